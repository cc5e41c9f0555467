"""From pairs to examples: what is held out, which score an image has, and what an objective gets to see."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.examples import (
    CHOSEN,
    REJECTED,
    Example,
    easiest_first,
    form_examples,
    read_scores,
    refuse_single_images,
    split_held_out,
    weigh_by_gain,
)
from diffusion_dpo.data.index import PairRecord
from diffusion_dpo.data.prompts import prompt_key
from diffusion_dpo.losses.capo import CaPO


def record(
    prompt: str,
    chosen: str,
    rejected: str,
    *,
    label_prob: float = 1.0,
    scores: tuple[float | None, float | None] = (None, None),
) -> PairRecord:
    """A pair of images that go by one letter each; "" for the side that is not there."""
    chosen_scores, rejected_scores = ({} if score is None else {"shade": score} for score in scores)
    return PairRecord(
        row=0,
        where=f"row {prompt} {chosen}{rejected}",
        pair_id=f"{prompt}:{chosen}{rejected}",
        prompt=prompt,
        label_prob=label_prob,
        chosen_size_px=(64, 64),
        rejected_size_px=(64, 64),
        chosen_uid=chosen,
        rejected_uid=rejected,
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        margin=None,
    )


def scored(prompt: str, **scores: float) -> list[PairRecord]:
    """Every pair of a prompt's images, the higher score chosen."""
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    return [
        record(prompt, better, worse, scores=(scores[better], scores[worse]))
        for i, better in enumerate(ranked)
        for worse in ranked[i + 1 :]
    ]


def plain(values: Sequence[float]) -> list[float]:
    return list(values)


def all_of(records: Sequence[PairRecord], *args, **kwargs) -> list[Example]:
    return list(form_examples(records, range(len(records)), *args, **kwargs))


def uids(records: Sequence[PairRecord], example: Example) -> str:
    """The letters of an example's images, in order."""
    return "".join((records[i].chosen_uid, records[i].rejected_uid)[side] for i, side in example.images)


# --- held out --------------------------------------------------------------------------------------------------------

MANY = [record(f"prompt {i}", chosen, "z") for i in range(40) for chosen in "abc"[: 1 + i % 3]]


def held_ids(records: Sequence[PairRecord], **settings) -> set[str]:
    keys = np.array([prompt_key(it.prompt) for it in records], dtype=np.uint64)
    pairs = np.array([it.is_pair for it in records], dtype=bool)
    train_on, held = split_held_out(keys, pairs, **{"share": 0.2, "max_pairs": 1000, "seed": 0} | settings)
    assert sorted([*train_on, *held]) == list(range(len(records)))
    return {records[i].pair_id for i in held}


@pytest.mark.parametrize("settings", [{}, {"share": 0.5}, {"max_pairs": 7}, {"seed": 1}, {"share": 0.013}])
def test_whole_prompts_are_held_out_and_never_more_than_allowed(settings: dict):
    held = held_ids(MANY, **settings)
    room = min(int(settings.get("share", 0.2) * len(MANY)), settings.get("max_pairs", 1000))
    assert room - 2 <= len(held) <= room  # at most three pairs a prompt, and single ones fill the gaps
    assert len(held) == room
    prompts = {pair.split(":")[0] for pair in held}
    assert held == {it.pair_id for it in MANY if it.prompt in prompts}


def test_what_is_held_out_depends_on_the_seed_and_not_on_the_order_of_rows():
    shuffled = random.Random(0).sample(MANY, len(MANY))
    assert held_ids(shuffled) == held_ids(MANY) != held_ids(MANY, seed=1)


def test_spaces_around_a_prompt_make_no_other_prompt_of_it():
    records = [replace(it, prompt=f" {it.prompt} \n" if i % 2 else it.prompt) for i, it in enumerate(MANY)]
    assert held_ids(records) == held_ids(MANY)


def test_single_images_stay_and_so_do_the_pairs_of_their_prompt():
    singles = [record(it.prompt, "q", "") for it in MANY[::12]]
    held = held_ids([*MANY, *singles], share=0.9)
    assert held
    with_singles = {it.prompt for it in singles}
    assert not with_singles & {pair.split(":")[0] for pair in held}
    assert held_ids(singles, share=0.9) == set()


