"""report.html of a training run: what its curves say, the curves, the previews and the settings, on one page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from diffusion_dpo.report import line_charts, words
from diffusion_dpo.report.alarms import SURE
from diffusion_dpo.report.figures import DASH, relative, relative_with_error, significant, with_error
from diffusion_dpo.report.line_charts import Chart, Line, Plot, plot
from diffusion_dpo.report.page import LONG_PROMPT, asset, fill
from diffusion_dpo.report.readings import LN_2, Findings, begins_at_ln_2
from diffusion_dpo.report.training_log import Log, Point, log_snr

PREVIEW_BUDGET_BYTES = 6_000_000
"""Of encoded previews; base64 adds a third."""
MAX_COLUMNS, MAX_ROWS = 24, 12
"""Of the film strip: steps, spread evenly with the first and the last among them, and prompts."""
MAX_EVALUATIONS = 48
"""Columns of the table by noise level."""


@dataclass(frozen=True)
class Film:
    """Previews: `images[row][column]` is of `prompts[row]` at `steps[column]`, RGB, None where there is none."""

    prompts: tuple[str, ...]
    steps: tuple[int, ...]
    images: tuple[tuple[Image.Image | None, ...], ...]
    num_steps: int
    """How many steps have previews; `steps` may be some of them."""


@dataclass(frozen=True)
class TrainingRun:
    """Everything that the page shows. Facts are lines of (name, value)."""

    name: str
    log: Log
    findings: Findings
    notes: tuple[str, ...] = ()
    """What could not be read, each in a sentence."""
    film: Film | None = None
    facts: tuple[tuple[str, str], ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    max_steps: int | None = None


def render(run: TrainingRun) -> str:
    """Return the page. It depends on its argument alone, so the same run gives the same bytes."""
    plots = [it for it in (plot(chart, run.log.first_step, run.log.last_step) for chart in charts(run.log)) if it]
    return fill(
        "training.html.j2",
        style=asset("report.css") + asset("training.css"),
        script=asset("training.js"),
        title=words.shorten(run.name, 80),
        run=run,
        tiles=_tiles(run),
        plots=plots,
        frame=line_charts,
        levels=_levels(run.log),
        film=_film(run.film) if run.film else None,
        data={"charts": [_readable(it) for it in plots]},
    )


# --- the curves ------------------------------------------------------------------------------------------------------


def charts(log: Log) -> list[Chart]:
    """Return the charts of a run, in their order on the page; those without a value are left out when drawn."""
    ln_2 = ((LN_2, "ln 2"),) if begins_at_ln_2(log) else ()
    return [
        Chart(
            "Accuracy",
            "How often the chosen image has the higher implicit reward; held-out pairs with ± one standard error",
            (_averaged(log, "rewards/accuracies", "training"), _held_out(log, "eval/accuracy", "held-out")),
            levels=((0.5, "chance"),),
        ),
        Chart(
            "Held-out errors",
            "Relative to the reference: below zero is better than before training, where the chosen one should stay",
            (
                _held_out(log, "eval/chosen_error", "chosen", "chosen"),
                _held_out(log, "eval/rejected_error", "rejected", "rejected"),
            ),
            "relative",
            ((0.0, "reference"),),
        ),
        Chart(
            "Training errors",
            "The same on the pairs of each step",
            (
                _averaged(log, "errors/chosen_excess", "chosen", "chosen"),
                _averaged(log, "errors/rejected_excess", "rejected", "rejected"),
            ),
            "relative",
            ((0.0, "reference"),),
        ),
        Chart(
            "Loss",
            "What is minimised. It falls as well when both errors rise",
            (_averaged(log, "loss", "training"), _held_out(log, "eval/loss", "held-out")),
            levels=ln_2,
        ),
        Chart(
            "Margin of rewards",
            "Chosen minus rejected, in units of the loss",
            (_averaged(log, "rewards/margins", "training"),),
            levels=((0.0, ""),),
        ),
        Chart(
            "Rewards",
            "Their difference is the margin; where both fall, it comes from making both images less likely",
            (
                _averaged(log, "rewards/chosen", "chosen", "chosen"),
                _averaged(log, "rewards/rejected", "rejected", "rejected"),
            ),
            levels=((0.0, ""),),
        ),
        Chart(
            "Distance from the reference",
            "Estimated KL divergence on held-out images, nats per image",
            (_held_out(log, "eval/kl", "held-out"),),
            levels=((0.0, ""),),
        ),
        Chart(
            "Gradient norm",
            "Before it is clipped, on a logarithmic axis",
            (_averaged(log, "grad_norm", "training"),),
            "log",
        ),
        Chart(
            "Learning rate",
            "What the optimizer used",
            (Line("training", "training", log.curve("learning_rate")),),
            levels=((0.0, ""),),
        ),
    ]


def _averaged(log: Log, metric: str, name: str, kind: Any = "training") -> Line:
    curve, _ = log.smooth(metric)
    return Line(name, kind, curve, raw=log.curve(metric))


def _held_out(log: Log, metric: str, name: str, kind: Any = "held_out") -> Line:
    curve, points = log.finite(metric), log.points(metric)
    errors = np.array([math.nan if it.standard_error is None else it.standard_error for it in points])
    band = errors if np.isfinite(errors).any() else None
    return Line(name, kind, curve, band=band, is_marked=True)


def _readable(it: Plot) -> dict[str, Any]:
    return {
        "names": [trace.name for trace in it.traces],
        "x": [at for at, _, _ in it.readable],
        "steps": [step for _, step, _ in it.readable],
        "values": [values for _, _, values in it.readable],
    }


# --- tiles and noise levels ------------------------------------------------------------------------------------------


def _tiles(run: TrainingRun) -> list[tuple[str, str, str, str]]:
    """Return (name, value, note, kind) of the numbers at the top."""
    log = run.log
    of = f"of {run.max_steps:,}" if run.max_steps is not None and run.max_steps != log.last_step else ""
    tiles = [("Steps", f"{log.last_step:,}", of, "")]
    accuracy = log.last("eval/accuracy")
    if accuracy:
        tiles.append(("Held-out accuracy", f"{accuracy.value:.2f}", _plus_minus(accuracy, 2), ""))
    elif log.smooth("rewards/accuracies")[0].steps.size:
        average = float(log.smooth("rewards/accuracies")[0].values[-1])
        tiles.append(("Training accuracy", f"{average:.2f}", "running average", ""))
    for role in ("chosen", "rejected"):
        point = log.last(f"eval/{role}_error")
        if point:
            value, _, error = relative_with_error(point).partition(" ± ")
            tiles.append((f"Error of {role}", value, f"± {error}" if error else "against the reference", ""))
    kl = log.last("eval/kl")
    if kl:
        tiles.append(("KL estimate", significant(kl.value), "nats per image", ""))
    return tiles


def _plus_minus(point: Point, places: int) -> str:
    return f"± {point.standard_error:.{places}f}" if point.standard_error else ""


def _levels(log: Log) -> dict[str, Any] | None:
    """Return the table by noise level: a row a level, cells from -1 to 1 a column, and the last value as text."""
    rows: list[dict[str, Any]] = []
    steps = sorted({step for level in log.noise_levels for step in log.curve(f"eval/{level}/accuracy").steps.tolist()})
    if not steps:
        return None
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_EVALUATIONS)).round().astype(int))
    shown = [steps[place] for place in places.tolist()]
    errors = [log.points(f"eval/{level}/chosen_error") for level in log.noise_levels]
    limit = max([0.05, *(abs(it.value) for points in errors for it in points)])
    for level in log.noise_levels:
        accuracy = {it.step: it for it in log.points(f"eval/{level}/accuracy")}
        error = {it.step: it for it in log.points(f"eval/{level}/chosen_error")}
        last = accuracy.get(shown[-1]), error.get(shown[-1])
        rows.append(
            {
                "level": words.number(log_snr(level), 1, signed=True),
                "accuracy": [_cell(accuracy.get(step), 0.5, 0.5, 1) for step in shown],
                "error": [_cell(error.get(step), 0.0, limit, -1) for step in shown],
                "last_accuracy": with_error(last[0]) if last[0] else DASH,
                "last_error": relative(last[1].value) if last[1] else DASH,
            }
        )
    return {"rows": rows, "steps": shown, "num_evaluations": len(steps)}


def _cell(point: Point | None, middle: float, limit: float, sign: int) -> dict[str, Any] | None:
    """Return how a cell is filled: its colour, how strongly, and whether it is surely different from the middle."""
    if point is None:
        return None
    distance = sign * (point.value - middle) / limit
    shown = f"{point.value:.2f}" if sign > 0 else relative(point.value)
    return {
        "kind": "better" if distance > 0 else "worse",
        "strength": round(0.12 + 0.88 * min(1.0, math.sqrt(abs(distance))), 2) if distance else 0,
        "is_sure": bool(point.standard_error) and abs(point.value - middle) > SURE * (point.standard_error or 0.0),
        "label": f"step {point.step:,}: {shown}",
    }


# --- previews --------------------------------------------------------------------------------------------------------


def pick_columns(steps: Sequence[int], limit: int = MAX_COLUMNS) -> list[int]:
    """Return at most `limit` of the rising steps, spread evenly, the last and then the first among them."""
    places = np.unique(np.linspace(len(steps) - 1, 0, min(len(steps), limit)).round().astype(int))
    return [steps[place] for place in places.tolist()]


def _film(film: Film) -> dict[str, Any]:
    from diffusion_dpo.report.gallery import SMALL_PX, thumbnails  # scipy, which takes long

    flat = [image for row in film.images for image in row if image is not None]
    uris = iter(thumbnails(flat, budget_bytes=PREVIEW_BUDGET_BYTES))
    rows = []
    for number, (prompt, images) in enumerate(zip(film.prompts, film.images, strict=True)):
        cells = [
            None if image is None else {"uri": next(uris), "step": step, "column": column, "size_px": image.size}
            for column, (step, image) in enumerate(zip(film.steps, images, strict=True))
        ]
        rows.append({"number": number, "prompt": words.shorten(prompt, LONG_PROMPT), "cells": cells})
    return {
        "rows": rows,
        "steps": film.steps,
        "num_left_out": film.num_steps - len(film.steps),
        "is_small": all(max(image.size) <= SMALL_PX for image in flat),
    }
