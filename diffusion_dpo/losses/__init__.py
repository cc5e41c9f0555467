"""Objectives over per-sample denoising errors. One paper, one file; a loss never sees a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffusion_dpo.config import Plugin

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairErrors:
    """What an objective may know about a batch of B pairs; every tensor is float32 of shape (B,) unless said.

    Errors are means over all latent elements of (prediction - target)^2. Chosen and rejected of a pair share one
    timestep and one noise; policy and reference saw the same noisy latents.
    """

    chosen: "Tensor"
    rejected: "Tensor"
    reference_chosen: "Tensor | None"
    reference_rejected: "Tensor | None"
    timesteps: "Tensor"
    """(B,) int64."""
    log_snr: "Tensor"
    """log of alpha_t^2 / sigma_t^2."""
    label_prob: "Tensor"
    """Probability that chosen is the better one, in [0.5, 1]."""


@dataclass(frozen=True)
class PairLoss:
    """An objective's value per pair, unreduced, float32 of shape (B,), and its implicit rewards (detached)."""

    loss: "Tensor"
    chosen_reward: "Tensor"
    rejected_reward: "Tensor"


class Loss(Plugin):
    """An objective (`loss.type`)."""

    needs_reference: ClassVar[bool] = True
    """False lets the training loop skip the reference forward; the reference errors are then None."""

    def __call__(self, errors: PairErrors) -> PairLoss:
        """Return the loss of every pair of the batch."""
        raise NotImplementedError
