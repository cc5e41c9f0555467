"""The geometry of the report's charts: numbers in, coordinates in px out. The template draws them as inline SVG."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_dpo.report import MetricResult
from diffusion_dpo.report.words import MINUS, number, percent, shorten

FOREST_WIDTH_PX, FOREST_HEIGHT_PX = 260, 28
CELL_WIDTH_PX = 120
"""Of a forest plot in a cell of a table that has one in every column."""
CURVE_WIDTH_PX, CURVE_HEIGHT_PX = 560, 240
CURVE_LEFT_PX = 56
HISTOGRAM_WIDTH_PX, HISTOGRAM_HEIGHT_PX = 560, 210
SCATTER_SIDE_PX = 260
_PADDING_PX = 10
_SCATTER_GRID_PX = 4
_SCATTER_MARGIN_PX = 48.0


class Tick(NamedTuple):
    """A labelled position on an axis."""

    at: float
    label: str


class Bar(NamedTuple):
    """A bar of a histogram. `kind` is better, worse or same, or the side that it counts."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    label: str


class Whisker(NamedTuple):
    """A mean with its interval, as x positions."""

    mean: float
    low: float
    high: float


class Histogram(NamedTuple):
    """Per-prompt differences in bins around zero, with the mean and its interval above."""

    bars: list[Bar]
    ticks: list[Tick]
    zero: float
    whisker: Whisker | None
    base: float


class ScoreHistogram(NamedTuple):
    """Scores in bins: one side's above the line at `base`, the other's below it."""

    bars: list[Bar]
    ticks: list[Tick]
    base: float


class Dot(NamedTuple):
    """A prompt, or several at the same place, in the scatter plot."""

    x: float
    y: float
    radius: float
    kind: str
    label: str


class Scatter(NamedTuple):
    """Per-prompt means of the baseline (x) and the model (y), with the same scale on both axes."""

    dots: list[Dot]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    low: float
    high: float


class Line(NamedTuple):
    """A metric's win rate, model by model: a point with its interval each, None where there is none."""

    name: str
    marks: list[tuple[float, Whisker] | None]
    """(x, the win rate and its interval as y positions)."""
    path: str


class Curve(NamedTuple):
    """Win rates of several models against the baseline, one line a metric."""

    lines: list[Line]
    models: list[Tick]
    ticks: list[Tick]
    half: float


def forest(results: Sequence[MetricResult], width_px: int = FOREST_WIDTH_PX) -> list[Whisker | None]:
    """Return one whisker a metric on a shared axis, zero in the middle and better to the right.

    Metrics have different units, so each is divided by the standard deviation of its per-prompt differences.
    """
    rows = [standardised(result) for result in results]
    limit = max([0.25, *(abs(value) for row in rows if row for value in row)])
    scale = (width_px / 2 - _PADDING_PX) / limit
    return [Whisker(*(width_px / 2 + scale * value for value in row)) if row else None for row in rows]


def standardised(result: MetricResult) -> tuple[float, float, float] | None:
    """Return mean, low and high in standard deviations, better to the right; None where there is no interval."""
    if result.mean_difference is None or result.mean_difference_interval is None or result.difference_std is None:
        return None
    unit = result.difference_std or abs(result.mean_difference) or 1.0
    sign = 1 if result.higher_is_better else -1
    low, high = sorted(sign * bound / unit for bound in result.mean_difference_interval)
    return sign * result.mean_difference / unit, low, high


