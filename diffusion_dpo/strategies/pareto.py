"""Pairs in which the chosen image is better by every judge: what CaPO's Pareto fronts are made of (2502.02588)."""

from collections import Counter

import numpy as np
from pydantic import Field, field_validator

from diffusion_dpo.strategies import Pick, ScoreTable, Strategy, gaps

NOT_DOMINATED = "pairs that no image dominates"


class Pareto(Strategy):
    """Chosen is at least as good by every metric and better by one: the safest labels, and the fewest."""

    metrics: tuple[str, ...] = Field(min_length=2)
    """The metrics that have to agree."""
    min_gain: float = Field(0.0, ge=0)
    """By how much chosen must be better by at least one of them, in normalised units."""

    @field_validator("metrics")
    @classmethod
    def _distinct(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(metrics)) < len(metrics):
            raise ValueError("a metric can agree once; name each once")
        return metrics

    @property
    def named(self) -> tuple[str, ...]:
        """`metrics`."""
        return self.metrics

    def pick(self, table: ScoreTable) -> tuple[list[Pick], Counter[str]]:
        """Return every dominating pair; its margin is the mean gap."""
        gap = gaps(table, self.metrics)
        dominates = (gap >= 0).all(0) & (gap > 0).any(0) & (gap.max(0) >= self.min_gain)
        means = {(int(i), int(j)): float(gap[:, i, j].mean()) for i, j in np.argwhere(dominates)}
        picks = [Pick(i, j, mean, mean) for (i, j), mean in means.items()]
        return picks, Counter({NOT_DOMINATED: len(table) * (len(table) - 1) // 2 - len(picks)})
