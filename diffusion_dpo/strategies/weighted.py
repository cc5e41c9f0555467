"""A weighted sum of several metrics, each first made comparable within the prompt.

Raw sums of unlike scales weigh whatever varies most. Here every metric becomes, within each prompt, a rank, a win rate
(CaPO, arXiv 2502.02588: mean_j sigmoid((s_i - s_j) / T)) or a robust z-score.
"""

from collections import Counter
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from diffusion_dpo.config import plugin
from diffusion_dpo.strategies import Pick, ScoreTable, Strategy, gaps

_SUM = "weighted sum"


class Weighted(Strategy):
    """Pairs by a weighted sum of metrics that were normalised within the prompt."""

    weights: dict[str, float] = Field(min_length=1)
    """Metric to weight, e.g. {clip_text: 1, aesthetic: 0.5}; each metric counts in its own direction."""
    normalise: Literal["rank", "win_rate", "robust_z"] = "rank"
    """rank: from 0, the worst, to 1. win_rate: the expected share of the prompt's images that it beats. robust_z:
    distance from the median in units of the median deviation; a metric that hardly varies within a prompt is 0."""
    temperature: float = Field(1.0, gt=0)
    """T of win_rate, in normalised units of the metric."""
    then: plugin("strategies") = "best_worst"  # type: ignore[valid-type]
    """What is done with the sums."""

    @field_validator("weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        wrong = [name for name, weight in weights.items() if weight <= 0]
        if wrong:
            raise ValueError(f"the weight of {wrong[0]} must be above 0; its direction is known from its scorer")
        return weights

    @field_validator("then")
    @classmethod
    def _goes_by_the_sum(cls, then: Strategy) -> Strategy:
        if not then.uses_main:
            raise ValueError(f"{then.type} goes by metrics of its own and would not look at the sum")
        return then

    @property
    def named(self) -> tuple[str, ...]:
        """The metrics with a weight, and those of `then`."""
        return (*self.weights, *self.then.named)

    @property
    def gated(self) -> tuple[str, ...]:
        """Those of `then`."""
        return tuple(self.then.gated)

    @property
    def uses_main(self) -> bool:
        """The sum takes the place of the main metric."""
        return False

    def pick(self, table: ScoreTable) -> tuple[list[Pick], Counter[str]]:
        """Return the pairs that `then` makes of the sums, of 0 to 1 for rank and win_rate, their only unit."""
        total = sum(self.weights.values())
        parts = [weight / total * self._normalised(table, name) for name, weight in self.weights.items()]
        summed = np.round(np.sum(parts, axis=0), 12)  # what ties, ties whatever the order of the weights
        merits = table.merits | {_SUM: summed}
        return self.then.pick(replace(table, main=_SUM, merits=merits, scale=table.scale | {_SUM: 1.0}))

    def _normalised(self, table: ScoreTable, metric: str) -> np.ndarray:
        from scipy.special import expit  # here, because the help opens every strategy, and scipy.stats is slow to come
        from scipy.stats import median_abs_deviation, rankdata

        merits = table.merits[metric]
        known = np.isfinite(merits)
        found = np.full(len(merits), -np.inf)
        if self.normalise == "rank":
            found[known] = (rankdata(merits[known]) - 1) / max(known.sum() - 1, 1)
        elif self.normalise == "win_rate":
            gap = gaps(table, [metric])[0][np.ix_(known, known)]
            rates = expit(gap / self.temperature)
            found[known] = (rates.sum(1) - 0.5) / max(known.sum() - 1, 1)  # without the tie with itself
        else:
            spread = median_abs_deviation(merits[known], scale="normal") if known.any() else 0.0
            center = np.median(merits[known]) if known.any() else 0.0
            found[known] = (merits[known] - center) / spread if spread > 0 else 0.0
        return found
