"""Invariants of the paired statistics: symmetry, ties, missing values, and intervals that cover what they promise."""

import itertools
import math
import warnings

import numpy as np
import pytest
from scipy import stats

from diffusion_dpo.report import BASELINE, MetricScores
from diffusion_dpo.report.statistics import (
    correct,
    holm,
    mean_interval,
    pair_differences,
    paired_statistics,
    prompts_needed,
    sign_flip_p,
    summarise_all,
    wilcoxon_p,
    win_rate_interval,
)

Scores = tuple[np.ndarray, np.ndarray]


def random_scores(seed: int, *, prompts: int = 40, seeds: int = 2, ties: float = 0.2) -> Scores:
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, seeds))
    after = before + 0.3 + rng.normal(size=(prompts, seeds))
    after[rng.random((prompts, seeds)) < ties] = np.nan
    after = np.where(np.isnan(after), before, after)
    before[0, 0] = np.nan
    return before, after


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_model_against_itself_is_all_ties_with_a_zero_interval() -> None:
    before, _ = random_scores(0)
    result = paired_statistics(before, before)
    assert (result.wins, result.ties, result.losses) == (0, 79, 0)
    assert result.mean_difference == 0
    assert result.mean_difference_interval == (0, 0)
    assert (result.win_rate, result.win_rate_interval) == (0.5, (0.5, 0.5))


@pytest.mark.parametrize("seed,seeds,prompts", list(itertools.product(range(5), (1, 3), (2, 7, 40))))
def test_swapping_flips_every_sign_and_mirrors_every_interval(seed: int, seeds: int, prompts: int) -> None:
    before, after = random_scores(seed, seeds=seeds, prompts=prompts)
    there, back = paired_statistics(before, after), paired_statistics(after, before)
    assert back.mean_difference == -there.mean_difference
    assert back.median_difference == -there.median_difference
    assert back.difference_std == there.difference_std
    assert (back.wins, back.ties, back.losses) == (there.losses, there.ties, there.wins)
    assert (back.mean_baseline, back.mean, back.p_value) == (there.mean, there.mean_baseline, there.p_value)
    assert back.win_rate == pytest.approx(1 - there.win_rate, abs=1e-15)
    assert back.win_rate_interval == pytest.approx([1 - x for x in reversed(there.win_rate_interval)], abs=1e-15)
    if there.mean_difference_interval is not None:
        low, high = there.mean_difference_interval
        assert back.mean_difference_interval == (-high, -low)


def test_lower_is_better_swaps_wins_and_leaves_raw_differences() -> None:
    scores = random_scores(1)
    high, low = paired_statistics(*scores), paired_statistics(*scores, higher_is_better=False)
    assert low.mean_difference == high.mean_difference
    assert low.mean_difference_interval == high.mean_difference_interval
    assert (low.wins, low.losses) == (high.losses, high.wins)
    assert low.win_rate == pytest.approx(1 - high.win_rate)


def test_the_numbers_of_a_small_case() -> None:
    before = np.array([[0.0, 0.0], [1.0, np.nan], [np.nan, np.nan]])
    after = np.array([[1.0, 0.0], [0.0, 5.0], [1.0, 1.0]])
    result = paired_statistics(before, after)
    assert (result.num_prompts, result.num_pairs, result.num_missing) == (2, 3, 3)
    assert (result.wins, result.ties, result.losses) == (1, 1, 1)
    assert (result.mean_baseline, result.mean) == (0.5, 0.25)  # a missing partner leaves the pair out
    assert result.mean_difference == (0.5 - 1) / 2
    assert result.win_rate == (0.75 + 0) / 2  # prompts weigh the same, whatever their number of pairs
    assert result.median_difference == -0.25
    assert result.difference_std == pytest.approx(1.5 / math.sqrt(2))  # of a sample: over n - 1
    assert result.win_rate_std == pytest.approx(0.75 / math.sqrt(2))
    assert (result.name, result.model, result.category, result.role) == ("score", "model", "", "held_out")
    assert result.higher_is_better and not result.auxiliary


