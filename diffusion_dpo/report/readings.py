"""What the curves of a training run say, in plain sentences: each reading is a function of the metrics alone.

A reading claims what is further from its threshold than `SURE` standard errors, and nothing else: those of the
held-out metrics are over prompts, those of the running averages over steps. docs/reading-the-curves.md explains each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffusion_dpo.report import alarms, words
from diffusion_dpo.report.alarms import FEWEST_STEPS, SURE
from diffusion_dpo.report.figures import significant, with_error
from diffusion_dpo.report.held_out_readings import (
    chosen_error,
    divergence,
    held_out_accuracy,
    memorising,
    noise_levels,
    past_its_best,
)
from diffusion_dpo.report.reading import Reading, beyond_chance, since_step
from diffusion_dpo.report.training_log import Curve, Log, Point

LN_2 = math.log(2)
FLAT = 0.01
"""Nats that a loss may be from ln 2 and still count as not having moved."""
_SPIKES_NAMED = 6
_ORDER = ("bad", "caution", "good", "plain")


@dataclass(frozen=True)
class Findings:
    """All readings of a run, the verdict on held-out pairs first, and the headline made of them."""

    headline: str
    readings: tuple[Reading, ...]


def read(log: Log, *, relative: bool, max_steps: int | None = None, max_kl: float | None = None) -> Findings:
    """Return what the curves say; `relative` says whether rewards are measured against the reference."""
    if log.num_steps < FEWEST_STEPS:
        text = f"Only {words.count(log.num_steps, 'steps')}: too few to read anything from"
        few = Reading("plain", f"{text}. From step {FEWEST_STEPS} on, there is more here.")
        return Findings(text, tuple(it for it in (few, unfinished(log, max_steps, max_kl)) if it))
    verdict = held_out_accuracy(log)
    found = [
        large_margin(log) if relative else None,
        chosen_error(log),
        memorising(log) if relative else None,
        saturated(log) if relative else None,
        past_its_best(log),
        not_moved(log) if relative else None,
        at_chance(log) if relative else None,
        gradient_spikes(log),
        skipped_steps(log),
        noise_levels(log),
        divergence(log, max_kl),
        unfinished(log, max_steps, max_kl),
    ]
    others = sorted((it for it in found if it is not None), key=lambda it: _ORDER.index(it.kind))
    return Findings(_headline(verdict, others), (verdict, *others))


def _headline(verdict: Reading, others: Sequence[Reading]) -> str:
    trouble = next((it.clause for it in others if it.kind == "bad" and it.clause), "")
    if not trouble:
        return verdict.clause
    return f"{verdict.clause}, {'but' if verdict.kind == 'good' else 'and'} {trouble}"


# --- every step ------------------------------------------------------------------------------------------------------


def saturated(log: Log) -> Reading | None:
    """Whether next to nothing is left to learn from the training pairs: alarms.SATURATED; memorising says it, too."""
    curve, _ = log.smooth("rewards/accuracies")
    since = since_step(curve, curve.values > alarms.SATURATED)
    if since is None or memorising(log) is not None:
        return None
    return Reading(
        "caution",
        f"The implicit accuracy on training pairs is {curve.values[-1]:.2f}: from here on the margin grows without "
        "learning.",
        alarms.STOP_EARLIER,
        since=since,
    )


def not_moved(log: Log) -> Reading | None:
    """Whether a loss that began at ln 2 is still there: within FLAT, or as far as its standard error can tell."""
    loss, accuracy = _loss_from_ln_2(log), _training_accuracy(log)
    if loss is None or accuracy is None or _has_moved(loss):
        return None
    more = "A larger learning_rate, or more steps; `diffusion-dpo train --find-beta` recommends one"
    if beyond_chance(accuracy) <= 0:
        return Reading(
            "bad",
            f"The loss is still ln 2 ({with_error(loss, 4)}) and the training accuracy no better than chance "
            f"({with_error(accuracy)}): nothing was learned.",
            more,
            clause="nothing was learned",
        )
    if abs(loss.value - LN_2) >= FLAT:
        return None
    return Reading(
        "bad",
        f"The loss is still ln 2 ({with_error(loss, 4)}) though the training accuracy is {with_error(accuracy)}: the "
        "policy has hardly moved from the reference. Accuracy counts signs alone, however small what is behind them.",
        more,
        clause="the policy has hardly moved",
    )


def at_chance(log: Log) -> Reading | None:
    """Whether the loss moved without the training pairs being told apart."""
    loss, accuracy = _loss_from_ln_2(log), _training_accuracy(log)
    if loss is None or accuracy is None or not _has_moved(loss) or beyond_chance(accuracy) > 0:
        return None
    return Reading(
        "bad",
        f"The loss went from ln 2 to {loss.value:.3g}, yet the training accuracy is {with_error(accuracy)}, no better "
        "than chance: the steps are too large, or the labels are noise.",
        "A smaller learning_rate first; then look at the pairs: `diffusion-dpo inspect`, and `pair audit=50` for a "
        "check by eye",
        clause="its training pairs are not told apart",
    )


def large_margin(log: Log) -> Reading | None:
    """Whether mean margins of rewards are beyond alarms.LOGIT_LIMIT: on average, which is bad, or in single steps."""
    curve = log.finite("rewards/margins")
    average, _ = log.smooth("rewards/margins")
    steps = curve.steps[np.abs(curve.values) > alarms.LOGIT_LIMIT]
    if not len(steps):
        return None
    largest = float(curve.values[np.abs(curve.values).argmax()])
    since = since_step(average, np.abs(average.values) > alarms.LOGIT_LIMIT)
    return Reading(
        "caution" if since is None else "bad",
        f"The mean margin of rewards was beyond ±{alarms.LOGIT_LIMIT:.0f} in {len(steps):,} of {len(curve.steps):,} "
        f"steps, the first of them step {int(steps[0]):,}, and {significant(largest)} at most, "
        f"{alarms.FLAT_OR_EXPLODES}.",
        since=since,
        clause="its margins are where the loss no longer works",
    )


def gradient_spikes(log: Log) -> Reading | None:
    """At which steps the gradient's norm was alarms.SPIKE times its running average before."""
    curve = log.finite("grad_norm")
    average, _ = log.smooth("grad_norm")
    before, now = average.values[:-1], curve.values[1:]
    jumps = np.flatnonzero((now > alarms.SPIKE * before) & (before > 0)) + 1
    steps = curve.steps[jumps[jumps + 1 >= FEWEST_STEPS]].tolist()
    if not steps:
        return None
    named = ", ".join(f"{step:,}" for step in steps[:_SPIKES_NAMED])
    more = f" and {len(steps) - _SPIKES_NAMED:,} more" if len(steps) > _SPIKES_NAMED else ""
    return Reading(
        "caution",
        f"The gradient's norm jumped to more than {alarms.SPIKE:.0f} times its running average at "
        f"step{'s'[: len(steps) != 1]} {named}{more}.",
        f"If the curves jump there, too: {alarms.CALM_GRADIENT}",
    )


