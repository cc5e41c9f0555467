"""How much an image differs from the others of its prompt, by CLIP: what it shows, not where."""

from collections.abc import Sequence

import numpy as np

from diffusion_dpo.scorers import Metric, Need, ScoreRequest, Scores
from diffusion_dpo.scorers.clip import ClipScorer
from diffusion_dpo.scorers.embeddings import embed_once

_ALONE = "the only image of its prompt"


class ClipDiversity(ClipScorer):
    """One minus the cosine of CLIP embeddings to the nearest other image of the prompt; 0 is a duplicate.

    The mean over all the others comes with it.

    Known biases: it sees what is shown more than how, so that two styles of one subject differ little; values of
    different models do not compare.
    """

    source = "Radford et al. 2021, arXiv 2103.00020"
    compares = "others"

    @property
    def needs(self) -> frozenset[Need]:
        """The other images of the prompt."""
        return frozenset({"rivals"})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`nearest_clip`, and `mean_clip`, which informs; both ending in `name`."""
        ending = f"_{self.name}" if self.name else ""
        return (
            Metric(f"nearest_clip{ending}", higher_is_better=True, range=(0.0, 2.0)),
            Metric(f"mean_clip{ending}", higher_is_better=True, range=(0.0, 2.0), auxiliary=True),
        )

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Return nearest and mean distance; NaN with a reason for an image without others.

        A copy of the image is another image at distance 0.
        """
        import torch

        assert self._clip is not None, "load() comes before score()"
        images = [image for request in batch for image in (request.image, *request.rivals)]
        with torch.inference_mode():
            vectors = embed_once(images, self._clip.embed_images).double().cpu()
        nearest, mean = (np.full(len(batch), np.nan) for _ in range(2))
        for i, group in enumerate(vectors.split([1 + len(request.rivals) for request in batch])):
            copies = np.zeros(batch[i].copies - 1)
            others = np.concatenate([copies, (1 - group[1:] @ group[0]).clamp(0, 2).numpy()])
            if others.size:
                nearest[i], mean[i] = others.min(), others.mean()
        names = [metric.name for metric in self.metrics]
        reasons = tuple("" if np.isfinite(value) else _ALONE for value in nearest)
        return Scores({names[0]: nearest, names[1]: mean}, reasons)
