"""The user's photograph chosen, the model's own image for the same caption rejected (as SPIN-Diffusion's first round,
arXiv 2402.10210; HG-DPO, 2405.20216).

Such pairs are easily told apart by sharpness, colour or format instead of content: look at `inspect` before training.
"""

import math
from collections import Counter

from diffusion_dpo.strategies import Pick, ScoreTable, Strategy


class RealVsGenerated(Strategy):
    """Each reference photograph of a prompt against each generated image; needs no scores."""

    @property
    def uses_main(self) -> bool:
        """No score decides."""
        return False

    def can_pair(self, table: ScoreTable) -> bool:
        """Return whether there are a photograph and an image."""
        return table.num_photos >= 1 and len(table) >= 1

    def pick(self, table: ScoreTable) -> tuple[list[Pick], Counter[str]]:
        """Return a pair for every photograph and image."""
        photos, images = range(table.num_photos), range(len(table))
        return [Pick(i, j, math.inf, math.inf, photo=True) for i in photos for j in images], Counter()
