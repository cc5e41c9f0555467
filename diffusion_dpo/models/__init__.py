"""Model families behind one interface: what the training loop needs of a diffusion model, and nothing else."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import Plugin

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor


class DiffusionModel(Plugin):
    """A model to tune (`model.type`): its fields are settings; `load` returns the live model."""

    def load(self, *, device: "torch.device", dtype: "torch.dtype") -> "LoadedModel":
        """Load the weights; `dtype` is that of the frozen parts. Raises ConfigError when they cannot be had."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return a hash of the weights that encode images and prompts; the key of the latent cache."""
        raise NotImplementedError


class LoadedModel:
    """A live model. Images are float [-1, 1] of shape (B, 3, H, W); latents are scaled, of shape (B, C, h, w)."""

    resolution_px: int
    """The side that the model was made for."""
    pipeline: "DiffusionPipeline"
    """The same weights as a pipeline, for previews."""

    def encode_images(self, images: "Tensor", noise: "Tensor") -> "Tensor":
        """Return scaled latents, float32; `noise` (B, C, h, w) samples the VAE's posterior."""
        raise NotImplementedError

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, "Tensor"]:
        """Return the conditioning of each prompt, every tensor with a leading dimension of len(prompts)."""
        raise NotImplementedError

    def sample_timesteps(self, uniform: "Tensor") -> "Tensor":
        """Map numbers of [0, 1) of shape (B,) to timesteps, int64 of shape (B,)."""
        raise NotImplementedError

    def log_snr(self, timesteps: "Tensor") -> "Tensor":
        """Return log(alpha_t^2 / sigma_t^2), float32 of shape (B,)."""
        raise NotImplementedError

    def add_noise(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Return the noisy latents x_t."""
        raise NotImplementedError

    def target(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Return what the denoiser should predict: epsilon or v, by the model's own parameterisation."""
        raise NotImplementedError

    def predict(self, noisy_latents: "Tensor", timesteps: "Tensor", conditioning: dict[str, "Tensor"]) -> "Tensor":
        """Return the denoiser's prediction, same shape as `noisy_latents`."""
        raise NotImplementedError

    def reference(self) -> AbstractContextManager[None]:
        """Within it, `predict` is the frozen reference. Backward never runs inside."""
        raise NotImplementedError

    def trainable(self) -> dict[str, "torch.nn.Parameter"]:
        """Return the parameters that are trained, by name, float32."""
        raise NotImplementedError

    def release_encoders(self) -> None:
        """Free what only encodes (VAE, text encoder) unless previews need it."""

    def save(self, run_dir: Path, metadata: dict[str, Any]) -> Path:
        """Write the adapter (or the full denoiser) in the layout that diffusers loads; return its folder."""
        raise NotImplementedError
