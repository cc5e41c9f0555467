"""HPS v2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): a CLIP tuned on people's rankings, through open_clip."""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, PrivateAttr

from diffusion_dpo.scorers import Metric, Need, Scorer, ScoreRequest, Scores
from diffusion_dpo.scorers.clip_weights import check_architecture
from diffusion_dpo.scorers.embeddings import PromptEmbeddings, embed_once
from diffusion_dpo.scorers.lineage import CLIP_H, clip_backbone
from diffusion_dpo.scorers.open_clip_model import OpenClip, load_open_clip
from diffusion_dpo.scorers.weights import Weights, content_hash

if TYPE_CHECKING:
    import torch

VERSION = 1
"""Raise it when a change of this file changes the values."""
_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


class Hps(Scorer):
    """Cosine of image and prompt, about 0.2 to 0.35, higher is better; the published tables have 100 times it.

    The longer side is resized to the model's size and the rest padded with black, so that nothing is cropped away.

    Known biases: tuning on it is known to make images brighter, oilier and more saturated; compare images of one
    prompt alone; v2 and v2.1 are different scales. It chooses as people do for 83 to 84 of 100 pairs of its own test
    set, and for 65 to 67 of ImageReward's.
    """

    licence = "Apache-2.0"
    source = "Wu et al. 2023, arXiv 2306.09341"
    weights = "xswu/HPSv2: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt (2 GB)"

    version: Annotated[Literal["2.0", "2.1"], BeforeValidator(str)] = "2.1"  # YAML reads 2.1 as a number
    """Which checkpoint: 2.0 gives the metric hps_v2, 2.1 gives hps_v21."""
    pretrained: str = "xswu/HPSv2"
    """The checkpoint, the folder that holds it, or its id on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null takes the newest and says which it is."""
    architecture: str = "ViT-H-14"
    """open_clip's name of the model that the checkpoint is of; the published ones are all of ViT-H-14."""

    _clip: OpenClip | None = PrivateAttr(None)
    _prompts: PromptEmbeddings | None = PrivateAttr(None)

    @property
    def needs(self) -> frozenset[Need]:
        """The prompt."""
        return frozenset({"prompt"})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`hps_v2` or `hps_v21`, by `version`."""
        name = {"2.0": "hps_v2", "2.1": "hps_v21"}[self.version]
        return (Metric(name, higher_is_better=True, range=(-1.0, 1.0)),)

    @property
    def lineage(self) -> frozenset[str]:
        """See Scorer; of the published checkpoints, wherever they lie."""
        return frozenset({clip_backbone(CLIP_H), "data: HPD"})

    def fingerprint(self) -> str:
        """Hash the version of the code, that of open_clip, the architecture and the checkpoint."""
        decides = f"{version('open_clip_torch')} {self.architecture} {content_hash([self._file()])}"
        return f"hps-{VERSION}-{hashlib.sha256(decides.encode()).hexdigest()[:16]}"

    def load(self, device: "torch.device") -> None:
        """Load the checkpoint; raises ConfigError."""
        check_architecture(self.architecture)
        file = str(self._file())
        self._clip = load_open_clip(self.type, self.architecture, file, device, resize_mode="longest")
        self._prompts = self._clip.prompts()

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Return the cosine of each image with its prompt."""
        import torch

        assert self._clip is not None and self._prompts is not None, "load() comes before score()"
        with torch.inference_mode():
            images = embed_once([request.image for request in batch], self._clip.embed_images)
            cosines = (images * self._prompts([request.prompt for request in batch])).sum(1).double().cpu().numpy()
        return Scores({self.metrics[0].name: cosines})

    def _file(self) -> Path:
        page = "https://huggingface.co/xswu/HPSv2"
        return Weights(self.type, self.pretrained, self.revision, page, self.licence).file(_FILES[self.version])
