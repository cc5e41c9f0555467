"""What the held-out pairs say of a training run; docs/reading-the-curves.md explains each reading."""

import math

import numpy as np

from diffusion_dpo.report import alarms, words
from diffusion_dpo.report.alarms import FEWEST_STEPS, SURE
from diffusion_dpo.report.figures import relative as percent_text
from diffusion_dpo.report.figures import relative_with_error, significant, with_error
from diffusion_dpo.report.reading import Reading, beyond_chance, since_step, start_of_stretch
from diffusion_dpo.report.training_log import Log, Point, log_snr

MEMORISING = 0.15
"""What the training accuracy may be above the held-out accuracy."""
CONCENTRATED = 2.0
"""How many times the overall rise of the chosen error one noise level may have."""


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
    since = _step(start_of_stretch(points, lambda it: beyond_chance(it) == beyond_chance(last)))
    if beyond_chance(last) > 0:
        return Reading(
            "good",
            f"Held-out accuracy is {shown}, better than chance: of pairs that were never trained on, the policy, more "
            "than the reference, prefers the chosen image.",
            since=since,
            clause=f"Held-out accuracy is {shown}, better than chance",
        )
    if beyond_chance(last) < 0:
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
            since=_step(start_of_stretch(points, _is_worse)),
            clause="the policy forgets what was liked",
        )
    if _is_better(last):
        return Reading(
            "good",
            f"The chosen images are predicted better than by the reference ({shown}): what was liked became likelier.",
            since=_step(start_of_stretch(points, _is_better)),
        )
    return None


def _chosen_error_of_training(log: Log) -> Reading | None:
    curve, errors = log.smooth("errors/chosen_excess")
    holds = curve.values > np.maximum(alarms.WORSE, SURE * errors)
    since = since_step(curve, holds)
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
    since = start_of_stretch(both, lambda it: gap(*it))
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
    base = log.last("eval/kl_base")
    farther = f", and {significant(base.value)} from the pretrained model" if base is not None else ""
    return Reading(
        "plain",
        f"The policy is about {significant(last.value)} nats per image from the reference{farther} (an estimate of "
        f"the KL divergence{limit}).",
    )


def _is_worse(point: Point) -> bool:
    return alarms.is_worse(point.value, point.standard_error or 0.0)


def _is_better(point: Point) -> bool:
    return alarms.is_worse(-point.value, point.standard_error or 0.0)


def _step(point: Point | None) -> int | None:
    return point.step if point else None
