"""The facts of a base model that loading, training, drawing and memory estimates go by."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError

XL = "StableDiffusionXLPipeline"
FAMILIES = {"StableDiffusionPipeline": "stable_diffusion", XL: "stable_diffusion_xl"}
"""The pipelines that are understood here, and the `model.type` that trains each."""


@dataclass(frozen=True)
class BaseFacts:
    """A pipeline as its settings describe it; the defaults of diffusers' classes are filled in."""

    name: str
    """As it was given: a folder, a file, a hub id or `pocket`."""
    source: str
    """The folder or hub id that diffusers loads, or the file."""
    pipeline_name: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    vae_class: str
    scheduler: Mapping[str, Any]
    scheduler_class: str
    texts: Mapping[str, Mapping[str, Any]]
    """The settings of the text encoders, by their names in the pipeline."""
    text_classes: Mapping[str, str]
    options: Mapping[str, Any]
    """The pipeline's own settings."""
    tokenizers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Vocabularies that a checkpoint's header spells out, by text encoder."""
    file: Path | None = None
    """The single-file checkpoint, where it is one."""
    variant: str | None = None
    """Of the weight files, as it was asked for."""
    notes: tuple[str, ...] = ()
    """Sentences on what was taken without being asked for, to be said when the weights are loaded."""

    @property
    def is_xl(self) -> bool:
        """Whether it is an SDXL."""
        return self.pipeline_name == XL

    def part_class(self, part: str) -> str:
        """Return the class of diffusers that the UNet or the VAE is of."""
        return self.vae_class if part == "vae" else "UNet2DConditionModel"

    @property
    def downscale(self) -> int:
        """Pixels per latent element along one side."""
        return int(2 ** (len(self.vae.get("block_out_channels") or self.vae["encoder_block_out_channels"]) - 1))


def with_defaults(class_name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of a diffusers class, which a file of an older version need not name."""
    import diffusers

    kind = getattr(diffusers, class_name, None)
    if not isinstance(kind, type):
        return dict(settings)
    parameters = inspect.signature(kind).parameters.values()
    return {it.name: it.default for it in parameters if it.default is not inspect.Parameter.empty} | dict(settings)


def native_side_px(sample_size: Any, downscale: int) -> int | None:
    """Return the side in px that a UNet was made for; None where its `sample_size` is null or no square."""
    sizes = set(sample_size) if isinstance(sample_size, list | tuple) else {sample_size}
    (size,) = sizes if len(sizes) == 1 else (None,)
    return None if size is None else int(size) * downscale


def require_side_px(sample_size: Any, downscale: int) -> int:
    """Return the side in px that a UNet was made for; raises ConfigError where it does not say."""
    side = native_side_px(sample_size, downscale)
    if side is None:
        raise ConfigError(
            f"the model does not say one side of its images (sample_size is {sample_size}): set resolution_px"
        )
    return side


def first_sentence(error: Exception) -> str:
    """Return an error's text on one line, shortened, without a final stop."""
    return " ".join(str(error).split())[:300].rstrip(".")
