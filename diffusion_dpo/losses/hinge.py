"""Hinge loss on the margin: Zhao et al. 2023, "SLiC-HF: Sequence Likelihood Calibration" (2305.10425).

    loss = max(0, 1 - u),      u as in Diffusion-DPO

The margin is in the units of u, so beta says how far a pair is pushed.
"""

from pydantic import Field

from diffusion_dpo.losses import Loss, PairErrors, PairLoss, expected, implicit_reward


class Hinge(Loss):
    """Pushes every pair equally until its margin is 1, and then not at all."""

    beta: float = Field(2000.0, gt=0)
    """Strength of the pull towards the reference, in the convention of `dpo`."""

    def __call__(self, errors: PairErrors) -> PairLoss:
        """Return max(0, 1 - u); 1 where policy and reference agree."""
        chosen_reward = implicit_reward(self.beta, errors.reference_chosen, errors.chosen)
        rejected_reward = implicit_reward(self.beta, errors.reference_rejected, errors.rejected)
        loss = expected(lambda u: (1 - u).relu(), chosen_reward - rejected_reward, errors.label_prob)
        return PairLoss(loss, chosen_reward.detach(), rejected_reward.detach())
