"""LPIPS as a judge: how far an image is from its references, for those that have the same layout."""

from collections.abc import Sequence

import numpy as np

from diffusion_dpo.scorers import Metric, Need, ScoreRequest, Scores
from diffusion_dpo.scorers.lpips_model import LpipsScorer


class Lpips(LpipsScorer):
    """Perceptual distance to the references, averaged: 0 for the same image, rarely above 1; lower is better.

    Known biases: it compares places, so it means something only where the reference has the same layout
    (image-to-image, inpainting, restoration); elsewhere it rewards copying the background. References should have the
    proportions of the image, since both are squashed to a square. Distances of different nets do not compare.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """The references."""
        return frozenset({"reference"})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`lpips_alex`, `lpips_vgg` or `lpips_squeeze`."""
        return (Metric(f"lpips_{self.net}", higher_is_better=False, range=(0.0, float("inf"))),)

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Return the mean distance of each image to its references."""
        import torch

        assert self._model is not None, "load() comes before score()"
        images = {id(image): image for request in batch for image in (request.image, *request.references)}
        place = {key: i for i, key in enumerate(images)}
        pairs = [(place[id(r.image)], place[id(reference)]) for r in batch for reference in r.references]
        with torch.inference_mode():
            distances = self._model.distances(list(images.values()), pairs).double().cpu()
        parts = distances.split([len(request.references) for request in batch])
        return Scores({self.metrics[0].name: np.array([float(part.mean()) for part in parts])})
