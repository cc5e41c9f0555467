"""Model families behind one interface: what the training loop needs of a diffusion model, and nothing else."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from diffusion_dpo.config import Plugin
from diffusion_dpo.settings import PredictionType

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor


class DiffusionModel(Plugin):
    """A model to tune (`model.type`): its fields are settings; `load` returns the live model."""

    def load(self, *, device: "torch.device", dtype: "torch.dtype", seed: int) -> "LoadedModel":
        """Load the weights and add what is trained, initialised from `seed`.

        `dtype` is that of the frozen parts and of the autocast; trained weights are float32. Raises ConfigError when
        the weights cannot be had.
        """
        raise NotImplementedError

    def usage(self, adapter: str) -> str:
        """Return Python that loads the result of training, the folder `adapter`, with plain diffusers; "" if unknown.

        For the model card: the last line leaves a pipeline called `pipe`.
        """
        return ""


class LoadedModel(Protocol):
    """A live model. Images are float [-1, 1] of shape (B, 3, H, W); latents are scaled, float32, (B, C, h, w)."""

    device: "torch.device"
    prediction_type: PredictionType
    """What the denoiser predicts: the noise, v = alpha_t epsilon - sigma_t x_0, or the latents x_0."""
    base_hash: str
    """Hash of what the reference computes: the weights that training starts from, and the noise schedule."""
    encoder_hash: str
    """Hash of all that encodes images and prompts, weights and settings: the key of the latent cache."""
    reference_needs_copy: bool = False
    """Whether `reference()` follows the policy until `freeze_copy` is called."""
    original_lost: str = ""
    """Why nothing can be measured from the pretrained model, "" where it can: see `original`."""
    pipeline: "DiffusionPipeline"
    """The same weights as a pipeline, for previews."""

    @property
    def resolution_px(self) -> int:
        """The side that the model was made for."""

    @property
    def latent_channels(self) -> int:
        """C of the latents."""

    @property
    def downscale(self) -> int:
        """Pixels per latent element along one side."""

    def encode_images(self, images: "Tensor", noise: "Tensor") -> "Tensor":
        """Return scaled latents, float32; `noise` (B, C, h, w) samples the VAE's posterior."""

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, "Tensor"]:
        """Return the conditioning, float32, every tensor with a leading dimension of len(prompts)."""

    def image_conditioning(self, sizes: "Tensor") -> dict[str, "Tensor"]:
        """Return what the denoiser is told about each image, float32, every tensor with a leading dimension of N.

        `sizes` is int64 (N, 6), in px: height and width of the original; top and left of the crop, after scaling;
        height and width of the image that is trained on. A model that is told nothing returns {}.
        """
        return {}

    def sample_timesteps(self, uniform: "Tensor", num_timesteps: int | None = None) -> "Tensor":
        """Map numbers of [0, 1) of shape (B,) to timesteps, int64 of shape (B,): all of them evenly.

        With `num_timesteps`, to so many evenly spaced ones, the last of which is the noisiest of all.
        """

    def log_snr(self, timesteps: "Tensor") -> "Tensor":
        """Return log(alpha_t^2 / sigma_t^2), float32 of shape (B,)."""

    def add_noise(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Return the noisy latents x_t."""

    def target(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Return what the denoiser should predict, by its `prediction_type`."""

    def predict(self, noisy_latents: "Tensor", timesteps: "Tensor", conditioning: dict[str, "Tensor"]) -> "Tensor":
        """Return the denoiser's prediction, float32, same shape as `noisy_latents`.

        `conditioning` is what encode_prompts and image_conditioning return, with one row for each of the latents.
        """

    def reference(self) -> AbstractContextManager[None]:
        """Within it, `predict` is the reference and records no gradient. Backward never runs inside.

        The reference is the frozen copy, where there is one. Without, it is the model with the trained adapter left
        out, or, where the whole denoiser is trained, the denoiser as it is: right before the first step only.
        """

    def original(self) -> AbstractContextManager[None] | None:
        """Within it, `predict` is the pretrained model without the adapter that training starts from, and no gradient.

        None where the two are one, and where such a start cannot be left out, which `original_lost` explains.
        """
        return None

    def freeze_copy(self) -> None:
        """Let the reference be a copy of the weights, frozen as they are now (without the trained adapter).

        Policy and copy compute the same, bit for bit, until the policy moves. Call it before `compile` and
        `wrap_policy`.
        """

    def trainable(self) -> dict[str, "torch.nn.Parameter"]:
        """Return the parameters that are trained, by name, float32."""

    def wrap_policy(self, wrap: "Callable[[torch.nn.Module], torch.nn.Module]") -> None:
        """Let the policy predict through `wrap(denoiser)`, such as DistributedDataParallel.

        What is trained, what is saved and the reference go on being the bare denoiser's.
        """

    def compile(self) -> None:
        """Compile the denoiser's repeated blocks, when they first run. Predictions change by rounding only.

        An error of the compiler is raised as ConfigError, by `predict`.
        """

    def enable_gradient_checkpointing(self, *, selective: bool) -> None:
        """Recompute activations in the backward pass: all, or only those of the outer blocks, of high resolution."""

    def save(self, run_dir: Path) -> Path:
        """Write the policy as diffusers loads it, `adapter/` (on the pretrained model) or the full `unet/`.

        Return that folder, which lies in `run_dir`. What training started from is part of what is written.
        """
