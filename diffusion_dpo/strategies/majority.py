"""Votes of several judges, each in its own preferences and not in its own units (BalancedDPO, arXiv 2503.12575)."""

from collections import Counter
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from diffusion_dpo.strategies import Pick, ScoreTable, Strategy, gaps

NO_MAJORITY, VETOED = "pairs without a majority", "pairs that a metric vetoes"
OUTWEIGHED = "pairs whose few opponents outweigh the majority"


class Majority(Strategy):
    """Chosen is better by most metrics, by none of the others much worse, and on the mean of all better."""

    metrics: tuple[str, ...] = Field(min_length=2)
    """The metrics that vote."""
    min_agree: int | None = None
    """Votes that chosen needs; null: more than half."""
    veto: float = Field(1.0, ge=0)
    """A metric by which chosen is worse by more than this, in normalised units, forbids the pair."""

    @model_validator(mode="after")
    def _enough_voters(self) -> Self:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("a metric has one vote; name each once")
        if self.min_agree is not None and not len(self.metrics) < 2 * self.min_agree <= 2 * len(self.metrics):
            raise ValueError(f"min_agree={self.min_agree} is not a majority of {len(self.metrics)} metrics")
        return self

    @property
    def named(self) -> tuple[str, ...]:
        """`metrics`."""
        return self.metrics

    def pick(self, table: ScoreTable) -> tuple[list[Pick], Counter[str]]:
        """Return the pairs with a majority; their margin is the mean of all gaps."""
        gap = gaps(table, self.metrics)
        wins = (gap > 0).sum(0) >= (self.min_agree or len(self.metrics) // 2 + 1)
        vetoed = wins & (gap < -self.veto).any(0)
        means = {(int(i), int(j)): float(gap[:, i, j].mean()) for i, j in np.argwhere(wins & ~vetoed)}
        picks = [Pick(i, j, mean, mean) for (i, j), mean in means.items() if mean > 0]
        drops = {VETOED: int(vetoed.sum()), OUTWEIGHED: len(means) - len(picks)}
        drops[NO_MAJORITY] = len(table) * (len(table) - 1) // 2 - int(wins.sum())
        return picks, Counter(drops)
