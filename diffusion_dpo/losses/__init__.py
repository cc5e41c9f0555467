"""Objectives over per-sample denoising errors. One paper, one file; a loss never sees a model.

Most objectives compare the two images of a pair and implement `__call__`. Those that look at single images or at whole
rankings name their `unit` and implement `over_images`, which is all that the training loop calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from diffusion_dpo.config import Plugin

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["pair", "image", "chosen", "list"]


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
    chosen_score: "Tensor | None" = None
    """The judge's score, for objectives that need it: in [0, 1], higher is better (see `Loss.calibrate`)."""
    rejected_score: "Tensor | None" = None


@dataclass(frozen=True)
class ImageErrors:
    """The same for B examples of K images; the K images of an example share prompt, timestep and noise.

    K is 2 for pairs, chosen first; 1 for single images; the length of the list for rankings, best first.
    """

    policy: "Tensor"
    """(B, K), float32, as in PairErrors."""
    reference: "Tensor | None"
    """(B, K)."""
    drift: "Tensor | None"
    """(B, K): mean over latent elements of (policy prediction - reference prediction)^2, whatever the mask."""
    cross: "Tensor | None"
    """(B,), for pairs: mean of the product of the policy's two residuals (prediction - target)."""
    timesteps: "Tensor"
    log_snr: "Tensor"
    previous_log_snr: "Tensor"
    """(B,): that of timestep t - 1, for the weights of the evidence bound; of t itself where t is 0."""
    labels: "Tensor"
    """(B, K): probability that the image is desirable; of a pair these are label_prob and 1 - label_prob."""
    scores: "Tensor | None"
    """(B, K), as in PairErrors."""
    baseline: float = 0.0
    """Mean over past optimizer steps of reference - policy: how much the policy has gained on any image at all."""

    def as_pairs(self) -> PairErrors:
        """Return the columns under their names; K is 2."""
        assert self.policy.shape[1] == 2, "an objective over pairs gets pairs"
        reference, scores = self.reference, self.scores
        return PairErrors(
            chosen=self.policy[:, 0],
            rejected=self.policy[:, 1],
            reference_chosen=None if reference is None else reference[:, 0],
            reference_rejected=None if reference is None else reference[:, 1],
            timesteps=self.timesteps,
            log_snr=self.log_snr,
            label_prob=self.labels[:, 0],
            chosen_score=None if scores is None else scores[:, 0],
            rejected_score=None if scores is None else scores[:, 1],
        )


@dataclass(frozen=True)
class PairLoss:
    """An objective's value per pair, unreduced, float32 of shape (B,), and its implicit rewards (detached)."""

    loss: "Tensor"
    chosen_reward: "Tensor"
    rejected_reward: "Tensor"


@dataclass(frozen=True)
class ImageLoss:
    """An objective's value per example, (B,), and its implicit rewards per image, (B, K), detached; float32."""

    loss: "Tensor"
    rewards: "Tensor"


class Loss(Plugin):
    """An objective (`loss.type`)."""

    unit: ClassVar[Unit] = "pair"
    """What an example is: a pair; any image by itself; a chosen image by itself; a ranking of a prompt's images."""
    needs_reference: ClassVar[bool] = True
    """False lets the training loop skip the reference forward; the reference errors are then None."""
    needs_scores: ClassVar[bool] = False
    """True where the judge's scores are used, beyond which image is the better one."""

    def __call__(self, errors: PairErrors) -> PairLoss:
        """Return the loss of every pair of the batch."""
        raise NotImplementedError

    def over_images(self, errors: ImageErrors) -> ImageLoss:
        """Return the loss of every example; objectives over pairs inherit this and implement `__call__`."""
        import torch

        result = self(errors.as_pairs())
        return ImageLoss(result.loss, torch.stack([result.chosen_reward, result.rejected_reward], 1))

    def calibrate(self, scores: Sequence[float]) -> list[float]:
        """Return what stands for the scores, in [0, 1], of all images of one prompt; unchanged unless overridden."""
        return list(scores)


class ListLoss(Loss):
    """Base of the objectives over rankings: lists of images of one prompt, ordered by score, best first."""

    unit: ClassVar[Unit] = "list"
    needs_scores: ClassVar[bool] = True

    list_size: int = Field(4, ge=2)
    """Images per list; of prompts with more, evenly spaced ranks are taken, and prompts with fewer are left out."""


def implicit_reward(beta: float, reference: "Tensor | None", policy: "Tensor") -> "Tensor":
    """Return (beta / 2) (e_ref - e): what Diffusion-DPO's derivation (2311.12908, S4) makes of an error."""
    assert reference is not None, "an objective that says needs_reference gets the reference's errors"
    return beta / 2 * (reference - policy)


def expected(link: "Callable[[Tensor], Tensor]", logit: "Tensor", label_prob: "Tensor") -> "Tensor":
    """Return the mean of link(logit) and link(-logit) under the probability that the label is right."""
    return label_prob * link(logit) + (1 - label_prob) * link(-logit)
