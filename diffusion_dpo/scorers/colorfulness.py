"""How colourful an image looks, by the formula of Hasler and Süsstrunk (2003, "Measuring colourfulness")."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffusion_dpo.scorers import Metric, Scorer, ScoreRequest, Scores

if TYPE_CHECKING:
    from PIL import Image

_HIGHEST = 255 * float(np.sqrt(2 * 1.09))
"""No image is above it: spread^2 + mean^2 <= 2 * 255^2, and then spread + 0.3 mean <= sqrt(1.09) times its root."""


def colorfulness(image: "Image.Image") -> float:
    """Return the measure M3 of the paper on R, G, B from 0 to 255; 0 is gray, above 100 extremely colourful.

    With rg = R - G and yb = (R + G) / 2 - B, it is the length of their standard deviations plus 0.3 times the length
    of their means.
    """
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=np.float64), 2, 0)
    opponents = (red - green, (red + green) / 2 - blue)
    spread = np.hypot(*(opponent.std() for opponent in opponents))
    return float(spread + 0.3 * np.hypot(*(opponent.mean() for opponent in opponents)))


class Colorfulness(Scorer):
    """The measure M3 of Hasler and Süsstrunk: 0 gray, 15 slightly, 45 averagely, above 100 extremely colourful.

    Known biases: several strong colours count more than one; it was fitted to what 20 people said of 84 photographs.
    """

    licence = "none needed: a formula"
    source = "Hasler and Süsstrunk 2003, Measuring colourfulness in natural images"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`colorfulness`."""
        return (Metric("colorfulness", higher_is_better=True, range=(0.0, _HIGHEST)),)

    def fingerprint(self) -> str:
        """Return the version of the formula."""
        return "colorfulness-1"

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Measure each image."""
        return Scores({"colorfulness": np.array([colorfulness(request.image) for request in batch])})
