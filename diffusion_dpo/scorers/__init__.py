"""Judges. A batch of requests in, named float arrays out; raw values are stored and oriented only when compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from diffusion_dpo.config import Plugin

if TYPE_CHECKING:
    import torch
    from PIL import Image


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
    """One image to judge: RGB, with its prompt and, where the scorer compares, its reference images (RGB)."""

    image: "Image.Image"
    prompt: str = ""
    references: tuple["Image.Image", ...] = ()


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

    @property
    def needs(self) -> frozenset[Literal["prompt", "reference"]]:
        """What every request must have beside its image; it may depend on the settings."""
        return frozenset()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The numbers that this scorer gives; the first one is its main metric."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return a short hash of everything that decides the values: settings, weights, version of the code."""
        raise NotImplementedError

    def load(self, device: "torch.device") -> None:
        """Load the weights; called once, before the first batch. Raises ConfigError when a file is missing."""

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        """Judge a batch. Values do not depend on what else is in the batch."""
        raise NotImplementedError
