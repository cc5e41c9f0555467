"""How much an image differs from the others of its prompt, by LPIPS: finds near-duplicates and what stands apart."""

from collections.abc import Sequence

import numpy as np

from diffusion_dpo.scorers import Metric, Need, ScoreRequest, Scores
from diffusion_dpo.scorers.lpips_model import LpipsScorer

_ALONE = "the only image of its prompt"


class Diversity(LpipsScorer):
    """Perceptual distance to the nearest other image of the prompt; 0 is a duplicate, higher is more different.

    Below about 0.05 two images are hard to tell apart. The mean distance to all the others comes with it.

    Known biases: it compares places, so a shifted copy counts as different; a broken image stands apart too.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """The other images of the prompt."""
        return frozenset({"rivals"})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`nearest_lpips_alex` (by `net`), and `mean_lpips_alex`, which informs."""
        infinite = (0.0, float("inf"))
        return (
            Metric(f"nearest_lpips_{self.net}", higher_is_better=True, range=infinite),
            Metric(f"mean_lpips_{self.net}", higher_is_better=True, range=infinite, auxiliary=True),
        )

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Return nearest and mean distance; NaN with a reason for an image without others. No pair is taken twice.

        A copy of the image is another image at distance 0.
        """
        import torch

        assert self._model is not None, "load() comes before score()"
        images = {id(image): image for request in batch for image in (request.image, *request.rivals)}
        place = {key: i for i, key in enumerate(images)}
        wanted = [
            [(min(a, b), max(a, b)) for a in [place[id(r.image)]] for b in (place[id(rival)] for rival in r.rivals)]
            for r in batch
        ]
        pairs = sorted({pair for own in wanted for pair in own})
        with torch.inference_mode():
            values = self._model.distances(list(images.values()), pairs).double().cpu().numpy()
        distance = dict(zip(pairs, values, strict=True))
        own = [
            np.array([0.0] * (request.copies - 1) + [distance[pair] for pair in pairs])
            for request, pairs in zip(batch, wanted, strict=True)
        ]
        nearest, mean = self.metrics
        return Scores(
            {
                nearest.name: np.array([others.min() if others.size else np.nan for others in own]),
                mean.name: np.array([others.mean() if others.size else np.nan for others in own]),
            },
            tuple("" if others.size else _ALONE for others in own),
        )
