"""What the curves of a training run say, in plain sentences: each reading is a function of the metrics alone.

A reading claims what is further from its threshold than `SURE` standard errors, and nothing else: those of the
held-out metrics are over prompts, those of the running averages over steps. docs/reading-the-curves.md explains each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from diffusion_dpo.report import alarms, words
from diffusion_dpo.report.alarms import FEWEST_STEPS, SURE
from diffusion_dpo.report.figures import relative as percent_text
from diffusion_dpo.report.figures import relative_with_error, significant, with_error
from diffusion_dpo.report.training_log import Curve, Log, Point, log_snr

LN_2 = math.log(2)
FLAT = 0.01
"""Nats that a loss may be from ln 2 and still count as not having moved."""
MEMORISING = 0.15
"""What the training accuracy may be above the held-out accuracy."""
CONCENTRATED = 2.0
"""How many times the overall rise of the chosen error one noise level may have."""
_SPIKES_NAMED = 6
_ORDER = ("bad", "caution", "good", "plain")

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """One thing that the curves say, since when, and what to do; `clause` is its short form for a headline."""

    kind: Literal["good", "bad", "caution", "plain"]
    text: str
    advice: str = ""
    since: int | None = None
    clause: str = ""


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


# --- held-out pairs --------------------------------------------------------------------------------------------------


def held_out_accuracy(log: Log) -> Reading:
    """Whether pairs that were never trained on are told apart: accuracy beyond 0.5 by SURE standard errors."""
    points = log.points("eval/accuracy")
    if not points:
        return Reading(
            "caution",
            "No held-out pairs were evaluated, so nothing here shows whether anything was learned beyond the training "
            "pairs.",
            "evaluation.share=0.05 holds out every twentieth prompt; compare before and after in any case",
            clause="No pairs were held out: these curves show training alone",
        )
    last = points[-1]
    shown = with_error(last)
    if not last.standard_error:
        return Reading(
            "caution",
            f"Held-out accuracy is {shown}, without a standard error: too few prompts were held out to say how much "
            "of it is chance.",
            "Hold out more: evaluation.share, evaluation.max_pairs",
            clause=f"Held-out accuracy is {shown}, of too few prompts to tell it from chance",
        )
    since = _step(_since(points, lambda it: _beyond_chance(it) == _beyond_chance(last)))
    if _beyond_chance(last) > 0:
        return Reading(
            "good",
            f"Held-out accuracy is {shown}, better than chance: of pairs that were never trained on, the policy, more "
            "than the reference, prefers the chosen image.",
            since=since,
            clause=f"Held-out accuracy is {shown}, better than chance",
        )
    if _beyond_chance(last) < 0:
        return Reading(
            "bad",
            f"Held-out accuracy is {shown}, worse than chance: the policy prefers what was rejected.",
            "Look at some pairs with `diffusion-dpo inspect`: are chosen and rejected swapped, or is higher_is_better "
            "of the metric that labelled them wrong?",
            since=since,
            clause=f"Held-out accuracy is {shown}, worse than chance",
        )
    return Reading(
        "caution",
        f"Held-out accuracy is {shown}, which cannot be told from chance (0.50): it is within {SURE:.0f} standard "
        "errors of it.",
        "Hold out more pairs to see smaller gains: evaluation.share, evaluation.max_pairs",
        clause=f"Held-out accuracy, {shown}, cannot be told from chance",
    )


def chosen_error(log: Log) -> Reading | None:
    """Whether the chosen images are predicted worse than by the reference: by alarms.is_worse, on held-out pairs.

    Where no pairs are held out, by the running average over training steps, as training itself watches it.
    """
    points = [it for it in log.points("eval/chosen_error") if it.standard_error]
    if not points:
        return _chosen_error_of_training(log)
    last = points[-1]
    rejected = log.last("eval/rejected_error")
    shown = f"held-out error {relative_with_error(last)}"
    if _is_worse(last):
        both = rejected is not None and _is_worse(rejected)
        tail = f"; the rejected ones {percent_text(rejected.value)}" if both and rejected else ""
        return Reading(
            "bad",
            f"The chosen images are predicted worse than by the reference ({shown}{tail}): {alarms.FORGETS}.",
            alarms.KEEP_CHOSEN,
            since=_step(_since(points, _is_worse)),
            clause="the policy forgets what was liked",
        )
    if _is_better(last):
        return Reading(
            "good",
            f"The chosen images are predicted better than by the reference ({shown}): what was liked became likelier.",
            since=_step(_since(points, _is_better)),
        )
    return None


def _chosen_error_of_training(log: Log) -> Reading | None:
    curve, errors = log.smooth("errors/chosen_excess")
    holds = curve.values > np.maximum(alarms.WORSE, SURE * errors)
    since = _since_step(curve, holds)
    if since is None:
        return None
    return Reading(
        "bad",
        "The chosen images of the training pairs are predicted worse than by the reference (error "
        f"{percent_text(float(curve.values[-1]))}): {alarms.FORGETS}.",
        alarms.KEEP_CHOSEN,
        since=since,
        clause="the policy forgets what was liked",
    )


def memorising(log: Log) -> Reading | None:
    """Whether training pairs are told apart far better than held-out ones: by MEMORISING, and surely."""
    curve, errors = log.smooth("rewards/accuracies")
    points = [it for it in log.points("eval/accuracy") if it.standard_error]
    if not points or len(curve.steps) < FEWEST_STEPS:
        return None
    places = np.searchsorted(curve.steps, [it.step for it in points], side="right") - 1

    def gap(point: Point, place: int) -> bool:
        if place + 1 < FEWEST_STEPS:
            return False
        gap = float(curve.values[place]) - point.value
        return gap > max(MEMORISING, SURE * math.hypot(point.standard_error or 0.0, float(errors[place])))

    both = list(zip(points, places.tolist(), strict=True))
    since = _since(both, lambda it: gap(*it))
    if since is None:
        return None
    return Reading(
        "bad",
        f"The training accuracy is {curve.values[-1]:.2f} while that of held-out pairs is {with_error(points[-1])}: "
        "the policy memorises its pairs.",
        "Take more pairs, stop earlier, or hold it closer to the reference: a larger beta, a smaller LoRA rank",
        since=since[0].step,
        clause="it memorises its pairs",
    )


def past_its_best(log: Log) -> Reading | None:
    """Whether the held-out accuracy was higher before, by SURE standard errors of the difference.

    The evaluations are of the same pairs, so that the error of the difference is smaller than is taken here.
    """
    points = [it for it in log.points("eval/accuracy") if it.standard_error]
    if len(points) < 2:
        return None
    best, last = max(points, key=lambda it: it.value), points[-1]
    if best.value - last.value <= SURE * math.hypot(best.standard_error or 0.0, last.standard_error or 0.0):
        return None
    return Reading(
        "bad",
        f"Held-out accuracy was best at step {best.step:,}, {with_error(best)}, and has fallen to {with_error(last)}.",
        f"Train again with max_steps={best.step}, or with a smaller learning_rate",
        clause=f"it was better at step {best.step:,}",
    )


def noise_levels(log: Log) -> Reading | None:
    """Which noise level the chosen images suffer at most: CONCENTRATED times the overall rise of their error."""
    overall = log.last("eval/chosen_error")
    found = [(log.last(f"eval/{level}/chosen_error"), level) for level in log.noise_levels]
    worst = max(((it, level) for it, level in found if it), key=lambda it: it[0].value, default=None)
    if overall is None or worst is None or not worst[0].standard_error or not _is_worse(worst[0]):
        return None
    margin = worst[0].value - CONCENTRATED * max(overall.value, 0.0)
    if margin <= SURE * worst[0].standard_error:
        return None
    value = log_snr(worst[1])
    where = "where images are almost clean" if value > 2 else "where they are almost noise" if value < -2 else ""
    return Reading(
        "caution",
        f"At log SNR {words.number(value, 2, signed=True)}{', ' * bool(where)}{where}, the chosen images' error has "
        f"risen most: {percent_text(worst[0].value)}, against {percent_text(overall.value)} over all noise levels.",
        "weighting.timestep_range leaves noise levels out, weighting.timesteps=min_snr weighs them differently",
    )


def divergence(log: Log, max_kl: float | None = None) -> Reading | None:
    """How far the policy is from the reference: an estimate without a standard error, so no claim is made of it."""
    last = log.last("eval/kl")
    if last is None:
        return None
    limit = f"; training ends above {max_kl:g}" if max_kl is not None else ""
    return Reading(
        "plain",
        f"The policy is about {significant(last.value)} nats per image from the reference (an estimate of the KL "
        f"divergence{limit}).",
    )


# --- every step ------------------------------------------------------------------------------------------------------


def saturated(log: Log) -> Reading | None:
    """Whether next to nothing is left to learn from the training pairs: alarms.SATURATED; memorising says it, too."""
    curve, _ = log.smooth("rewards/accuracies")
    since = _since_step(curve, curve.values > alarms.SATURATED)
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
    """Whether a loss that began at ln 2 is still there, within FLAT."""
    loss = _loss_from_ln_2(log)
    if loss is None or abs(loss - LN_2) >= FLAT:
        return None
    accuracy = _training_accuracy(log)
    if accuracy is None:
        return None
    more = "A larger learning_rate, or more steps; `diffusion-dpo train --find-beta` recommends one"
    if _beyond_chance(accuracy) == 0:
        return Reading(
            "bad",
            f"The loss is still ln 2 ({loss:.4f}) and the training accuracy at chance ({with_error(accuracy)}): "
            "nothing was learned.",
            more,
            clause="nothing was learned",
        )
    return Reading(
        "bad",
        f"The loss is still ln 2 ({loss:.4f}) though the training accuracy is {with_error(accuracy)}: the policy has "
        "hardly moved from the reference. Accuracy counts signs alone, however small what is behind them.",
        more,
        clause="the policy has hardly moved",
    )


def at_chance(log: Log) -> Reading | None:
    """Whether the loss moved without the training pairs being told apart."""
    loss, accuracy = _loss_from_ln_2(log), _training_accuracy(log)
    if loss is None or accuracy is None or abs(loss - LN_2) < FLAT or _beyond_chance(accuracy) > 0:
        return None
    return Reading(
        "bad",
        f"The loss went from ln 2 to {loss:.3g}, yet the training accuracy is {with_error(accuracy)}, no better than "
        "chance: the steps are too large, or the labels are noise.",
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
    since = _since_step(average, np.abs(average.values) > alarms.LOGIT_LIMIT)
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


# --- comparisons -------------------------------------------------------------------------------------------


def _beyond_chance(point: Point) -> int:
    """Return 1 above, -1 below, and 0 within SURE standard errors of 0.5, or where there is no standard error."""
    if point.standard_error is None:
        return 0
    distance = point.value - 0.5
    return int(math.copysign(1, distance)) if abs(distance) > SURE * point.standard_error else 0


def _is_worse(point: Point) -> bool:
    return alarms.is_worse(point.value, point.standard_error or 0.0)


def _is_better(point: Point) -> bool:
    return alarms.is_worse(-point.value, point.standard_error or 0.0)


def _loss_from_ln_2(log: Log) -> float | None:
    """Return the running average of a loss that began at ln 2, None for others."""
    curve, _ = log.smooth("loss")
    began = len(curve.steps) and curve.steps[0] == 1 and abs(curve.values[0] - LN_2) < FLAT
    return float(curve.values[-1]) if began else None


def _training_accuracy(log: Log) -> Point | None:
    curve, errors = log.smooth("rewards/accuracies")
    return Point(int(curve.steps[-1]), float(curve.values[-1]), float(errors[-1])) if len(curve.steps) else None


def _since(points: Sequence[T], holds: Callable[[T], bool]) -> T | None:
    """Return the first point of the unbroken stretch that holds up to the last one; None where that one does not."""
    found = None
    for point in reversed(points):
        if not holds(point):
            break
        found = point
    return found


def _step(point: Point | None) -> int | None:
    return point.step if point else None


def _since_step(curve: Curve, holds: np.ndarray) -> int | None:
    """Return the step from which on it holds unbroken to the end, not counting the first FEWEST_STEPS - 1."""
    if len(curve.steps) < FEWEST_STEPS or not holds[-1]:
        return None
    broken = np.flatnonzero(~holds)
    first = max(int(broken[-1]) + 1 if len(broken) else 0, FEWEST_STEPS - 1)
    return int(curve.steps[first])
