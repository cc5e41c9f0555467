"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): a CLIP tuned on what people picked out of two images."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from pydantic import PrivateAttr

from diffusion_dpo.scorers import Metric, Need, Scorer, ScoreRequest, Scores
from diffusion_dpo.scorers.embeddings import PromptEmbeddings, embed_once
from diffusion_dpo.scorers.lineage import CLIP_H, clip_backbone
from diffusion_dpo.scorers.transformers_model import ClipText, ClipVision, load_model, load_processor, load_tokenizer
from diffusion_dpo.scorers.weights import Weights, content_hash, files_of

if TYPE_CHECKING:
    import torch

VERSION = 1
"""Raise it when a change of this file changes the values."""


class PickScore(Scorer):
    """Scale times the cosine of image and prompt, equation (1) of the paper: about 15 to 25, higher is better.

    Code that leaves out the scale (about 100) gives numbers a hundred times smaller.

    Known biases: trained on the users and the models of Pick-a-Pic, so a model tuned on those pairs is not judged
    independently by it; only the first 77 tokens of a prompt are read. People and it agree on about 70 of 100 pairs.
    """

    licence = "as the model page says (not stated as a file); read https://huggingface.co/yuvalkirstain/PickScore_v1"
    source = "Kirstain et al. 2023, arXiv 2305.01569"
    weights = "yuvalkirstain/PickScore_v1 (4 GB), and the preprocessing of laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    pretrained: str = "yuvalkirstain/PickScore_v1"
    """A folder with a CLIPModel of transformers, or its id on the hub."""
    revision: str | None = None
    """Branch, tag or commit of `pretrained` on the hub; null takes the newest and says which it is."""
    processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """A folder with preprocessing and tokenizer, or its id on the hub; null takes those of `pretrained`."""
    processor_revision: str | None = None
    """As `revision`, of `processor`."""

    _vision: ClipVision | None = PrivateAttr(None)
    _prompts: PromptEmbeddings | None = PrivateAttr(None)
    _scale: float = PrivateAttr(0.0)

    @property
    def needs(self) -> frozenset[Need]:
        """The prompt."""
        return frozenset({"prompt"})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`pickscore`."""
        return (Metric("pickscore", higher_is_better=True, range=(float("-inf"), float("inf"))),)

    @property
    def lineage(self) -> frozenset[str]:
        """See Scorer; of the published checkpoint, wherever it lies."""
        return frozenset({clip_backbone(CLIP_H), "data: Pick-a-Pic"})

    def fingerprint(self) -> str:
        """Hash the version of the code, that of transformers, and the files of model and preprocessing."""
        model, processor = self._weights().folder(), self._processor_weights().folder("processor")
        small = [file for file in files_of(processor) if file.suffix in (".json", ".txt", ".model")]
        decides = f"{version('transformers')} {content_hash(files_of(model))} {content_hash(small)}"
        return f"pickscore-{VERSION}-{hashlib.sha256(decides.encode()).hexdigest()[:16]}"

    def load(self, device: "torch.device") -> None:
        """Load model, preprocessing and tokenizer; raises ConfigError."""
        model = load_model(self.type, "CLIPModel", self._weights().folder(), device)
        processor = self._processor_weights().folder("processor")
        self._vision = ClipVision(model, load_processor(self.type, processor))
        self._prompts = ClipText(model, load_tokenizer(self.type, processor)).prompts()
        self._scale = float(model.logit_scale.exp())

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Return the scaled cosine of each image with its prompt."""
        import torch

        assert self._vision is not None and self._prompts is not None, "load() comes before score()"
        with torch.inference_mode():
            images = embed_once([request.image for request in batch], self._vision.embed)
            cosines = (images * self._prompts([request.prompt for request in batch])).sum(1).double().cpu().numpy()
        return Scores({"pickscore": self._scale * cosines})

    def _weights(self) -> Weights:
        page = "https://huggingface.co/yuvalkirstain/PickScore_v1"
        return Weights(self.type, self.pretrained, self.revision, page, "see that page")

    def _processor_weights(self) -> Weights:
        if self.processor is None:
            return self._weights()
        page = "https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        return Weights(self.type, self.processor, self.processor_revision, page, "MIT")
