"""Kendall's tau per prompt, against scipy."""

import math

import numpy as np
import pytest
from scipy.stats import kendalltau

from diffusion_dpo.report.agreement import agreement


def prompts(seed: int, noise: float, *, amount: int = 30, each: int = 7) -> list[list[dict[str, float]]]:
    rng = np.random.default_rng(seed)
    return [
        [{"a": x, "b": x + noise * rng.normal(), "c": float(rng.integers(3))} for x in rng.normal(size=each)]
        for _ in range(amount)
    ]


def test_it_is_scipys_tau_b_averaged_over_prompts_with_ties_and_missing_scores() -> None:
    images = prompts(0, 1.0)
    images[0][2].pop("b")
    images[1][3]["c"] = math.nan
    found = {(it.first, it.second): it for it in agreement(images, ["a", "b", "c"], lower_is_better=frozenset())}
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    for (first, second), tau in found.items():
        expected = []
        for part in images:
            both = [(it.get(first, math.nan), it.get(second, math.nan)) for it in part]
            known = [it for it in both if not any(map(math.isnan, it))]
            expected.append(kendalltau(*zip(*known, strict=True)).statistic)
        assert tau.mean == pytest.approx(np.mean(expected), abs=1e-12)
        assert tau.num_prompts == 30 and tau.interval[0] < tau.mean < tau.interval[1]


def test_directions_are_turned_round_where_lower_is_better() -> None:
    images = prompts(1, 0.5)
    (plain,) = agreement(images, ["a", "b"], lower_is_better=frozenset())
    (turned,) = agreement(images, ["a", "b"], lower_is_better=frozenset({"b"}))
    assert turned.mean == pytest.approx(-plain.mean)
    (same,) = agreement(images, ["a", "b"], lower_is_better=frozenset({"a", "b"}))
    assert same.mean == plain.mean


def test_how_good_a_prompt_is_says_nothing() -> None:
    """Two judges that agree on which prompts are good, and on nothing else."""
    rng = np.random.default_rng(0)
    images = [[{"a": 9 * p + rng.normal(), "b": 9 * p + rng.normal()} for _ in range(6)] for p in range(200)]
    (tau,) = agreement(images, ["a", "b"], lower_is_better=frozenset())
    assert abs(tau.mean) < 0.1 and tau.interval[0] <= 0 <= tau.interval[1]


def test_prompts_without_two_scored_images_that_differ_do_not_count() -> None:
    images = [[{"a": 1.0, "b": 1.0}], [{"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 3.0}], [{}, {"a": 1.0}], []]
    (tau,) = agreement(images, ["a", "b"], lower_is_better=frozenset())
    assert (tau.mean, tau.interval, tau.num_prompts) == (None, None, 0)
    assert agreement([], ["a"], lower_is_better=frozenset()) == []
    assert agreement([], [], lower_is_better=frozenset()) == []


def test_a_prompt_with_very_many_images_stays_affordable() -> None:
    rng = np.random.default_rng(0)
    images = [[{"a": x, "b": x} for x in rng.normal(size=20_000)]]
    (tau,) = agreement(images, ["a", "b"], lower_is_better=frozenset())
    assert tau.mean == pytest.approx(1)
