"""Before/after reports: paired scores in; report.json and one self-contained report.html out. No model, no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from diffusion_dpo.config import Config

Role = Literal["trained_on", "held_out"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class MetricScores:
    """One metric's raw values for both models, of shape (num_prompts, seeds); NaN where an image has no score.

    Element [p, s] of `before` and `after` comes from the same prompt, seed and noise. An `auxiliary` metric informs,
    and heads the report only where there is no other.
    """

    name: str
    role: Role
    higher_is_better: bool
    before: np.ndarray
    after: np.ndarray
    auxiliary: bool = False


class MetricResult(Config):
    """One metric of report.json. Differences are after minus before in the metric's own unit; wins are oriented."""

    name: str
    """Name of the metric."""
    role: Role
    """trained_on: it labelled the training pairs, so a rise is expected. held_out: training never saw it."""
    auxiliary: bool
    """True for a number that informs only."""
    higher_is_better: bool
    """Which direction counts as a win."""
    num_prompts: int = Field(ge=0)
    """Prompts with at least one pair that could be scored: the sample size of both intervals."""
    num_pairs: int = Field(ge=0)
    """Pairs of images (same prompt, same seed) of which both could be scored."""
    num_missing: int = Field(ge=0)
    """Pairs left out because one or both images could not be scored."""
    mean_before: float | None = Field(allow_inf_nan=False)
    """Mean over prompts of the mean over seeds; null when nothing could be scored, as are all the following."""
    mean_after: float | None = Field(allow_inf_nan=False)
    """The same for the tuned model, over the same pairs."""
    mean_difference: float | None = Field(allow_inf_nan=False)
    """Mean over prompts of the difference averaged over seeds."""
    mean_difference_interval: Interval | None
    """95 % interval of the mean difference, [low, high]; null with fewer than two prompts."""
    median_difference: float | None = Field(allow_inf_nan=False)
    """Median over prompts."""
    difference_std: float | None = Field(allow_inf_nan=False)
    """Standard deviation over prompts of the difference; null with fewer than two prompts."""
    win_rate: float | None = Field(ge=0, le=1)
    """Share of pairs won by the tuned model, ties as one half; averaged within each prompt, then over prompts."""
    win_rate_interval: Interval | None
    """95 % interval of the win rate, [low, high]."""
    wins: int = Field(ge=0)
    """Pairs in which the tuned model's image has the better score."""
    ties: int = Field(ge=0)
    """Pairs with exactly equal scores."""
    losses: int = Field(ge=0)
    """Pairs in which the tuned model's image has the worse score."""


class Report(Config):
    """The content of report.json; `schema.json` beside this file is its JSON schema."""

    schema_version: Literal[1] = 1
    """Rises when a field changes its meaning."""
    prompt_set: str = "prompts"
    """What the prompts are, in the plural, e.g. `held-out prompts`."""
    num_prompts: int = Field(ge=1)
    """Prompts compared."""
    num_prompts_trained_on: int = Field(0, ge=0)
    """How many of them were in the pairs that the tuned model was trained on, as far as is known."""
    seeds_per_prompt: int = Field(ge=1)
    """Pairs of images drawn for each prompt."""
    metrics: tuple[MetricResult, ...]
    """One entry for each metric, in the order of the scorers."""
    methods: dict[str, str]
    """How each number was computed, in words."""
    made_with: dict[str, Any]
    """Models, sampling, versions: what it takes to make this report again."""


class Pair(NamedTuple):
    """Which pair of images: the row and the column of the score arrays."""

    prompt: int
    seed: int


@dataclass(frozen=True)
class Gallery:
    """The images behind the numbers. `seeds[p][s]` drew the pair (p, s); `read` fetches the pairs that are shown."""

    prompts: Sequence[str]
    seeds: Sequence[Sequence[int]]
    read: Callable[[Sequence[Pair]], dict[Pair, tuple[bytes, bytes]]]
    """Returns the encoded images (before, after) of the pairs asked for."""
