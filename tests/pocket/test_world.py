"""The pocket world says what it draws, and its oracle reads back what was drawn."""

from itertools import islice

import numpy as np
import pytest
from PIL import Image

from diffusion_dpo.pocket import world
from diffusion_dpo.pocket.oracle import check, read_scene
from diffusion_dpo.pocket.world import (
    COLORS,
    Item,
    Scene,
    distinct_scenes,
    is_held_out,
    num_captions,
    parse_caption,
    render,
    sample_scene,
)


def test_captions_are_read_back():
    for scene in islice(distinct_scenes(0), 500):
        assert parse_caption(scene.caption) == scene
    assert parse_caption("A small RED circle, on a blue background.") == Scene(
        (Item("red", "circle", "small"),), "blue"
    )
    assert parse_caption("a photo of a cat") is None
    assert parse_caption("a red circle") is None


def test_there_are_more_than_ten_thousand_prompts():
    captions = {scene.caption for scene in islice(distinct_scenes(0), 10_500)}
    assert len(captions) == 10_500


def test_scenes_come_in_an_order_that_stays():
    assert [scene.caption for scene in islice(distinct_scenes(0), 3)] == [
        "a small blue square on a black background",
        "a small green square left of a red square on a purple background",
        "a large red square on a black background",
    ]


@pytest.mark.parametrize("held_out", [True, False])
def test_scenes_end_where_the_world_does(held_out: bool, monkeypatch: pytest.MonkeyPatch):
    draws = 0

    def counted(*arguments, **settings):
        nonlocal draws
        draws += 1
        assert draws < 50_000, "it goes on for ever"
        return sample_scene(*arguments, **settings)

    monkeypatch.setattr(world, "sample_scene", counted)
    scenes = list(distinct_scenes(0, num_items=1, held_out=held_out))
    assert len({scene.caption for scene in scenes}) == len(scenes) == num_captions(num_items=1, held_out=held_out)


def test_captions_are_counted_as_they_can_be_drawn():
    assert [num_captions(num_items=1, held_out=side) for side in (True, False)] == [75, 8 * 7 * 4 * 3 - 75]
    both = sum(num_captions(num_items=2, held_out=side) for side in (True, False))
    assert both == 8 * (7 * 4) ** 2 * 4 * 9
    assert num_captions(held_out=True) == num_captions(num_items=2, held_out=True) + 75


def test_the_split_is_by_content_and_blind_to_size_and_wording():
    left = Scene((Item("red", "circle", "small"), Item("blue", "cross", None)), "white", "left of")
    right = Scene((Item("blue", "cross", "large"), Item("red", "circle", None)), "white", "right of")
    assert is_held_out(left) == is_held_out(right)
    scenes = list(islice(distinct_scenes(0), 300)) + list(islice(distinct_scenes(0, held_out=True), 300))
    assert [is_held_out(scene) for scene in scenes] == [False] * 300 + [True] * 300
    rng = np.random.default_rng(0)
    share = np.mean([is_held_out(Scene(s.items, b, s.relation)) for s in scenes for b in COLORS if rng.random() < 0.5])
    assert 0.05 < share < 0.3


def test_the_oracle_is_right_on_clean_renderings():
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng) for _ in range(2000)]
    right = [check(render(scene, rng), scene)[1] for scene in scenes]
    assert np.mean(right) >= 0.99


def test_a_wrong_caption_loses_exactly_its_wrong_facts():
    rng = np.random.default_rng(2)
    drawn = Scene((Item("red", "circle", "small"), Item("blue", "square", "large")), "white", "left of")
    image = render(drawn, rng)
    assert check(image, drawn) == (1.0, True)
    facts = drawn.num_facts
    assert facts == 9
    wrong = {
        "a small red circle left of a large blue square on a yellow background": 1,
        "a small red circle right of a large blue square on a white background": 1,
        "a large red circle left of a large blue square on a white background": 1,
        "a small green circle left of a large blue square on a white background": 1,
        "a small red cross left of a large blue square on a white background": 1,
    }
    for caption, count in wrong.items():
        scene = parse_caption(caption)
        assert scene is not None
        assert check(image, scene) == ((facts - count) / facts, False)
    lonely = parse_caption("a small red circle on a white background")
    assert lonely is not None
    assert check(image, lonely) == (4 / 5, False)  # one object too many


@pytest.mark.parametrize("color", list(COLORS))
def test_an_empty_image_has_a_background_and_no_objects(color: str):
    seen = read_scene(Image.new("RGB", (64, 64), COLORS[color]))
    assert (seen.background, seen.items) == (color, ())
    scene = Scene((Item("red" if color != "red" else "blue", "circle"),), color)
    assert check(Image.new("RGB", (64, 64), COLORS[color]), scene) == (1 / 4, False)


def test_noise_is_no_scene():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    score, right = check(Image.fromarray(noise), Scene((Item("red", "circle"),), "white"))
    assert not right
    assert score < 0.75
