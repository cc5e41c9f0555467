"""Do people agree, and do they choose by place or by habit? Numbers over plain votes.

Percent agreement; kappa of two raters (Cohen, Educ. Psychol. Meas. 20, 1960); alpha of any number with gaps, nominal
(Krippendorff, Content Analysis, 2004, section 11.3).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

from scipy import stats

from diffusion_dpo.report import Interval
from diffusion_dpo.report.statistics import CONFIDENCE


def percent_agreement(ratings: Sequence[Mapping[str, str]]) -> tuple[float, int] | None:
    """Return the share of pairs of raters that agree, over all units, and how many pairs; None without any.

    `ratings` has one unit an entry: the answer of each rater by name.
    """
    pairs = [a == b for unit in ratings for a, b in combinations(unit.values(), 2)]
    return (sum(pairs) / len(pairs), len(pairs)) if pairs else None


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return kappa of two raters' answers to the same units; None where chance alone would make them agree."""
    if not first:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    one, other = Counter(first), Counter(second)
    expected = sum(one[answer] * other[answer] for answer in one) / len(first) ** 2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(ratings: Sequence[Mapping[str, str]]) -> float | None:
    """Return alpha for nominal answers; units with one answer say nothing. None where all answers are the same."""
    units = [Counter(unit.values()) for unit in ratings if len(unit) > 1]
    totals: Counter[str] = Counter()
    for counts in units:
        totals.update(counts)
    amount = totals.total()
    if amount < 2:
        return None
    observed = sum(counts[a] * (counts.total() - counts[a]) / (counts.total() - 1) for counts in units for a in counts)
    expected = sum(totals[a] * (amount - totals[a]) for a in totals) / (amount - 1)
    return None if expected == 0 else 1 - observed / expected


def left_share(answers: Sequence[str]) -> tuple[float, Interval, int] | None:
    """Return how often the left image was chosen of those that were not a tie, its 95 % interval, and how many.

    Wilson's interval, which includes one half unless the exact test of it rejects that.
    """
    left = sum(answer == "left" for answer in answers)
    total = left + sum(answer == "right" for answer in answers)
    if not total:
        return None
    test = stats.binomtest(left, total)
    found = test.proportion_ci(CONFIDENCE, method="wilson")
    low, high = float(found.low), float(found.high)
    if test.pvalue > 1 - CONFIDENCE:
        low, high = min(low, 0.5), max(high, 0.5)
    return left / total, (low, high), total


def longest_streak(answers: Sequence[str]) -> int:
    """Return the most answers in a row that are the same."""
    longest = current = 0
    before = None
    for answer in answers:
        current = current + 1 if answer == before else 1
        before, longest = answer, max(longest, current)
    return longest
