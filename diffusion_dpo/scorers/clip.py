"""CLIP as a judge, through open_clip: how well an image fits its prompt.

The number is the raw cosine of two embeddings (Radford et al. 2021, arXiv 2103.00020), as CLIP-T of DreamBooth (arXiv
2208.12242): not 100 times it, and not 2.5 max(cos, 0) as in CLIPScore.
"""

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, PrivateAttr, model_validator

from diffusion_dpo.console import say
from diffusion_dpo.scorers import Metric, Need, Scorer, ScoreRequest, Scores
from diffusion_dpo.scorers.clip_weights import (
    HUB,
    LOCAL,
    find_network,
    is_self_contained,
    locate,
)
from diffusion_dpo.scorers.embeddings import PromptEmbeddings, embed_once
from diffusion_dpo.scorers.lineage import clip_backbone
from diffusion_dpo.scorers.open_clip_model import OpenClip, load_open_clip
from diffusion_dpo.scorers.weights import content_hash

if TYPE_CHECKING:
    import torch

VERSION = 2
"""Raise it when a change of the code changes the values."""


class ClipScorer(Scorer):
    """What the judges by CLIP have in common: which model it is, and how it is loaded."""

    licence = "that of the weights: MIT for most of OpenAI's and LAION's; the pocket CLIP has this package's"
    weights = "an open_clip model: the pocket CLIP (in the package), a folder, a hub id, or a tag"
    compares: ClassVar[str]
    """What the image is compared with: `text`, `image` (a reference) or `others` (of the prompt)."""

    model: str = "pocket"
    """`pocket` (comes with the package), `local-dir:/path` (open_clip_config.json beside weights), `hf-hub:org/name`,
    or the name of an open_clip architecture together with `pretrained`."""
    pretrained: str | None = None
    """Weights for an architecture name: an open_clip tag such as laion2b_s34b_b79k, or a weights file."""
    pretrained_tag: str | None = None
    """For weights from a file: the open_clip tag that they are of, or were fine-tuned from. It says the activation and
    the preprocessing, which a file does not; null will do where all tags of the architecture have the same."""
    revision: str | None = None
    """Branch, tag or commit of an hf-hub: model; null takes the newest and says which it is."""
    name: str = Field("", pattern=r"^[a-z0-9_]*$")
    """Ending of the metric's name, so that two CLIPs can stand side by side: `l14` gives clip_text_l14."""

    _clip: OpenClip | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _weights_are_named(self) -> Self:
        if is_self_contained(self.model) and self.pretrained is not None:
            raise ValueError(f"pretrained goes with an architecture name; model={self.model} brings its own weights")
        if not is_self_contained(self.model) and self.pretrained is None:
            raise ValueError(
                f"model={self.model} is an architecture without weights: set pretrained to an open_clip tag or a "
                "file, or model to pocket, local-dir:/path or hf-hub:org/name"
            )
        if self.pretrained_tag is not None and self.pretrained is None:
            raise ValueError("pretrained_tag is about the file that pretrained names; set both")
        if self.revision is not None and not self.model.startswith(HUB):
            raise ValueError(f"revision pins what is on the hub, and model={self.model} is not hf-hub:org/name")
        return self

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`clip_text` or `clip_image`, ending in `name`."""
        name = f"clip_{self.compares}" + (f"_{self.name}" if self.name else "")
        return (Metric(name, higher_is_better=True, range=(-1.0, 1.0)),)

    @property
    def lineage(self) -> frozenset[str]:
        """Its own weights: of one architecture, one training."""
        return frozenset({clip_backbone(self.model, self.pretrained_tag or self.pretrained)})

    def fingerprint(self) -> str:
        """Hash the version of the code, the architecture, its preprocessing and the bytes of its files."""
        decides = [str(VERSION), version("open_clip_torch"), self.compares]
        decides += [content_hash(self._files())]
        if self.pretrained is not None:
            decides += [self.model, str(self.pretrained_tag)]
            if not Path(self.pretrained).is_file():  # a file's kind follows from these, and needs no open_clip
                decides.append(str(find_network(self.type, self.model, self.pretrained, None)))
        return f"clip-{VERSION}-{hashlib.sha256(' '.join(decides).encode()).hexdigest()[:16]}"

    def load(self, device: "torch.device") -> None:
        """Load model, preprocessing and tokenizer in float32; raises ConfigError rather than score without weights."""
        files = self._files()
        if self.pretrained is None:
            self._clip = load_open_clip(self.type, f"{LOCAL}{files[0].parent}", None, device)
            return
        network = find_network(self.type, self.model, self.pretrained, self.pretrained_tag)
        if network.architecture != self.model:
            say(f"scorer {self.type}: {self.pretrained} is of {network.architecture}, which is taken")
        # the file: of the right architecture the tag might not be known
        self._clip = load_open_clip(
            self.type, network.architecture, str(files[0]), device, preprocessing=network.preprocessing
        )

    def _files(self) -> list[Path]:
        return locate(self.type, self.model, self.pretrained, self.revision)


class Clip(ClipScorer):
    """Cosine of the CLIP embeddings of image and prompt; 0.15 to 0.4 for most models and pairs.

    Known biases: counts, relations ("left of") and negations hardly change it; what is written in the image counts as
    shown; only the first 77 tokens of a prompt are read.
    """

    source = "Radford et al. 2021, arXiv 2103.00020"
    compares = "text"

    _prompts: PromptEmbeddings | None = PrivateAttr(None)

    @property
    def needs(self) -> frozenset[Need]:
        """The prompt."""
        return frozenset({"prompt"})

    def load(self, device: "torch.device") -> None:
        """Load the model; see `ClipScorer.load`."""
        super().load(device)
        assert self._clip is not None
        self._prompts = self._clip.prompts()

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Return the cosine of each image with its prompt.

        The pocket CLIP knows the captions of its world alone: NaN, with the reason, for any other prompt.
        """
        import torch

        from diffusion_dpo.pocket.world import parse_caption

        assert self._clip is not None and self._prompts is not None, "load() comes before score()"
        reasons = [""] * len(batch)
        if self.model == "pocket":
            reasons = [
                "" if parse_caption(request.prompt) else "the prompt is not a caption of the pocket world"
                for request in batch
            ]
        with torch.inference_mode():
            images = embed_once([request.image for request in batch], self._clip.embed_images)
            cosines = (images * self._prompts([request.prompt for request in batch])).sum(1).double().cpu().numpy()
        cosines[[bool(reason) for reason in reasons]] = float("nan")
        return Scores({self.metrics[0].name: cosines}, tuple(reasons))
