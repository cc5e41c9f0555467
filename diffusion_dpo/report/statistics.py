"""Paired statistics with the prompt as the unit: images of one prompt resemble each other, prompts are independent.

Both intervals cover 95 %. The mean difference gets a percentile bootstrap over prompts. The win rate gets Wilson's
score interval (J. Am. Stat. Assoc. 22, 1927) at the *effective* number of prompts, num_prompts times binomial variance
over observed variance, as surveys do for clustered answers (Franco et al., J. Surv. Stat. Methodol. 7, 2019). With one
seed per prompt and no ties that is Wilson's own interval; unlike a bootstrap it stays honest when all pairs are won.

When most prompts tie, a handful of prompts carries all the evidence and both intervals are too narrow. So the
effective number never exceeds the number of pairs, and an interval excludes "no effect" only where a sign-flip test
over the prompts that changed (Fisher, The Design of Experiments, 1935, section 21) rejects it too.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from diffusion_dpo.report import BASELINE, Interval, MetricResult, MetricScores, Role
from diffusion_dpo.report.words import FEWEST_PROMPTS

CONFIDENCE = 0.95
NUM_RESAMPLES = 9999
POWER = 0.8
METHODS = {
    "unit": "the prompt: values are averaged over the seeds of a prompt first, then over prompts",
    "mean_difference_interval": f"95 % percentile bootstrap over prompts, {NUM_RESAMPLES} resamples, fixed seed",
    "win_rate_interval": "95 % Wilson score interval at the effective number of prompts, at most the number of pairs",
    "no effect": "an interval is widened to include no effect (0, or a win rate of one half) unless a two-sided "
    "sign-flip test over the prompts that changed rejects it at 5 %",
    "p_value": "two-sided Wilcoxon signed-rank test of the per-prompt mean differences; prompts that tie are left out",
    "p_holm": "the same after Holm's correction over the main metrics of a model",
    "wins, ties, losses": "counted per pair of images (same prompt, same seed); a tie is an exactly equal score",
    "missing": "a pair with an image that could not be scored is left out of that metric and counted, never a zero",
    "prompts_needed": f"prompts for which an interval excludes one half with a probability of {POWER:.0%}, by the "
    "normal approximation, with the spread between prompts that was observed (where there was any)",
}
_MAX_ENUMERATED = 12
"""Up to this many changed prompts all 2^n signs are tried; above, NUM_RESAMPLES random ones."""
_BATCH_ELEMENTS = 2_000_000


def paired_statistics(
    baseline: ArrayLike,
    other: ArrayLike,
    *,
    higher_is_better: bool = True,
    name: str = "score",
    model: str = "model",
    category: str = "",
    role: Role = "held_out",
    auxiliary: bool = False,
) -> MetricResult:
    """Return the statistics of paired scores, arrays of shape (num_prompts,) or (num_prompts, seeds), NaN: no score.

    Element by element, both come from the same prompt, seed and noise. Swapping them flips every difference and
    mirrors every win. Raises ValueError for other shapes.
    """
    first, second = (np.atleast_1d(np.asarray(values, dtype=float)) for values in (baseline, other))
    if first.shape != second.shape or first.ndim > 2:
        raise ValueError(
            f"paired scores must both be of shape (num_prompts,) or (num_prompts, seeds), not {first.shape} and "
            f"{second.shape}"
        )
    first, second = (values.reshape(len(values), -1) for values in (first, second))
    differences = second - first
    scored = np.isfinite(differences)
    outcomes = np.sign(differences) * (1 if higher_is_better else -1)
    per_prompt = _known(prompt_means(differences))
    win_rates = 0.5 + 0.5 * prompt_means(outcomes)
    return MetricResult(
        name=name,
        model=model,
        category=category,
        role=role,
        auxiliary=auxiliary,
        higher_is_better=higher_is_better,
        num_prompts=per_prompt.size,
        num_pairs=int(scored.sum()),
        num_missing=int((~scored).sum()),
        mean_baseline=_mean(prompt_means(np.where(scored, first, np.nan))),
        mean=_mean(prompt_means(np.where(scored, second, np.nan))),
        mean_difference=_mean(per_prompt),
        mean_difference_interval=mean_interval(per_prompt),
        median_difference=float(np.median(per_prompt)) if per_prompt.size else None,
        difference_std=float(per_prompt.std(ddof=1)) if per_prompt.size > 1 else None,
        win_rate=_mean(win_rates),
        win_rate_std=float(known.std(ddof=1)) if (known := _known(win_rates)).size > 1 else None,
        win_rate_interval=win_rate_interval(outcomes),
        wins=int((outcomes > 0).sum()),
        ties=int((outcomes == 0).sum()),
        losses=int((outcomes < 0).sum()),
        p_value=wilcoxon_p(per_prompt),
    )


def summarise(
    metric: MetricScores, model: str, *, prompts: np.ndarray | None = None, category: str = ""
) -> MetricResult:
    """Return one metric of one model against the baseline; `prompts`, indices or a mask, are those of a category."""
    baseline, other = (metric.values[name] for name in (BASELINE, model))
    if prompts is not None:
        baseline, other = baseline[prompts], other[prompts]
    return paired_statistics(
        baseline,
        other,
        higher_is_better=metric.higher_is_better,
        name=metric.name,
        model=model,
        category=category,
        role=metric.roles.get(model, metric.role),
        auxiliary=metric.auxiliary,
    )


def summarise_all(scores: Sequence[MetricScores], categories: Sequence[str]) -> list[MetricResult]:
    """Return every metric of every model, on all prompts (with Holm's correction) and then by category.

    `categories` has the category of each prompt; where all are the same there is nothing to divide.
    """
    models = [name for name in scores[0].values if name != BASELINE] if scores else []
    results: list[MetricResult] = []
    for model in models:
        results += correct([summarise(metric, model) for metric in scores])
    names = list(dict.fromkeys(name for name in categories if name))
    labels = np.array(categories)
    for category in names if len(set(categories)) > 1 else []:
        rows = np.flatnonzero(labels == category)
        results += [summarise(m, model, prompts=rows, category=category) for model in models for m in scores]
    return results


def correct(results: Sequence[MetricResult]) -> list[MetricResult]:
    """Return the results of one model with `p_holm` over its main metrics."""
    tested = [i for i, it in enumerate(results) if not it.auxiliary and it.p_value is not None]
    adjusted = dict(zip(tested, holm([results[i].p_value or 0.0 for i in tested]), strict=True))
    return [it.model_copy(update={"p_holm": adjusted[i]}) if i in adjusted else it for i, it in enumerate(results)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, in the same order (Holm, Scand. J. Stat. 6, 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def wilcoxon_p(per_prompt: np.ndarray) -> float | None:
    """Return the two-sided p of Wilcoxon's signed-rank test; None with fewer than two prompts, 1 where all tie."""
    if per_prompt.size < 2:
        return None
    changed = per_prompt[per_prompt != 0]
    return float(stats.wilcoxon(changed).pvalue) if changed.size else 1.0


def prompts_needed(win_rate: float, spread: float | None = None) -> int:
    """Return how many prompts would show a win rate other than one half, with a probability of 80 % (POWER).

    `spread` is the `win_rate_std` of an earlier comparison; without it, one seed a prompt and no ties are assumed,
    which needs most. Never fewer than 20 (FEWEST_PROMPTS). Raises ValueError unless win_rate is in (0, 1) and not one
    half.
    """
    if not 0 < win_rate < 1 or win_rate == 0.5:
        raise ValueError(f"a win rate must lie between 0 and 1, and not be one half: {win_rate:g}")
    binomial = math.sqrt(win_rate * (1 - win_rate))
    # Wilson's interval excludes one half where a test with the variance under one half rejects it
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * 0.5 / binomial + float(stats.norm.ppf(POWER))
    return max(FEWEST_PROMPTS, math.ceil((z * (spread or binomial) / (win_rate - 0.5)) ** 2))


def pair_differences(metric: MetricScores, model: str) -> np.ndarray:
    """Return model minus baseline of shape (num_prompts, seeds), NaN where either score is missing."""
    return metric.values[model] - metric.values[BASELINE]


def prompt_means(values: np.ndarray) -> np.ndarray:
    """Average over seeds: (num_prompts, seeds) to (num_prompts,), NaN for a prompt without any value."""
    counts = np.isfinite(values).sum(axis=1)
    return np.where(counts > 0, np.nansum(values, axis=1), np.nan) / np.maximum(counts, 1)


def mean_interval(per_prompt: np.ndarray, *, num_resamples: int = NUM_RESAMPLES) -> Interval | None:
    """Return the 95 % interval of the mean of per-prompt values, None with fewer than two.

    The data are resampled with the sign of their first nonzero value, so negating them negates the interval exactly.
    """
    if per_prompt.size < 2:
        return None
    if np.ptp(per_prompt) == 0:
        value = float(per_prompt[0])
        return _include((value, value), 0.0, per_prompt)
    sign = float(np.sign(per_prompt[np.flatnonzero(per_prompt)[0]]))
    result = stats.bootstrap(
        (sign * per_prompt,),
        np.mean,
        n_resamples=num_resamples,
        batch=max(1, _BATCH_ELEMENTS // per_prompt.size),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = sorted((sign * float(result.confidence_interval.low), sign * float(result.confidence_interval.high)))
    return _include((low, high), 0.0, per_prompt)


def win_rate_interval(outcomes: np.ndarray) -> Interval | None:
    """Return the 95 % interval of the win rate; `outcomes` (num_prompts, seeds): 1 won, 0 tied, -1 lost, NaN missing.

    The variance is the larger of that between prompts and what independent pairs would give, so that seeds never count
    for more than they can know.
    """
    return share_interval(_known(prompt_means(outcomes)), _known(outcomes))


def share_interval(per_prompt: np.ndarray, pairs: np.ndarray) -> Interval | None:
    """Return the same where prompts have any number of pairs; of shape (num_prompts,) and (num_pairs,), no NaN."""
    if per_prompt.size == 0:
        return None
    advantage = float(per_prompt.mean())  # win rate 1/2 + advantage/2
    variance = max(float(per_prompt.var()), float(pairs.var()) * per_prompt.size / pairs.size)
    if abs(advantage) == 1:
        effective = float(per_prompt.size)
    elif variance == 0:  # nothing but ties
        return 0.5, 0.5
    else:
        effective = min(per_prompt.size * (1 - advantage**2) / variance, float(pairs.size))
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    shrink = 1 + z**2 / effective
    half = z * math.sqrt((1 - advantage**2) / (4 * effective) + z**2 / (4 * effective**2)) / shrink
    middle = advantage / 2 / shrink
    low = 0.0 if advantage == -1 else 0.5 + (middle - half)
    high = 1.0 if advantage == 1 else 0.5 + (middle + half)
    return _include((low, high), 0.5, per_prompt)


def sign_flip_p(per_prompt: np.ndarray) -> float:
    """Return the two-sided p of per-prompt values that are symmetric about 0; zeros (prompts that tie) say nothing.

    Exact up to 12 nonzero values; above, by random signs that are always the same, counting the observed ones too.
    """
    changed = per_prompt[per_prompt != 0]
    if changed.size <= _MAX_ENUMERATED:
        signs = 1 - 2 * (np.arange(2**changed.size)[:, None] >> np.arange(changed.size) & 1)
        return float(_as_extreme(signs, changed).mean())
    rng, rows = np.random.default_rng(0), max(1, _BATCH_ELEMENTS // changed.size)
    count = 1
    for start in range(0, NUM_RESAMPLES, rows):
        signs = rng.choice((-1, 1), size=(min(rows, NUM_RESAMPLES - start), changed.size))
        count += int(_as_extreme(signs, changed).sum())
    return count / (NUM_RESAMPLES + 1)


def _as_extreme(signs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether each row of signs gives a sum at least as far from 0 as the observed one, rounding aside."""
    return np.abs((signs * values).sum(axis=1)) >= abs(values.sum()) - 1e-12 * np.abs(values).sum()


def _include(interval: Interval, no_effect: float, per_prompt: np.ndarray) -> Interval:
    """Widen an interval to include no effect unless the sign-flip test of the per-prompt effects rejects it."""
    low, high = interval
    if low <= no_effect <= high or sign_flip_p(per_prompt) <= 1 - CONFIDENCE:
        return interval
    return min(low, no_effect), max(high, no_effect)


def _known(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _mean(values: np.ndarray) -> float | None:
    known = _known(values)
    return float(known.mean()) if known.size else None
