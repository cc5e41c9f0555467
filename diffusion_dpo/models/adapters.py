"""Adapters of a UNet: where they lie, how they get onto a pipeline, how one is left out, how several become one.

A LoRA (arXiv 2106.09685) adds s B A to the weight of a layer, of rank r and with s = alpha / r. Several add up.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import warn
from diffusion_dpo.models.pipeline import first_sentence
from diffusion_dpo.models.quiet import quiet as quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    from peft.tuners.lora import LoraLayer
    from torch import Tensor

AdapterKind = Literal["lora", "unet"]

LORA_FILE = "pytorch_lora_weights.safetensors"
_INTERFACE = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type")
"""What a UNet must share with the one that it replaces."""


def find_adapter(path: Path) -> tuple[AdapterKind, Path]:
    """Return what adapter a path holds, and where: a LoRA folder or file, a `unet/` folder, or a run folder.

    Raises ConfigError when it holds none.
    """
    for folder in (path / "adapter", path):
        if (folder / LORA_FILE).exists():
            return "lora", folder / LORA_FILE
    for folder in (path / "unet", path):
        if (folder / "config.json").exists():
            return "unet", folder
    if path.is_file() and path.suffix == ".safetensors":
        return "lora", path
    what = "holds neither" if path.exists() else "does not exist; it should hold either"
    either = "nor" if path.exists() else "or"
    raise ConfigError(f"{path} {what} {LORA_FILE} (a LoRA) {either} unet/config.json (a full UNet)")


def add_adapter(
    pipeline: "DiffusionPipeline", path: Path, *, name: str = "adapter", scale: float = 1.0, unet_only: bool = False
) -> AdapterKind:
    """Put an adapter on a pipeline, in evaluation mode; return its kind.

    A LoRA stays beside the weights of the UNet, in float32, as the peft adapter `name`, `scale` times as strong as it
    was trained; a full UNet comes in float32. Added into half-precision weights, most of a small update would be
    rounded away. With `unet_only`, what a LoRA has for the text encoders is left out, with a warning, and of the rest
    only products B A are accepted (no DoRA, no biases). Raises ConfigError when the adapter is missing, cannot be
    read or does not fit the pipeline's UNet.
    """
    kind, where = find_adapter(path)
    if kind == "unet":
        _replace_unet(pipeline, where)
    else:
        _load_lora(pipeline, where, name, unet_only=unet_only)
        pipeline.set_adapters(name, scale)
    return kind


def lora_layers(unet: "UNet2DConditionModel") -> dict[str, "LoraLayer"]:
    """Return the layers that carry LoRAs, by name, in the order of the UNet."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def train_only(unet: "UNet2DConditionModel", name: str, *, beside: Sequence[str] = ()) -> None:
    """Let the UNet add up the LoRAs `beside` and then the LoRA `name`, and only the last be trained, in float32."""
    import torch
    from diffusers.training_utils import cast_training_params

    unet.set_adapters([*beside, name])
    for parameter_name, parameter in unet.named_parameters():
        parameter.requires_grad_(f".{name}." in parameter_name)
    cast_training_params(unet, dtype=torch.float32)


