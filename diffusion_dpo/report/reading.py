"""A reading of the curves, and the comparisons that all readings make."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from diffusion_dpo.report.alarms import FEWEST_STEPS, SURE
from diffusion_dpo.report.training_log import Curve, Point

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """One thing that the curves say, since when, and what to do; `clause` is its short form for a headline."""

    kind: Literal["good", "bad", "caution", "plain"]
    text: str
    advice: str = ""
    since: int | None = None
    clause: str = ""


def beyond_chance(point: Point) -> int:
    """Return 1 above, -1 below, and 0 within SURE standard errors of 0.5, or where there is no standard error."""
    if point.standard_error is None:
        return 0
    distance = point.value - 0.5
    return int(math.copysign(1, distance)) if abs(distance) > SURE * point.standard_error else 0


def start_of_stretch(points: Sequence[T], holds: Callable[[T], bool]) -> T | None:
    """Return the first point of the unbroken stretch that holds up to the last one; None where that one does not."""
    found = None
    for point in reversed(points):
        if not holds(point):
            break
        found = point
    return found


def since_step(curve: Curve, holds: np.ndarray) -> int | None:
    """Return the step from which on it holds unbroken to the end, not counting the first FEWEST_STEPS - 1."""
    if len(curve.steps) < FEWEST_STEPS or not holds[-1]:
        return None
    broken = np.flatnonzero(~holds)
    first = max(int(broken[-1]) + 1 if len(broken) else 0, FEWEST_STEPS - 1)
    return int(curve.steps[first])