def test_seeds_of_a_prompt_are_not_independent_evidence() -> None:
    """Repeating every pair ten times under the same prompt must not narrow an interval."""
    before, after = random_scores(2, seeds=1, ties=0)
    one, ten = paired_statistics(before, after), paired_statistics(before.repeat(10, 1), after.repeat(10, 1))
    assert ten.mean_difference_interval == pytest.approx(one.mean_difference_interval)
    assert ten.win_rate_interval == pytest.approx(one.win_rate_interval)
    assert ten.p_value == pytest.approx(one.p_value)


@pytest.mark.parametrize("wins,losses", [(0, 9), (3, 6), (41, 23), (64, 0)])
def test_one_seed_without_ties_is_wilsons_interval(wins: int, losses: int) -> None:
    outcomes = np.array([1.0] * wins + [-1.0] * losses)[:, None]
    expected = stats.binomtest(wins, wins + losses).proportion_ci(method="wilson")
    low, high = win_rate_interval(outcomes)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (low == 0) == (wins == 0) and (high == 1) == (losses == 0)  # exactly


@pytest.mark.parametrize("wins,losses", [(30, 30), (24, 16)])
def test_seeds_that_contradict_each_other_are_pairs_like_any_others(wins: int, losses: int) -> None:
    """Two seeds a prompt, both of a prompt won only where losses have run out: prompts differ less than pairs do."""
    seeds = np.array([1.0] * wins + [-1.0] * losses)
    outcomes = np.stack([seeds[: len(seeds) // 2], seeds[::-1][: len(seeds) // 2]], axis=1)
    expected = stats.binomtest(wins, wins + losses).proportion_ci(method="wilson")
    assert outcomes.mean(1).var() < outcomes.var() / 2
    assert win_rate_interval(outcomes) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_nothing_scored_one_prompt_and_equal_differences_give_no_nan() -> None:
    empty = paired_statistics(np.full((3, 2), np.nan), np.zeros((3, 2)))
    assert (empty.mean_difference, empty.mean_difference_interval, empty.win_rate) == (None, None, None)
    assert empty.num_missing == 6
    assert empty.median_difference is empty.difference_std is empty.win_rate_std is empty.p_value is None
    single = paired_statistics(np.zeros((1, 2)), np.ones((1, 2)))
    assert single.mean_difference == 1 and single.mean_difference_interval is None
    assert single.difference_std is single.win_rate_std is single.p_value is None
    assert single.win_rate_interval is not None and single.win_rate_interval[1] == 1
    equal = paired_statistics(np.zeros((9, 1)), np.full((9, 1), 0.25))
    assert equal.mean_difference_interval == (0.25, 0.25)
    for result in (empty, single, equal):
        assert "NaN" not in result.model_dump_json()


def test_of_many_prompts_the_mean_interval_is_that_of_the_normal_distribution() -> None:
    """19 in 20: 1.96 standard errors either way, which 1.88 (94 %) or 2.05 (96 %) are not."""
    values = np.random.default_rng(7).normal(3.0, 2.0, 2000)
    error = values.std(ddof=1) / math.sqrt(2000)
    low, high = mean_interval(values) or (math.nan, math.nan)
    assert (high - values.mean()) / error == pytest.approx(1.96, abs=0.04)
    assert (values.mean() - low) / error == pytest.approx(1.96, abs=0.04)


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


@pytest.mark.parametrize("wins,losses", [(4, 0), (6, 0), (9, 2), (9, 3), (11, 3), (40, 24), (41, 23)])
def test_the_sign_flip_test_of_wins_and_losses_is_the_sign_test(wins: int, losses: int) -> None:
    values = np.array([1.0] * wins + [-1.0] * losses + [0.0] * 50)
    expected = stats.binomtest(wins, wins + losses).pvalue
    assert sign_flip_p(values) == pytest.approx(expected, abs=1e-12 if wins + losses <= 12 else 0.008)
    assert sign_flip_p(-values) == sign_flip_p(values)


def test_up_to_12_changes_are_counted_out_and_of_more_10_000_signs_are_looked_at() -> None:
    assert sign_flip_p(np.ones(12)) == 2 / 2**12
    assert sign_flip_p(np.ones(40)) == 1 / 10_000  # the observed signs, and none of 9,999 others
    assert sign_flip_p(np.ones(13)) in [count / 10_000 for count in range(1, 10)] != 2 / 2**13
    assert sign_flip_p(np.zeros(3)) == 1
    assert sign_flip_p(np.array([1.0, -1.0] * 7)) == 1  # all signs are as far from 0 as these


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


def test_a_true_tie_is_called_a_difference_in_one_study_of_twenty() -> None:
    """1,000 studies with a true win rate of one half, whose seeds agree with each other."""
    rng = np.random.default_rng(3)
    excluded = 0
    for _ in range(1000):
        lean = 1 / (1 + np.exp(-1.5 * rng.normal(size=(60, 1))))
        outcomes = np.where(rng.random((60, 4)) < lean, 1.0, -1.0)
        low, high = win_rate_interval(outcomes) or (math.nan, math.nan)
        excluded += not low <= 0.5 <= high
    assert 30 <= excluded <= 70


def test_the_signed_rank_test_is_scipys_and_ignores_ties() -> None:
    values = np.random.default_rng(4).normal(0.3, 1, 30)
    assert wilcoxon_p(np.append(values, np.zeros(9))) == stats.wilcoxon(values).pvalue
    assert wilcoxon_p(np.zeros(9)) == 1 and wilcoxon_p(np.ones(1)) is None
    assert wilcoxon_p(-values) == wilcoxon_p(values)
    assert wilcoxon_p(np.array([1.0, 2.0])) == 0.5 and wilcoxon_p(np.array([])) is None


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1, 1] and holm([]) == []


@pytest.mark.parametrize("win_rate", [0.6, 0.3])
def test_as_many_prompts_as_are_said_to_be_needed_show_it_four_times_in_five(win_rate: float) -> None:
    rng = np.random.default_rng(5)

    def outcomes(prompts: int) -> np.ndarray:
        lean = np.clip(win_rate + 0.15 * rng.normal(size=(prompts, 1)), 0, 1)
        return np.where(rng.random((prompts, 2)) < lean, 1.0, -1.0)

    many = outcomes(2000)
    needed = prompts_needed(win_rate, paired_statistics(np.zeros_like(many), many).win_rate_std)
    intervals = [win_rate_interval(outcomes(needed)) for _ in range(300)]
    assert 0.7 <= np.mean([low > 0.5 or high < 0.5 for low, high in intervals]) <= 0.88
    assert prompts_needed(win_rate) > needed and prompts_needed(0.9) == 20


@pytest.mark.parametrize("win_rate", [0.6, 0.42, 0.55])
@pytest.mark.parametrize("spread", [None, 0.3])
def test_the_prompts_needed_are_those_of_the_text_book(win_rate: float, spread: float | None) -> None:
    """A share against one half, two-sided at 5 %, power 80 %; another spread between prompts scales both terms."""
    binomial = math.sqrt(win_rate * (1 - win_rate))
    exact = ((1.959964 * 0.5 + 0.841621 * binomial) * (spread or binomial) / binomial / (win_rate - 0.5)) ** 2
    assert prompts_needed(win_rate, spread) == math.ceil(exact)


def test_for_no_win_rate_but_those_there_is_a_number_of_prompts() -> None:
    assert prompts_needed(0.6) == 194
    assert prompts_needed(0.9) == prompts_needed(0.1) == prompts_needed(0.51, 0.001) == 20
    for win_rate in (0.0, 1.0, 0.5, -0.1, 1.1):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            prompts_needed(win_rate)


def test_metrics_are_corrected_together_model_by_model_and_categories_are_divided() -> None:
    rng = np.random.default_rng(6)
    base = rng.normal(size=(20, 2))
    scores = [
        MetricScores(name, "held_out", True, {BASELINE: base, "a": base + 1, "b": base - gain}, auxiliary)
        for name, gain, auxiliary in (("x", 0.5, False), ("y", 0.0, False), ("z", 0.1, True))
    ]
    results = summarise_all(scores, ["animal"] * 5 + ["scene"] * 15)
    assert [(it.model, it.name, it.category) for it in results[:6]] == [(m, n, "") for m in "ab" for n in "xyz"]
    whole, animal = results[3], next(it for it in results if (it.model, it.name, it.category) == ("b", "x", "animal"))
    assert (whole.num_prompts, animal.num_prompts) == (20, 5)
    assert whole.mean_difference == animal.mean_difference == pytest.approx(-0.5), "the model minus the baseline"
    assert (whole.wins, whole.losses, animal.losses) == (0, 40, 10)
    assert (whole.mean_baseline, animal.mean_baseline) == pytest.approx((base.mean(), base[:5].mean()))
    assert pair_differences(scores[0], "a") == pytest.approx(np.ones((20, 2)))
    certain = [whole.model_copy(update={"p_value": p}) for p in (0.0, 0.04)]
    assert [it.p_holm for it in correct(certain)] == [0.0, 0.04], "a p of 0 is the smallest there is"
    assert whole.p_holm == pytest.approx(2 * whole.p_value) and animal.p_holm is None
    assert all((it.p_holm is None) == (it.auxiliary or bool(it.category)) for it in results)
    assert len(results) == 6 + 2 * 6 and len(summarise_all(scores, ["all"] * 20)) == 6
    assert len(summarise_all(scores, [""] * 5 + ["scene"] * 15)) == 6 + 6, "what has no category is in the whole alone"
    assert summarise_all([], []) == []
    assert [it.auxiliary for it in results[:3]] == [False, False, True]


def test_a_metric_plays_its_role_for_each_model() -> None:
    base = np.zeros((3, 1))
    metric = MetricScores("x", "held_out", False, {BASELINE: base, "a": base, "b": base}, roles={"b": "trained_on"})
    found = summarise_all([metric], [""] * 3)
    assert [(it.model, it.role, it.higher_is_better, it.auxiliary) for it in found] == [
        ("a", "held_out", False, False),
        ("b", "trained_on", False, False),
    ]


def test_two_prompts_have_an_interval_and_one_has_none() -> None:
    """Of the four ways to draw two prompts of two, one in four has the smaller mean, and one the larger."""
    assert mean_interval(np.array([1.0, 3.0])) == (0.0, 3.0)  # 0 too: two changes prove nothing
    assert mean_interval(np.array([1.0])) is None


def test_scores_are_double_precision_and_none_is_missing() -> None:
    single = paired_statistics(np.full(3, 0.1, np.float32), np.full(3, 0.3, np.float32))
    assert single.mean_difference == float(np.float32(0.3)) - float(np.float32(0.1))
    holes = paired_statistics([1, None, 3], [2, 2, None])
    assert (holes.num_pairs, holes.num_missing, holes.mean_difference) == (1, 2, 1)


def test_plain_lists_are_scores_and_other_shapes_are_refused() -> None:
    result = paired_statistics([1, 2, 3], [2, 2, 2])
    assert (result.wins, result.ties, result.losses, result.mean_difference) == (1, 1, 1, 0)
    with pytest.raises(ValueError, match=r"not \(2,\) and \(3,\)"):
        paired_statistics([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"not \(2, 1, 1\) and \(2, 1, 1\)"):
        paired_statistics(np.zeros((2, 1, 1)), np.zeros((2, 1, 1)))