@pytest.mark.parametrize("records, share", [(MANY, 0.0), (MANY[:4], 0.24), (MANY[1:3], 0.5), ([], 0.5)])
def test_nothing_is_held_out_of_too_little(records: list[PairRecord], share: float):
    """The third case has one prompt of two pairs, half of which is not a whole prompt."""
    assert held_ids(records, share=share) == set()


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_go_from_0_the_worst_to_1_the_best_of_all_the_data():
    records = [*scored("x", a=30, b=10), *scored("y", a=20, c=15)]
    table = read_scores(records, "shade", plain)
    assert [table.of(records[0], side) for side in (CHOSEN, REJECTED)] == [1, 0]
    assert [table.of(records[1], side) for side in (CHOSEN, REJECTED)] == [0.5, 0.25]


def test_where_less_is_better_the_lowest_is_1():
    lower = [record(it.prompt, it.chosen_uid, it.rejected_uid, scores=s) for it, s in
             zip(scored("x", a=3, b=2, c=1), [(1, 2), (1, 5), (2, 5)], strict=True)]  # fmt: skip
    table = read_scores(lower, "shade", plain)
    assert [table.of(lower[1], side) for side in (CHOSEN, REJECTED)] == [1, 0]
    assert table.of(lower[0], REJECTED) == 0.75


def test_the_majority_of_pairs_says_which_way_is_up():
    records = [*scored("x", a=3, b=2, c=1), record("y", "a", "b", scores=(0, 4))]
    table = read_scores(records, "shade", plain)
    assert [table.of(records[-1], side) for side in (CHOSEN, REJECTED)] == [0, 1]


@pytest.mark.parametrize("scores", [(0.5, None), (None, 0.5), (0.5, float("nan")), (float("inf"), 0.5)])
def test_a_score_that_is_missing_or_no_number_is_named_with_its_row(scores: tuple):
    side = "rejected" if scores[0] == 0.5 else "chosen"
    with pytest.raises(ConfigError, match=rf"row y ab: the {side} image has no finite score 'shade'"):
        read_scores([*scored("x", a=2, b=1), record("y", "a", "b", scores=scores)], "shade", plain)


def test_a_metric_that_nobody_has_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match=r"no finite score 'clip' \(it has: shade\)"):
        read_scores(scored("x", a=2, b=1), "clip", plain)


def test_the_side_that_is_not_there_needs_no_score():
    records = [*scored("x", a=2, b=1), record("y", "c", "", scores=(1.5, None))]
    assert read_scores(records, "shade", plain).of(records[-1], CHOSEN) == 0.5


@pytest.mark.parametrize(
    "records",
    [
        [record("x", "a", "b", scores=(1, 1)), record("y", "a", "b", scores=(1, 1))],
        [record("x", "a", "b", scores=(1, 2)), record("y", "a", "b", scores=(2, 1))],
        [record("x", "a", "", scores=(1, None)), record("x", "", "b", scores=(None, 2))],
    ],
    ids=["all equal", "as often one way as the other", "no pairs"],
)
def test_scores_that_do_not_tell_the_sides_apart_are_refused(records: list[PairRecord]):
    with pytest.raises(ConfigError, match="score_metric shade: its values do not tell chosen from rejected"):
        read_scores(records, "shade", plain)


def test_scores_are_calibrated_within_a_prompt_over_its_distinct_images():
    seen = []

    def halve(values: Sequence[float]) -> list[float]:
        seen.append(sorted(values))
        return [value / 2 for value in values]

    records = [*scored("x", a=4, b=2, c=0), *scored("y", a=3, d=1)]
    table = read_scores(records, "shade", halve)
    assert seen == [[0, 0.5, 1], [0.25, 0.75]]
    assert table.of(records[0], CHOSEN) == 0.5  # a under x: the same image scores otherwise under y
    assert table.of(records[-1], CHOSEN) == 0.375


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_a_pair_is_an_example_with_its_label():
    records = [record("x", "a", "b"), record("y", "c", "d", label_prob=0.8), record("z", "e", "f")]
    examples = form_examples(records, [2, 1], "pair")
    assert [example.key for example in examples] == ["z:ef", "y:cd"]
    assert [uids(records, example) for example in examples] == ["ef", "cd"]
    assert examples[1].labels == pytest.approx((0.8, 0.2))
    assert all((example.scores, example.weight) == ((), 1) for example in examples)