@contextmanager
def left_out(layers: Sequence["LoraLayer"], name: str) -> Iterator[None]:
    """Within it, the layers compute as if they had no LoRA `name`; those beside it stay.

    peft's own switches (set_adapter, disable_adapters) also change which weights require a gradient.
    """
    active = [layer.active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [other for other in layer.active_adapters if other != name]
        yield
    finally:
        for layer, before in zip(layers, active, strict=True):
            layer._active_adapter = before


def merge(unet: "UNet2DConditionModel") -> None:
    """Add the active LoRAs into the weights of a float32 UNet, which is a plain UNet afterwards."""
    unet.fuse_lora()
    unet.unload_lora()


def remove(unet: "UNet2DConditionModel", name: str) -> None:
    """Take the LoRA `name` off a UNet; those beside it stay, frozen, and without any it is a plain UNet again."""
    beside = [other for other in unet.active_adapters() if other != name]
    if beside:
        unet.delete_adapters(name)
        unet.set_adapters(beside)
        unet.requires_grad_(False)
    else:
        unet.unload_lora()


def one_lora(unet: "UNet2DConditionModel") -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Return one LoRA that computes what the active ones do together: its weights by peft's names, and its settings.

    A single LoRA is returned as it is. Of several the ranks add up, layer by layer, and the scales go into B:
    sum_i s_i B_i A_i = [s_1 B_1 ... s_n B_n] [A_1; ...; A_n], so that alpha is the rank.
    """
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    names = unet.active_adapters()
    if len(names) == 1:
        alone = get_peft_model_state_dict(unet, adapter_name=names[0])
        return {key: value.contiguous() for key, value in alone.items()}, unet.peft_config[names[0]].to_dict()
    weights, ranks = {}, {}
    for path, layer in lora_layers(unet).items():
        here = [name for name in names if name in layer.lora_A]
        # convolutions too: A is (r, in, k, k), B is (out, r, 1, 1)
        down = torch.cat([layer.lora_A[name].weight.detach() for name in here], dim=0)
        up = torch.cat([layer.scaling[name] * layer.lora_B[name].weight.detach() for name in here], dim=1)
        weights[f"{path}.lora_A.weight"], weights[f"{path}.lora_B.weight"] = down.contiguous(), up.contiguous()
        ranks[path] = len(down)
    rank, _ = Counter(ranks.values()).most_common(1)[0]
    others = {f"^{path}": other for path, other in ranks.items() if other != rank}
    config = LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=others, alpha_pattern=dict(others), target_modules=list(ranks)
    )
    return weights, config.to_dict()


def refuse_other_interface(unet: "UNet2DConditionModel", other: "UNet2DConditionModel", name: str) -> None:
    """Raise ConfigError where a UNet cannot stand in the place of another one; `name` says which it is."""
    for key in _INTERFACE:
        if unet.config[key] != other.config[key]:
            raise ConfigError(
                f"the UNet {name} does not fit this model: its {key} is {unet.config[key]}, not {other.config[key]}; "
                "was it trained on another family?"
            )


def _replace_unet(pipeline: "DiffusionPipeline", folder: Path) -> None:
    import torch
    from safetensors import SafetensorError

    try:
        unet = type(pipeline.unet).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"cannot load the UNet {folder}: {first_sentence(error)}") from error
    refuse_other_interface(unet, pipeline.unet, str(folder))
    pipeline.register_modules(unet=unet.to(pipeline.device, memory_format=torch.channels_last).eval())


def _load_lora(pipeline: "DiffusionPipeline", file: Path, name: str, *, unet_only: bool) -> None:
    weights, alphas, metadata = _read_lora(pipeline, file)
    misfit = f"the LoRA {file} does not fit this model"
    parts = {key.partition(".")[0] for key in weights}
    if not parts or not parts <= pipeline.components.keys():
        raise ConfigError(f"{misfit}: its weights are for {', '.join(sorted(parts)) or 'nothing'}")
    if unet_only:
        _require_plain(file, weights)
        if parts != {"unet"}:
            warn(f"only the UNet's part of the LoRA {file} is used, not {', '.join(sorted(parts - {'unet'}))}")
        parts = {"unet"}
    loading = {"adapter_name": name, "metadata": metadata, "_pipeline": pipeline}
    try:
        with quiet():
            for part in sorted(parts):
                model = getattr(pipeline, part)
                if part == "unet":
                    pipeline.load_lora_into_unet(weights, alphas, model, **loading)
                else:
                    pipeline.load_lora_into_text_encoder(weights, alphas, model, prefix=part, **loading)
                model.eval()  # the new layers too: a LoRA may bring dropout
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{misfit}; was it trained on another family? {first_sentence(error)}") from error
    if "unet" in parts and (alone := _restore_float32(pipeline.unet, name, weights)):
        raise ConfigError(
            f"{misfit}: {len(alone)} weights have no counterpart, e.g. {alone[0]}; was it trained on another family?"
        )


def _read_lora(
    pipeline: "DiffusionPipeline", file: Path
) -> tuple[dict[str, "Tensor"], dict[str, float] | None, dict[str, Any] | None]:
    """Read a LoRA file: weights by part and peft's names ("unet.mid_block..."), kohya's alphas, peft's settings."""
    from diffusers.utils import convert_unet_state_dict_to_peft
    from safetensors import SafetensorError

    try:
        weights, alphas, metadata = pipeline.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=True,
            local_files_only=True,
            unet_config=pipeline.unet.config,
            return_lora_metadata=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"cannot read the LoRA {file}: {first_sentence(error)}") from error
    if not all("lora" in key for key in weights):
        raise ConfigError(f"{file} holds weights that are no LoRA, {next(k for k in weights if 'lora' not in k)}")
    # diffusers looks at the first name only to tell which of two spellings a file has; some files mix them
    unet = convert_unet_state_dict_to_peft({key: value for key, value in weights.items() if key.startswith("unet.")})
    return {key: value for key, value in weights.items() if not key.startswith("unet.")} | unet, alphas, metadata


def _require_plain(file: Path, weights: dict[str, "Tensor"]) -> None:
    unet = [key for key in weights if key.startswith("unet.")]
    if not unet:
        raise ConfigError(f"the LoRA {file} has nothing for the UNet, which is what is trained")
    for key in unet:
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ConfigError(
                f"the LoRA {file} holds {key}; training starts from plain LoRAs, not from DoRA or biases"
            )


def _restore_float32(unet: "UNet2DConditionModel", name: str, weights: dict[str, "Tensor"]) -> list[str]:
    """Undo the rounding to the UNet's precision of a LoRA that was loaded.

    Return the names of what only the file has, which found no layer, and of what only the UNet has, left at random.
    """
    import torch

    loaded = {
        key.replace(f".{name}.", "."): parameter for key, parameter in unet.named_parameters() if f".{name}." in key
    }
    read = {key.removeprefix("unet."): value for key, value in weights.items() if key.startswith("unet.")}
    for key in loaded.keys() & read.keys():
        loaded[key].data = read[key].to(loaded[key].device, torch.float32)
    return sorted(key for key in loaded.keys() ^ read.keys() if ".lora_A." in key or ".lora_B." in key)
