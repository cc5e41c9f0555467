"""What predicts a label: the truth is known in tables that were made for it."""

import numpy as np
import pytest

from diffusion_dpo.report.confounds import (
    LOUD_ABOVE,
    MAX_VALUES,
    category,
    few_values,
    number,
    origin_keys,
    together,
)


def table(seed: int, share: float, *, prompts: int = 100, each: int = 4) -> tuple[list[np.ndarray], np.ndarray]:
    """A number that is larger on the chosen side of a share of the pairs."""
    rng = np.random.default_rng(seed)
    size = prompts * each
    low, gap = rng.random(size), rng.random(size) + 0.01
    is_larger = rng.random(size) < share
    sides = [np.where(is_larger, low + gap, low), np.where(is_larger, low, low + gap)]
    return sides, np.repeat(np.arange(prompts), each)


def texts(seed: int, share: float, names: tuple[str, str] = ("new", "old")) -> tuple[list[list[str]], np.ndarray]:
    rng = np.random.default_rng(seed)
    is_first = rng.random(400) < share
    chosen = [names[not it] for it in is_first]
    return [chosen, [names[it == names[0]] for it in chosen]], np.repeat(np.arange(100), 4)


def test_a_number_that_decides_four_labels_of_five_has_an_auc_of_0_8_and_is_loud() -> None:
    found = number("brightness", *table(0, 0.8))
    assert found.auc == pytest.approx(0.8, abs=0.04)
    assert found.interval is not None and found.interval[0] < 0.8 < found.interval[1]
    assert found.is_loud
    assert f"chosen images are brighter in {round(100 * found.auc)}\u00a0% of the pairs (AUC 0." in found.sentence


@pytest.mark.parametrize("share", [0.5, 0.8, 0.97])
def test_swapping_all_labels_mirrors_the_auc_and_its_interval(share: float) -> None:
    sides, prompts = table(1, share)
    there, back = number("sharpness", sides, prompts), number("sharpness", sides[::-1], prompts)
    assert back.auc == pytest.approx(1 - there.auc, abs=1e-12)
    assert back.interval == pytest.approx([1 - it for it in reversed(there.interval)], abs=1e-12)
    assert back.is_loud == there.is_loud
    if share > 0.5:
        assert "chosen images are less sharp in " in back.sentence


def test_the_auc_is_that_of_a_classifier_over_all_pairs_seen_from_both_sides() -> None:
    """The definition with ties, against the rank statistic of the pairs' signs, where every prompt has one pair."""
    rng = np.random.default_rng(0)
    chosen, rejected = rng.integers(0, 4, 300) + rng.integers(0, 2, 300), rng.integers(0, 4, 300)
    found = number("x", [chosen.astype(float), rejected.astype(float)], np.arange(300))
    assert found.auc == pytest.approx((chosen > rejected).mean() + 0.5 * (chosen == rejected).mean())
    assert found.num_equal == (chosen == rejected).sum()


@pytest.mark.parametrize("prompts,each", [(20, 1), (60, 3)])
def test_random_labels_are_hardly_ever_loud(prompts: int, each: int) -> None:
    loud = sum(number("x", *table(seed, 0.5, prompts=prompts, each=each)).is_loud for seed in range(200))
    assert loud <= 10
    found = [category("x", *texts(seed, 0.5)) for seed in range(200)]
    assert sum(it.is_loud for it in found) <= 10
    assert 0.485 <= np.mean([it.auc for it in found]) <= 0.515


def test_a_category_with_many_values_and_random_labels_is_not_biased_upwards() -> None:
    aucs = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        sides = [[str(it) for it in rng.integers(0, 10, 60)] for _ in range(2)]
        aucs.append(category("x", sides, np.arange(60)).auc)
    assert 0.47 <= np.mean(aucs) <= 0.53  # in-sample it is 0.66


def test_a_category_whose_value_decides_is_loud_and_names_it() -> None:
    found = category("model (origin)", *texts(0, 0.8))
    assert found.auc == pytest.approx(0.8, abs=0.05) and found.is_loud
    assert [it.value for it in found.values] == ["new", "old"]
    assert found.values[0].rate == pytest.approx(0.8, abs=0.05)
    assert found.values[0].rate + found.values[1].rate == pytest.approx(1)
    assert "model (origin) predicts which image is chosen" in found.sentence and "new is chosen in " in found.sentence
    sides, prompts = texts(0, 0.8)
    assert category("model", sides[::-1], prompts).values[0].value == "old"


