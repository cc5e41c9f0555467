"""Loading a diffusers pipeline from a folder or the hub: safetensors only, and one sentence when it cannot be had."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.models.base import POCKET_DIR as POCKET_DIR
from diffusion_dpo.models.base import choose_variants, read_base
from diffusion_dpo.models.base_facts import BaseFacts
from diffusion_dpo.models.base_facts import first_sentence as first_sentence
from diffusion_dpo.models.checkpoint_file import load_checkpoint
from diffusion_dpo.models.quiet import hush_cuts, quiet
from diffusion_dpo.models.requirements import require_drawable

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def load_base(
    pretrained: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    device: "torch.device",
    dtype: "torch.dtype",
    prediction_type: str | None = None,
) -> "DiffusionPipeline":
    """Load a pipeline that draws from prompts, by its name; see `load_facts`. `pocket` is the packaged model."""
    base = read_base(pretrained, revision=revision, variant=variant, prediction_type=prediction_type)
    require_drawable(base)
    return load_facts(base, revision=revision, device=device, dtype=dtype)


def load_facts(
    base: BaseFacts,
    *,
    revision: str | None = None,
    device: "torch.device",
    dtype: "torch.dtype",
    unet_dtype: "torch.dtype | None" = None,
) -> "DiffusionPipeline":
    """Load a pipeline in evaluation mode, convolutions in channels_last.

    The UNet may have a dtype of its own. A VAE that overflows in float16 stays in float32: SDXL's own says so
    (force_upcast); in the older families the same entry is a default that nobody heeds. The safety checker is left
    out: a judged or compared image must be what the model drew; and with it what only serves it or image prompts.
    Raises ConfigError when the model cannot be had.
    """
    import diffusers.utils.logging
    import torch
    import transformers.utils.logging
    from safetensors import SafetensorError

    for note in base.notes:
        say(note)
    overflows = base.is_xl and dtype == torch.float16 and base.vae.get("force_upcast", True)
    dtypes = {"unet": unet_dtype or dtype, "vae": torch.float32 if overflows else dtype}
    every = {part: dtypes.get(part, dtype) for part in ("unet", "vae", *base.texts)}
    diffusers.utils.logging.disable_progress_bar()  # ours say more, and theirs break them
    transformers.utils.logging.disable_progress_bar()
    hush_cuts()
    try:
        with quiet():
            pipeline = _assemble(base, revision, every)
    except (OSError, ValueError, AttributeError, ImportError, RuntimeError, TypeError, SafetensorError) as error:
        raise ConfigError(_explain(base, error)) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def _assemble(base: BaseFacts, revision: str | None, dtypes: "Mapping[str, torch.dtype]") -> "DiffusionPipeline":
    """Load part by part: diffusers' own loader insists on an image encoder that the index names, though unused."""
    import diffusers
    import transformers

    if base.file is not None:
        return _pipeline_of(base, load_checkpoint(base, dtypes))
    folder = base.source
    if not Path(folder).is_dir():
        folder = diffusers.DiffusionPipeline.download(
            folder, revision=revision, variant=base.variant, use_safetensors=True, safety_checker=None
        )
    variants = choose_variants(base.name, Path(folder), list(dtypes), base.variant)
    parts: dict[str, Any] = {}
    for part, dtype in dtypes.items():
        named = base.text_classes.get(part)
        kind: Any = getattr(transformers, named) if named else getattr(diffusers, base.part_class(part))
        parts[part] = kind.from_pretrained(
            folder, subfolder=part, variant=variants[part], dtype=dtype, use_safetensors=True
        )
    for text in base.texts:
        tokenizer = text.replace("text_encoder", "tokenizer")
        parts[tokenizer] = transformers.CLIPTokenizer.from_pretrained(folder, subfolder=tokenizer)
    return _pipeline_of(base, parts)


def _pipeline_of(base: BaseFacts, parts: dict[str, Any]) -> "DiffusionPipeline":
    import diffusers

    parts["scheduler"] = getattr(diffusers, base.scheduler_class).from_config(dict(base.scheduler))
    if not base.is_xl:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline: DiffusionPipeline = getattr(diffusers, base.pipeline_name)(**parts, **base.options)
    return pipeline


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


def _explain(base: BaseFacts, error: Exception) -> str:
    if Path(base.source).exists():
        return f"cannot load the pipeline {base.name}: {first_sentence(error)}"
    text = f"cannot load {base.name!r} from the hub: {first_sentence(error)}"
    if "no file named" in text.lower():
        text += ". If it has a variant of its weights alone, name it, such as variant=fp16"
    return text
