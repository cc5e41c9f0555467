"""DCO: Lee et al. 2024, "Direct Consistency Optimization for Robust Customization of Text-to-Image" (2402.12004).

On chosen images alone, be better than the reference, but no further than it takes:

    loss = -log sigmoid((beta / 2) (e_ref - e))

The authors write beta without 1/2: their 1000 to 2000 is our 2000 to 4000. Their code averages the errors of a batch
before the sigmoid; here every image has its own, as in the paper.
"""

from typing import ClassVar

from pydantic import Field

from diffusion_dpo.losses import ImageErrors, ImageLoss, Loss, Unit, implicit_reward


class DCO(Loss):
    """Fine-tuning on the chosen images that stops where the reference is beaten; for personalisation."""

    unit: ClassVar[Unit] = "chosen"

    beta: float = Field(2000.0, gt=0)
    """Strength of the pull towards the reference, in the convention of `dpo`; published: 2000 to 4000."""

    def over_images(self, errors: ImageErrors) -> ImageLoss:
        """Return the loss; ln 2 where policy and reference agree."""
        from torch.nn import functional as F

        rewards = implicit_reward(self.beta, errors.reference, errors.policy)
        return ImageLoss(F.softplus(-rewards).mean(1), rewards.detach())
