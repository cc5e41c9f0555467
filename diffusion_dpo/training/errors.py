"""Denoising errors: the one place where noise, timesteps and the images of an example meet.

Notation of Diffusion-DPO (arXiv 2311.12908): the chosen image is x^w, the rejected one x^l. Both are noised with the
same (t, epsilon), which cancels most of the variance of their difference; equation 14 writes two draws, its authors'
code shares one, and with two the optimum is another (tests/training/test_analytic_optimum.py).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self

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
    per_image: Mapping[str, "Tensor"] = field(default_factory=dict)
    """Conditioning of each image, (B, K, ...): what SDXL is told of its size and crop."""
    reference: "Tensor | None" = None
    """(B, K): the reference's errors, where they are known already."""

    def to(self, device: "torch.device") -> Self:
        """Return the batch on another device, without waiting for it where the memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Return the batch in memory that a GPU can read by itself; called by the DataLoader."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, function: "Callable[[Tensor], Tensor]") -> Self:
        changed: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Mapping):
                changed[part.name] = {name: function(tensor) for name, tensor in value.items()}
            elif value is not None:
                changed[part.name] = function(value)
        return replace(self, **changed)


def denoising_errors(
    model: "LoadedModel",
    batch: Batch,
    *,
    reference: "Callable[[], AbstractContextManager[None]] | None",
    baseline: float = 0.0,
) -> ImageErrors:
    """Return mean squared errors per image, float32, of policy and (without gradient) reference.

    Within `reference()`, `model.predict` is the reference; None skips that forward. Where its errors are known already
    (`batch.reference`), there is no drift.
    """
    noisy_latents, timesteps, conditioning, target = add_shared_noise(model, batch)
    reference_prediction = None
    if reference is not None and batch.reference is None:
        with reference():
            reference_prediction = model.predict(noisy_latents, timesteps, conditioning)
    prediction = model.predict(noisy_latents, timesteps, conditioning)
    return errors_of(model, batch, prediction, target, reference_prediction, baseline=baseline)


def errors_of(
    model: "LoadedModel",
    batch: Batch,
    prediction: "Tensor",
    target: "Tensor",
    reference_prediction: "Tensor | None",
    *,
    baseline: float = 0.0,
) -> ImageErrors:
    """Return the errors of predictions that are there, as `denoising_errors`; all (K times B, C, h, w)."""
    residual = prediction - target
    errors, drift, cross = batch.reference, None, None
    if reference_prediction is not None:
        errors = mean_squares(reference_prediction - target, batch)
        drift = mean_squares(prediction - reference_prediction, replace(batch, masks=None))
    if batch.latents.shape[1] == 2:
        chosen, rejected = residual.detach().chunk(2)
        cross = masked_mean(chosen * rejected, None if batch.masks is None else batch.masks[:, 0])
    return ImageErrors(
        policy=mean_squares(residual, batch),
        reference=errors,
        drift=drift,
        cross=cross,
        timesteps=batch.timesteps,
        log_snr=model.log_snr(batch.timesteps),
        previous_log_snr=model.log_snr((batch.timesteps - 1).clamp(min=0)),
        labels=batch.labels,
        scores=batch.scores,
        baseline=baseline,
    )


def reference_errors(model: "LoadedModel", batch: Batch) -> "Tensor":
    """Return the mean squared errors (B, K), float32, of the model's own reference alone."""
    noisy_latents, timesteps, conditioning, target = add_shared_noise(model, batch)
    with model.reference():
        return mean_squares(model.predict(noisy_latents, timesteps, conditioning) - target, batch)


def add_shared_noise(model: "LoadedModel", batch: Batch) -> "tuple[Tensor, Tensor, dict[str, Tensor], Tensor]":
    """Return noisy latents, timesteps, conditioning and target of all images, leading dimension K times B.

    The K images of an example get the same noise and timestep. They go through the denoiser as one batch, in the order
    of `latents`' columns: for pairs, all chosen ones and then all rejected ones.
    """
    num_images = batch.latents.shape[1]
    latents = batch.latents.transpose(0, 1).flatten(0, 1)
    noise, timesteps = shared(batch.noise, num_images), shared(batch.timesteps, num_images)
    conditioning = {name: shared(value, num_images) for name, value in batch.conditioning.items()}
    conditioning |= {name: value.transpose(0, 1).flatten(0, 1) for name, value in batch.per_image.items()}
    noisy_latents = model.add_noise(latents, noise, timesteps)
    return noisy_latents, timesteps, conditioning, model.target(latents, noise, timesteps)


def mean_squares(residual: "Tensor", batch: Batch) -> "Tensor":
    """Return the mean squares (B, K) of residuals (K times B, C, h, w) of a batch, within its masks."""
    masks = None if batch.masks is None else batch.masks.transpose(0, 1).flatten(0, 1)
    return masked_mean(residual.square(), masks).view(-1, len(batch.noise)).T


def masked_mean(values: "Tensor", masks: "Tensor | None") -> "Tensor":
    """Return the means over the elements of each of (N, C, h, w), (N,), within masks (N, 1, h, w) of mean 1."""
    return (values if masks is None else values * masks).flatten(1).mean(1)


def shared(values: "Tensor", num_images: int) -> "Tensor":
    """Return what the images of an example have in common, (B, ...), for all of them: (K times B, ...)."""
    return values.repeat(num_images, *[1] * (values.ndim - 1))
