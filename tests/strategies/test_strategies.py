"""Every strategy on small tables whose right pairs are known, and the laws that hold for all of them."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.registry import TABLES
from diffusion_dpo.settings import PairConfig
from diffusion_dpo.strategies import TOO_FEW, Pick, ScoreTable, Strategy, compare, gaps, ranked
from diffusion_dpo.strategies.majority import NO_MAJORITY, OUTWEIGHED, VETOED
from diffusion_dpo.strategies.pareto import NOT_DOMINATED
from diffusion_dpo.strategies.plan import (
    CAPPED,
    EQUAL,
    NARROW,
    NO_SCORE,
    Limits,
    make_table,
    pick_pairs,
    spread_within,
)

NAN = float("nan")
NO_LIMITS = Limits()
SETTINGS: dict[str, dict[str, Any]] = {
    "pareto": {"metrics": ["a", "b"]},
    "majority": {"metrics": ["a", "b", "c"]},
    "weighted": {"weights": {"a": 1.0, "b": 2.0}},
    "gate": {"gates": [{"metric": "c", "min": 1.0}]},
}


def strategy(name: str, **settings: Any) -> Strategy:
    block = {"type": name} | SETTINGS.get(name, {}) | settings
    return load(PairConfig, None, [f"strategy={block}"]).strategy


def picks(
    how: Strategy,
    scores: dict[str, list[float]],
    *,
    limits: Limits = NO_LIMITS,
    missing: str = "drop",
    lower: tuple[str, ...] = (),
    scale: float = 1.0,
    uids: str = "",
    num_photos: int = 0,
) -> tuple[list[tuple[str, str]], dict[str, int], list[float]]:
    """Pairs by the letters of their images (A, B, ...), drops, and margins."""
    count = len(next(iter(scores.values())))
    names = list(uids or [chr(ord("A") + i) for i in range(count)])
    table, lacking = make_table(
        names,
        {name: np.array(values) for name, values in scores.items()},
        how,
        main="a" if how.uses_main else "",
        higher_is_better={name: name not in lower for name in scores},
        scale=dict.fromkeys(scores, scale),
        missing=missing,
        num_photos=num_photos,
    )
    found, drops = pick_pairs(table, how, limits)
    assert all(type(number) is int and number > 0 for number in [*lacking.values(), *drops.values()])
    named = [(f"photo {p.chosen}" if p.photo else table.uids[p.chosen], table.uids[p.rejected]) for p in found]
    return named, dict(lacking + drops), [p.margin for p in found]


ENDS = {
    "gate": {"gates": (None, [[]], []), "failed": ("drop", ["win"], ["lose"])},
    "majority": {
        "metrics": (None, [["a"]], [["a", "b"]]),
        "min_agree": (None, [0, 1, 4], [2, 3]),
        "veto": (1.0, [-1e-9], [0.0]),
    },
    "pareto": {"metrics": (None, [["a"]], [["a", "b"]]), "min_gain": (0.0, [-1e-9], [0.0])},
    "top_bottom": {"top_k": (2, [0], [1]), "top_share": (None, [0.0, 0.5 + 1e-9], [1e-9, 0.5])},
    "weighted": {
        "weights": (None, [{}, {"a": 0.0}], [{"a": 1e-9}]),
        "normalise": ("rank", ["minmax"], ["win_rate", "robust_z"]),
        "temperature": (1.0, [0.0], [1e-9]),
    },
}
"""Of every setting: its default, None where it has none; values that are refused, and the last ones that are not."""


@pytest.mark.parametrize("name", ENDS)
def test_a_setting_has_its_default_and_its_ends(name: str) -> None:
    for setting, (default, refused, accepted) in ENDS[name].items():
        assert default is None or getattr(strategy(name), setting) == default
        for value in accepted:
            found = getattr(strategy(name, **{setting: value}), setting)
            assert (list(found) if isinstance(found, tuple) else found) == value
        for value in refused:
            with pytest.raises(ConfigError, match=setting if value != {"a": 0.0} else "weight of a must be above 0"):
                strategy(name, **{setting: value})


def table_of(merits: list[float]) -> ScoreTable:
    values = {"a": np.array(merits)}
    return ScoreTable(tuple(map(str, range(len(merits)))), values, values, {"a": 2.0}, "a", 0)


def test_of_equal_images_the_first_comes_first() -> None:
    table = table_of([1.0, 0.0] * 50)
    assert ranked(table.merits["a"]) == [*range(0, 100, 2), *range(1, 100, 2)]
    assert [pick[:2] for pick in compare(table, "a", [(4, 2), (2, 4), (1, 0)])] == [(4, 2), (2, 4), (0, 1)]


def test_gaps_to_what_has_no_score_are_infinite_and_none_between_two_such() -> None:
    with np.errstate(all="raise"):
        found = gaps(table_of([0.0, -math.inf, -math.inf, 3.0]), ["a"])
    assert found.tolist() == [
        [
            [0, math.inf, math.inf, -1.5],
            [-math.inf, 0, 0, -math.inf],
            [-math.inf, 0, 0, -math.inf],
            [1.5, math.inf, math.inf, 0],
        ]
    ]


def test_best_against_worst() -> None:
    assert picks(strategy("best_worst"), {"a": [0.2, 0.9, 0.1, 0.5]})[:2] == ([("B", "C")], {})
    assert picks(strategy("best_worst"), {"a": [0.2, 0.9, 0.1, 0.5]}, lower=("a",))[0] == [("C", "B")]


def test_top_against_bottom() -> None:
    values = {"a": [4.0, 3.0, 2.0, 1.0, 0.0]}
    assert picks(strategy("top_bottom", top_k=2), values)[0] == [("A", "E"), ("A", "D"), ("B", "E"), ("B", "D")]
    assert picks(strategy("top_bottom", top_k=10), {"a": [3.0, 2.0, 1.0]})[0] == [("A", "C")], "halves never overlap"
    eight = {"a": [float(i) for i in range(8)]}
    assert len(picks(strategy("top_bottom", top_share=0.25), eight)[0]) == 4
    assert len(picks(strategy("top_bottom", top_share=0.01), eight)[0]) == 1


def test_all_pairs() -> None:
    found, drops, margins = picks(strategy("all_pairs"), {"a": [1.0, 3.0, 1.0]})
    assert found == [("B", "A"), ("B", "C")]
    assert drops == {EQUAL: 1}
    assert margins == [2, 2]


def test_scores_are_numbers_not_words() -> None:
    assert picks(strategy("best_worst"), {"a": [9.0, 10.0]})[0] == [("B", "A")]


def test_missing_is_not_a_number_and_neither_wins_nor_loses() -> None:
    values = {"a": [0.5, NAN, -3.0, float("inf")]}
    assert picks(strategy("best_worst"), values)[:2] == ([("A", "C")], {NO_SCORE: 2})
    assert picks(strategy("best_worst"), {"a": [NAN, 1.0]})[:2] == ([], {NO_SCORE: 1, TOO_FEW: 1})


def test_missing_may_lose_and_then_never_wins() -> None:
    for lower in ((), ("a",)):
        found, drops, margins = picks(strategy("all_pairs"), {"a": [0.5, NAN, NAN, 0.5]}, missing="lose", lower=lower)
        assert found == [("A", "B"), ("A", "C"), ("D", "B"), ("D", "C")]
        assert drops == {EQUAL: 2}
        assert margins == [math.inf] * 4
    assert picks(strategy("best_worst"), {"a": [NAN, NAN]}, missing="lose")[:2] == ([], {EQUAL: 1})


def test_only_what_decides_may_be_missing() -> None:
    """A metric that the strategy does not look at costs no image."""
    assert picks(strategy("best_worst"), {"a": [1.0, 2.0], "b": [NAN, NAN]})[0] == [("B", "A")]
    assert picks(strategy("pareto"), {"a": [1.0, 2.0, 3.0], "b": [NAN, 2.0, 3.0]})[:2] == ([("C", "B")], {NO_SCORE: 1})


def test_pareto_wants_every_metric() -> None:
    scores = {"a": [3.0, 2.0, 1.0, 2.0], "b": [3.0, 1.0, 2.0, 1.0]}
    found, drops, _ = picks(strategy("pareto"), scores)
    assert found == [("A", "B"), ("A", "C"), ("A", "D")]
    assert drops == {NOT_DOMINATED: 3}
    assert picks(strategy("pareto"), scores, lower=("b",))[0] == [("B", "C"), ("D", "C")], "b turned around"
    assert picks(strategy("pareto", min_gain=2.0), scores)[0] == [("A", "B"), ("A", "C"), ("A", "D")]
    assert picks(strategy("pareto", min_gain=2.0), scores, scale=2.0)[0] == [], "in normalised units"
    one_of_two = {"a": [1.0, 1.0], "b": [0.5, 0.25]}
    assert picks(strategy("pareto"), one_of_two)[0] == [("A", "B")], "as good by one, better by the other"
    assert picks(strategy("pareto"), {"a": [1.0, 1.0], "b": [0.5, 0.5]})[1] == {NOT_DOMINATED: 1}


def test_the_majority_decides_unless_one_is_far_against_it() -> None:
    scores = {"a": [1.0, 0.0], "b": [1.0, 0.0], "c": [0.0, 0.9]}
    found, drops, margins = picks(strategy("majority"), scores)
    assert (found, drops) == ([("A", "B")], {})
    assert margins == [pytest.approx((1 + 1 - 0.9) / 3)]
    assert picks(strategy("majority"), scores | {"c": [0.0, 1.1]})[:2] == ([], {VETOED: 1})
    assert picks(strategy("majority", min_agree=3), scores)[:2] == ([], {NO_MAJORITY: 1})
    assert picks(strategy("majority"), {"a": [1.0, 0.0], "b": [0.0, 0.0], "c": [0.0, 0.0]})[1] == {NO_MAJORITY: 1}


@pytest.mark.parametrize(
    ("votes", "found"),
    [
        ([1, 1], True),
        ([1, -1], False),
        ([1, 0], False),
        ([1, 1, -1, -1], False),
        ([1, 1, 0, 0], False),
        ([1, 1, 1, -1], True),
        ([1, 1, 1, 0], True),
        ([1, 1, 0, 0, -1], False),
        ([1, 1, 1, 0, -1], True),
    ],
)
def test_half_of_the_votes_is_no_majority(votes: list[int], found: bool) -> None:
    """For the first of two images, against it, or neither."""
    names = [f"m{number}" for number in range(len(votes))]
    scores = {name: [0.3 * vote + 0.1, 0.1] for name, vote in zip(names, votes, strict=True)}
    named, drops, _ = picks(strategy("majority", metrics=names), scores)
    assert (named, drops) == (([("A", "B")], {}) if found else ([], {NO_MAJORITY: 1}))


def test_one_far_against_two_a_little_for_is_no_majority() -> None:
    scores = {"a": [0.1, 0.0], "b": [0.1, 0.0], "c": [0.0, 0.9]}
    assert picks(strategy("majority"), scores)[:2] == ([], {OUTWEIGHED: 1})
    scores = {"a": [0.5, 0.0], "b": [0.5, 0.0], "c": [0.0, 1.0]}
    assert picks(strategy("majority"), scores)[:2] == ([], {OUTWEIGHED: 1}), "a veto of 1 is for more than 1"
    three = {"a": [0.0, 0.0, 0.0, 1.0], "b": [0.0, 0.0, 0.0, 1.0], "c": [0.0, 0.0, 0.0, 1.0]}
    found, drops, _ = picks(strategy("majority"), three)
    assert (found, drops) == ([("D", "A"), ("D", "B"), ("D", "C")], {NO_MAJORITY: 3})


def test_a_metric_has_one_vote() -> None:
    for name in ("majority", "pareto"):
        with pytest.raises(ConfigError, match="name each once"):
            strategy(name, metrics=["a", "a", "b"])


def test_two_sides_can_never_both_have_a_majority() -> None:
    with pytest.raises(ConfigError, match=r"min_agree=2 is not a majority of 4"):
        strategy("majority", metrics=["a", "b", "c", "d"], min_agree=2)
    with pytest.raises(ConfigError, match=r"min_agree=4 is not a majority of 3"):
        strategy("majority", min_agree=4)


def test_weights_count_ranks_not_units() -> None:
    scores = {"a": [0.1, 0.2, 0.3], "b": [3000.0, 1000.0, 2000.0]}
    assert picks(strategy("weighted"), scores)[0] == [("A", "B")]
    found, _, margins = picks(strategy("weighted", then="all_pairs"), scores)
    sums = {"A": (0 + 2 * 1) / 3, "B": (0.5 + 0) / 3, "C": (1 + 2 * 0.5) / 3}
    assert margins[0] == pytest.approx(sums["A"] - sums["B"])
    assert found == [("A", "B"), ("C", "B")], "A and C tie"
    assert picks(strategy("weighted", weights={"a": 5.0, "b": 1.0}), scores)[0] == [("C", "A")]
    assert picks(strategy("weighted", weights={"a": 5.0, "b": 1.0}), scores, lower=("a",))[0] == [("A", "C")]


def test_equal_sums_tie_whatever_the_order_of_the_weights() -> None:
    scores = {"a": [0.0, 1.0, 2.0, 3.0], "b": [3.0, 2.0, 1.0, 0.0], "c": [0.0, 3.0, 1.0, 2.0]}
    for weights in ({"a": 0.1, "b": 0.1, "c": 0.1}, {"c": 0.1, "b": 0.1, "a": 0.1}):
        found, drops, _ = picks(strategy("weighted", weights=weights, then="all_pairs"), scores)
        assert (len(found), drops) == (6, {})
    pair = {"a": [0.0, 1.0], "b": [1.0, 0.0]}
    assert picks(strategy("weighted", weights={"a": 0.3, "b": 0.3}), pair)[:2] == ([], {EQUAL: 1})


def test_what_goes_by_metrics_of_its_own_would_ignore_the_sum() -> None:
    for then in ({"type": "pareto", "metrics": ["a", "b"]}, {"type": "real_vs_generated"}):
        with pytest.raises(ConfigError, match="would not look at the sum"):
            strategy("weighted", then=then)


def test_win_rate_is_the_mean_over_the_others() -> None:
    values = [0.0, 1.0, 3.0]
    how = strategy("weighted", weights={"a": 1.0}, normalise="win_rate", temperature=0.5)
    rates = [
        np.mean([expit((x - y) / 2.0 / 0.5) for j, y in enumerate(values) if j != i]) for i, x in enumerate(values)
    ]
    assert picks(how, {"a": values}, scale=2.0)[2] == [pytest.approx(rates[2] - rates[0])]


def test_robust_z_ignores_an_outlier_and_what_does_not_vary() -> None:
    how = strategy("weighted", weights={"a": 1.0, "b": 1.0}, normalise="robust_z")
    scores = {"a": [0.0, 1.0, 2.0, 3.0, 1000.0], "b": [1.0, 1.0, 1.0, 1.0, 5.0]}
    (margin,) = picks(how, scores)[2]
    assert margin == pytest.approx(0.5 * 1000 / 1.4826, rel=1e-3), "median 2, deviation 1; b does not vary by it"


@pytest.mark.parametrize(
    ("normalise", "values", "margin"),
    [
        ("rank", [0.1, 0.2], 1.0),
        ("win_rate", [0.1, 0.2], expit(0.2) - expit(-0.2)),  # at half the temperature
        ("robust_z", [0.0, 0.1, 0.3], 0.3 / (1.4826 * 0.1)),
    ],
)
def test_few_images_have_the_whole_range_in_the_sums_own_unit(
    normalise: str, values: list[float], margin: float
) -> None:
    how = strategy("weighted", weights={"a": 3.0}, normalise=normalise, temperature=0.5)
    last = "ABC"[len(values) - 1]
    for limits in (NO_LIMITS, Limits(min_margin_norm=0.999 * margin)):
        found, _, margins = picks(how, {"a": values}, limits=limits)
        assert (found, margins) == ([(last, "A")], [pytest.approx(margin, rel=1e-4)])
    assert picks(how, {"a": values}, limits=Limits(min_margin_norm=1.001 * margin))[1] == {NARROW: 1}


def test_a_gate_is_no_score() -> None:
    scores = {"a": [9.0, 3.0, 2.0, 1.0], "c": [0.0, 1.0, NAN, 1.0]}
    found, drops, _ = picks(strategy("gate"), scores)
    assert found == [("B", "D")]
    assert drops == {"images that do not pass the gate on c": 1, NO_SCORE: 1}
    losing = strategy("gate", failed="lose", then="all_pairs")
    found, drops, _ = picks(losing, scores)
    assert found == [("B", "A"), ("D", "A"), ("B", "D")]
    assert drops == {NO_SCORE: 1}, "what nobody looked at does not lose, and what may be rejected is not dropped"
    assert picks(losing, scores, missing="lose")[0] == [("B", "A"), ("B", "C"), ("D", "A"), ("D", "C"), ("B", "D")]
    alone = picks(strategy("gate"), {"a": [1.0, 2.0], "c": [0.0, 1.0]})
    assert alone[:2] == ([], {"images that do not pass the gate on c": 1, TOO_FEW: 1})
    bounds = [{"metric": "c", "min": 1, "max": 1}, {"metric": "a", "max": 2}]
    assert picks(strategy("gate", gates=bounds), scores)[1]["images that do not pass the gate on a"] == 1


def test_a_gate_without_bounds_is_refused() -> None:
    with pytest.raises(ConfigError, match="the gate on c needs min or max"):
        strategy("gate", gates=[{"metric": "c"}])
    with pytest.raises(ConfigError, match="nothing passes the gate on c: min 2 is above max 1"):
        strategy("gate", gates=[{"metric": "c", "min": 2, "max": 1}])


def test_a_gate_before_votes() -> None:
    how = strategy("gate", then={"type": "pareto", "metrics": ["a", "b"]})
    scores = {"a": [3.0, 2.0, 1.0], "b": [3.0, 2.0, 1.0], "c": [0.0, 1.0, 1.0]}
    assert picks(how, scores)[0] == [("B", "C")]
    assert (how.named, how.gated, how.uses_main) == (("a", "b"), ("c",), False)
    scores = {"a": [3.0, 2.0, 1.0, 2.0], "b": [3.0, 2.0, 1.0, 0.0], "c": [0.0, 1.0, 1.0, 1.0]}
    found, drops, _ = picks(how, scores)
    assert found == [("B", "C"), ("B", "D")]
    assert drops == {"images that do not pass the gate on c": 1, NOT_DOMINATED: 1}, "C is better by a, D by b"


def test_photographs_are_chosen_over_everything_drawn() -> None:
    how = strategy("real_vs_generated")
    found, _, margins = picks(how, {"a": [1.0, NAN]}, num_photos=2)
    assert found == [("photo 0", "A"), ("photo 0", "B"), ("photo 1", "A"), ("photo 1", "B")]
    assert margins == [math.inf] * 4
    assert picks(how, {"a": [1.0]}, num_photos=1)[0] == [("photo 0", "A")]
    assert picks(how, {"a": [1.0, 2.0]})[:2] == ([], {TOO_FEW: 1})
    assert how.uses_main is False
    gated = strategy("gate", then="real_vs_generated")
    assert picks(gated, {"a": [1.0, 2.0], "c": [1.0, 0.0]}, num_photos=1)[0] == [("photo 0", "A")]
    none = {"images that do not pass the gate on c": 1, TOO_FEW: 1}
    assert picks(gated, {"a": [1.0], "c": [0.0]}, num_photos=1)[:2] == ([], none)
    found = picks(gated, {"a": [1.0, 2.0], "c": [0.0, 1.0]}, num_photos=3)[0]
    assert found == [("photo 0", "B"), ("photo 1", "B"), ("photo 2", "B")], "photographs pass no gate"


def test_margins_have_a_smallest_one_in_either_unit() -> None:
    scores = {"a": [1.0, 0.5]}
    assert picks(strategy("best_worst"), scores, limits=Limits(min_margin=0.5))[0] == [("A", "B")], "inclusive"
    assert picks(strategy("best_worst"), scores, limits=Limits(min_margin=0.51))[:2] == ([], {NARROW: 1})
    assert picks(strategy("best_worst"), scores, limits=Limits(min_margin_norm=2.0), scale=0.25)[0] == [("A", "B")]
    assert picks(strategy("best_worst"), scores, limits=Limits(min_margin_norm=2.1), scale=0.25)[1] == {NARROW: 1}


def test_caps_keep_the_widest() -> None:
    scores = {"a": [4.0, 3.0, 1.0, 0.0]}
    per_prompt = picks(strategy("all_pairs"), scores, limits=Limits(max_pairs_per_prompt=2))
    assert per_prompt[:2] == ([("A", "D"), ("A", "C")], {CAPPED: 4})
    per_image = picks(strategy("all_pairs"), scores, limits=Limits(max_pairs_per_image=1))
    assert per_image[:2] == ([("A", "D"), ("B", "C")], {CAPPED: 4})
    both = picks(strategy("all_pairs"), scores, limits=Limits(max_pairs_per_image=1, max_pairs_per_prompt=2))
    assert both[:2] == per_image[:2], "what an image's cap takes away does not count for the prompt"


def test_the_widest_comes_first_whatever_order_a_strategy_makes_pairs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the margin; then in normalised units; then in the order of the images."""
    right = [
        Pick(3, 0, 2.0, 0.1),
        Pick(2, 0, 1.0, 3.0),
        Pick(0, 1, 1.0, 2.0),
        Pick(0, 3, 1.0, 2.0),
        Pick(1, 0, 1.0, 2.0),
    ]
    how = strategy("all_pairs")
    for order in itertools.permutations(right):
        monkeypatch.setattr(type(how), "pick", lambda self, table, order=order: (list(order), Counter()))
        assert pick_pairs(table_of([0.0] * 4), how)[0] == right