def curve(models: Sequence[str], metrics: Sequence[Sequence[MetricResult]]) -> Curve:
    """Place the win rates of metrics (one list each, a result a model); models stand in their order, evenly."""
    left, right, top, base = CURVE_LEFT_PX, CURVE_WIDTH_PX, 14, CURVE_HEIGHT_PX - 30
    known = [
        v for rows in metrics for it in rows for v in (it.win_rate, *(it.win_rate_interval or ())) if v is not None
    ]
    low, high = math.floor(10 * min([0.4, *known])) / 10, math.ceil(10 * max([0.6, *known])) / 10
    step = (right - left) / max(1, len(models))

    def up(value: float) -> float:
        return base - (value - low) / (high - low) * (base - top)

    lines = []
    for series, rows in enumerate(metrics):
        aside = (series - (len(metrics) - 1) / 2) * min(9.0, step / (len(metrics) + 1))
        marks: list[tuple[float, Whisker] | None] = []
        for place, it in enumerate(rows):
            if it.win_rate is None:
                marks.append(None)
                continue
            ends = it.win_rate_interval or (it.win_rate, it.win_rate)
            marks.append((left + (place + 0.5) * step + aside, Whisker(*map(up, (it.win_rate, *ends)))))
        points = [f"{x:.1f} {mark.mean:.1f}" for x, mark in filter(None, marks)]
        lines.append(Line(rows[0].name, marks, f"M {' L '.join(points)}" if points else ""))
    every = -(-len(models) // 4)  # so that names do not run into each other on a phone
    names = [Tick(left + (i + 0.5) * step, shorten(name, 14)) for i, name in enumerate(models) if i % every == 0]
    return Curve(lines, names, [Tick(up(it), percent(it)) for it in nice_ticks(low, high, 4)], up(0.5))


def histogram(per_prompt: np.ndarray, result: MetricResult, places: int | None) -> Histogram:
    """Bin per-prompt differences (NaN left out); one bin is centred on zero, so that ties stand alone."""
    known = per_prompt[np.isfinite(per_prompt)]
    limit = float(np.abs(known).max(initial=0.0)) or 1.0
    num_bins = 2 * min(12, max(4, round(math.sqrt(max(known.size, 1))))) + 1
    edges = np.linspace(-limit, limit, num_bins + 1) * num_bins / (num_bins - 1)
    counts, _ = np.histogram(known, edges)
    left, right, top = _PADDING_PX, HISTOGRAM_WIDTH_PX - _PADDING_PX, 44
    base = HISTOGRAM_HEIGHT_PX - 26

    def place(value: float) -> float:
        return left + (value - edges[0]) / (edges[-1] - edges[0]) * (right - left)

    bars = []
    for amount, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        height = (base - top) * amount / max(int(counts.max()), 1)
        label = f"{amount} of {known.size} prompts: " + " to ".join(
            number(x, places, signed=True) for x in (low, high)
        )
        bars.append(
            Bar(
                place(low) + 1,
                base - height,
                place(high) - place(low) - 2,
                height,
                _kind((low + high) / 2, result, limit / num_bins),
                label,
            )
        )
    ticks = [Tick(place(it), label) for it, label in _labelled_ticks(-limit, limit, 5, signed=True)]
    whisker = None
    if result.mean_difference is not None and result.mean_difference_interval is not None:
        whisker = Whisker(*(place(value) for value in (result.mean_difference, *result.mean_difference_interval)))
    return Histogram([bar for bar in bars if bar.height], ticks, place(0.0), whisker, base)


def score_histogram(above: np.ndarray, below: np.ndarray, sides: tuple[str, str]) -> ScoreHistogram:
    """Bin scores (NaN left out): those of one side upwards, those of the other, if any, downwards, on one scale."""
    known = [values[np.isfinite(values)] for values in (above, below)]
    both = np.concatenate(known)
    low, high = (float(both.min()), float(both.max())) if both.size else (0.0, 1.0)
    if not low < high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, min(40, max(8, round(math.sqrt(both.size)))) + 1)
    counts = [np.histogram(values, edges)[0] for values in known]
    room = (HISTOGRAM_HEIGHT_PX - 26 - _PADDING_PX) / (2 if known[1].size else 1)
    base = _PADDING_PX + room
    unit = room / max(1, *(int(it.max()) for it in counts))

    def place(value: float) -> float:
        return _PADDING_PX + (value - low) / (high - low) * (HISTOGRAM_WIDTH_PX - 2 * _PADDING_PX)

    bars = [
        Bar(
            place(left) + 1,
            base - amount * unit if side == sides[0] else base,
            place(right) - place(left) - 2,
            amount * unit,
            side,
            f"{amount} {side}: {left:.4g} to {right:.4g}",
        )
        for side, amounts in zip(sides, counts, strict=True)
        for amount, left, right in zip(amounts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        if amount
    ]
    ticks = [Tick(place(value), f"{value:.4g}".replace("-", MINUS)) for value in nice_ticks(low, high)]
    return ScoreHistogram(bars, ticks, base)


def chance(value: float, interval: tuple[float, float] | None) -> Whisker:
    """Return a share in [0, 1] with its interval on an axis from 0 at the left to 1 at the right."""
    low, high = interval or (value, value)
    return Whisker(*(_PADDING_PX + it * (FOREST_WIDTH_PX - 2 * _PADDING_PX) for it in (value, low, high)))


def scatter(before: np.ndarray, after: np.ndarray, result: MetricResult) -> Scatter:
    """Place every prompt with both means, the baseline's and the model's; those on one spot become one dot."""
    both = np.isfinite(before) & np.isfinite(after)
    before, after = before[both], after[both]
    low = float(min(before.min(initial=math.inf), after.min(initial=math.inf)))
    high = float(max(before.max(initial=-math.inf), after.max(initial=-math.inf)))
    if not low < high:
        low, high = (low - 0.5, high + 0.5) if math.isfinite(low) else (0.0, 1.0)
    start, end = _SCATTER_MARGIN_PX, SCATTER_SIDE_PX - _PADDING_PX

    def place(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start - 4)

    spots = Counter(
        (_snap(place(x)), _snap(place(y)), _kind(y - x, result))
        for x, y in zip(before.tolist(), after.tolist(), strict=True)
    )
    dots = [
        Dot(
            x,
            SCATTER_SIDE_PX - y,
            min(3 + 1.2 * math.sqrt(amount - 1), 9),
            kind,
            f"{amount} prompt{'s'[: amount != 1]}, {kind}",
        )
        for (x, y, kind), amount in sorted(spots.items(), key=lambda item: -item[1])
    ]
    ticks = [Tick(place(it), label) for it, label in _labelled_ticks(low, high, 4)]
    return Scatter(dots, ticks, [Tick(SCATTER_SIDE_PX - tick.at, tick.label) for tick in ticks], start, end)


def _kind(difference: float, result: MetricResult, tolerance: float = 0.0) -> str:
    if abs(difference) <= tolerance:
        return "same"
    return "better" if (difference > 0) == result.higher_is_better else "worse"


def _snap(position: float) -> float:
    return round(position / _SCATTER_GRID_PX) * _SCATTER_GRID_PX


def _labelled_ticks(low: float, high: float, about: int, *, signed: bool = False) -> list[tuple[float, str]]:
    """Return round numbers within [low, high] with as many decimals as tell them apart."""
    values = nice_ticks(low, high, about)
    step = values[1] - values[0] if len(values) > 1 else high - low
    places: int | None = max(0, math.ceil(-math.log10(step) - 1e-9))
    if places is not None and abs(step * 10**places - round(step * 10**places)) > 1e-6:
        places += 1  # a step of 2.5
    if places is not None and places > 6:
        places = None
    return [(value, number(value, places, signed=signed)) for value in values]


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers within [low, high]."""
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
