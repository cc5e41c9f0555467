"""From scores to pairs: a strategy looks at the images of one prompt and says which is better than which.

Merit is a raw score turned so that higher is better. An image without a score is either not in the table at all or has
the merit -inf (`missing: drop | lose`), so it never wins, and never loses by accident.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from diffusion_dpo.config import Plugin

TOO_FEW = "prompts with too few images to pair"


@dataclass(frozen=True)
class ScoreTable:
    """The N distinct images of one prompt, in the order of their uids, and their merits by metric.

    Everything is a function of what the images are, so the order in which they were drawn or stored changes nothing.
    """

    uids: tuple[str, ...]
    raw: dict[str, np.ndarray]
    """Scores as they were stored, (N,), NaN where there is none."""
    merits: dict[str, np.ndarray]
    """Scores with higher better, (N,), -inf where there is none."""
    scale: dict[str, float]
    """The spread of each metric within a prompt, over all prompts: the unit of normalised margins."""
    main: str
    """The metric that decides where a strategy names none; empty where there are no scores."""
    num_photos: int
    """Reference photographs of the prompt, for the strategies that pair with them."""

    def __len__(self) -> int:
        return len(self.uids)

    def norm(self, metric: str) -> np.ndarray:
        """Return the merits in units of the spread that they have within a prompt, (N,)."""
        return self.merits[metric] / self.scale[metric]

    def only(self, keep: np.ndarray) -> "ScoreTable":
        """Return the table of some images; `keep` is boolean, (N,)."""
        return replace(
            self,
            uids=tuple(np.array(self.uids, dtype=object)[keep]),
            raw={name: values[keep] for name, values in self.raw.items()},
            merits={name: values[keep] for name, values in self.merits.items()},
        )


class Pick(NamedTuple):
    """A pair: the positions of its images in the table (of chosen among the photographs, if `photo`).

    `margin` is by how much chosen is better, 0 for a tie: in the metric's own unit where one metric decides, in
    normalised units (`margin_norm`) otherwise. Infinite where rejected has no score, or scores did not decide.
    """

    chosen: int
    rejected: int
    margin: float
    margin_norm: float
    photo: bool = False


class Strategy(Plugin):
    """How the images of a prompt become pairs (`strategy: {type: ...}`)."""

    @property
    def named(self) -> tuple[str, ...]:
        """The metrics that the settings name; () for one that goes by the table's main metric."""
        return ()

    @property
    def gated(self) -> tuple[str, ...]:
        """The metrics that bar images from being chosen, or from being in a pair."""
        return ()

    @property
    def uses_main(self) -> bool:
        """Whether the table's main metric decides, alone or among others."""
        return not self.named

    def reads(self, main: str) -> tuple[str, ...]:
        """Return every metric that has a say, `main` being the table's main one; none of them may be missing."""
        return tuple(dict.fromkeys((*self.named, *([main] if self.uses_main else []), *self.gated)))

    def can_pair(self, table: ScoreTable) -> bool:
        """Return whether a table has enough in it for a pair."""
        return len(table) >= 2

    def pick(self, table: ScoreTable) -> tuple[list[Pick], Counter[str]]:
        """Return every pair that the rule makes, ties included, and counts of what it leaves out, by reason.

        Caps and smallest margins are the framework's work. It is asked for tables that `can_pair`.
        """
        raise NotImplementedError


def compare(table: ScoreTable, metric: str, pairs: Iterable[tuple[int, int]]) -> list[Pick]:
    """Return a pick for each pair of positions, the better one chosen by a metric; of a tie, the first is."""
    merits, norms = table.merits[metric], table.norm(metric)
    picks = []
    for i, j in pairs:
        chosen, rejected = (i, j) if merits[i] >= merits[j] else (j, i)
        margin, margin_norm = (_gap(values[chosen], values[rejected]) for values in (merits, norms))
        picks.append(Pick(chosen, rejected, margin, margin_norm))
    return picks


def ranked(merits: np.ndarray) -> list[int]:
    """Return the positions, best first; equal merits in the order of the table."""
    return [int(i) for i in np.argsort(-merits, kind="stable")]


def gaps(table: ScoreTable, metrics: Sequence[str]) -> np.ndarray:
    """Return how much better i is than j by each metric, in normalised units, (M, N, N); two without a score tie."""
    norms = np.stack([table.norm(metric) for metric in metrics])
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(norms[:, :, None] - norms[:, None, :], nan=0.0, posinf=np.inf, neginf=-np.inf)


def _gap(better: float, worse: float) -> float:
    return 0.0 if better == worse else float(better - worse)
