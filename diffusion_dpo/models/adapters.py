"""Adapters of a pipeline: where they lie, what they are, and how they get onto it."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.lora_file import PEFT_FILE, place, read_lora, recognise, settings_beside
from diffusion_dpo.models.lora_layers import parts_of, put_on
from diffusion_dpo.models.lora_write import LORA_FILE
from diffusion_dpo.models.pipeline import first_sentence
from diffusion_dpo.models.safetensors_file import read_facts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel

AdapterKind = Literal["lora", "unet"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INTERFACE = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type")
"""What a UNet must share with the one that it replaces."""


def locate_adapter(path: Path) -> tuple[AdapterKind, Path]:
    """Return what adapter a path holds, and where, without a look into it.

    A LoRA file or a folder that holds one, a `unet/` folder, or a run folder. Raises ConfigError when it holds none.
    """
    if path.is_file():
        return "lora", path
    if (path / "model_index.json").is_file():
        raise ConfigError(
            f"{path} is a whole pipeline, not an adapter; give it as pretrained, without an adapter_path"
        )
    for folder in (path / "adapter", path):
        for name in (LORA_FILE, PEFT_FILE):
            if (folder / name).is_file():
                return "lora", folder / name
    for folder in (path / "unet", path):
        if (folder / "config.json").is_file():
            return "unet", folder
    if not path.exists():
        raise ConfigError(
            f"{path} does not exist; it should hold {LORA_FILE} (a LoRA) or unet/config.json (a full UNet)"
        )
    files = sorted(file for file in path.iterdir() if file.suffix == ".safetensors" and file.is_file())
    if len(files) == 1:
        return "lora", files[0]
    if files:
        names = ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")
        raise ConfigError(f"{path} holds {len(files)} .safetensors files: {names}; name one of them")
    for file in sorted(file for file in path.iterdir() if file.suffix in _PICKLES and file.is_file()):
        read_facts(file)  # which says that it is a pickle, and what helps
    raise ConfigError(f"{path} holds neither {LORA_FILE} (a LoRA) nor unet/config.json (a full UNet)")


def find_adapter(path: Path) -> tuple[AdapterKind, Path]:
    """Return what adapter a path holds, and where; raises ConfigError when it holds none that can be used here.

    Of a LoRA only the header is read, so that a file of another kind is named before gigabytes are loaded.
    """
    kind, where = locate_adapter(path)
    if kind == "lora":
        recognise(where)
    return kind, where


def adapter_files(path: Path) -> list[Path]:
    """Return the files and folders that an adapter's weights and strength are in."""
    kind, where = locate_adapter(path)
    beside = settings_beside(where) if kind == "lora" else None
    return [where] if beside is None else [where, beside]


def add_adapter(
    pipeline: "DiffusionPipeline", path: Path, *, name: str = "adapter", scale: float = 1.0
) -> AdapterKind:
    """Put an adapter on a pipeline, in evaluation mode; return its kind.

    A LoRA stays beside the weights, in float32, as the peft adapter `name`, `scale` times as strong as it was trained;
    a full UNet comes in float32. Raises ConfigError when the adapter is missing, cannot be read or does not fit.
    """
    kind, where = find_adapter(path)
    if kind == "unet":
        replace_unet(pipeline, where)
    else:
        lora, models = read_lora(where), parts_of(pipeline)
        put_on(models, place(lora, models), name, scale=scale)
    return kind


def refuse_other_interface(unet: "UNet2DConditionModel", other: "UNet2DConditionModel", name: str) -> None:
    """Raise ConfigError where a UNet cannot stand in the place of another one; `name` says which it is."""
    for key in INTERFACE:
        if unet.config[key] != other.config[key]:
            raise ConfigError(
                f"the UNet {name} does not fit this model: its {key} is {unet.config[key]}, not {other.config[key]}; "
                "was it trained on another family?"
            )


def replace_unet(pipeline: "DiffusionPipeline", folder: Path) -> None:
    """Put a whole UNet in the place of a pipeline's, in float32; raises ConfigError when it cannot be read or used."""
    import torch
    from safetensors import SafetensorError

    try:
        unet = type(pipeline.unet).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"cannot load the UNet {folder}: {first_sentence(error)}") from error
    refuse_other_interface(unet, pipeline.unet, str(folder))
    pipeline.register_modules(unet=unet.to(pipeline.device, memory_format=torch.channels_last).eval())
