"""The LAION aesthetic predictor, version 2: a linear head on CLIP's image embedding, whatever the prompt."""

import hashlib
import itertools
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PrivateAttr

from diffusion_dpo.config import ConfigError
from diffusion_dpo.scorers import Metric, Scorer, ScoreRequest, Scores
from diffusion_dpo.scorers.embeddings import embed_once
from diffusion_dpo.scorers.lineage import CLIP_L, clip_backbone
from diffusion_dpo.scorers.transformers_model import ClipVision, load_model, load_processor
from diffusion_dpo.scorers.weights import Weights, content_hash, files_of, load_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VERSION = 1
"""Raise it when a change of this file changes the values."""
_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
_LAYER = re.compile(r"layers\.(\d+)\.(weight|bias)")


class Aesthetic(Scorer):
    """What people would rate the looks of the image: about 1 to 10, most between 4 and 7; higher is better.

    Known biases: it does not read the prompt, and tuning on it alone is known to cost fidelity to prompts; it likes
    saturated, painterly pictures and single subjects, and was trained on ratings of artworks and photo contests.
    """

    licence = "Apache-2.0 (the head), MIT (OpenAI's CLIP)"
    source = "improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE (Schuhmann 2022)"
    weights = f"the head {_HEAD} (4 MB), and openai/clip-vit-large-patch14 (1.7 GB)"

    head: Path = Path(_HEAD)
    """The file of the head, or the folder that holds it."""
    encoder: str = "openai/clip-vit-large-patch14"
    """A folder with the CLIPModel of transformers that the head was trained on, or its id on the hub."""
    encoder_revision: str | None = None
    """Branch, tag or commit of `encoder` on the hub; null takes the newest and says which it is."""

    _vision: ClipVision | None = PrivateAttr(None)
    _layers: "list[tuple[Tensor, Tensor]]" = PrivateAttr(default_factory=list)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """`aesthetic`."""
        return (Metric("aesthetic", higher_is_better=True, range=(float("-inf"), float("inf"))),)

    @property
    def lineage(self) -> frozenset[str]:
        """See Scorer; of the published head, which is on one CLIP alone, wherever that lies."""
        return frozenset({clip_backbone(CLIP_L), "data: AVA", "data: LOGOS", "data: SAC"})

    def fingerprint(self) -> str:
        """Hash the version of the code, that of transformers, the head and the files of the encoder."""
        files = [self._head_file(), *files_of(self._encoder_weights().folder())]
        decides = f"{version('transformers')} {content_hash(files)}"
        return f"aesthetic-{VERSION}-{hashlib.sha256(decides.encode()).hexdigest()[:16]}"

    def load(self, device: "torch.device") -> None:
        """Load encoder and head; raises ConfigError, also where they do not fit each other."""
        layers = _read_head(self._head_file(), self.type)
        folder = self._encoder_weights().folder()
        model = load_model(self.type, "CLIPModel", folder, device)
        if model.config.projection_dim != layers[0][0].shape[1]:
            raise ConfigError(
                f"scorer {self.type}: the head {self.head} takes embeddings of {layers[0][0].shape[1]} numbers, and "
                f"{self.encoder} gives {model.config.projection_dim}; set encoder to the CLIP that it was trained on"
            )
        self._vision = ClipVision(model, load_processor(self.type, folder))
        self._layers = [(weight.to(device).float(), bias.to(device).float()) for weight, bias in layers]

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Return the head's rating of each image."""
        import torch
        from torch.nn.functional import linear

        assert self._vision is not None, "load() comes before score()"
        with torch.inference_mode():
            hidden = embed_once([request.image for request in batch], self._vision.embed)
            for weight, bias in self._layers:  # with dropout between them in training, and no activations
                hidden = linear(hidden, weight, bias)
        return Scores({"aesthetic": hidden[:, 0].double().cpu().numpy()})

    def _head_file(self) -> Path:
        file = self.head / _HEAD if self.head.is_dir() else self.head
        if not file.is_file():
            page = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
            raise Weights(self.type, str(self.head), None, page, "Apache-2.0").missing(
                f"there is no file {file}", "a folder of your choice, and set head to the file"
            )
        return file

    def _encoder_weights(self) -> Weights:
        page = "https://huggingface.co/openai/clip-vit-large-patch14"
        return Weights(self.type, self.encoder, self.encoder_revision, page, "MIT")


def _read_head(file: Path, scorer: str) -> "list[tuple[Tensor, Tensor]]":
    """Return weight and bias of each linear layer in order; raises ConfigError where they do not make a chain."""
    state = load_tensors(file, scorer)
    names = [_LAYER.fullmatch(name) for name in state]
    numbers = sorted({int(name[1]) for name in names if name})
    layers = [(state.get(f"layers.{i}.weight"), state.get(f"layers.{i}.bias")) for i in numbers]
    whole = [(weight, bias) for weight, bias in layers if weight is not None and bias is not None]
    widths = [(weight.shape[1], weight.shape[0]) for weight, bias in whole if weight.ndim == 2]
    chained = all(before[1] == after[0] for before, after in itertools.pairwise(widths))
    if not widths or len(widths) != len(numbers) or not chained or widths[-1][1] != 1 or not all(names):
        raise ConfigError(
            f"scorer {scorer}: {file} is not a head of linear layers (layers.N.weight, layers.N.bias) that ends in "
            f"one number; it should be {_HEAD}"
        )
    return whole
