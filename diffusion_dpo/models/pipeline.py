"""Loading a diffusers pipeline from a folder or the hub: safetensors only, and one sentence when it cannot be had."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

POCKET_DIR = Path(__file__).parents[1] / "pocket" / "weights" / "stable-diffusion"
_XL = "StableDiffusionXLPipeline"
FAMILIES = {"StableDiffusionPipeline": "stable_diffusion", _XL: "stable_diffusion_xl"}
"""The pipelines that are understood here, and the `model.type` that trains each."""


def load_base(
    pretrained: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    device: "torch.device",
    dtype: "torch.dtype",
    unet_dtype: "torch.dtype | None" = None,
) -> "DiffusionPipeline":
    """Load a pipeline in evaluation mode, convolutions in channels_last; `pocket` is the packaged model.

    The UNet may have a dtype of its own. A VAE that overflows in float16 stays in float32: SDXL's own says so
    (force_upcast); in the older families the same entry is a default that nobody heeds. The safety checker is left
    out: a judged or compared image must be what the model drew. Raises ConfigError when the model cannot be had.
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
        is_xl = DiffusionPipeline.load_config(source, revision=revision).get("_class_name") == _XL
        overflows = is_xl and dtype == torch.float16 and _vae_overflows(source, revision)
        checker = {} if is_xl else {"safety_checker": None, "requires_safety_checker": False}
        pipeline = DiffusionPipeline.from_pretrained(
            source,
            revision=revision,
            variant=variant,
            dtype={"default": dtype, "unet": unet_dtype or dtype, "vae": torch.float32 if overflows else dtype},
            use_safetensors=True,
            **checker,
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


def _vae_overflows(source: str, revision: str | None) -> bool:
    """Whether the VAE of an SDXL pipeline cannot be run in float16."""
    from diffusers import AutoencoderKL

    return bool(AutoencoderKL.load_config(source, subfolder="vae", revision=revision).get("force_upcast", True))


def require_family(name: str, pipeline: "DiffusionPipeline", wanted: str | None = None) -> None:
    """Raise ConfigError unless a pipeline draws from prompts alone, and is a `wanted` (None: of any family here).

    Refused are those that look alike but are fed otherwise: refiners, inpainting, editing, video.
    """
    kind = type(pipeline).__name__
    if kind not in FAMILIES:
        needed = " or ".join(FAMILIES)
        raise ConfigError(
            f"{name} is a {kind}: a refiner, an inpainting or another model? A {needed}, from which model.type "
            f"{' or '.join(FAMILIES.values())} trains, is needed here"
        )
    if wanted is not None and kind != wanted:
        raise ConfigError(f"{name} is a {kind}, which model.type={FAMILIES[kind]} trains, not {FAMILIES[wanted]}")
    channels, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latents:
        raise ConfigError(
            f"the UNet of {name} takes {channels} channels, not {latents}: an inpainting or editing model?"
        )
    if pipeline.vae.config.latents_mean is not None:
        raise ConfigError(
            f"the VAE of {name} normalizes its latents in a way of its own (latents_mean); models on it are not known"
        )


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a part without where it came from and which version read it."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}


def content_hash(settings: object, *modules: "torch.nn.Module") -> str:
    """Hash settings and the weights themselves: an edited model in the same folder is another model."""
    import torch

    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
