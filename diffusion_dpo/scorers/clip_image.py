"""CLIP as a judge of likeness, through open_clip: how much an image is like its references.

The number is the raw cosine of two image embeddings, CLIP-I of DreamBooth (arXiv 2208.12242).
"""

from collections.abc import Sequence

from diffusion_dpo.scorers import Need, ScoreRequest, Scores
from diffusion_dpo.scorers.clip import ClipScorer
from diffusion_dpo.scorers.embeddings import cosines_to_references


class ClipImage(ClipScorer):
    """Cosine of the CLIP embeddings of an image and of each of its references, averaged.

    Known biases: it is high for anything of the same kind, so that it tells subjects apart worse than `dino` does; it
    rewards copying the background and the pose of the reference.
    """

    source = "Ruiz et al. 2022, arXiv 2208.12242 (CLIP-I)"
    compares = "image"

    @property
    def needs(self) -> frozenset[Need]:
        """The references."""
        return frozenset({"reference"})

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Return the mean cosine of each image with its references."""
        import torch

        assert self._clip is not None, "load() comes before score()"
        with torch.inference_mode():
            return Scores({self.metrics[0].name: cosines_to_references(batch, self._clip.embed_images)})
