"""Robust DPO: Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback" (2403.00409).

Where a share r of the labels is flipped, this has the expectation that DPO has on the true labels:

    loss = [(1 - r) l(u) - r l(-u)] / (1 - 2 r),      l(u) = -log sigmoid(u), u as in Diffusion-DPO

It can be negative, and is unbounded below for pairs whose label is wrong: keep `max_grad_norm`.
"""

from pydantic import Field

from diffusion_dpo.losses import Loss, PairErrors, PairLoss, expected, implicit_reward


class RobustDPO(Loss):
    """DPO made unbiased for labels of which a known share is flipped."""

    beta: float = Field(2000.0, gt=0)
    """Strength of the pull towards the reference, in the convention of `dpo`."""
    flip_rate: float = Field(0.1, ge=0, lt=0.5)
    """Share of the labels that is wrong."""

    def __call__(self, errors: PairErrors) -> PairLoss:
        """Return the corrected loss; ln 2 where policy and reference agree."""
        from torch.nn import functional as F

        chosen_reward = implicit_reward(self.beta, errors.reference_chosen, errors.chosen)
        rejected_reward = implicit_reward(self.beta, errors.reference_rejected, errors.rejected)
        rate = self.flip_rate
        loss = expected(
            lambda u: ((1 - rate) * F.softplus(-u) - rate * F.softplus(u)) / (1 - 2 * rate),
            chosen_reward - rejected_reward,
            errors.label_prob,
        )
        return PairLoss(loss, chosen_reward.detach(), rejected_reward.detach())
