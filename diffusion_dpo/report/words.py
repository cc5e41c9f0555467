"""Numbers and results in plain words: the same sentences head the page and end the command."""

import math
import unicodedata
from collections.abc import Sequence

from diffusion_dpo.report import Interval, MetricResult, ModelFacts, Report, Sign

MINUS = "\u2212"
NBSP = "\u00a0"
_KEPT_CONTROLS = "\n\t"
SIGNIFICANT = 0.05
FEWEST_PROMPTS = 20
"""Below so many, intervals come out too narrow."""


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
    if result.mean_baseline is None or result.mean is None:
        return 2
    return decimals(result.mean_difference_interval, (result.mean_baseline, result.mean))


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
    if result.role == "human":  # of votes the win rate is what is shown
        low, high = result.win_rate_interval or (0.0, 1.0)
        return "unclear" if low <= 0.5 <= high else "better" if low > 0.5 else "worse"
    if result.mean_difference_interval is None:
        return "unclear"
    low, high = result.mean_difference_interval
    if low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == result.higher_is_better else "worse"


def lead(result: MetricResult) -> str:
    """Return the result as a clause, `clip rose from 0.71 to 0.79`; it claims a change only where there is one."""
    places = places_of(result)
    before, after = number(result.mean_baseline, places), number(result.mean, places)
    if result.num_pairs == 0:
        return "nobody voted" if result.role == "human" else f"no pair could be scored with {result.name}"
    outcome = verdict(result)
    if result.role == "human":
        who = {"better": result.model, "worse": "the baseline", "same": "neither", "unclear": "neither measurably"}
        return f"{result.name} preferred {who[outcome]}"
    if outcome == "same":
        return f"{result.name} is the same for both, {before}"
    if result.mean_difference_interval is None:
        return f"{result.name} went from {before} to {after}"
    if outcome == "unclear":
        return f"{result.name} did not change measurably, from {before} to {after}"
    rose = (result.mean_difference or 0) > 0
    return f"{result.name} {'rose' if rose else 'fell'} from {before} to {after}"


def detail(result: MetricResult) -> str:
    """Return what follows the clause: `+0.08, 95 % interval +0.05 to +0.11`, and what it does not show."""
    if result.num_pairs == 0:
        missing = "vote" if result.role == "human" else "score"
        return f"all {result.num_missing} pairs are missing a {missing}"
    if result.role == "human":
        wins = f"win rate {percent(result.win_rate)}, 95{NBSP}% interval {win_interval(result)}"
        return f"{wins}, {count(result.num_pairs, 'pairs')}"
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
    return f"{claim(report, result)} ({detail(result)})."


def claim(report: Report, result: MetricResult) -> str:
    """Return the result without its interval, and whose it is: `On 64 prompts, clip rose from 0.71 to 0.79`."""
    among = f" with {result.model}" if len(report.models) > 1 else ""
    return f"On {count(report.num_prompts, report.prompt_set)}{among}, {lead(result)}"


def count(amount: int, plural: str) -> str:
    """Return `64 prompts` or `1 prompt`."""
    return f"{amount:,} {plural[:-1] if amount == 1 and plural.endswith('s') else plural}"


