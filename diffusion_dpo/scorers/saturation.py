"""How saturated the colours of an image are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffusion_dpo.scorers import Metric, Scorer, ScoreRequest, Scores

if TYPE_CHECKING:
    from PIL import Image


def saturation(image: "Image.Image") -> float:
    """Return the mean of HSV's saturation, (max - min) / max of a pixel's R, G and B, 0 gray to 1; black counts 0."""
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), dtype=np.float64), 2, 0)
    highest = np.maximum(np.maximum(red, green), blue)
    lowest = np.minimum(np.minimum(red, green), blue)
    return float(((highest - lowest) / np.maximum(highest, 1)).mean())


class Saturation(Scorer):
    """Mean saturation of the pixels, as HSV defines it: 0 gray to 1.

    Known biases: it does not look at lightness, so that dark tinted shadows count as much as vivid light. Judges of
    preference (HPS above all) are known to push it up; watch it beside them.
    """

    licence = "none needed: a formula"
    source = "the saturation of HSV (Smith 1978)"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`saturation`."""
        return (Metric("saturation", higher_is_better=True, range=(0.0, 1.0)),)

    def fingerprint(self) -> str:
        """Return the version of the formula."""
        return "saturation-1"

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Average the saturation of each image."""
        return Scores({"saturation": np.array([saturation(request.image) for request in batch])})
