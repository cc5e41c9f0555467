"""MaPO: Hong et al. 2024, "Margin-aware Preference Optimization for Aligning Diffusion Models Without Reference".

arXiv 2406.06424. No reference, hence one forward less a step:

    phi(x) = x / (e^x - 1),      loss = e(chosen) + w l(T [phi(s e(chosen)) - phi(s e(rejected))]),   l = -log sigmoid

Two parameterisations are published. The authors' code (and arXiv version 1): s = 0.5, T = 1000, w = 0.1. The AAAI
version: s = 1, T = beta, w = 1 / beta. Their gradients differ by a factor of about 50.
"""

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from diffusion_dpo.losses import Loss, PairErrors, PairLoss

if TYPE_CHECKING:
    from torch import Tensor


class MaPO(Loss):
    """Fine-tuning on the chosen image plus a margin between the two, without a reference."""

    needs_reference: ClassVar[bool] = False

    beta: float | None = Field(None, gt=0)
    """null: the constants of the authors' code. A number: those of the AAAI version; 8 for preferences, up to 1024 for
    personalisation."""

    def __call__(self, errors: PairErrors) -> PairLoss:
        """Return the loss; the rewards are T phi(s e)."""
        from torch.nn import functional as F

        scale, temperature, weight = (0.5, 1000.0, 0.1) if self.beta is None else (1.0, self.beta, 1 / self.beta)
        chosen_reward, rejected_reward = (
            temperature * phi(scale * error) for error in (errors.chosen, errors.rejected)
        )
        logit, q = chosen_reward - rejected_reward, errors.label_prob
        loss = q * (errors.chosen + weight * F.softplus(-logit))
        loss = loss + (1 - q) * (errors.rejected + weight * F.softplus(logit))
        return PairLoss(loss, chosen_reward.detach(), rejected_reward.detach())


def phi(x: "Tensor") -> "Tensor":
    """Return x / (e^x - 1) for x >= 0; value and gradient are exact for tiny x (1 at 0) and finite for large x.

    Written out naively, e^x - 1 loses all digits for the errors of a good model, and T = 1000 magnifies that. With
    expm1 the value keeps them but the gradient, a difference of two numbers near 1 / x, does not: hence the series.
    """
    import torch

    small = x < 0.1
    tiny, large = torch.where(small, x, 0.0), torch.where(small, 1.0, x)
    square = tiny * tiny
    series = 1 - tiny / 2 + square / 12 * (1 - square / 60 * (1 - square / 42 * (1 - square / 40)))
    return torch.where(small, series, large * torch.exp(-large) / -torch.expm1(-large))
