"""What is minimised: an objective, and what can be added to any of them.

The errors are weighted by timestep, the rejected image's gradient is tempered where it would hurt the chosen one, the
objective is applied, and regularisers are added. Every stage is a function of errors alone.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diffusion_dpo.losses import ImageErrors, ImageLoss, Loss
from diffusion_dpo.losses.weighting import error_weights
from diffusion_dpo.settings import PredictionType, Regularizers, Weighting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """An objective with its modifiers."""

    loss: Loss
    weighting: Weighting
    regularizers: Regularizers
    safeguard_mu: float | None
    prediction_type: PredictionType

    @property
    def needs_reference(self) -> bool:
        """Whether the reference forward is needed, by the objective or by a regulariser."""
        return self.loss.needs_reference or self.regularizers.needs_reference

    def __call__(self, errors: ImageErrors) -> tuple[ImageErrors, ImageLoss]:
        """Return the weighted errors, and the loss per example (B,) with the implicit rewards (B, K)."""
        weighted = self.weigh(errors)
        safe = weighted if self.safeguard_mu is None else safeguard(weighted, self.safeguard_mu)
        result = self.loss.over_images(safe)
        return weighted, replace(result, loss=result.loss + self._regularization(weighted))

    def weigh(self, errors: ImageErrors) -> ImageErrors:
        """Return the errors with the weights of their timesteps; `cross` and `drift` are squares of errors as well."""
        weights = error_weights(self.weighting, self.prediction_type, errors.log_snr, errors.previous_log_snr)

        def times(value: "Tensor | None") -> "Tensor | None":
            return None if value is None else value * weights.view(-1, *[1] * (value.ndim - 1))

        return replace(
            errors,
            policy=errors.policy * weights[:, None],
            reference=times(errors.reference),
            drift=times(errors.drift),
            cross=times(errors.cross),
        )

    def _regularization(self, errors: ImageErrors) -> "Tensor":
        """Return the sum of the regularisers, (B,); zeros where none is set. Only desirable images are anchored."""
        weights, desirable = self.regularizers, (errors.labels > 0.5).to(errors.policy.dtype)
        total = errors.policy.new_zeros(len(errors.policy))
        if weights.sft:
            total = total + weights.sft * (desirable * errors.policy).sum(1)
        if weights.chosen_hinge:
            assert errors.reference is not None
            total = total + weights.chosen_hinge * (desirable * (errors.policy - errors.reference).relu()).sum(1)
        if weights.drift:
            assert errors.drift is not None
            total = total + weights.drift * errors.drift.mean(1)
        return total


def safeguard(errors: ImageErrors, mu: float) -> ImageErrors:
    """Scale the gradient of the rejected error, leaving its value, so that the chosen error cannot rise.

    Diffusion-SDPO (2511.03317): with residuals r = prediction - target, the scale is
    clip((1 - mu) |r_chosen|^2 / <r_chosen, r_rejected>, 0, 1), or 1 where the product is not positive. To first order
    in the space of predictions, a step that pulls the margin up then lowers the chosen error by at least
    mu |r_chosen|^2. Per pair; the authors' code takes one scale for the whole micro-batch.
    """
    import torch

    assert errors.cross is not None
    chosen, rejected = errors.policy.unbind(1)
    cross = errors.cross.detach()
    scale = torch.where(cross > 0, (1 - mu) * chosen.detach() / cross.clamp(min=1e-12), 1.0).clamp(0, 1)
    held = rejected.detach()
    return replace(errors, policy=torch.stack([chosen, held + scale * (rejected - held)], 1))
