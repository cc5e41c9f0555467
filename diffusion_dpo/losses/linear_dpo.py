"""Linear-DPO: Li et al. 2026, "Linear-DPO: Linear Direct Preference Optimization for Diffusion and Flow-Matching
Generative Models" (2605.21123): DPO's gradient with the sigmoid in front of it made linear and clipped.

    c = stop_gradient(clip(1/2 - 0.2 beta h, eta, maximum)),      loss = c (e(chosen) - e(rejected))
    h = (e_ref(chosen) - e(chosen)) - (e_ref(rejected) - e(rejected))

Without DPO's outer factor beta, usual learning rates of fine-tuning apply. Unbounded below: while c > 0 the rejected
error keeps rising, so watch it. The authors' reference follows the policy (`reference.type: ema`) for SD 1.5.
"""

from typing import TYPE_CHECKING

from pydantic import Field

from diffusion_dpo.losses import Loss, PairErrors, PairLoss, implicit_reward

if TYPE_CHECKING:
    from torch import Tensor


class LinearDPO(Loss):
    """The difference of the errors, weighted by how far the pair is from being preferred."""

    beta: float = Field(100.0, gt=0)
    """How fast a pair loses weight as its margin grows; published: 100 (SD 1.5), 500 (SDXL)."""
    eta: float = Field(1e-3, ge=0, lt=0.5)
    """Least weight of a pair; published: 1e-3 (SD 1.5), 0 (SDXL)."""
    maximum: float = Field(1.0, gt=0.5)
    """Largest weight of a pair: 1 in the paper, 1 - eta in its code."""

    def __call__(self, errors: PairErrors) -> PairLoss:
        """Return c (e(chosen) - e(rejected)); c is 1/2 where policy and reference agree."""
        chosen_reward = implicit_reward(self.beta, errors.reference_chosen, errors.chosen)
        rejected_reward = implicit_reward(self.beta, errors.reference_rejected, errors.rejected)
        logit = (chosen_reward - rejected_reward).detach()
        difference = errors.chosen - errors.rejected
        q = errors.label_prob
        loss = q * self._weight(logit) * difference - (1 - q) * self._weight(-logit) * difference
        return PairLoss(loss, chosen_reward.detach(), rejected_reward.detach())

    def _weight(self, logit: "Tensor") -> "Tensor":
        """The logit is (beta / 2) h, so 0.2 beta h is 0.4 of it."""
        return (0.5 - 0.4 * logit).clamp(self.eta, self.maximum)
