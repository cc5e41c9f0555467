"""Denoising errors: the one place where noise, timesteps and the images of an example meet.

Notation of Diffusion-DPO (arXiv 2311.12908): the chosen image is x^w, the rejected one x^l. Both are noised with the
same (t, epsilon), which cancels most of the variance of their difference; equation 14 writes two draws, its authors'
code shares one, and with two the optimum is another (tests/training/test_analytic_optimum.py).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self

from diffusion_dpo.losses import ImageErrors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffusion_dpo.models import LoadedModel


@dataclass(frozen=True)
class Batch:
    """B examples of K images each; float32 unless said."""

    latents: "Tensor"
    """(B, K, C, h, w), chosen before rejected, best before worst."""
    noise: "Tensor"
    """(B, C, h, w): one draw an example."""
    timesteps: "Tensor"
    """(B,) int64: one draw an example."""
    conditioning: Mapping[str, "Tensor"]
    """Of the examples' prompts, leading dimension B."""
    labels: "Tensor"
    """(B, K), as in ImageErrors."""
    weights: "Tensor"
    """(B,): of the examples in the mean; they average 1 over the data."""
    masks: "Tensor | None" = None
    """(B, K, 1, h, w), mean 1 per image: how much each position counts; None: all alike."""
    scores: "Tensor | None" = None
    """(B, K), as in ImageErrors."""

    def to(self, device: "torch.device") -> Self:
        """Return the batch on another device."""
        conditioning = {name: value.to(device) for name, value in self.conditioning.items()}
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "conditioning"}
        moved = {name: value.to(device) for name, value in tensors.items() if value is not None}
        return replace(self, conditioning=conditioning, **moved)


def denoising_errors(
    model: "LoadedModel",
    batch: Batch,
    *,
    reference: "Callable[[], AbstractContextManager[None]] | None",
    reference_prediction: "Tensor | None" = None,
    baseline: float = 0.0,
) -> ImageErrors:
    """Return mean squared errors per image, float32, of policy and (without gradient) reference.

    Within `reference()`, `model.predict` is the reference; None skips that forward. Where the reference's predictions
    are known already (`reference_prediction`), they are taken instead.
    """
    noisy_latents, timesteps, conditioning, target = add_shared_noise(model, batch)
    if reference_prediction is None and reference is not None:
        with reference():
            reference_prediction = model.predict(noisy_latents, timesteps, conditioning)
    prediction = model.predict(noisy_latents, timesteps, conditioning)
    size = len(batch.noise)
    masks = None if batch.masks is None else batch.masks.transpose(0, 1).flatten(0, 1)
    residual = prediction - target
    reference_errors = drift = cross = None
    if reference_prediction is not None:
        reference_errors = masked_mean((reference_prediction - target).square(), masks).view(-1, size).T
        drift = masked_mean((prediction - reference_prediction).square(), None).view(-1, size).T
    if batch.latents.shape[1] == 2:
        chosen, rejected = residual.detach().chunk(2)
        cross = masked_mean(chosen * rejected, None if masks is None else masks[:size])
    return ImageErrors(
        policy=masked_mean(residual.square(), masks).view(-1, size).T,
        reference=reference_errors,
        drift=drift,
        cross=cross,
        timesteps=batch.timesteps,
        log_snr=model.log_snr(batch.timesteps),
        previous_log_snr=model.log_snr((batch.timesteps - 1).clamp(min=0)),
        labels=batch.labels,
        scores=batch.scores,
        baseline=baseline,
    )


def add_shared_noise(model: "LoadedModel", batch: Batch) -> "tuple[Tensor, Tensor, dict[str, Tensor], Tensor]":
    """Return noisy latents, timesteps, conditioning and target of all images, leading dimension K times B.

    The K images of an example get the same noise and timestep. They go through the denoiser as one batch, in the order
    of `latents`' columns: for pairs, all chosen ones and then all rejected ones.
    """
    num_images = batch.latents.shape[1]
    latents = batch.latents.transpose(0, 1).flatten(0, 1)
    noise, timesteps = shared(batch.noise, num_images), shared(batch.timesteps, num_images)
    conditioning = {name: shared(value, num_images) for name, value in batch.conditioning.items()}
    conditioning |= model.image_conditioning(_whole_squares(latents, model.downscale))
    noisy_latents = model.add_noise(latents, noise, timesteps)
    return noisy_latents, timesteps, conditioning, model.target(latents, noise, timesteps)


def _whole_squares(latents: "Tensor", downscale: int) -> "Tensor":
    """Return the sizes of images that were not cropped, (N, 6) as in LoadedModel.image_conditioning."""
    import torch

    height, width = (side * downscale for side in latents.shape[2:])
    return torch.tensor([[height, width, 0, 0, height, width]] * len(latents), device=latents.device)


def masked_mean(values: "Tensor", masks: "Tensor | None") -> "Tensor":
    """Return the means over the elements of each of (N, C, h, w), (N,), within masks (N, 1, h, w) of mean 1."""
    return (values if masks is None else values * masks).flatten(1).mean(1)


def shared(values: "Tensor", num_images: int) -> "Tensor":
    """Return what the images of an example have in common, (B, ...), for all of them: (K times B, ...)."""
    return values.repeat(num_images, *[1] * (values.ndim - 1))
