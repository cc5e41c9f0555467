"""Judges. A batch of requests in, named float arrays out; raw values are stored and oriented only when compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from diffusion_dpo.config import Plugin

if TYPE_CHECKING:
    import torch
    from PIL import Image

Need = Literal["prompt", "reference", "rivals"]
"""What a request must have beside its image: a text, reference images, or the other images of the same prompt."""


@dataclass(frozen=True)
class Metric:
    """What one of a scorer's numbers means."""

    name: str
    higher_is_better: bool
    range: tuple[float, float]
    """The values it can take; infinities where there is no bound."""
    auxiliary: bool = False
    """True for numbers that inform (a count, a detection score) and never label pairs unless asked to."""


@dataclass(frozen=True)
class ScoreRequest:
    """One image to judge: RGB, with its prompt and, where the scorer compares, its reference images (RGB).

    `rivals` are the other images of its prompt, without repeats, in an order that depends on them alone; empty unless
    the scorer needs them, and then still for the only image of a prompt: NaN with a reason.
    """

    image: "Image.Image"
    prompt: str = ""
    references: tuple["Image.Image", ...] = ()
    rivals: tuple["Image.Image", ...] = ()
    copies: int = 1
    """How often this very image is there under its prompt, itself included; known where rivals are."""


@dataclass(frozen=True)
class Scores:
    """What a scorer returns for a batch of B requests.

    `values[metric]` is a float array of shape (B,), NaN where the image cannot be scored; then `reasons[i]` says why
    in a few words (empty where all is well).
    """

    values: dict[str, np.ndarray]
    reasons: tuple[str, ...] = ()


class Scorer(Plugin):
    """A judge (`scorers: [{type: ...}]`). Batching, caching, device choice and validation are the framework's work."""

    licence: ClassVar[str]
    """Licence of the weights that this scorer uses, and what it forbids."""
    source: ClassVar[str] = ""
    """Where its numbers come from: a paper with its arXiv id, a package, or a formula's name."""
    weights: ClassVar[str] = "none"
    """The files that it needs, in a few words."""
    extra: ClassVar[str] = ""
    """The install extra that brings its libraries; empty where the package itself does."""

    @property
    def needs(self) -> frozenset[Need]:
        """What every request must have beside its image; it may depend on the settings."""
        return frozenset()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The numbers that this scorer gives; the first one is its main metric."""
        raise NotImplementedError

    @property
    def lineage(self) -> frozenset[str]:
        """What makes it err like another judge: `backbone: ...` and `data: ...` that it was fine-tuned on.

        Data of the size of the web, which every backbone has seen, does not count. Weights in a folder of the user's
        are known by its path alone.
        """
        return frozenset()

    def fingerprint(self) -> str:
        """Return a short hash of everything that decides the values: settings, weights, version of the code."""
        raise NotImplementedError

    def load(self, device: "torch.device") -> None:
        """Load the weights; called once, before the first batch. Raises ConfigError when a file is missing."""

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Judge a batch. Values do not depend on what else is in the batch."""
        raise NotImplementedError

    def close(self) -> None:
        """Say what there is to say of the whole run; called once, after the last batch, if anything was judged."""
