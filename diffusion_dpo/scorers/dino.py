"""DINOv2 as a judge of likeness (Oquab et al. 2023, arXiv 2304.07193): is it the same subject as in the references?"""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from diffusion_dpo.scorers import Metric, Need, Scorer, ScoreRequest, Scores
from diffusion_dpo.scorers.embeddings import cosines_to_references
from diffusion_dpo.scorers.transformers_model import load_model, load_processor
from diffusion_dpo.scorers.weights import Weights, content_hash, files_of

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

VERSION = 1
"""Raise it when a change of this file changes the values."""


class Dino(Scorer):
    """Cosine of the CLS embeddings of an image and of each of its references, averaged; higher is better.

    It is the subject fidelity of DreamBooth (arXiv 2208.12242), by DINOv2 instead of DINO.

    Known biases: pose and background of the reference count too, so that the highest values are copies; it does not
    tell faces of different people apart well.
    """

    licence = "Apache-2.0"
    source = "Oquab et al. 2023, arXiv 2304.07193"
    weights = "facebook/dinov2-base (350 MB)"

    pretrained: str = "facebook/dinov2-base"
    """A folder with a DINOv2 model of transformers, or its id on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null takes the newest and says which it is."""

    _model: Any = PrivateAttr(None)
    _processor: Any = PrivateAttr(None)

    @property
    def needs(self) -> frozenset[Need]:
        """The references."""
        return frozenset({"reference"})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`dino`."""
        return (Metric("dino", higher_is_better=True, range=(-1.0, 1.0)),)

    @property
    def lineage(self) -> frozenset[str]:
        """See Scorer: the sizes of DINOv2 were distilled from one teacher."""
        return frozenset({f"backbone: {'DINOv2' if 'dinov2' in self.pretrained else self.pretrained}"})

    def fingerprint(self) -> str:
        """Hash the version of the code, that of transformers, and the files of the model."""
        decides = f"{version('transformers')} {content_hash(files_of(self._weights().folder()))}"
        return f"dino-{VERSION}-{hashlib.sha256(decides.encode()).hexdigest()[:16]}"

    def load(self, device: "torch.device") -> None:
        """Load model and preprocessing; raises ConfigError."""
        folder = self._weights().folder()
        self._model = load_model(self.type, "AutoModel", folder, device)
        self._processor = load_processor(self.type, folder)

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Return the mean cosine of each image with its references."""
        import torch

        assert self._model is not None, "load() comes before score()"
        with torch.inference_mode():
            return Scores({"dino": cosines_to_references(batch, self._embed)})

    def _embed(self, images: "list[Image.Image]") -> "Tensor":
        from torch.nn.functional import normalize

        pixels = self._processor(images=images, return_tensors="pt")["pixel_values"].to(self._model.device)
        return normalize(self._model(pixel_values=pixels).last_hidden_state[:, 0])

    def _weights(self) -> Weights:
        page = f"https://huggingface.co/{type(self).model_fields['pretrained'].default}"
        return Weights(self.type, self.pretrained, self.revision, page, self.licence)
