"""Paired statistics with the prompt as the unit: images of one prompt resemble each other, prompts are independent.

Both intervals cover 95 %. The mean difference gets a percentile bootstrap over prompts. The win rate gets Wilson's
score interval (J. Am. Stat. Assoc. 22, 1927) at the *effective* number of prompts, num_prompts times binomial variance
over observed variance, as surveys do for clustered answers (Franco et al., J. Surv. Stat. Methodol. 7, 2019). With one
seed per prompt and no ties that is Wilson's own interval; unlike a bootstrap it stays honest when all pairs are won.
"""

import math

import numpy as np
from scipy import stats

from diffusion_dpo.report import Interval, MetricResult, MetricScores

CONFIDENCE = 0.95
NUM_RESAMPLES = 9999
METHODS = {
    "unit": "the prompt: values are averaged over the seeds of a prompt first, then over prompts",
    "mean_difference_interval": f"95 % percentile bootstrap over prompts, {NUM_RESAMPLES} resamples, fixed seed",
    "win_rate_interval": "95 % Wilson score interval at the effective number of prompts",
    "wins, ties, losses": "counted per pair of images (same prompt, same seed); a tie is an exactly equal score",
    "missing": "a pair with an image that could not be scored is left out of that metric and counted, never a zero",
}
_BATCH_ELEMENTS = 2_000_000


def summarise(scores: MetricScores) -> MetricResult:
    """Return the result of one metric. Swapping before and after flips every difference and mirrors every win."""
    assert scores.before.shape == scores.after.shape and scores.before.ndim == 2
    differences = pair_differences(scores)
    scored = np.isfinite(differences)
    outcomes = np.sign(differences) * (1 if scores.higher_is_better else -1)
    per_prompt = _known(prompt_means(differences))
    return MetricResult(
        name=scores.name,
        role=scores.role,
        auxiliary=scores.auxiliary,
        higher_is_better=scores.higher_is_better,
        num_prompts=per_prompt.size,
        num_pairs=int(scored.sum()),
        num_missing=int((~scored).sum()),
        mean_before=_mean(prompt_means(np.where(scored, scores.before, np.nan))),
        mean_after=_mean(prompt_means(np.where(scored, scores.after, np.nan))),
        mean_difference=_mean(per_prompt),
        mean_difference_interval=mean_interval(per_prompt),
        median_difference=float(np.median(per_prompt)) if per_prompt.size else None,
        difference_std=float(per_prompt.std(ddof=1)) if per_prompt.size > 1 else None,
        win_rate=_mean(0.5 + 0.5 * prompt_means(outcomes)),
        win_rate_interval=win_rate_interval(outcomes),
        wins=int((outcomes > 0).sum()),
        ties=int((outcomes == 0).sum()),
        losses=int((outcomes < 0).sum()),
    )


def pair_differences(scores: MetricScores) -> np.ndarray:
    """Return after minus before of shape (num_prompts, seeds), NaN where either score is missing."""
    return scores.after - scores.before


def prompt_means(values: np.ndarray) -> np.ndarray:
    """Average over seeds: (num_prompts, seeds) to (num_prompts,), NaN for a prompt without any value."""
    counts = np.isfinite(values).sum(axis=1)
    return np.where(counts > 0, np.nansum(values, axis=1), np.nan) / np.maximum(counts, 1)


def mean_interval(per_prompt: np.ndarray, *, num_resamples: int = NUM_RESAMPLES) -> Interval | None:
    """Return the 95 % bootstrap interval of the mean of per-prompt values, None with fewer than two.

    The data are resampled with the sign of their first nonzero value, so negating them negates the interval exactly.
    """
    if per_prompt.size < 2:
        return None
    if np.ptp(per_prompt) == 0:
        return float(per_prompt[0]), float(per_prompt[0])
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
    return low, high


def win_rate_interval(outcomes: np.ndarray) -> Interval | None:
    """Return the 95 % interval of the win rate; `outcomes` (num_prompts, seeds): 1 won, 0 tied, -1 lost, NaN missing.

    The variance is the larger of that between prompts and what independent pairs would give, so that seeds never count
    for more than they can know.
    """
    per_prompt = _known(prompt_means(outcomes))
    if per_prompt.size == 0:
        return None
    pairs = _known(outcomes)
    advantage = float(per_prompt.mean())  # win rate 1/2 + advantage/2
    variance = max(float(per_prompt.var()), float(pairs.var()) * per_prompt.size / pairs.size)
    if abs(advantage) == 1:
        effective = float(per_prompt.size)
    elif variance == 0:  # nothing but ties
        return 0.5, 0.5
    else:
        effective = per_prompt.size * (1 - advantage**2) / variance
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    shrink = 1 + z**2 / effective
    half = z * math.sqrt((1 - advantage**2) / (4 * effective) + z**2 / (4 * effective**2)) / shrink
    middle = advantage / 2 / shrink
    low = 0.0 if advantage == -1 else 0.5 + (middle - half)
    high = 1.0 if advantage == 1 else 0.5 + (middle + half)
    return low, high


def _known(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _mean(values: np.ndarray) -> float | None:
    known = _known(values)
    return float(known.mean()) if known.size else None