def test_swapped_labels_exchange_the_images_and_keep_the_certainty_of_the_label():
    records = [record("x", "a", "b", label_prob=0.8)]
    [example] = all_of(records, "pair", swap_labels=True)
    assert uids(records, example) == "ba"
    assert example.labels == pytest.approx((0.8, 0.2))
    assert example.key == "x:ab"


@pytest.mark.parametrize("swap_labels", [False, True])
def test_the_first_image_of_a_pair_has_the_higher_score_also_with_swapped_labels(swap_labels: bool):
    """CaPO regresses onto the difference of scores: with its sign kept, swapped labels would train the very same."""
    records = scored("x", a=4, b=3, c=0)
    scores = read_scores(records, "shade", CaPO().calibrate)
    for example in all_of(records, "pair", scores=scores, swap_labels=swap_labels):
        assert example.scores[0] > example.scores[1]


def test_single_images_are_refused_by_an_objective_over_pairs():
    records = [record("x", "a", "b"), record("y", "c", ""), record("z", "", "d")]
    with pytest.raises(ConfigError, match=r"2 of 3 rows are single images \(e\.g\. row y c\).*loss\.type=kto"):
        refuse_single_images(records, np.array([True, False, False]))
    refuse_single_images(records[:1], np.array([True]))


# --- single images ---------------------------------------------------------------------------------------------------


def image_labels(records: Sequence[PairRecord], *args, **kwargs) -> dict[tuple[str, str], float]:
    examples = all_of(records, *args, **kwargs)
    found = {(records[it.images[0][0]].prompt, uids(records, it)): it.labels[0] for it in examples}
    assert len(found) == len(examples) == len({example.key for example in examples})
    assert all(len(example.images) == len(example.labels) == 1 for example in examples)
    return found


CHAIN = [record("x", "b", "c"), record("x", "a", "b"), record("x", "c", "d", label_prob=0.7), record("y", "e", "a")]


def test_every_image_of_a_prompt_comes_once_and_is_liked_if_it_was_preferred_once():
    expected = {("x", "a"): 1, ("x", "b"): 1, ("x", "c"): 0.7, ("x", "d"): 0.3, ("y", "e"): 1, ("y", "a"): 0}
    for records in (CHAIN, CHAIN[::-1]):
        assert image_labels(records, "image") == pytest.approx(expected)


def test_swapped_labels_like_what_was_rejected():
    expected = {("x", "a"): 0, ("x", "b"): 1, ("x", "c"): 1, ("x", "d"): 0.7, ("y", "e"): 0, ("y", "a"): 1}
    assert image_labels(CHAIN, "image", swap_labels=True) == pytest.approx(expected)


def test_images_judged_one_by_one_keep_their_label():
    records = [record("x", "a", ""), record("x", "", "b"), record("y", "", "a")]
    assert image_labels(records, "image") == {("x", "a"): 1, ("x", "b"): 0, ("y", "a"): 0}
    assert image_labels(records, "chosen") == {("x", "a"): 1}
    assert image_labels(records, "chosen", swap_labels=True) == {("x", "b"): 1, ("y", "a"): 1}


def test_only_what_was_preferred_is_chosen():
    assert image_labels(CHAIN, "chosen") == {("x", "a"): 1, ("x", "b"): 1, ("x", "c"): 0.7, ("y", "e"): 1}
    tie = record("x", "e", "f", label_prob=0.5)
    assert image_labels([*CHAIN, tie], "chosen") == image_labels(CHAIN, "chosen")
    with pytest.raises(ConfigError, match="no image that was chosen"):
        all_of([tie], "chosen")


def test_an_image_keeps_its_noise_when_a_later_pair_makes_it_liked():
    first, last = (form_examples(CHAIN, indices, "image") for indices in ([0], [0, 2]))
    keys = [{uids(CHAIN, it): it.key for it in examples} for examples in (first, last)]
    assert keys[0].items() <= keys[1].items()
    assert all(form_examples(CHAIN, [0, 2], "image")[i].labels[0] > 0.5 for i in (0, 1))  # b, and now c