def skipped_steps(log: Log) -> Reading | None:
    """How many gradients were not finite, which fp16 answers by skipping the step."""
    curve = log.curve("grad_norm")
    amount = int(np.isnan(curve.values).sum())
    if not amount:
        return None
    return Reading(
        "plain",
        f"In {words.count(amount, 'steps')} the gradient was not finite and the step was skipped: fp16 finds its "
        "scale like this, a few times at the start.",
        "If it goes on: mixed_precision=bf16" if amount > len(curve.values) / 100 else "",
    )


def unfinished(log: Log, max_steps: int | None, max_kl: float | None = None) -> Reading | None:
    """Whether steps are left to take."""
    if max_steps is None or log.last_step >= max_steps:
        return None
    kl = log.last("eval/kl")
    if max_kl is not None and kl is not None and kl.value > max_kl:
        return Reading("plain", f"Training ended at step {log.last_step:,}, beyond evaluation.max_kl={max_kl:g}.")
    return Reading(
        "plain", f"{log.last_step:,} of {max_steps:,} steps are taken so far; the same command takes the others."
    )


def begins_at_ln_2(log: Log) -> bool:
    """Whether the loss of the first step is that of a policy which is its reference."""
    loss = log.finite("loss")
    return len(loss.steps) > 0 and int(loss.steps[0]) == 1 and abs(float(loss.values[0]) - LN_2) < FLAT


def _loss_from_ln_2(log: Log) -> Point | None:
    """Return the running average of a loss that began at ln 2, None for others; the first step is not in it."""
    return _last(log.smooth("loss", skip=1)) if begins_at_ln_2(log) else None


def _has_moved(loss: Point) -> bool:
    return abs(loss.value - LN_2) > max(FLAT, SURE * (loss.standard_error or 0.0))


def _training_accuracy(log: Log) -> Point | None:
    return _last(log.smooth("rewards/accuracies"))


def _last(average: tuple[Curve, np.ndarray]) -> Point | None:
    curve, errors = average
    return Point(int(curve.steps[-1]), float(curve.values[-1]), float(errors[-1])) if len(curve.steps) else None
