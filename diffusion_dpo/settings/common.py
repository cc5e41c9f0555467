"""What several verbs have settings for: a model that draws, how it draws, and where it computes."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from diffusion_dpo.config import Config

Precision = Literal["auto", "fp32", "fp16", "bf16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""What a denoiser predicts: the noise, v = alpha_t epsilon - sigma_t x_0, or the latents x_0."""


class ImageModel(Config):
    """A model that draws: a diffusers pipeline, optionally with an adapter on top."""

    pretrained: str = "pocket"
    """Folder or hub id of a diffusers pipeline, or a single-file checkpoint (.safetensors); `pocket` is the small
    model that comes with the package."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pin it for results that can be repeated."""
    variant: str | None = None
    """Variant of the weight files, e.g. fp16."""
    prediction_type: PredictionType | None = None
    """What the model predicts, where its files do not say it or say it wrongly; null takes what they say."""
    adapter_path: Path | None = None
    """LoRA folder or file, a `unet/` folder, or a run folder of `train`; null draws with the base alone."""
    adapter_scale: float = 1.0
    """Strength of the LoRA; 1 as trained, 0 none. Ignored for a full UNet."""


class Sampling(Config):
    """How images are drawn; the same for every model that is compared."""

    num_inference_steps: int = Field(20, ge=1)
    """Denoising steps per image."""
    guidance_scale: float = Field(1.5, ge=0)
    """Classifier-free guidance; 1 or less turns it off. 1.5 suits the pocket model, 7.5 Stable Diffusion 1.x."""
    negative_prompt: str = ""
    """What the guidance pushes away from."""
    resolution_px: int | None = Field(None, ge=32)
    """Side of the square images; null takes the model's own."""
    batch_size: int = Field(32, ge=1)
    """Images drawn at once; less needs less memory."""
