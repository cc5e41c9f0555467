"""How bright an image is: the smallest scorer there can be, for tests and to read before writing one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffusion_dpo.scorers import Metric, Scorer, ScoreRequest, Scores

if TYPE_CHECKING:
    from PIL import Image


def brightness(image: "Image.Image") -> float:
    """Return the mean luma of an RGB image (ITU-R BT.601), 0 black to 1 white."""
    return float(np.asarray(image.convert("L"), dtype=np.float64).mean() / 255)


class Brightness(Scorer):
    """Mean luma of the image (ITU-R BT.601), 0 black to 1 white.

    Known biases: it knows nothing but light. It is for finding out whether labels follow it; nobody prefers by it.
    """

    licence = "none needed: a formula"
    source = "ITU-R BT.601"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`brightness`."""
        return (Metric("brightness", higher_is_better=True, range=(0.0, 1.0)),)

    def fingerprint(self) -> str:
        """Return the version of the formula."""
        return "brightness-1"

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Average the luma of each image."""
        return Scores({"brightness": np.array([brightness(request.image) for request in batch])})
