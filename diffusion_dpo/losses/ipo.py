"""IPO: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences" (2310.12036).

Published as (h - 1/(2 tau))^2 with h the difference of log-ratios, times tau^2, with tau = beta / 2:

    loss = (u - 1/2)^2,      u as in Diffusion-DPO

The factor changes nothing but the size of the gradient; unscaled, losses are about 1e-8 and vanish in Adam's epsilon.
"""

from pydantic import Field

from diffusion_dpo.losses import Loss, PairErrors, PairLoss, expected, implicit_reward


class IPO(Loss):
    """The squared distance of the margin from a fixed target, which bounds how far a pair is pushed."""

    beta: float = Field(2000.0, gt=0)
    """Strength of the pull towards the reference, in the convention of `dpo`."""

    def __call__(self, errors: PairErrors) -> PairLoss:
        """Return (u - 1/2)^2; 1/4 where policy and reference agree."""
        chosen_reward = implicit_reward(self.beta, errors.reference_chosen, errors.chosen)
        rejected_reward = implicit_reward(self.beta, errors.reference_rejected, errors.rejected)
        loss = expected(lambda u: (u - 0.5).square(), chosen_reward - rejected_reward, errors.label_prob)
        return PairLoss(loss, chosen_reward.detach(), rejected_reward.detach())
