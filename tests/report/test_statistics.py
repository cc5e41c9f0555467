"""Invariants of the paired statistics: symmetry, ties, missing values, and intervals that cover what they promise."""

import dataclasses
import itertools
import math
import warnings

import numpy as np
import pytest
from scipy import stats

from diffusion_dpo.report import MetricScores
from diffusion_dpo.report.statistics import mean_interval, sign_flip_p, summarise, win_rate_interval


def random_scores(seed: int, *, prompts: int = 40, seeds: int = 2, ties: float = 0.2) -> MetricScores:
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, seeds))
    after = before + 0.3 + rng.normal(size=(prompts, seeds))
    after[rng.random((prompts, seeds)) < ties] = np.nan
    after = np.where(np.isnan(after), before, after)
    before[0, 0] = np.nan
    return MetricScores("m", "held_out", True, before, after)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_model_against_itself_is_all_ties_with_a_zero_interval() -> None:
    scores = random_scores(0)
    result = summarise(dataclasses.replace(scores, after=scores.before))
    assert (result.wins, result.ties, result.losses) == (0, 79, 0)
    assert result.mean_difference == 0
    assert result.mean_difference_interval == (0, 0)
    assert (result.win_rate, result.win_rate_interval) == (0.5, (0.5, 0.5))


@pytest.mark.parametrize("seed,seeds,prompts", list(itertools.product(range(5), (1, 3), (2, 7, 40))))
def test_swapping_flips_every_sign_and_mirrors_every_interval(seed: int, seeds: int, prompts: int) -> None:
    scores = random_scores(seed, seeds=seeds, prompts=prompts)
    there = summarise(scores)
    back = summarise(dataclasses.replace(scores, before=scores.after, after=scores.before))
    assert back.mean_difference == -there.mean_difference
    assert back.median_difference == -there.median_difference
    assert back.difference_std == there.difference_std
    assert (back.wins, back.ties, back.losses) == (there.losses, there.ties, there.wins)
    assert (back.mean_before, back.mean_after) == (there.mean_after, there.mean_before)
    assert back.win_rate == pytest.approx(1 - there.win_rate, abs=1e-15)
    assert back.win_rate_interval == pytest.approx([1 - x for x in reversed(there.win_rate_interval)], abs=1e-15)
    if there.mean_difference_interval is not None:
        low, high = there.mean_difference_interval
        assert back.mean_difference_interval == (-high, -low)


def test_lower_is_better_swaps_wins_and_leaves_raw_differences() -> None:
    scores = random_scores(1)
    high, low = summarise(scores), summarise(dataclasses.replace(scores, higher_is_better=False))
    assert low.mean_difference == high.mean_difference
    assert low.mean_difference_interval == high.mean_difference_interval
    assert (low.wins, low.losses) == (high.losses, high.wins)
    assert low.win_rate == pytest.approx(1 - high.win_rate)


def test_the_numbers_of_a_small_case() -> None:
    before = np.array([[0.0, 0.0], [1.0, np.nan], [np.nan, np.nan]])
    after = np.array([[1.0, 0.0], [0.0, 5.0], [1.0, 1.0]])
    result = summarise(MetricScores("m", "held_out", True, before, after))
    assert (result.num_prompts, result.num_pairs, result.num_missing) == (2, 3, 3)
    assert (result.wins, result.ties, result.losses) == (1, 1, 1)
    assert (result.mean_before, result.mean_after) == (0.5, 0.25)  # a missing partner leaves the pair out
    assert result.mean_difference == (0.5 - 1) / 2
    assert result.win_rate == (0.75 + 0) / 2  # prompts weigh the same, whatever their number of pairs


def test_seeds_of_a_prompt_are_not_independent_evidence() -> None:
    """Repeating every pair ten times under the same prompt must not narrow an interval."""
    scores = random_scores(2, seeds=1, ties=0)
    tenfold = dataclasses.replace(scores, before=scores.before.repeat(10, 1), after=scores.after.repeat(10, 1))
    one, ten = summarise(scores), summarise(tenfold)
    assert ten.mean_difference_interval == pytest.approx(one.mean_difference_interval)
    assert ten.win_rate_interval == pytest.approx(one.win_rate_interval)


