"""Signs of reward hacking: numbers that move when a model learns to please its judge instead of drawing better.

Each is a plain sentence, with its interval, and warns where it moved further than chance and habit allow. Judges like
bright, saturated, sharp images; a policy that is pushed too far draws one image per prompt; and one that does nothing
at all draws the baseline's.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from diffusion_dpo.report import BASELINE, MetricResult, MetricScores, Sign, words
from diffusion_dpo.report.statistics import mean_interval, prompt_means
from diffusion_dpo.report.training_log import Point

APPEARANCE = {
    "brightness": ("brighter", "darker"),
    "saturation": ("more saturated", "paler"),
    "colorfulness": ("more colourful", "less colourful"),
    "sharpness": ("sharper", "softer"),
}
"""What can be seen of an image without understanding it, and what more and less of it is called."""
_SHIFT = 0.5
"""Of the baseline's standard deviation between prompts: a shift that one sees."""
_LESS_DIVERSE = 0.1
"""Of the baseline's diversity."""
_FAR = 0.9
"""Of the distance between two seeds of the baseline."""


def appearance(scores: MetricScores, result: MetricResult) -> Sign:
    """Say how light or colour moved; it warns where the interval excludes 0 and the shift is one that is seen."""
    more, less = APPEARANCE[scores.name]
    spread = float(np.nanstd(prompt_means(scores.values[BASELINE]))) if result.num_prompts > 1 else 0.0
    change, interval = result.mean_difference, result.mean_difference_interval
    places = words.places_of(result)
    clear = interval is not None and not interval[0] <= 0 <= interval[1]
    warns = clear and change is not None and abs(change) > _SHIFT * spread
    if not clear or change is None:
        sentence = f"{scores.name} did not change measurably"
    else:
        sentence = (
            f"the images are {more if change > 0 else less}: {scores.name} went from "
            f"{words.number(result.mean_baseline, places)} to {words.number(result.mean, places)}"
        )
        if warns:
            sentence += ", more than half of what prompts differ by; judges often reward this alone"
    return _sign(result, scores.name, interval, warns, sentence)


def diversity(result: MetricResult) -> Sign:
    """Say whether the images of a prompt still differ; it warns where they clearly do less, by a tenth or more."""
    change, interval, before = result.mean_difference, result.mean_difference_interval, result.mean_baseline
    places = words.places_of(result)
    numbers = f"{result.name}: {words.number(before, places)} to {words.number(result.mean, places)}"
    warns = bool(interval and before and change is not None and interval[1] < 0 and change < -_LESS_DIVERSE * before)
    amount = "as much as"
    if interval is not None and not interval[0] <= 0 <= interval[1]:
        amount = "more than" if interval[0] > 0 else "less than" if warns else "a little less than"
    sentence = f"the images of a prompt differ {amount} the baseline's ({numbers})" + ": variety was lost" * warns
    return _sign(result, "diversity", interval, warns, sentence)


def distance(model: str, name: str, moved: np.ndarray, yardstick: np.ndarray | None, *, is_same: bool) -> Sign:
    """Say how far a model's images moved; `moved` (num_prompts, seeds), `yardstick` between seeds of the baseline.

    It warns where they did not move at all (`is_same`: every pixel is), and where they moved as far as another seed
    would.
    """
    per_prompt = prompt_means(moved)
    per_prompt = per_prompt[np.isfinite(per_prompt)]
    value = float(per_prompt.mean()) if per_prompt.size else None
    between = float(np.nanmean(yardstick)) if yardstick is not None and np.isfinite(yardstick).any() else None
    share = value / between if value is not None and between else None
    warns = is_same or (share is not None and share > _FAR)
    if is_same:
        sentence = "its images are the baseline's, pixel by pixel: the adapter does nothing here"
    elif value is None:
        sentence = f"how far its images moved could not be judged ({name})"
    elif share is None:
        sentence = f"its images are {value:.3g} away from the baseline's ({name})"
    else:
        sentence = f"its images moved by {value:.3g}, {words.percent(share)} of the way to another seed's ({name})"
        if warns:
            sentence += ": little of what the baseline would draw is left"
    return Sign(
        model=model,
        name="distance",
        baseline=between,
        value=value,
        interval=mean_interval(per_prompt),
        warns=warns,
        sentence=sentence,
    )


def implicit_accuracy(model: str, accuracy: Point) -> Sign:
    """Say how often the model prefers the chosen image of held-out pairs, as training measured it.

    It warns unless the interval is above one half. The page of a run, which is looked at often, asks for more.
    """
    side, interval = 0, None
    sentence = f"on held-out pairs it prefers the chosen image in {words.percent(accuracy.value)}"
    if accuracy.standard_error is not None:
        half = 1.96 * accuracy.standard_error
        interval = (max(0.0, accuracy.value - half), min(1.0, accuracy.value + half))
        side = (interval[0] > 0.5) - (interval[1] < 0.5)
        sentence += f" ({words.percent(interval[0])} to {words.percent(interval[1])})"
    if side == 0:
        sentence += ": this may be chance" if interval else ": of too few prompts to tell it from chance"
    elif side < 0:
        sentence += ": less often than chance would, as if chosen and rejected were swapped"
    return Sign(
        model=model,
        name="implicit_accuracy",
        baseline=None,
        value=accuracy.value,
        interval=interval,
        warns=side <= 0,
        sentence=sentence,
    )


def trained_on_only(results: Sequence[MetricResult]) -> Iterable[Sign]:
    """Say where the judge of the training pairs rose and no held-out one did; nothing where there is no such judge."""
    main = [result for result in results if not result.auxiliary and result.num_pairs]
    trained = [result for result in main if result.role == "trained_on" and words.verdict(result) == "better"]
    held_out = [result for result in main if result.role in ("held_out", "human")]
    if not trained or not held_out:
        return
    better = [result.name for result in held_out if words.verdict(result) == "better"]
    if better:
        sentence = f"{trained[0].name}, which labelled the training pairs, is better, and so is {words.listed(better)}"
    else:
        sentence = (
            f"{trained[0].name} labelled the training pairs and is better, yet no held-out metric is: the model may "
            "have learnt to please the judge rather than to draw better"
        )
    yield _sign(trained[0], "trained_on_only", trained[0].mean_difference_interval, not better, sentence)


def _sign(result: MetricResult, name: str, interval: tuple[float, float] | None, warns: bool, sentence: str) -> Sign:
    return Sign(
        model=result.model,
        name=name,
        baseline=result.mean_baseline,
        value=result.mean,
        interval=interval,
        warns=warns,
        sentence=sentence,
    )
