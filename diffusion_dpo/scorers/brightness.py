"""How bright an image is: the smallest scorer there can be, for tests and to read before writing one."""

from collections.abc import Sequence

import numpy as np

from diffusion_dpo.scorers import Metric, Scorer, ScoreRequest, Scores


class Brightness(Scorer):
    """Mean luma of the image (ITU-R BT.601), 0 black to 1 white."""

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
        luma = [np.asarray(request.image.convert("L"), dtype=np.float64).mean() / 255 for request in batch]
        return Scores({"brightness": np.array(luma)})