@pytest.mark.parametrize("wins,losses", [(0, 9), (3, 6), (41, 23), (64, 0)])
def test_one_seed_without_ties_is_wilsons_interval(wins: int, losses: int) -> None:
    outcomes = np.array([1.0] * wins + [-1.0] * losses)[:, None]
    expected = stats.binomtest(wins, wins + losses).proportion_ci(method="wilson")
    assert win_rate_interval(outcomes) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_nothing_scored_one_prompt_and_equal_differences_give_no_nan() -> None:
    empty = summarise(MetricScores("m", "held_out", True, np.full((3, 2), np.nan), np.zeros((3, 2))))
    assert (empty.mean_difference, empty.mean_difference_interval, empty.win_rate) == (None, None, None)
    assert empty.num_missing == 6
    single = summarise(MetricScores("m", "held_out", True, np.zeros((1, 2)), np.ones((1, 2))))
    assert single.mean_difference == 1 and single.mean_difference_interval is None
    assert single.win_rate_interval is not None and single.win_rate_interval[1] == 1
    equal = summarise(MetricScores("m", "held_out", True, np.zeros((9, 1)), np.full((9, 1), 0.25)))
    assert equal.mean_difference_interval == (0.25, 0.25)
    for result in (empty, single, equal):
        assert "NaN" not in result.model_dump_json()


def test_the_mean_interval_covers_the_truth_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        prompts = 0.1 + rng.normal(size=48) + 0.5 * rng.exponential(size=48) - 0.5
        interval = mean_interval(prompts, num_resamples=999)
        assert interval is not None
        hits += interval[0] <= 0.1 <= interval[1]
    assert 0.915 <= hits / 400 <= 0.975  # 0.95 with three standard errors, less the bootstrap's small-sample loss


@pytest.mark.parametrize("strength,ties", [(0.0, 0.0), (0.7, 0.3), (1.8, 0.1)])
def test_the_win_rate_interval_covers_the_truth_19_times_in_20(strength: float, ties: float) -> None:
    rng = np.random.default_rng(1)

    def outcomes(prompts: int) -> np.ndarray:
        odds = 1 / (1 + np.exp(-strength - rng.normal(size=(prompts, 1))))  # prompts differ: seeds are correlated
        won = np.where(rng.random((prompts, 3)) < odds, 1.0, -1.0)
        return np.where(rng.random((prompts, 3)) < ties, 0.0, won)

    truth = 0.5 + 0.5 * outcomes(400_000).mean()
    intervals = [win_rate_interval(outcomes(48)) for _ in range(1000)]
    share = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.925 <= share <= 0.975
    assert all(math.isfinite(bound) and 0 <= bound <= 1 for interval in intervals for bound in interval)


@pytest.mark.parametrize("num_changed,decided", [(1, False), (4, False), (5, False), (6, True), (12, True)])
def test_few_changed_prompts_among_ties_decide_only_where_a_sign_test_does(num_changed: int, decided: bool) -> None:
    changes = np.zeros(96)
    changes[:num_changed] = np.linspace(0.1, 0.2, num_changed)
    low, high = mean_interval(changes) or (math.nan, math.nan)
    assert (low > 0) == decided and high > 0
    assert mean_interval(-changes) == (-high, -low)
    assert win_rate_interval(np.sign(changes)[:, None])[0] <= 0.5 + num_changed / 192
    if not decided:
        assert win_rate_interval(np.sign(changes)[:, None])[0] <= 0.5


@pytest.mark.parametrize("wins,losses", [(4, 0), (6, 0), (9, 2), (11, 3), (40, 24), (41, 23)])
def test_the_sign_flip_test_of_wins_and_losses_is_the_sign_test(wins: int, losses: int) -> None:
    values = np.array([1.0] * wins + [-1.0] * losses + [0.0] * 50)
    expected = stats.binomtest(wins, wins + losses).pvalue
    assert sign_flip_p(values) == pytest.approx(expected, abs=1e-12 if wins + losses <= 12 else 0.008)
    assert sign_flip_p(-values) == sign_flip_p(values)


def test_few_prompts_that_all_agree_do_not_exclude_no_effect() -> None:
    assert mean_interval(np.full(4, 0.25)) == (0, 0.25)
    assert win_rate_interval(np.ones((4, 1))) == (0.5, 1)


@pytest.mark.parametrize("changed,seeds", [(0.05, 1), (0.1, 1), (0.05, 3), (0.1, 3)])
@pytest.mark.parametrize("up", [0.5, 0.8, 1.0])
def test_intervals_cover_the_truth_when_nearly_all_prompts_tie(changed: float, seeds: int, up: float) -> None:
    rng = np.random.default_rng(2)
    truth = changed * (2 * up - 1)
    mean_hits = win_hits = excluded = 0
    for _ in range(300):
        signs = np.where(rng.random((96, seeds)) < up, 1.0, -1.0)
        outcomes = np.where(rng.random((96, 1)) < changed, signs, 0.0)
        low, high = mean_interval(outcomes.mean(1), num_resamples=499) or (math.nan, math.nan)
        mean_hits += low <= truth <= high
        excluded += not low <= 0 <= high
        low, high = win_rate_interval(outcomes) or (math.nan, math.nan)
        win_hits += low <= 0.5 + truth / 2 <= high
    assert mean_hits / 300 >= 0.89 and win_hits / 300 >= 0.95  # the mean's bootstrap is rough with so few changes
    assert up != 0.5 or excluded / 300 <= 0.05
