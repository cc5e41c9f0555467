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

import numpy as np
from scipy import stats

from diffusion_dpo.report import Interval, MetricResult, MetricScores

CONFIDENCE = 0.95
NUM_RESAMPLES = 9999
METHODS = {
    "unit": "the prompt: values are averaged over the seeds of a prompt first, then over prompts",
    "mean_difference_interval": f"95 % percentile bootstrap over prompts, {NUM_RESAMPLES} resamples, fixed seed",
    "win_rate_interval": "95 % Wilson score interval at the effective number of prompts, at most the number of pairs",
    "no effect": "an interval is widened to include no effect (0, or a win rate of one half) unless a two-sided "
    "sign-flip test over the prompts that changed rejects it at 5 %",
    "wins, ties, losses": "counted per pair of images (same prompt, same seed); a tie is an exactly equal score",
    "missing": "a pair with an image that could not be scored is left out of that metric and counted, never a zero",
}
_MAX_ENUMERATED = 12
"""Up to this many changed prompts all 2^n signs are tried; above, NUM_RESAMPLES random ones."""
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
