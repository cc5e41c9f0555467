"""What a labelling has come to: who voted, whether they agree, and whether somebody only presses keys."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from diffusion_dpo.label.items import Item
from diffusion_dpo.report import Interval
from diffusion_dpo.report.raters import (
    cohen_kappa,
    krippendorff_alpha,
    left_share,
    longest_streak,
    percent_agreement,
)
from diffusion_dpo.report.statistics import share_interval
from diffusion_dpo.report.words import percent

_HASTY_SECONDS = 0.7
_STREAK = 12
_FEW = 20


@dataclass(frozen=True)
class RaterResult:
    """One rater's habits."""

    name: str
    num_votes: int
    seconds: float
    """Median per vote."""
    left: tuple[float, Interval, int] | None
    """Share of left among left and right, its interval, and of how many."""
    repeats: tuple[int, int]
    """Repeated pairs that were answered alike, of how many."""
    checks: tuple[int, int]
    """Attention checks passed, of how many."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """Everything on the results page."""

    num_items: int
    num_votes: int
    answers: dict[str, int]
    raters: tuple[RaterResult, ...]
    agreement: tuple[float, int] | None
    """Share of pairs of raters that agree, and how many pairs."""
    kappa: float | None
    """Of two raters."""
    alpha: float | None
    models: dict[str, tuple[int, int, int, float, Interval]] = field(default_factory=dict)
    """Of a comparison, by model: won, tied, lost, win rate with its interval."""


def results_of(votes: Sequence[dict[str, Any]], items: Mapping[str, Item]) -> Results:
    """Return the results of the votes that stand, on items by id; one pass over them, whoever voted."""
    pairs = [vote for vote in votes if vote["kind"] == "pair"]
    by_item: dict[str, dict[str, str]] = defaultdict(dict)
    for vote in pairs:
        if vote["choice"] != "skip":
            by_item[vote["item"]][vote["rater"]] = vote["choice"]
    by_rater: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for vote in votes:
        by_rater[vote["rater"]].append(vote)
    names = list(by_rater)
    units = list(by_item.values())
    kappa = None
    if len(names) == 2:
        both = [unit for unit in units if len(unit) == 2]
        kappa = cohen_kappa([unit[names[0]] for unit in both], [unit[names[1]] for unit in both])
    return Results(
        num_items=len(items),
        num_votes=len(pairs),
        answers=dict(Counter(vote["choice"] for vote in pairs)),
        raters=tuple(_rater(name, its) for name, its in by_rater.items()),
        agreement=percent_agreement(units),
        kappa=kappa,
        alpha=krippendorff_alpha(units),
        models=_models(items, pairs),
    )


def _rater(name: str, votes: Sequence[dict[str, Any]]) -> RaterResult:
    pairs = {vote["item"]: vote for vote in votes if vote["kind"] == "pair"}
    again = [(pairs[v["item"]]["choice"], v["choice"]) for v in votes if v["kind"] == "repeat" and v["item"] in pairs]
    checks = [vote["choice"] == "first" for vote in votes if vote["kind"] == "check"]
    answers = [vote["answer"] for vote in votes]
    seconds = median(vote["seconds"] for vote in votes)
    left = left_share([vote["answer"] for vote in pairs.values()])
    warnings = []
    if len(votes) >= _FEW and seconds < _HASTY_SECONDS:
        warnings.append(f"half of the votes took less than {seconds:.1f} s: too fast to have looked")
    if (streak := longest_streak(answers)) >= _STREAK:
        warnings.append(f"{streak} times in a row the same answer")
    if left is not None and left[2] >= _FEW and not left[1][0] <= 0.5 <= left[1][1]:
        warnings.append(f"chose the left image in {percent(left[0])}: sides are random, so this should be about half")
    if checks and sum(checks) < 0.8 * len(checks):
        failed = len(checks) - sum(checks)
        warnings.append(f"missed {failed} of {len(checks)} attention checks, an image beside a ruined copy of itself")
    return RaterResult(
        name=name,
        num_votes=len(pairs),
        seconds=seconds,
        left=left,
        repeats=(sum(a == b for a, b in again), len(again)),
        checks=(sum(checks), len(checks)),
        warnings=tuple(warnings),
    )


def _models(
    items: Mapping[str, Item], pairs: Sequence[dict[str, Any]]
) -> dict[str, tuple[int, int, int, float, Interval]]:
    """Return how often each model of a comparison was chosen over the baseline; prompts are what was sampled."""
    import numpy as np

    outcome = {"first": -1.0, "tie": 0.0, "both_bad": 0.0, "second": 1.0}
    by_model: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for vote in pairs:
        item = items[vote["item"]]
        if item.model and vote["choice"] in outcome:
            by_model[item.model][item.prompt].append(outcome[vote["choice"]])
    found = {}
    for model, prompts in by_model.items():
        values = np.array([value for votes in prompts.values() for value in votes])
        means = np.array([sum(votes) / len(votes) for votes in prompts.values()])
        interval = share_interval(means, values)
        assert interval is not None
        counts = (int((values > 0).sum()), int((values == 0).sum()), int((values < 0).sum()))
        found[model] = (*counts, 0.5 + float(means.mean()) / 2, interval)
    return found