def test_the_unit_of_margins_is_the_spread_within_prompts() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(2000), 8)
    values = rng.normal(0, 0.5, groups.shape) + rng.normal(0, 100, 2000)[groups]
    assert spread_within(values, groups) == pytest.approx(0.5, rel=0.02), "not the 100 between prompts"
    values[::3] = NAN
    assert spread_within(values, groups) == pytest.approx(0.5, rel=0.02)
    assert spread_within(np.array([1.0, 1.0]), np.array([0, 0])) == 1
    assert spread_within(np.array([NAN, 3.0]), np.array([0, 1])) == 1
    assert spread_within(np.array([NAN, NAN]), np.array([0, 1])) == 1
    assert spread_within(np.array([1.0, 3.0, 7.0, 8.0, 9.0]), np.array([0, 0, 2, 2, 2])) == math.sqrt((2 + 2) / 3)


@pytest.mark.parametrize("name", TABLES["strategies"])
@pytest.mark.parametrize("seed", range(12))
def test_laws(name: str, seed: int) -> None:
    """Whatever the scores, and whatever the strategy."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 9))
    scores = {metric: rng.integers(0, 6, count).astype(float) for metric in "abc"}  # ties are common
    for values in scores.values():
        values[rng.random(count) < 0.15] = NAN
    uids = "".join(rng.permutation(list("ABCDEFGH"))[:count])
    how, missing = strategy(name), ["drop", "lose"][seed % 2]
    limits = Limits(max_pairs_per_image=[None, 1][seed // 2 % 2])

    def run(order: np.ndarray, sign: float = 1.0) -> tuple[list[tuple[str, str]], dict[str, int], list[float]]:
        turned = {metric: (sign if metric != "c" else 1.0) * values[order] for metric, values in scores.items()}
        return picks(
            how,
            {metric: values.tolist() for metric, values in turned.items()},
            limits=limits,
            missing=missing,
            lower=("a", "b") if sign < 0 else (),
            uids="".join(np.array(list(uids))[order]),
            num_photos=1,
        )

    straight = np.arange(count)
    found, drops, margins = run(straight)
    assert run(rng.permutation(count)) == (found, drops, margins), "the order of the images"
    if name != "majority":  # c has one direction only, there
        assert run(straight, -1.0) == (found, drops, margins), "the sign of a metric"
    assert len(set(found)) == len(found)
    assert not {(b, a) for a, b in found} & set(found), "no contradiction"
    assert all(margin > 0 for margin in margins)
    assert margins == sorted(margins, reverse=True)
    assert min(drops.values(), default=1) > 0
    score_of = {uid: {metric: scores[metric][i] for metric in "abc"} for i, uid in enumerate(uids)}
    for chosen, rejected in found:
        if name != "real_vs_generated":
            assert all(not math.isnan(score_of[chosen][metric]) for metric in how.named), "what is missing never wins"
            if missing == "drop":
                assert all(not math.isnan(score_of[rejected][metric]) for metric in how.named)
    if limits.max_pairs_per_image:
        assert max(Counter(image for pair in found for image in pair).values(), default=0) <= 1
