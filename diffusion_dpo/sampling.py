"""Images from prompts: one seed per (prompt, index), and the same noise for every model, device and batch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffusion_dpo.config import ConfigError
from diffusion_dpo.settings import ImageModel, Sampling

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

POCKET_DIR = Path(__file__).parent / "pocket" / "weights" / "stable-diffusion"
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class DrawRequest:
    """One image to draw."""

    prompt: str
    seed: int


def image_seed(base_seed: int, prompt_id: str, index: int) -> int:
    """Return the seed (63 bits) of the index-th image of a prompt; it does not depend on what else is drawn."""
    digest = hashlib.sha256(json.dumps([base_seed, prompt_id, index]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def pretrained_path(name: str) -> str:
    """Return the folder or hub id that `pretrained` stands for (`pocket` is the packaged model)."""
    if name != "pocket":
        return name
    if not (POCKET_DIR / "model_index.json").exists():
        raise ConfigError(f"the pocket model is not installed at {POCKET_DIR}; scripts/train_pocket.py makes it")
    return str(POCKET_DIR)


def load_pipeline(model: ImageModel, *, device: "torch.device", dtype: "torch.dtype") -> "DiffusionPipeline":
    """Load a diffusers pipeline, with its adapter if it has one. Safetensors only.

    The safety checker is left out: a judged or compared image must be what the model drew. Raises ConfigError when the
    model or the adapter cannot be had.
    """
    import torch
    from diffusers import DiffusionPipeline

    source = pretrained_path(model.pretrained)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            source,
            revision=model.revision,
            variant=model.variant,
            torch_dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(explain_missing_model(model.pretrained, error)) from error
    if model.adapter_path is not None:
        _add_adapter(pipeline, model.adapter_path, model.adapter_scale)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def explain_missing_model(name: str, error: Exception) -> str:
    """Say in one sentence why a pipeline could not be loaded, and what to do."""
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").exists():
            return f"{name} is no diffusers pipeline: it has no model_index.json"
        return f"cannot load the pipeline {name}: {_first_sentence(error)}"
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return f"there is no folder {name}, and it is no hub id (owner/name)"
    return (
        f"cannot get {name!r} from the hub: {_first_sentence(error)}. Check the name, the network and, for a gated model, "
        f"`hf auth login`; or give a local folder"
    )


def find_adapter(path: Path) -> tuple[Literal["lora", "unet"], Path]:
    """Return what kind of adapter a path holds, and where: a LoRA folder or file, a `unet/` folder, or a run folder."""
    for folder in (path / "adapter", path):
        if (folder / LORA_FILE).exists():
            return "lora", folder
    for folder in (path / "unet", path):
        if (folder / "config.json").exists():
            return "unet", folder
    if path.is_file() and path.suffix == ".safetensors":
        return "lora", path
    what = "holds neither" if path.exists() else "does not exist; expected"
    raise ConfigError(f"adapter_path {path} {what} {LORA_FILE} (a LoRA) nor unet/config.json (a full UNet)")


def _add_adapter(pipeline: "DiffusionPipeline", path: Path, scale: float) -> None:
    kind, where = find_adapter(path)
    try:
        if kind == "lora":
            pipeline.load_lora_weights(
                str(where.parent if where.is_file() else where),
                weight_name=where.name if where.is_file() else LORA_FILE,
            )
            pipeline.fuse_lora(lora_scale=scale)
            pipeline.unload_lora_weights()
        else:
            unet = type(pipeline.unet).from_pretrained(where, torch_dtype=pipeline.unet.dtype, use_safetensors=True)
            pipeline.register_modules(unet=unet)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot put the adapter {where} on this model: {_first_sentence(error)}") from error


def draw(pipeline: "DiffusionPipeline", requests: Sequence[DrawRequest], sampling: Sampling) -> list["Image"]:
    """Draw one batch of images (as many as are asked for; the caller keeps to `sampling.batch_size`).

    The initial noise of an image is drawn on the CPU in float32 from its own seed, so it is the same whatever the
    model, the device, the precision or the rest of the batch.
    """
    import torch

    side = resolution_px(pipeline, sampling.resolution_px)
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    shape = (pipeline.unet.config.in_channels, side // pipeline.vae_scale_factor, side // pipeline.vae_scale_factor)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    negative = [sampling.negative_prompt] * len(requests) if sampling.guidance_scale > 1 else None
    output = pipeline(
        [request.prompt for request in requests],
        negative_prompt=negative,
        height=side,
        width=side,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        latents=noise.to(pipeline.device, pipeline.unet.dtype),
        generator=generators,
    )
    return list(output.images)


def resolution_px(pipeline: "DiffusionPipeline", asked: int | None) -> int:
    """Return the side of the images in px; raises ConfigError when the model cannot draw that size."""
    side = asked or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if side % pipeline.vae_scale_factor:
        raise ConfigError(f"resolution_px is {side}; this model needs a multiple of {pipeline.vae_scale_factor}")
    return int(side)


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
