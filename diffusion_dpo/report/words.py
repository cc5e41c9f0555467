"""Numbers and results in plain words: the same sentences head the page and end the command."""

import math
import unicodedata

from diffusion_dpo.report import Interval, MetricResult, Report

MINUS = "\u2212"
NBSP = "\u00a0"
_KEPT_CONTROLS = "\n\t"


def decimals(interval: Interval | None, values: tuple[float, ...]) -> int | None:
    """Return how many decimals a metric deserves: what its interval can tell apart, None for scientific notation."""
    half = (interval[1] - interval[0]) / 2 if interval else 0.0
    if half == 0:
        half = max((abs(value) for value in values), default=0.0) / 50
    if half == 0:
        return 2
    places = math.ceil(-math.log10(half / 2))
    return None if places > 6 else max(0, places)


def number(value: float | None, places: int | None, *, signed: bool = False) -> str:
    """Format a number with a real minus sign and, where asked for, a plus; a dash for a missing one."""
    if value is None:
        return "\u2013"
    text = f"{abs(value):.2e}" if places is None else f"{abs(value):,.{places}f}"
    if not any(digit in "123456789" for digit in text.partition("e")[0]):
        return text  # zero has no sign
    return (MINUS if value < 0 else "+" if signed else "") + text


def percent(value: float | None) -> str:
    """Format a share as a whole per cent; 0 % and 100 % are kept for none and all."""
    if value is None:
        return "\u2013"
    rounded = round(100 * value)
    if rounded == 0 and value > 0:
        return f"<{NBSP}1{NBSP}%"
    if rounded == 100 and value < 1:
        return f">{NBSP}99{NBSP}%"
    return f"{rounded}{NBSP}%"


def places_of(result: MetricResult) -> int | None:
    """Return the decimals for all numbers of a metric."""
    if result.mean_before is None or result.mean_after is None:
        return 2
    return decimals(result.mean_difference_interval, (result.mean_before, result.mean_after))


def interval(result: MetricResult) -> str:
    """Return `+0.05 to +0.11`; a dash where there is no interval."""
    if result.mean_difference_interval is None:
        return "\u2013"
    places = places_of(result)
    return " to ".join(number(bound, places, signed=True) for bound in result.mean_difference_interval)


def win_interval(result: MetricResult) -> str:
    """Return `56 % to 71 %`; a dash where there is no interval."""
    return " to ".join(percent(bound) for bound in result.win_rate_interval) if result.win_rate_interval else "\u2013"


def verdict(result: MetricResult) -> str:
    """Return `better`, `worse`, `unclear` (the interval includes zero, or there is none) or `same` (all pairs tie)."""
    if result.num_pairs and result.ties == result.num_pairs:
        return "same"
    if result.mean_difference_interval is None:
        return "unclear"
    low, high = result.mean_difference_interval
    if low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == result.higher_is_better else "worse"


def lead(result: MetricResult) -> str:
    """Return the result as a clause, `clip rose from 0.71 to 0.79`; it claims a change only where there is one."""
    places = places_of(result)
    before, after = number(result.mean_before, places), number(result.mean_after, places)
    if result.num_pairs == 0:
        return f"no pair could be scored with {result.name}"
    outcome = verdict(result)
    if outcome == "same":
        return f"{result.name} is the same before and after, {before}"
    if result.mean_difference_interval is None:
        return f"{result.name} went from {before} to {after}"
    if outcome == "unclear":
        return f"{result.name} did not change measurably, from {before} to {after}"
    rose = (result.mean_difference or 0) > 0
    return f"{result.name} {'rose' if rose else 'fell'} from {before} to {after}"


def detail(result: MetricResult) -> str:
    """Return what follows the clause: `+0.08, 95 % interval +0.05 to +0.11`, and what it does not show."""
    if result.num_pairs == 0:
        return f"all {result.num_missing} pairs are missing a score"
    if verdict(result) == "same":
        return f"all {count(result.num_pairs, 'pairs')} tie"
    parts = [number(result.mean_difference, places_of(result), signed=True)]
    if result.mean_difference_interval is None:
        parts.append("one prompt allows no interval")
    else:
        parts.append(f"95{NBSP}% interval {interval(result)}")
        if verdict(result) == "unclear":
            parts.append("which includes zero")
    if not result.higher_is_better:
        parts.append("lower is better")
    return ", ".join(parts)


def sentence(report: Report, result: MetricResult) -> str:
    """Return the whole result of one metric in one sentence."""
    return f"On {count(report.num_prompts, report.prompt_set)}, {lead(result)} ({detail(result)})."


def count(amount: int, plural: str) -> str:
    """Return `64 prompts` or `1 prompt`."""
    return f"{amount:,} {plural[:-1] if amount == 1 and plural.endswith('s') else plural}"


def headline(report: Report) -> MetricResult:
    """Return the metric that heads the report: a main one, and held out where there is such a one."""
    return min(report.metrics, key=rank)


def rank(result: MetricResult) -> tuple[bool, bool]:
    """Return the place of a metric on the page: main before auxiliary, held-out before trained-on."""
    return result.auxiliary, result.role == "trained_on"


def cautions(report: Report) -> list[str]:
    """Return what a careful reader should be told, each in one sentence."""
    notes = []
    main = [result for result in report.metrics if not result.auxiliary]
    trained = [result for result in main if result.role == "trained_on" and verdict(result) == "better"]
    held_out = [result for result in main if result.role == "held_out"]
    if trained and held_out and not any(verdict(result) == "better" for result in held_out):
        notes.append(
            f"{trained[0].name} labelled the training pairs and rose, yet no held-out metric did: the model may have "
            "learnt to please the judge rather than to draw better."
        )
    if main and not held_out:
        notes.append("Every metric labelled the training pairs; none is held out, so a rise here proves little.")
    if report.num_prompts_trained_on:
        notes.append(
            f"{report.num_prompts_trained_on} of {count(report.num_prompts, 'prompts')} were in the training pairs: "
            "what is gained on them may not hold for others."
        )
    if report.num_prompts < 20:
        notes.append(
            f"With {count(report.num_prompts, 'prompts')}, intervals come out too narrow; 64 or more are better."
        )
    if len(main) > 2:
        notes.append(f"{len(main)} metrics were tested: by chance alone one in twenty intervals excludes zero.")
    notes += [
        f"{result.name}: {count(result.num_missing, 'pairs')} of {result.num_pairs + result.num_missing} could not be "
        "scored and are left out."
        for result in report.metrics
        if result.num_missing
    ]
    return notes


def clean(text: str) -> str:
    """Return text that UTF-8 and HTML can hold: lone surrogates and control characters become U+FFFD."""
    return "".join(
        "\ufffd" if unicodedata.category(char) in ("Cc", "Cs") and char not in _KEPT_CONTROLS else char
        for char in text
    )