def listed(names: Sequence[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def p_text(value: float | None) -> str:
    """Format a p-value: `0.031`, `< 0.001`; a dash for a missing one."""
    if value is None:
        return "\u2013"
    return f"<{NBSP}0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def headline(report: Report, model: str | None = None) -> MetricResult:
    """Return the metric that heads a model, the first one by default: a main one, and held out if there is one."""
    return min(report.of(model or report.models[0].name), key=rank)


def rank(result: MetricResult) -> tuple[bool, bool, int]:
    """Return the place of a metric on the page: main before auxiliary, held out and people's votes before the rest.

    One that has no pair, of a model that people were not asked about, say, comes after those that have.
    """
    return (
        result.auxiliary,
        not result.num_pairs,
        {"held_out": 0, "human": 0, "related": 1, "trained_on": 2}[result.role],
    )


def cautions(report: Report, model: str | None = None) -> list[str]:
    """Return what a careful reader should be told of one model, of all by default, each in one sentence."""
    notes = []
    for facts in report.models:
        if model in (None, facts.name):
            about = f"{facts.name}: " if model is None and len(report.models) > 1 else ""
            notes += [about + note if about else capital(report, note) for note in _cautions_of(report, facts)]
    if report.num_prompts < FEWEST_PROMPTS:
        notes.append(
            f"With {count(report.num_prompts, 'prompts')}, intervals come out too narrow; 64 or more are better."
        )
    return notes


def _cautions_of(report: Report, facts: ModelFacts) -> list[str]:
    notes = [f"{sign.sentence}." for sign in report.signs if sign.warns and sign.model == facts.name]
    results = report.of(facts.name)
    main = [result for result in results if not result.auxiliary and result.num_pairs]
    if main and not any(result.role in ("held_out", "human") for result in main):
        notes.append("no metric is held out from the training pairs, so a rise here proves little.")
    if facts.labelled_by is None:
        notes.append(
            "nothing says what labelled the pairs that it was trained on, and a judge that did is not told apart: set "
            "trained_on to the metrics that did, or to [] where people chose."
        )
    if facts.judges_not_known:
        notes.append(
            f"it stands on {listed(facts.judges_not_known)}, whose judges are not known and not told apart; set "
            "trained_on to all metrics that labelled."
        )
    if facts.num_prompts_trained_on:
        notes.append(
            f"{facts.num_prompts_trained_on:,} of {count(report.num_prompts, 'prompts')} were in the training pairs: "
            "what is gained on them may not hold for others."
        )
    lost = [it.name for it in main if verdict(it) in ("better", "worse") and not survives(it)]
    if lost:
        notes.append(
            f"{listed(lost)} changed by the interval, but not after Holm's correction for "
            f"{count(sum(it.p_holm is not None for it in main), 'metrics')}: it may be chance."
        )
    notes += [
        f"{result.name}: {count(result.num_missing, 'pairs')} of {result.num_pairs + result.num_missing:,} "
        f"{'have no vote' if result.role == 'human' else 'could not be scored'}, and took no part."
        for result in results
        if result.num_missing
    ]
    return notes


def survives(result: MetricResult) -> bool:
    """Return whether a change holds after Holm's correction; true where nothing was corrected."""
    return result.p_holm is None or result.p_holm < SIGNIFICANT


def corrected(results: Sequence[MetricResult]) -> str:
    """Return which main metrics of a model changed after Holm's correction; empty where only one was tested."""
    tested = [result for result in results if result.p_holm is not None]
    if len(tested) < 2:
        return ""
    changed = [result.name for result in tested if survives(result)]
    found = f"{listed(changed)} changed" if changed else "none changed"
    return f"After Holm\u2019s correction for {len(tested)} metrics, {found} at a level of 5{NBSP}%."


def power(report: Report) -> str:
    """Return how many prompts it takes to show a win rate, in one sentence; empty where that is not known."""
    needed = [
        f"{percent(float(rate))} takes {count(amount, 'prompts')}" for rate, amount in report.prompts_needed.items()
    ]
    if not needed:
        return ""
    return (
        f"To be shown in four comparisons of five, a win rate of {listed(needed)}, judged by "
        f"{headline(report).name}; this comparison has {report.num_prompts:,}."
    )


def sign_name(sign: Sign) -> str:
    """Return what a sign is about, in a word or two."""
    known = {"trained_on_only": "judges", "implicit_accuracy": "held-out pairs", "distance": "distance moved"}
    return known.get(sign.name, sign.name.replace("_", " "))


def capital(report: Report, text: str) -> str:
    """Return a sentence with its first letter as a capital, unless it begins with the name of a metric."""
    begins_with_name = text.split(maxsplit=1)[0].rstrip(",:") in {result.name for result in report.results}
    return text if begins_with_name else text[0].upper() + text[1:]


def shorten(text: str, characters: int = 400) -> str:
    """Return the start of a text, on one line, such as UTF-8 and HTML can hold."""
    flat = " ".join(text[: 4 * characters].split())
    is_whole = len(flat) <= characters and len(text) <= 4 * characters
    return clean(flat if is_whole else flat[:characters].rstrip() + "\u2026")


def clean(text: str) -> str:
    """Return text that UTF-8 and HTML can hold: lone surrogates and control characters become U+FFFD."""
    return "".join(
        "\ufffd" if unicodedata.category(char) in ("Cc", "Cs") and char not in _KEPT_CONTROLS else char
        for char in text
    )
