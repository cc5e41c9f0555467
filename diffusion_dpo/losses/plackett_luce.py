"""Plackett-Luce over rankings: Rafailov et al. 2023, "Direct Preference Optimization" (2305.18290), appendix A.

    loss = - sum over k of  [ r_k - log sum over j >= k of exp r_j ],      r = (beta / 2) (e_ref - e)

for images ordered from best to worst that share timestep and noise: the likelihood of the order under the policy's
implicit rewards. For two images it is Diffusion-DPO.
"""

from pydantic import Field

from diffusion_dpo.losses import ImageErrors, ImageLoss, ListLoss, implicit_reward


class PlackettLuce(ListLoss):
    """Likelihood of a whole order; uses which image scored higher, not by how much."""

    beta: float = Field(2000.0, gt=0)
    """Strength of the pull towards the reference, in the convention of `dpo`."""

    def over_images(self, errors: ImageErrors) -> ImageLoss:
        """Return minus the log likelihood; log K! where policy and reference agree."""
        rewards = implicit_reward(self.beta, errors.reference, errors.policy)
        remaining = rewards.flip(1).logcumsumexp(1).flip(1)
        return ImageLoss((remaining - rewards).sum(1), rewards.detach())
