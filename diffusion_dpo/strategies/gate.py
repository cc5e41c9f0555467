"""Hard constraints first, then a ranking: no score makes up for a missing face."""

from collections import Counter
from dataclasses import replace
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from diffusion_dpo.config import Config, plugin
from diffusion_dpo.strategies import TOO_FEW, Pick, ScoreTable, Strategy


class Bound(Config):
    """What a metric must be, in its own unit; an image without it does not pass."""

    metric: str
    """The metric; auxiliary ones such as a number of faces too."""
    min: float | None = None
    """Smallest value that passes."""
    max: float | None = None
    """Largest value that passes."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError(f"the gate on {self.metric} needs min or max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"nothing passes the gate on {self.metric}: min {self.min:g} is above max {self.max:g}")
        return self

    def passes(self, values: np.ndarray) -> np.ndarray:
        """Return which raw values lie within, (N,); NaN does not."""
        low = -np.inf if self.min is None else self.min
        high = np.inf if self.max is None else self.max
        return (values >= low) & (values <= high)


class Gate(Strategy):
    """Only images that pass every gate can be chosen; they are then paired by another strategy."""

    gates: tuple[Bound, ...] = Field(min_length=1)
    """The constraints, e.g. [{metric: arcface_n_faces, min: 1, max: 1}, {metric: clip_text, min: 0.2}]."""
    failed: Literal["drop", "lose"] = "drop"
    """drop: images that do not pass are in no pair. lose: they may be rejected, as the worst there are."""
    then: plugin("strategies") = "best_worst"  # type: ignore[valid-type]
    """How those that pass are paired."""

    @property
    def named(self) -> tuple[str, ...]:
        """The metrics of `then`: a gate decides nothing between two images that pass."""
        return tuple(self.then.named)

    @property
    def uses_main(self) -> bool:
        """As `then` does."""
        return bool(self.then.uses_main)

    def can_pair(self, table: ScoreTable) -> bool:
        """As `then` can."""
        return bool(self.then.can_pair(table))

    @property
    def gated(self) -> tuple[str, ...]:
        """The metrics with a gate."""
        return (*(bound.metric for bound in self.gates), *self.then.gated)

    def pick(self, table: ScoreTable) -> tuple[list[Pick], Counter[str]]:
        """Return the pairs that `then` makes; what is in none for not passing is counted by its first gate."""
        passed = np.ones(len(table), dtype=bool)
        drops: Counter[str] = Counter()
        for bound in self.gates:
            now = passed & bound.passes(table.raw[bound.metric])
            drops[f"images that do not pass the gate on {bound.metric}"] += int((passed & ~now).sum())
            passed = now
        if self.failed == "lose":
            worst = {name: np.where(passed, values, -np.inf) for name, values in table.merits.items()}
            rest, positions = replace(table, merits=worst), np.arange(len(table))
            drops.clear()  # they may be rejected still
        else:
            rest, positions = table.only(passed), passed.nonzero()[0]
        if not self.then.can_pair(rest):
            return [], drops + Counter({TOO_FEW: 1})
        picks, dropped = self.then.pick(rest)
        return [_moved(pick, positions) for pick in picks], drops + dropped


def _moved(pick: Pick, positions: np.ndarray) -> Pick:
    """Return a pick of a part of the images as one of all of them."""
    chosen = pick.chosen if pick.photo else int(positions[pick.chosen])
    return pick._replace(chosen=chosen, rejected=int(positions[pick.rejected]))
