"""Comparisons of models: paired scores in; report.json, report.md and one page out. No model, no torch.

One model is the baseline; every other one is compared with it, pair by pair of images of the same prompt, seed and
noise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field

from diffusion_dpo.config import Config

BASELINE = "baseline"
"""What the model that all others are compared with is called."""
Role = Literal["trained_on", "related", "held_out", "human"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class MetricScores:
    """One metric's raw values by model, each of shape (num_prompts, seeds); NaN where an image has no score.

    Element [p, s] comes from the same prompt, seed and noise in every model; the first model is the baseline. An
    `auxiliary` metric informs, and heads the report only where there is no other.
    """

    name: str
    role: Role
    higher_is_better: bool
    values: Mapping[str, np.ndarray]
    auxiliary: bool = False
    roles: Mapping[str, Role] = field(default_factory=dict)
    """By model, where it is not `role`: what one was trained on may be new to another."""


class _Written(Config):
    """A part of report.json, whose schema describes every field."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class MetricResult(_Written):
    """One metric of one model. Differences are model minus baseline in the metric's own unit; wins are oriented."""

    name: str
    """Name of the metric."""
    model: str
    """The model that is compared with the baseline."""
    category: str = ""
    """The category of prompts; empty for all prompts."""
    role: Role
    """trained_on: it labelled the model's training pairs, so a rise is expected. related: it shares a backbone or
    data with one that did, or data with the pairs. held_out: training never saw it. human: people's votes."""
    auxiliary: bool
    """True for a number that informs only."""
    higher_is_better: bool
    """Which direction counts as a win."""
    num_prompts: int = Field(ge=0)
    """Prompts with at least one pair that could be scored: the sample size of both intervals and of the test."""
    num_pairs: int = Field(ge=0)
    """Pairs of images (same prompt, same seed) of which both could be scored."""
    num_missing: int = Field(ge=0)
    """Pairs left out because one or both images could not be scored."""
    mean_baseline: float | None = Field(allow_inf_nan=False)
    """Mean over prompts of the mean over seeds; null when nothing could be scored, as are all the following."""
    mean: float | None = Field(allow_inf_nan=False)
    """The same for the model, over the same pairs."""
    mean_difference: float | None = Field(allow_inf_nan=False)
    """Mean over prompts of the difference averaged over seeds."""
    mean_difference_interval: Interval | None
    """95 % interval of the mean difference, [low, high]; null with fewer than two prompts."""
    median_difference: float | None = Field(allow_inf_nan=False)
    """Median over prompts."""
    difference_std: float | None = Field(allow_inf_nan=False)
    """Standard deviation over prompts of the difference; null with fewer than two prompts."""
    win_rate: float | None = Field(ge=0, le=1)
    """Share of pairs won by the model, ties as one half; averaged within each prompt, then over prompts."""
    win_rate_interval: Interval | None
    """95 % interval of the win rate, [low, high]."""
    win_rate_std: float | None = Field(ge=0)
    """Standard deviation over prompts of a prompt's win rate; null with fewer than two prompts."""
    wins: int = Field(ge=0)
    """Pairs in which the model's image has the better score."""
    ties: int = Field(ge=0)
    """Pairs with exactly equal scores."""
    losses: int = Field(ge=0)
    """Pairs in which the model's image has the worse score."""
    p_value: float | None = Field(ge=0, le=1)
    """Two-sided Wilcoxon signed-rank test of the per-prompt mean differences against 0; null with fewer than two."""
    p_holm: float | None = Field(None, ge=0, le=1)
    """The same after Holm's correction over the main metrics of this model, on all prompts; null elsewhere."""


class ModelFacts(_Written):
    """A model of the comparison."""

    name: str
    """Its name in the report."""
    description: str
    """Where it comes from, in words."""
    weights: str
    """Hash of its local weights."""
    adapter: str = ""
    """Hash of its adapter alone; empty without one."""
    adapter_scale: float = 1.0
    """Strength of its adapter."""
    labelled_by: tuple[str, ...] | None = ()
    """Metrics that labelled its training pairs or those of what it started from; null where nothing says."""
    judges_not_known: tuple[str, ...] = ()
    """What it stands on, beside that, of which nothing says who labelled the pairs."""
    num_prompts_trained_on: int = Field(0, ge=0)
    """How many of the prompts were in the pairs that it was trained on, as far as is known."""


class Sign(_Written):
    """A number that moves when a model learns to please its judge instead of drawing better."""

    model: str
    """The model that it is of."""
    name: str
    """What moved: diversity, distance, brightness, ..., implicit_accuracy, trained_on_only."""
    baseline: float | None = Field(allow_inf_nan=False)
    """The baseline's value, where it has one."""
    value: float | None = Field(allow_inf_nan=False)
    """The model's."""
    interval: Interval | None = None
    """95 % interval of the difference, or of the value where the baseline has none."""
    warns: bool
    """Whether it moved enough to be told."""
    sentence: str
    """What it says, in plain words."""


class Report(_Written):
    """The content of report.json; `schema.json` beside this file is its JSON schema."""

    schema_version: Literal[2] = 2
    """Rises when a field changes its meaning."""
    prompt_set: str = "prompts"
    """What the prompts are, in the plural, e.g. `held-out prompts`."""
    num_prompts: int = Field(ge=1)
    """Prompts compared."""
    seeds_per_prompt: int = Field(ge=1)
    """Pairs of images drawn for each prompt."""
    categories: dict[str, int] = {}
    """The categories of prompts, and how many prompts each has; empty where they have none."""
    baseline: ModelFacts
    """What the models are compared with."""
    models: tuple[ModelFacts, ...]
    """The models; the first one heads the report."""
    results: tuple[MetricResult, ...]
    """Every metric of every model, on all prompts and then by category."""
    signs: tuple[Sign, ...] = ()
    """The signs of reward hacking, those that warn and those that do not."""
    prompts_needed: dict[str, int] = {}
    """How many prompts would show a win rate (the key) with a probability of 80 %, judging by the headline metric."""
    methods: dict[str, str]
    """How each number was computed, in words."""
    made_with: dict[str, Any]
    """Models, sampling, versions: what it takes to make this report again."""

    def of(self, model: str, category: str = "") -> list[MetricResult]:
        """Return the results of one model, on all prompts or on those of a category."""
        return [result for result in self.results if (result.model, result.category) == (model, category)]


class Pair(NamedTuple):
    """Which images of a comparison: the row and the column of the score arrays."""

    prompt: int
    seed: int


@dataclass(frozen=True)
class Gallery:
    """The images behind the numbers. `seeds[p][s]` drew the images (p, s); `read` fetches those that are shown."""

    prompts: Sequence[str]
    categories: Sequence[str]
    """The category of each prompt; empty texts where there are none."""
    seeds: Sequence[Sequence[int]]
    read: Callable[[Sequence[Pair]], dict[Pair, dict[str, bytes]]]
    """Returns, for the pairs asked for, the encoded image of every model by name, the baseline's first."""
