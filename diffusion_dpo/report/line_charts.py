"""The geometry of the curves of a training run: numbers in, coordinates in px out. The template draws them as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from diffusion_dpo.report.charts import Tick, nice_ticks
from diffusion_dpo.report.figures import DASH, relative, relative_with_error, significant
from diffusion_dpo.report.training_log import Curve, Point
from diffusion_dpo.report.words import number

WIDTH_PX, HEIGHT_PX = 360, 210
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 60, 352, 12, 182
"""Edges of the area that is drawn in."""
_BUCKETS = RIGHT_PX - LEFT_PX
"""Of longer curves the lowest and the highest value in each of so many parts are drawn."""
_MOST_MARKS = 40
_MOST_READ = 300
"""Values of a curve that can be read off by pointing."""
_TRIMMED = 1.0
"""Per cent of a curve's raw values that may lie beyond the frame at either end."""

Unit = Literal["number", "relative", "log"]


@dataclass(frozen=True)
class Line:
    """One curve of a chart: `kind` is its colour; `band` its standard errors; `raw` what it is the average of."""

    name: str
    kind: Literal["training", "held_out", "chosen", "rejected"]
    curve: Curve
    band: np.ndarray | None = None
    raw: Curve | None = None
    is_marked: bool = False
    """Whether single values are marked: few, measured now and then."""


@dataclass(frozen=True)
class Chart:
    """Curves that share both axes. `levels` are values that a line is drawn at, with their names."""

    title: str
    caption: str
    lines: tuple[Line, ...]
    unit: Unit = "number"
    levels: tuple[tuple[float, str], ...] = ()


class Trace(NamedTuple):
    """A line as SVG paths; `marks` are its single values."""

    name: str
    kind: str
    path: str
    raw: str
    band: str
    marks: list[tuple[float, float]]


class Plot(NamedTuple):
    """A chart in coordinates. `readable` is what pointing at it shows: one row of texts a step."""

    title: str
    caption: str
    traces: list[Trace]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    levels: list[Tick]
    readable: list[tuple[float, str, list[str]]]


class Scale(NamedTuple):
    """A mapping of values to px; `is_log` of their logarithms."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return px, within the ends."""
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(values) if self.is_log else values
        share = (values - self.low) / (self.high - self.low)
        return self.start + np.clip(share, 0, 1) * (self.end - self.start)


def plot(chart: Chart, first_step: int, last_step: int) -> Plot | None:
    """Place a chart's curves between two steps; None where it has no value at all."""
    lines = [line for line in chart.lines if np.isfinite(line.curve.values).any()]
    if not lines:
        return None
    x = Scale(first_step, last_step if last_step > first_step else first_step + 1, LEFT_PX, RIGHT_PX)
    low, high = _range(lines, chart)
    y = Scale(low, high, BOTTOM_PX, TOP_PX, chart.unit == "log")
    y_ticks = [Tick(_px(y, value), label) for value, label in _value_ticks(low, high, chart.unit)]
    x_ticks = [Tick(_px(x, step), f"{step:,}") for step in _step_ticks(first_step, last_step)]
    levels = [Tick(_px(y, value), name) for value, name in chart.levels if low <= value <= high]
    traces = [_trace(line, x, y) for line in lines]
    return Plot(chart.title, chart.caption, traces, x_ticks, y_ticks, levels, _readable(lines, x, chart.unit))


def decimate(curve: Curve, num_buckets: int) -> Curve:
    """Return a curve of at most two values a bucket, its lowest and its highest, so that no peak is lost.

    Values that are not finite are kept where a whole bucket is of them, which leaves a gap.
    """
    if len(curve.steps) <= 2 * num_buckets:
        return curve
    edges = np.linspace(0, len(curve.steps), num_buckets + 1).astype(int)
    kept: list[int] = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = curve.values[start:end]
        known = np.flatnonzero(np.isfinite(part))
        if not len(known):
            kept.append(start)
            continue
        kept += sorted({start + int(known[part[known].argmin()]), start + int(known[part[known].argmax()])})
    return Curve(curve.steps[kept], curve.values[kept])


