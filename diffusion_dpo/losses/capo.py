"""CaPO: Lee et al. 2025, "Calibrated Multi-Preference Optimization for Aligning Diffusion Models" (2502.02588).

Regression of the margin onto the difference of calibrated rewards, which say how likely an image wins against the
others of its prompt:

    R(x_i) = mean over j != i of sigmoid((s_i - s_j) / temperature),      loss = (R(chosen) - R(rejected) - u)^2

with scores s and u as in Diffusion-DPO. A constant difference of 1/2 is IPO.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from diffusion_dpo.losses import Loss, PairErrors, PairLoss, implicit_reward


class CaPO(Loss):
    """Margins that match how much better the chosen image scored."""

    needs_scores: ClassVar[bool] = True

    beta: float = Field(2000.0, gt=0)
    """Strength of the pull towards the reference, in the convention of `dpo`."""
    temperature: float = Field(0.1, gt=0)
    """Difference of scores, on the scale from the data's worst (0) to its best (1), that makes odds of e to 1."""

    def __call__(self, errors: PairErrors) -> PairLoss:
        """Return (R(chosen) - R(rejected) - u)^2."""
        assert errors.chosen_score is not None and errors.rejected_score is not None
        chosen_reward = implicit_reward(self.beta, errors.reference_chosen, errors.chosen)
        rejected_reward = implicit_reward(self.beta, errors.reference_rejected, errors.rejected)
        goal = errors.chosen_score - errors.rejected_score
        loss = (goal - (chosen_reward - rejected_reward)).square()
        return PairLoss(loss, chosen_reward.detach(), rejected_reward.detach())

    def calibrate(self, scores: Sequence[float]) -> list[float]:
        """Return the calibrated rewards of all images of one prompt, in [0, 1]."""
        return [
            sum(_sigmoid((score - other) / self.temperature) for j, other in enumerate(scores) if j != i)
            / max(1, len(scores) - 1)
            for i, score in enumerate(scores)
        ]


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))
