"""Diffusion-KTO: Li et al. 2024, "Aligning Diffusion Models by Optimizing Human Utility" (2404.04465).

With the Kahneman-Tversky utility, over single images that are desirable (y = 1) or not (y = -1):

    g = e_ref - e,      loss = weight(y) [1 - sigmoid(y (beta / 2) (g - z))],      z = max(0, mean of g)

The authors write beta without 1/2: their 5000 is our 10000. They take z from the same micro-batch, of two images,
where a gain cancels itself. Here z is a running mean over the whole batches of past steps, so that it neither depends
on how a batch is divided nor cancels; it is 0 at the start, where the policy is the reference.
"""

from typing import ClassVar

from pydantic import Field

from diffusion_dpo.losses import ImageErrors, ImageLoss, Loss, Unit, implicit_reward


class KTO(Loss):
    """Utility of single images: needs no pairs, only images that are liked or disliked."""

    unit: ClassVar[Unit] = "image"

    beta: float = Field(10000.0, gt=0)
    """Strength of the pull towards the reference, in the convention of `dpo`; published: 10000."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of desirable images; raise it where they are few."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of undesirable images."""

    def over_images(self, errors: ImageErrors) -> ImageLoss:
        """Return the loss; half the weight where policy and reference agree. The rewards are (beta/2) g."""
        rewards = implicit_reward(self.beta, errors.reference, errors.policy)
        value = rewards - self.beta / 2 * max(0.0, errors.baseline)
        liked = self.desirable_weight * (-value).sigmoid()
        disliked = self.undesirable_weight * value.sigmoid()
        loss = errors.labels * liked + (1 - errors.labels) * disliked
        return ImageLoss(loss.mean(1), rewards.detach())
