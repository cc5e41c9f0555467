"""Loading a diffusers pipeline from a folder or the hub: safetensors only, and one sentence when it cannot be had."""

from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_dpo.config import ConfigError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

POCKET_DIR = Path(__file__).parents[1] / "pocket" / "weights" / "stable-diffusion"


def load_base(
    pretrained: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    device: "torch.device",
    dtype: "torch.dtype | dict[str, torch.dtype]",
) -> "DiffusionPipeline":
    """Load a pipeline in evaluation mode, convolutions in channels_last; `pocket` is the packaged model.

    `dtype` may name the parts: {"unet": float32, "default": float16}. The safety checker is left out: a judged or
    compared image must be what the model drew. Raises ConfigError when the model cannot be had.
    """
    import diffusers.utils.logging
    import torch
    import transformers.utils.logging
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    diffusers.utils.logging.disable_progress_bar()  # ours say more, and theirs break them
    transformers.utils.logging.disable_progress_bar()
    source = str(POCKET_DIR) if pretrained == "pocket" else pretrained
    if pretrained == "pocket" and not (POCKET_DIR / "model_index.json").exists():
        raise ConfigError(f"the pocket model is not installed at {POCKET_DIR}; scripts/train_pocket.py makes it")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            source,
            revision=revision,
            variant=variant,
            dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(_explain(pretrained, error)) from error
    for name in ("unet", "vae"):
        if getattr(pipeline, name, None) is None:
            raise ConfigError(
                f"{pretrained} is a {type(pipeline).__name__} without a {name}; a UNet model is needed here"
            )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def first_sentence(error: Exception) -> str:
    """Return an error's text on one line, shortened, without a final stop."""
    return " ".join(str(error).split())[:300].rstrip(".")


def _explain(name: str, error: Exception) -> str:
    if Path(name).is_dir():
        if not (Path(name) / "model_index.json").exists():
            return f"{name} is no diffusers pipeline: it has no model_index.json"
        return f"cannot load the pipeline {name}: {first_sentence(error)}"
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return f"there is no folder {name}, and it is no hub id (owner/name)"
    return (
        f"cannot get {name!r} from the hub: {first_sentence(error)}. Check the name, the network and, for a gated "
        f"model, `hf auth login`; or give a local folder"
    )
