"""Denoising errors of preference pairs: the one place where noise, timesteps and both halves of a pair meet.

Notation of Diffusion-DPO (arXiv 2311.12908): the chosen image is x^w, the rejected one x^l. Both are noised with the
same (t, epsilon), which cancels most of the variance of their difference.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusion_dpo.losses import PairErrors

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_dpo.models import LoadedModel


@dataclass(frozen=True)
class PairBatch:
    """B pairs, ready for the denoiser, on its device; latents and noise float32 of shape (B, C, h, w)."""

    chosen: "Tensor"
    rejected: "Tensor"
    noise: "Tensor"
    timesteps: "Tensor"
    """(B,) int64."""
    conditioning: Mapping[str, "Tensor"]
    """Of the pairs' prompts, leading dimension B."""
    label_prob: "Tensor"
    """(B,) float32."""


def pair_errors(model: "LoadedModel", batch: PairBatch, *, needs_reference: bool) -> PairErrors:
    """Return mean squared errors per sample, float32, of policy and (without gradient) reference.

    Chosen and rejected go through the denoiser as one batch of 2B: the first half is chosen.
    """
    import torch

    latents = torch.cat([batch.chosen, batch.rejected])
    noise = torch.cat([batch.noise, batch.noise])
    timesteps = torch.cat([batch.timesteps, batch.timesteps])
    conditioning = {name: torch.cat([value, value]) for name, value in batch.conditioning.items()}
    noisy_latents = model.add_noise(latents, noise, timesteps)
    target = model.target(latents, noise, timesteps)

    def errors() -> "tuple[Tensor, Tensor]":
        prediction = model.predict(noisy_latents, timesteps, conditioning)
        chosen, rejected = (prediction - target).square().flatten(1).mean(1).chunk(2)
        return chosen, rejected

    reference_chosen = reference_rejected = None
    if needs_reference:
        with model.reference():
            reference_chosen, reference_rejected = errors()
    chosen, rejected = errors()
    return PairErrors(
        chosen=chosen,
        rejected=rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        timesteps=batch.timesteps,
        log_snr=model.log_snr(batch.timesteps),
        label_prob=batch.label_prob,
    )
