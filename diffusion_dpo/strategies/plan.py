"""Around every strategy: what an image without a score is worth, what a margin is measured in, ties, and caps."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusion_dpo.strategies import TOO_FEW, Pick, ScoreTable, Strategy

NO_SCORE = "images without a score"
EQUAL, NARROW, CAPPED = "pairs with equal scores", "pairs below min_margin", "pairs over a cap"


@dataclass(frozen=True)
class Limits:
    """What is done with the pairs that a strategy makes; see PairConfig."""

    min_margin: float = 0.0
    min_margin_norm: float = 0.0
    max_pairs_per_prompt: int | None = None
    max_pairs_per_image: int | None = None


def spread_within(values: np.ndarray, groups: np.ndarray) -> float:
    """Return the standard deviation of values within their groups, pooled over all groups; 1 where there is none.

    `values` (N,) may hold NaN, `groups` (N,) are numbers from 0. Within the prompt, because between prompts scores
    differ by what was asked for; pooled, because in a group of near-identical images any gap would be large.
    """
    known = np.isfinite(values)
    values, groups = values[known], groups[known]
    if not len(values):
        return 1.0
    counts = np.maximum(np.bincount(groups), 1)
    centered = values - (np.bincount(groups, weights=values) / counts)[groups]
    freedom = len(values) - len(np.unique(groups))
    spread = math.sqrt((centered**2).sum() / freedom) if freedom else 0.0
    return spread or 1.0


def make_table(
    uids: Sequence[str],
    raw: Mapping[str, np.ndarray],
    strategy: Strategy,
    *,
    main: str,
    higher_is_better: Mapping[str, bool],
    scale: Mapping[str, float],
    missing: str = "drop",
    num_photos: int = 0,
) -> tuple[ScoreTable, Counter[str]]:
    """Return the table of one prompt, its images in the order of their uids; and what is not in it, by reason.

    `raw` holds scores (N,) of the metrics that the strategy reads. An image without one of them is left out with
    missing="drop", and worse than any other with "lose".
    """
    order = sorted(range(len(uids)), key=lambda i: uids[i])
    values = {name: np.asarray(raw[name], dtype=np.float64)[order] for name in raw}
    lacking = np.zeros(len(uids), dtype=bool)
    for name in strategy.reads(main):
        lacking |= ~np.isfinite(values[name])
    signs = {name: 1 if higher_is_better[name] else -1 for name in values}
    merits = {
        name: np.where(lacking | ~np.isfinite(found), -np.inf, signs[name] * found) for name, found in values.items()
    }
    table = ScoreTable(tuple(uids[i] for i in order), values, merits, dict(scale), main, num_photos)
    if missing == "lose":
        return table, Counter()
    return table.only(~lacking), +Counter({NO_SCORE: int(lacking.sum())})


def pick_pairs(table: ScoreTable, strategy: Strategy, limits: Limits = Limits()) -> tuple[list[Pick], Counter[str]]:
    """Return the pairs of one prompt, widest margin first, and counts of what was dropped, by reason."""
    if not strategy.can_pair(table):
        return [], Counter({TOO_FEW: 1})
    found, drops = strategy.pick(table)
    wide = []
    for pick in found:
        if not pick.margin > 0:  # of an infinite gap for and one against, no mean is known
            drops[EQUAL] += 1
        elif pick.margin < limits.min_margin or pick.margin_norm < limits.min_margin_norm:
            drops[NARROW] += 1
        else:
            wide.append(pick)
    wide.sort(key=lambda pick: (-pick.margin, -pick.margin_norm, pick.chosen, pick.rejected))
    kept = _capped(wide, limits)
    drops[CAPPED] += len(wide) - len(kept)
    return kept, +drops


def _capped(picks: Sequence[Pick], limits: Limits) -> list[Pick]:
    most = math.inf if limits.max_pairs_per_image is None else limits.max_pairs_per_image
    used: Counter[tuple[bool, int]] = Counter()
    kept = []
    for pick in picks:
        images = (pick.photo, pick.chosen), (False, pick.rejected)
        if all(used[image] < most for image in images):
            used.update(images)
            kept.append(pick)
    return kept[: limits.max_pairs_per_prompt]