def test_only_disliked_images_leave_nothing_to_imitate():
    with pytest.raises(ConfigError, match="no image that was chosen"):
        all_of([record("x", "", "a")], "chosen")


# --- rankings --------------------------------------------------------------------------------------------------------

FIVE = scored("x", c=3, a=5, e=1, b=4, d=2)


def ranking(records: Sequence[PairRecord], **kwargs) -> list[Example]:
    return all_of(records, "list", scores=read_scores(records, "shade", plain), **kwargs)


@pytest.mark.parametrize("size, expected", [(2, "ae"), (3, "ace"), (4, "abde"), (5, "abcde")])
def test_a_list_is_ordered_best_first_at_evenly_spaced_ranks(size: int, expected: str):
    [example] = ranking(FIVE, list_size=size)
    assert uids(FIVE, example) == expected
    assert example.scores == pytest.approx(["edcba".index(letter) / 4 for letter in expected])
    assert example.labels == (1.0, *[0.5] * (size - 2), 0.0)


def test_of_any_number_of_images_none_is_taken_twice():
    for number in range(2, 12):
        records = scored("x", **{chr(ord("a") + i): number - i for i in range(number)})
        for size in range(2, number + 1):
            [example] = ranking(records, list_size=size)
            letters = uids(records, example)
            assert len(set(letters)) == size
            assert list(letters) == sorted(letters)
            assert letters[0] == "a" and letters[-1] == records[-1].rejected_uid


def test_swapped_labels_put_the_worst_first_and_its_score_on_top():
    [example] = ranking(FIVE, list_size=5, swap_labels=True)
    assert uids(FIVE, example) == "edcba"
    assert example.scores == (1, 0.75, 0.5, 0.25, 0)
    assert example.labels[0] == 1 and example.labels[-1] == 0


def test_prompts_with_too_few_images_are_left_out_and_images_do_not_cross_prompts():
    records = [*scored("x", a=5, b=4, c=3), *scored("y", a=2, b=1), *scored("z", d=3, e=2, f=1)]
    assert [uids(records, example) for example in ranking(records, list_size=3)] == ["abc", "def"]
    assert len({example.key for example in ranking(records)}) == 3


def test_no_prompt_with_enough_images_is_an_error_that_says_what_to_do():
    with pytest.raises(ConfigError, match=r"no prompt has 4 distinct scored images .*top_bottom.*loss\.list_size"):
        ranking([*scored("x", a=5, b=4, c=3), *scored("y", a=2, b=1)], list_size=4)


# --- weights and order -----------------------------------------------------------------------------------------------


def test_gain_weights_follow_the_formula_and_average_1():
    records = [*scored("x", a=4, b=0), *scored("y", a=4, b=2), *scored("z", a=1, b=0)]
    weighted = weigh_by_gain(all_of(records, "pair", scores=read_scores(records, "shade", plain)))
    gains = [2 - 1, 2 - 2**0.5, 2**0.25 - 1]
    assert [example.weight for example in weighted] == pytest.approx([3 * gain / sum(gains) for gain in gains])
    assert sum(example.weight for example in weighted) == pytest.approx(3)


def test_a_curriculum_begins_with_the_widest_difference_whatever_its_sign():
    widths = {"a": (0.5, 0.4), "b": (0.0, 0.9), "c": (0.8, 0.2), "d": (0.3, 0.2)}
    examples = [Example(key, ((i, 0), (i, 1)), (1, 0), scores) for i, (key, scores) in enumerate(widths.items())]
    expected = ["b", "c", *sorted("ad", key=lambda key: (-abs(widths[key][0] - widths[key][1]), key))]
    for order in (examples, examples[::-1]):
        assert [example.key for example in easiest_first(order)] == expected
    ties = [Example(key, ((0, 0), (0, 1)), (1, 0), (0.5, 0.25)) for key in "cab"]
    assert [example.key for example in easiest_first(ties)] == ["a", "b", "c"]


def test_shared_images_count_once_a_prompt():
    """What the pairs of one prompt amount to: five images, each in four pairs."""
    examples = all_of(FIVE, "image")
    assert Counter(uids(FIVE, example) for example in examples) == Counter("abcde")
