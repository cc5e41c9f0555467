"""`metrics.jsonl` as curves: whatever a run wrote and a crash left of it, with what could not be read said."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from diffusion_dpo.report import words
from diffusion_dpo.report.alarms import Average


class Curve(NamedTuple):
    """A metric at the steps that have it: rising int64 steps (from 1), and float64 values, NaN where it said null."""

    steps: np.ndarray
    values: np.ndarray


class Point(NamedTuple):
    """A value of a curve, and its standard error where it has one."""

    step: int
    value: float
    standard_error: float | None = None


_ABSURD = 1e100
"""No metric is as large; what is, cannot be drawn or squared."""
EMPTY = Curve(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class Log:
    """What a run said about itself."""

    curves: Mapping[str, Curve]
    """By name; also `errors/chosen_excess` and `errors/rejected_excess`, errors over the reference's, minus 1."""
    first_step: int = 0
    last_step: int = 0
    num_steps: int = 0
    notes: tuple[str, ...] = ()
    """What of the file could not be read, each in a sentence."""
    _smooth: dict[tuple[str, int], tuple[Curve, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def curve(self, name: str) -> Curve:
        """Return a metric, empty where the run has none of that name."""
        return self.curves.get(name, EMPTY)

    def finite(self, name: str) -> Curve:
        """Return a metric at the steps at which it is a number."""
        curve = self.curve(name)
        known = np.isfinite(curve.values)
        return Curve(curve.steps[known], curve.values[known])

    def points(self, name: str) -> list[Point]:
        """Return a held-out metric, evaluation by evaluation, with its standard errors."""
        curve, errors = self.finite(name), self.finite(f"{name}/se")
        known = dict(zip(errors.steps.tolist(), errors.values.tolist(), strict=True))
        pairs = zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
        return [Point(step, value, known.get(step)) for step, value in pairs]

    def last(self, name: str) -> Point | None:
        """Return the last value of a held-out metric."""
        points = self.points(name)
        return points[-1] if points else None

    def smooth(self, name: str, *, skip: int = 0) -> tuple[Curve, np.ndarray]:
        """Return the running average of a metric, as training watches it, and its standard error, of one shape.

        `skip` leaves out the first values.
        """
        if (name, skip) not in self._smooth:
            steps, values = self.finite(name)
            self._smooth[name, skip] = running_average(Curve(steps[skip:], values[skip:]))
        return self._smooth[name, skip]

    @cached_property
    def noise_levels(self) -> list[str]:
        """The parts of the names of held-out metrics that say a noise level, clean images first."""
        found = {name.split("/")[1] for name in self.curves if name.startswith("eval/log_snr_")}
        return sorted((level for level in found if _is_number(level)), key=lambda level: -log_snr(level))


def log_snr(level: str) -> float:
    """Return the number in a name such as `log_snr_+1.23`."""
    return float(level.removeprefix("log_snr_"))


def running_average(curve: Curve) -> tuple[Curve, np.ndarray]:
    """Return the running average at every step and its standard error."""
    average, means, errors = Average(), np.empty(len(curve.steps)), np.empty(len(curve.steps))
    for i, value in enumerate(curve.values.tolist()):
        average.add(value)
        means[i], errors[i] = average.mean, average.standard_error
    return Curve(curve.steps, means), errors


def read_log(lines: Iterable[str]) -> Log:
    """Return the curves of the lines of a metrics.jsonl, which keep their line ends.

    A line that is not whole or no JSON object with a step is left out. Where steps go back, a run was continued from
    there: what it said before of these steps is replaced.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    num_damaged = num_replaced = 0
    is_last_cut = False
    for line in lines:
        if not line.strip():
            continue
        row = _row(line)
        is_last_cut = row is None and not line.endswith("\n")
        if row is None:
            num_damaged += not is_last_cut
            continue
        while rows and rows[-1][0] >= row[0]:
            rows.pop()
            num_replaced += 1
        rows.append(row)
    notes = []
    if is_last_cut:
        notes.append(
            "The last line of metrics.jsonl is half-written and left out: the run was stopped, or still works."
        )
    if num_damaged:
        notes.append(f"Of metrics.jsonl, {words.count(num_damaged, 'lines')} could not be read.")
    if num_replaced:
        notes.append(f"{words.count(num_replaced, 'steps')} logged twice: what was logged last is shown.")
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for step, values in rows:
        for name, value in values.items():
            if name != "step" and (value is None or isinstance(value, int | float)) and not isinstance(value, bool):
                steps, numbers = columns.setdefault(name, ([], []))
                steps.append(step)
                numbers.append(_number(value))
    curves = {name: Curve(np.array(steps, np.int64), np.array(numbers)) for name, (steps, numbers) in columns.items()}
    for role in ("chosen", "rejected"):
        pair = [curves.get(name, EMPTY) for name in (f"errors/{role}", f"errors/reference_{role}")]
        curves[f"errors/{role}_excess"] = _relative(*pair)
    ends = (rows[0][0], rows[-1][0]) if rows else (0, 0)
    return Log(curves, *ends, len(rows), tuple(notes))


def _row(line: str) -> tuple[int, dict[str, Any]] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return (step, row) if type(step) is int and 1 <= step < 2**53 else None


def _number(value: float | None) -> float:
    try:
        number = math.nan if value is None else float(value)
    except OverflowError:  # an integer of 400 digits
        return math.nan
    return number if abs(number) < _ABSURD else math.nan


def _relative(policy: Curve, reference: Curve) -> Curve:
    steps, left, right = np.intersect1d(policy.steps, reference.steps, assume_unique=True, return_indices=True)
    below = reference.values[right]
    known = below != 0  # it is 0 where a timestep weighs nothing
    return Curve(steps[known], policy.values[left][known] / below[known] - 1)


def _is_number(level: str) -> bool:
    try:
        return math.isfinite(log_snr(level))
    except ValueError:
        return False
