"""Signs of reward hacking: each warns on the one side of its threshold, and only on what chance does not explain."""

import numpy as np
import pytest

from diffusion_dpo.report import BASELINE, MetricScores, Role, Sign, signs
from diffusion_dpo.report.statistics import summarise
from diffusion_dpo.report.training_log import Point

RNG = np.random.default_rng(0)
BASE = 0.5 + 0.1 * RNG.normal(size=(40, 2))
NOISE = 0.02 * RNG.normal(size=(40, 2))


def metric(values: np.ndarray, name: str = "saturation", role: Role = "held_out") -> MetricScores:
    return MetricScores(name, role, True, {BASELINE: BASE, "tuned": values}, auxiliary=role == "held_out")


def appearance(values: np.ndarray) -> Sign:
    scores = metric(values)
    return signs.appearance(scores, summarise(scores, "tuned"))


@pytest.mark.parametrize("shift,warns", [(0.0, False), (0.03, False), (0.09, True), (-0.09, True)])
def test_a_shift_of_light_or_colour_warns_where_one_sees_it(shift: float, warns: bool) -> None:
    sign = appearance(BASE + NOISE + shift)
    assert sign.warns == warns
    expected = "did not change" if shift == 0 else "more saturated" if shift > 0 else "paler"
    assert expected in sign.sentence and ("judges often reward" in sign.sentence) == warns


def test_a_large_shift_that_may_be_chance_does_not_warn() -> None:
    wild = BASE + 0.09 + 2 * RNG.normal(size=BASE.shape)
    assert not appearance(wild).warns


@pytest.mark.parametrize(
    "factor,warns,words", [(1.0, False, "as much as"), (0.95, False, "a little less"), (0.8, True, "variety was lost")]
)
def test_less_variety_warns_from_a_tenth_on(factor: float, warns: bool, words: str) -> None:
    sign = signs.diversity(summarise(metric(BASE * factor + NOISE * (factor == 1), "mean_lpips"), "tuned"))
    assert (sign.name, sign.warns) == ("diversity", warns) and words in sign.sentence
    assert "more than" in signs.diversity(summarise(metric(BASE * 1.3), "tuned")).sentence


def test_distance_warns_where_nothing_moved_and_where_all_did() -> None:
    between = np.full((40, 1), 0.4)

    def sign(moved: float, **facts: bool) -> Sign:
        return signs.distance("tuned", "clip_image", np.full((40, 2), moved), between, **({"is_same": False} | facts))

    assert "the adapter does nothing" in sign(0.0, is_same=True).sentence and sign(0.0, is_same=True).warns
    near, far = sign(0.1), sign(0.38)
    assert not near.warns and "25\u00a0% of the way to another seed's" in near.sentence
    assert far.warns and "little of what the baseline would draw is left" in far.sentence
    assert near.baseline == pytest.approx(0.4) and near.value == pytest.approx(0.1)
    unknown = signs.distance("tuned", "lpips", np.full((40, 1), np.nan), None, is_same=False)
    assert unknown.value is None and "could not be judged" in unknown.sentence and not unknown.warns
    alone = signs.distance("tuned", "lpips", np.full((40, 1), 0.3), None, is_same=False)
    assert not alone.warns and "0.3 away" in alone.sentence


@pytest.mark.parametrize(
    "accuracy,warns,words",
    [
        (0.66, False, "chosen image in 66\u00a0% (60\u00a0% to 72\u00a0%)"),
        (0.55, True, "this may be chance"),
        (0.4, True, "less often than chance would"),
    ],
)
def test_held_out_accuracy_warns_unless_it_is_better_than_chance(accuracy: float, warns: bool, words: str) -> None:
    sign = signs.implicit_accuracy("tuned", Point(9, accuracy, 0.03))
    assert sign.warns == warns and words in sign.sentence
    assert sign.interval == pytest.approx((accuracy - 0.0588, accuracy + 0.0588))
    unsure = signs.implicit_accuracy("tuned", Point(9, accuracy))
    assert unsure.interval is None and unsure.warns and "too few prompts to tell it from chance" in unsure.sentence


@pytest.mark.parametrize("held_out_gain,warns", [(0.0, True), (0.1, False)])
def test_a_judge_that_rises_alone_warns(held_out_gain: float, warns: bool) -> None:
    def main(name: str, role: Role, gain: float):
        return summarise(MetricScores(name, role, True, {BASELINE: BASE, "tuned": BASE + NOISE + gain}), "tuned")

    trained, held_out = main("clip", "trained_on", 0.1), main("oracle", "held_out", held_out_gain)
    (sign,) = signs.trained_on_only([trained, held_out])
    assert sign.warns == warns and ("learnt to please" in sign.sentence) == warns
    assert not list(signs.trained_on_only([main("clip", "trained_on", 0.0), held_out]))
    assert not list(signs.trained_on_only([trained]))
