"""Supervised fine-tuning on the chosen images: the baseline that every preference objective has to beat.

The denoising loss of Ho et al. 2020 (2006.11239), equation 14: loss = e(chosen). On Stable Diffusion 1.5, 500 highly
rated images and this loss do better than the released Diffusion-DPO weights (Diffusion-DRO, table 3).
"""

from typing import ClassVar

from diffusion_dpo.losses import ImageErrors, ImageLoss, Loss, Unit


class SFT(Loss):
    """Plain fine-tuning on what was chosen; ignores the rejected images."""

    unit: ClassVar[Unit] = "chosen"
    needs_reference: ClassVar[bool] = False

    def over_images(self, errors: ImageErrors) -> ImageLoss:
        """Return the error of each chosen image; its reward is minus that."""
        return ImageLoss(errors.policy.mean(1), -errors.policy.detach())
