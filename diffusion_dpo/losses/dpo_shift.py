"""DPO-Shift: Yang et al. 2025, "Shifting the Distribution of Direct Preference Optimization" (2502.07599).

DPO with less weight on the rejected image, so that the chosen one's likelihood falls less, or not at all:

    u = (beta / 2) [(e_ref(chosen) - e(chosen)) - w (e_ref(rejected) - e(rejected))],      loss = -log sigmoid(u)
"""

from pydantic import Field

from diffusion_dpo.losses import Loss, PairErrors, PairLoss, implicit_reward


class DPOShift(Loss):
    """DPO whose rejected reward counts less; a weight of 1 is DPO."""

    beta: float = Field(2000.0, gt=0)
    """Strength of the pull towards the reference, in the convention of `dpo`."""
    rejected_weight: float = Field(0.95, gt=0, le=1)
    """w above."""

    def __call__(self, errors: PairErrors) -> PairLoss:
        """Return -log sigmoid(u); ln 2 where policy and reference agree."""
        from torch.nn import functional as F

        chosen_reward = implicit_reward(self.beta, errors.reference_chosen, errors.chosen)
        rejected_reward = implicit_reward(self.beta, errors.reference_rejected, errors.rejected)
        q, weight = errors.label_prob, self.rejected_weight
        loss = q * F.softplus(weight * rejected_reward - chosen_reward)
        loss = loss + (1 - q) * F.softplus(weight * chosen_reward - rejected_reward)
        return PairLoss(loss, chosen_reward.detach(), rejected_reward.detach())