def _trace(line: Line, x: Scale, y: Scale) -> Trace:
    marks = []
    if len(line.curve.steps) <= (_MOST_MARKS if line.is_marked else 1):
        known = np.isfinite(line.curve.values)
        marks = list(zip(x(line.curve.steps[known]).tolist(), y(line.curve.values[known]).tolist(), strict=True))
    band = ""
    if line.band is not None:
        known = np.isfinite(line.band)
        steps, middle, width = (it[known] for it in (line.curve.steps, line.curve.values, line.band))
        low, high = (decimate(Curve(steps, middle + sign * width), _BUCKETS) for sign in (-1, 1))
        if len(steps) > 1:
            back = Curve(low.steps[::-1], low.values[::-1])
            band = _path(high, x, y) + _path(back, x, y).replace("M", "L", 1) + "Z"
    raw = "" if line.raw is None else _path(decimate(line.raw, _BUCKETS), x, y)
    return Trace(line.name, line.kind, _path(decimate(line.curve, _BUCKETS), x, y), raw, band, marks)


def _path(curve: Curve, x: Scale, y: Scale) -> str:
    """Return the path of a curve; it begins anew after what is not finite."""
    parts, is_down = [], False
    for at, height in zip(x(curve.steps).tolist(), y(curve.values).tolist(), strict=True):
        if not math.isfinite(height):
            is_down = False
            continue
        parts.append(f"{'L' if is_down else 'M'}{at:.1f} {height:.1f}")
        is_down = True
    return "".join(parts)


def _range(lines: Sequence[Line], chart: Chart) -> tuple[float, float]:
    """Return what the y axis covers: every average with its band and level, and nearly all that is raw."""
    parts = [np.array([value for value, _ in chart.levels])]
    for line in lines:
        band = 0.0 if line.band is None else line.band
        parts += [line.curve.values - band, line.curve.values + band]
        raw = np.empty(0) if line.raw is None else line.raw.values[np.isfinite(line.raw.values)]
        if len(raw):
            parts.append(np.percentile(raw, [_TRIMMED, 100 - _TRIMMED]))
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    if chart.unit == "log":
        values = np.log10(values[values > 0])
        if not len(values):
            return 0.0, 1.0
        low, high = math.floor(float(values.min()) * 4) / 4, math.ceil(float(values.max()) * 4) / 4
        return (low, high) if high - low >= 1 else (math.floor(low), math.floor(low) + 2)
    low, high = float(values.min()), float(values.max())
    is_flat = high - low <= 1e-12 * max(abs(low), abs(high))
    room = (0.1 * abs(high) or 1.0) if is_flat else 0.06 * (high - low)
    return low - room, high + room


def _value_ticks(low: float, high: float, unit: Unit) -> list[tuple[float, str]]:
    if unit == "log":
        every = max(1, math.ceil((high - low) / 5))
        powers = range(math.ceil(low), math.floor(high) + 1, every)
        return [(10.0**power, significant(10.0**power)) for power in powers]
    values = nice_ticks(low, high, 4)
    if unit == "relative":
        return [(value, relative(value) if value else f"0{relative(0)[-2:]}") for value in values]
    step = values[1] - values[0] if len(values) > 1 else 1.0
    places = max(0, -math.floor(math.log10(step) + 1e-9)) + (1 if f"{step:.1e}".startswith("2.5") else 0)
    return [(value, significant(value) if places > 3 else number(value, places)) for value in values]


def _step_ticks(first: int, last: int) -> list[int]:
    inner = sorted({round(value) for value in nice_ticks(first, last, 4)}) if last > first else []
    room = (last - first) / 12
    return [first, *(step for step in inner if first + room < step < last - room), *([last] if last > first else [])]


def _px(scale: Scale, value: float) -> float:
    return float(scale(np.array([float(value)]))[0])


def _readable(lines: Sequence[Line], x: Scale, unit: Unit) -> list[tuple[float, str, list[str]]]:
    """Return, at steps spread evenly, where they are, which they are, and what each line is there or was last."""
    steps = np.unique(np.concatenate([line.curve.steps for line in lines]))
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MOST_READ)).round().astype(int))]
    rows = []
    for step in steps.tolist():
        texts = []
        for line in lines:
            place = int(np.searchsorted(line.curve.steps, step, side="right")) - 1
            texts.append(DASH if place < 0 else _text(line, place, unit))
        rows.append((round(_px(x, step), 1), f"{step:,}", texts))
    return rows


def _text(line: Line, place: int, unit: Unit) -> str:
    value = float(line.curve.values[place])
    error = math.nan if line.band is None else float(line.band[place])
    if not math.isfinite(value):
        return DASH
    known = Point(0, value, error if math.isfinite(error) else None)
    if unit == "relative":
        return relative_with_error(known)
    return significant(value) + (f" ± {significant(error)}" if known.standard_error else "")