def test_pairs_of_one_prompt_are_not_independent_evidence() -> None:
    sides, prompts = table(2, 0.8, prompts=12, each=1)
    once = number("x", sides, prompts)
    often = number("x", [np.repeat(it, 50) for it in sides], np.repeat(prompts, 50))
    assert often.auc == once.auc
    assert often.interval[1] - often.interval[0] >= 0.95 * (once.interval[1] - once.interval[0])


def test_missing_and_equal_values_are_counted_and_never_loud() -> None:
    nothing = number("x", [np.full(9, np.nan), np.ones(9)], np.arange(9))
    assert (nothing.auc, nothing.num_pairs, nothing.varies, nothing.is_loud) == (None, 0, False, False)
    same = number("x", [np.ones(9), np.ones(9)], np.arange(9))
    assert (same.auc, same.interval, same.varies, same.is_loud) == (0.5, (0.5, 0.5), False, False)
    unknown = category("x", [["a", None], [None, None]], np.arange(2))
    assert (unknown.auc, unknown.values) == (None, ())
    infinite = number("x", [np.array([np.inf, 1.0]), np.array([0.0, 2.0])], np.arange(2))
    assert infinite.num_pairs == 1


def test_few_pairs_are_never_loud_whatever_they_say() -> None:
    assert not number("x", [np.ones(4), np.zeros(4)], np.arange(4)).is_loud
    assert number("x", [np.ones(9), np.zeros(9)], np.arange(9)).is_loud
    assert LOUD_ABOVE == 0.65


def test_keys_of_origins_are_categories_numbers_or_left_out() -> None:
    origins = [{"model": f"m{i % 2}", "guidance_scale": i % 3, "seed": i, "uid": f"u{i}"} for i in range(40)]
    assert origin_keys([*origins, {}, {"steps": [1]}]) == {
        "guidance_scale": True,
        "model": True,
        "seed": False,
        "steps": True,
    }


def test_many_numbers_together_are_loud_by_chance_no_more_often_than_one() -> None:
    """Nine numbers and random labels: without correction every third data set would be warned of."""
    rng, loud = np.random.default_rng(0), 0
    prompts = np.repeat(np.arange(30), 3)
    for _ in range(200):
        found = [number(f"n{i}", tuple(rng.normal(size=(2, 90))), prompts) for i in range(9)]
        loud += any(it.is_loud for it in together(found))
    assert loud <= 20


def test_a_strong_one_is_loud_among_many() -> None:
    rng, prompts = np.random.default_rng(0), np.repeat(np.arange(60), 3)
    noise = [number(f"n{i}", tuple(rng.normal(size=(2, 180))), prompts) for i in range(12)]
    chosen = rng.normal(size=180)
    strong = number("strong", (chosen, chosen - np.where(rng.random(180) < 0.85, 1, -1)), prompts)
    assert [it.name for it in together([*noise, strong]) if it.is_loud] == ["strong"]


def test_too_few_prompts_are_untold_and_not_silent() -> None:
    prompts, chosen = np.repeat(np.arange(3), 40), np.ones(120)
    (found,) = together([number("n", (chosen, chosen * 0), prompts)])
    assert (found.is_loud, found.is_untold) == (False, True)
    (few,) = together([number("n", (chosen[:6], chosen[:6] * 0), prompts[:6])])
    assert not few.is_untold


def test_of_many_models_the_common_ones_are_told_apart() -> None:
    rng, prompts = np.random.default_rng(0), np.arange(300)
    names = [f"model {i}" for i in range(30)]
    chosen = ["good" if rng.random() < 0.5 else str(rng.choice(names)) for _ in range(300)]
    rejected = [str(rng.choice(names)) for _ in range(300)]
    assert origin_keys({"model": it} for it in chosen + rejected) == {"model": True}
    (found,) = together([category("model (origin)", few_values([chosen, rejected]), prompts)])
    assert found.is_loud and found.values[0].value == "good"
    assert len(found.values) <= MAX_VALUES
