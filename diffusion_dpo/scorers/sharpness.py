"""How sharp an image is: the variance of its Laplacian, at one size for all."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffusion_dpo.scorers import Metric, Scorer, ScoreRequest, Scores

if TYPE_CHECKING:
    from PIL import Image

_SIDE_PX = 256
_HIGHEST = math.log10(1 + (4 * 255) ** 2)


def sharpness(image: "Image.Image") -> float:
    """Return log10(1 + variance of the Laplacian of the luma, 0 to 255); 0 is flat, 2 to 4 most photographs.

    The image is first resampled (bicubic) to the area of 256 x 256 pixels in its own proportions, since the
    Laplacian measures detail a pixel. The logarithm makes a difference of two images a ratio of their variances.
    """
    scale = _SIDE_PX / math.sqrt(image.width * image.height)
    size = (max(3, round(image.width * scale)), max(3, round(image.height * scale)))
    luma = np.asarray(image.convert("L").resize(size), dtype=np.float64)  # Pillow is bicubic
    inner = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
    return math.log10(1 + laplacian.var())


class Sharpness(Scorer):
    """Logarithm (base 10) of 1 + the variance of the Laplacian, at the area of 256 x 256 pixels: 0 flat to 6.

    Known biases: noise and grain count as sharpness, and so do busy textures; a shallow depth of field lowers it.
    """

    licence = "none needed: a formula"
    source = "variance of the Laplacian (Pech-Pacheco et al. 2000)"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`sharpness`."""
        return (Metric("sharpness", higher_is_better=True, range=(0.0, _HIGHEST)),)

    def fingerprint(self) -> str:
        """Return the version of the formula."""
        return "sharpness-1"

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Measure each image."""
        return Scores({"sharpness": np.array([sharpness(request.image) for request in batch])})
