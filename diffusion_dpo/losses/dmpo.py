"""DMPO: "Divergence Minimization Preference Optimization for Diffusion Model Alignment" (2507.07510).

The reverse KL divergence from the policy's preference to the label's, smoothed by a (on two samples, EXO's objective):

    p = sigmoid(u),      loss = p log(p / (1 - a)) + (1 - p) log((1 - p) / a),      u as in Diffusion-DPO

Its gradient vanishes where |u| is large on either side: pairs that are hopelessly wrong are given up.
"""

import math
from typing import TYPE_CHECKING

from pydantic import Field

from diffusion_dpo.losses import Loss, PairErrors, PairLoss, expected, implicit_reward

if TYPE_CHECKING:
    from torch import Tensor


class DMPO(Loss):
    """Reverse-KL preference matching; the margin has a finite optimum, log((1 - smoothing) / smoothing)."""

    beta: float = Field(2000.0, gt=0)
    """Strength of the pull towards the reference, in the convention of `dpo`; published: 2000 (SD 1.5),
    6000 (SDXL)."""
    smoothing: float = Field(0.01, gt=0, lt=0.5)
    """a above: how far from certain the label is taken to be."""

    def __call__(self, errors: PairErrors) -> PairLoss:
        """Return the divergence; 1/2 log(1/2 / (1 - a)) + 1/2 log(1/2 / a) where policy and reference agree."""
        chosen_reward = implicit_reward(self.beta, errors.reference_chosen, errors.chosen)
        rejected_reward = implicit_reward(self.beta, errors.reference_rejected, errors.rejected)
        loss = expected(self._divergence, chosen_reward - rejected_reward, errors.label_prob)
        return PairLoss(loss, chosen_reward.detach(), rejected_reward.detach())

    def _divergence(self, logit: "Tensor") -> "Tensor":
        from torch.nn import functional as F

        yes = logit.sigmoid() * (F.logsigmoid(logit) - math.log(1 - self.smoothing))
        no = (-logit).sigmoid() * (F.logsigmoid(-logit) - math.log(self.smoothing))
        return yes + no
