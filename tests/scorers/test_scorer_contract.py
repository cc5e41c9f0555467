"""What every registered scorer promises, whatever it measures."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.images import decode_rgb
from diffusion_dpo.pocket.world import distinct_scenes, render
from diffusion_dpo.registry import TABLES, resolve
from diffusion_dpo.scorers import Scorer, ScoreRequest
from diffusion_dpo.scorers.judge import Judge, check_metrics, judge
from tests.scorers.servers import Reply, chat, decode, light, lighter, serve
from tests.scorers.tiny import NUM_VARIANTS, TINY, Settings


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Scorer]:
    """Make the scorer of a name and a number among its variants; the weights of each name are made once."""
    made: dict[str, list[Settings]] = {}

    def make(name: str, number: int) -> Scorer:
        if name not in made:
            made[name] = TINY[name](tmp_path_factory.mktemp(name))
        return resolve("scorers", name)(type=name, **made[name][number])

    return make


def _ids() -> list[tuple[str, int]]:
    return [(name, number) for name in TABLES["scorers"] for number in range(NUM_VARIANTS.get(name, 1))]


@pytest.fixture(params=_ids(), ids=lambda variant: f"{variant[0]}-{variant[1]}")
def scorer(request: pytest.FixtureRequest, variants: Callable[[str, int], Scorer]) -> Scorer:
    scorer = variants(*request.param)
    scorer.load(torch.device("cpu"))
    return scorer


@pytest.fixture(scope="module")
def requests() -> list[ScoreRequest]:
    """Eight scenes, each judged by its own caption or that of the next one, against one or two references."""
    rng = np.random.default_rng(0)
    scenes = [scene for scene, _ in zip(distinct_scenes(0), range(8), strict=False)]
    images = [render(scene, rng) for scene in scenes]
    return [
        ScoreRequest(
            image, scenes[(i + i % 2) % 8].caption, tuple(images[: 1 + i % 2]), tuple(images[:i] + images[i + 1 :])[:3]
        )
        for i, image in enumerate(images)
    ]


def test_gives_every_metric_one_float_per_image(scorer: Scorer, requests: list[ScoreRequest]) -> None:
    for count in (1, 8):
        raw = scorer.score(requests[:count])
        scores = judge(scorer, requests[:count], batch_size=8)
        assert list(scores.values) == [metric.name for metric in scorer.metrics]
        for name, values in scores.values.items():
            assert raw.values[name].shape == (count,)
            assert np.issubdtype(raw.values[name].dtype, np.floating)
            assert values.dtype == np.float64
        assert len(scores.reasons) == count


def test_says_what_it_errs_like(scorer: Scorer) -> None:
    assert all(tag.startswith(("backbone: ", "data: ")) and tag == tag.strip() for tag in scorer.lineage)


def test_does_not_look_at_the_rest_of_the_batch(scorer: Scorer, requests: list[ScoreRequest]) -> None:
    whole = scorer.score(requests)
    order = np.random.default_rng(1).permutation(len(requests))
    permuted = scorer.score([requests[i] for i in order])
    for name, values in whole.values.items():
        alone = np.concatenate([scorer.score([request]).values[name] for request in requests])
        np.testing.assert_allclose(alone, values, atol=1e-5)
        np.testing.assert_allclose(permuted.values[name], values[order], atol=1e-5)
        assert np.ptp(values) > 0, "a judge that says the same of every image passes every test"


def test_says_the_same_twice(scorer: Scorer, requests: list[ScoreRequest]) -> None:
    first, second = scorer.score(requests), scorer.score(requests)
    for name, values in first.values.items():
        np.testing.assert_array_equal(values, second.values[name])
    assert scorer.fingerprint() == scorer.fingerprint()


@pytest.mark.parametrize("size", [(32, 32), (33, 97), (200, 41)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16", "rotated"])
def test_takes_images_of_any_size_and_mode(
    scorer: Scorer, requests: list[ScoreRequest], size: tuple[int, int], mode: str
) -> None:
    image = requests[0].image.resize(size)
    file = io.BytesIO()
    if mode == "rotated":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", exif=exif, quality=95)
    elif mode == "I;16":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(file, "PNG")
    else:
        image.convert(mode).save(file, "TIFF")
    found = decode_rgb(file.getvalue())
    assert found.size == size
    other = requests[2].image.resize(size)
    scores = judge(scorer, [ScoreRequest(found, requests[0].prompt, (image,), (other,))], batch_size=2)
    assert np.isfinite(scores.values[scorer.metrics[0].name]).all()


def test_refuses_what_it_lacks(scorer: Scorer, requests: list[ScoreRequest]) -> None:
    whole = requests[0]
    lacking = {"prompt": replace(whole, prompt=" "), "reference": replace(whole, references=())}
    for need, bare in lacking.items():
        if need in scorer.needs:
            with pytest.raises(ConfigError, match=rf"{scorer.type} needs a {need} .* 1 of 2 images have none"):
                judge(scorer, [whole, bare], batch_size=2)
        else:
            assert len(judge(scorer, [whole, bare], batch_size=2).reasons) == 2


def test_the_only_image_of_a_prompt_is_not_compared(scorer: Scorer, requests: list[ScoreRequest]) -> None:
    if "rivals" in scorer.needs:
        scores = judge(scorer, [replace(requests[0], rivals=()), requests[1]], batch_size=2)
        main = scores.values[scorer.metrics[0].name]
        assert np.isnan(main).tolist() == [True, False]
        assert scores.reasons[0]


def test_nothing_is_more_like_a_reference_than_itself(scorer: Scorer, requests: list[ScoreRequest]) -> None:
    if "reference" in scorer.needs:
        against = [replace(request, references=(requests[0].image,)) for request in requests]
        metric = scorer.metrics[0]
        values = judge(scorer, against, batch_size=8).values[metric.name]
        best = metric.range[1] if metric.higher_is_better else metric.range[0]
        if np.isfinite(best):  # 1 for a cosine, 0 for a distance
            assert values[0] == pytest.approx(best, abs=1e-5)
        oriented = values * (1 if metric.higher_is_better else -1)
        assert oriented[0] >= np.nanmax(oriented) - 1e-6
        assert oriented[0] > np.nanmin(oriented) + 1e-3


_DARK = Image.new("RGB", (64, 64), (6, 6, 6))
UNSCORABLE: dict[str, Callable[[ScoreRequest], ScoreRequest]] = {
    "arcface": lambda request: replace(request, image=_DARK),
    "clip-pocket": lambda request: replace(request, prompt="a cat"),
    "clip_diversity": lambda request: replace(request, rivals=()),
    "diversity": lambda request: replace(request, rivals=()),
    "http": lambda request: replace(request, image=_DARK),
    "judge": lambda request: replace(request, image=_DARK),
    "pocket_scene": lambda request: replace(request, prompt="a cat"),
    "sface": lambda request: replace(request, image=_DARK),
}
"""What each scorer cannot score; those that score whatever there is are in `SCORES_ANYTHING`."""
SCORES_ANYTHING = {
    *("aesthetic", "brightness", "clip", "clip_image", "colorfulness", "dino", "hps", "lpips", "pickscore"),
    *("saturation", "sharpness"),
}


def _silent_on_the_dark(folder: Path) -> dict[str, list[Settings]]:
    """Servers that give no value for an image without light."""

    def say(images: Sequence[Image.Image]) -> str:
        return "I would rather not." if min(map(light, images)) < 0.1 else lighter(images)

    def answer(body: Any) -> Reply:
        found = [light(decode(text)) for text in body["images"]]
        return Reply({"metrics": {"remote_light": [None if one < 0.1 else one for one in found]}})

    common = {"url": chat(say).url, "model": "light"}
    return {
        "http": [{"url": serve(answer).url, "version": "1", "gives": [{"name": "remote_light"}]}],
        "judge": [
            {**common, "log_path": folder / "pairs.jsonl"},
            {**common, "log_path": folder / "points.jsonl", "mode": "pointwise"},
        ],
        "clip-pocket": [{}],
    }


@pytest.mark.parametrize("case", UNSCORABLE)
def test_what_cannot_be_scored_is_nan_with_a_reason(case: str, requests: list[ScoreRequest], tmp_path: Path) -> None:
    name = case.removesuffix("-pocket")
    for settings in _silent_on_the_dark(tmp_path).get(case) or TINY[name](tmp_path):
        scorer = resolve("scorers", name)(type=name, **settings)
        scorer.load(torch.device("cpu"))
        scores = judge(scorer, [UNSCORABLE[case](requests[0]), requests[2]], batch_size=2)
        assert np.isnan(scores.values[scorer.metrics[0].name]).tolist() == [True, False]
        assert scores.reasons[0] and not scores.reasons[1]


def test_every_scorer_is_asked_for_what_it_cannot_score_or_scores_anything() -> None:
    assert {case.removesuffix("-pocket") for case in UNSCORABLE} | SCORES_ANYTHING == TABLES["scorers"].keys()


def test_equal_requests_tie_exactly(scorer: Scorer, requests: list[ScoreRequest]) -> None:
    again = [
        ScoreRequest(
            r.image.copy(), r.prompt, tuple(i.copy() for i in r.references), tuple(i.copy() for i in r.rivals)
        )
        for r in requests
    ]
    scores = Judge(scorer, batch_size=3).score([*requests, *again])
    for values in scores.values.values():
        np.testing.assert_array_equal(values[:8], values[8:])


def test_states_its_licence_source_and_direction(scorer: Scorer) -> None:
    assert scorer.licence
    assert scorer.source
    assert scorer.weights
    assert not scorer.metrics[0].auxiliary, "the first metric is the main one"
    check_metrics([scorer])


def test_pocket_scene_is_nan_with_a_reason_outside_its_world() -> None:
    scorer = resolve("scorers", "pocket_scene")(type="pocket_scene")
    scores = judge(scorer, [ScoreRequest(Image.new("RGB", (64, 64)), "a cat")], batch_size=1)
    assert all(np.isnan(values).all() for values in scores.values.values())
    assert "pocket world" in scores.reasons[0]


def test_pocket_scene_tells_right_from_wrong(requests: list[ScoreRequest]) -> None:
    scorer = resolve("scorers", "pocket_scene")(type="pocket_scene")
    values = judge(scorer, requests, batch_size=8).values
    assert (values["pocket_scene_all"][::2] == 1).all()
    assert (values["pocket_scene_all"][1::2] == 0).all()
    assert (values["pocket_scene"][1::2] < 1).all()


def test_brightness_of_black_and_white() -> None:
    scorer = resolve("scorers", "brightness")(type="brightness")
    images = [Image.new("RGB", (32, 32), color) for color in ("black", "white")]
    values = judge(scorer, [ScoreRequest(image) for image in images], batch_size=2).values["brightness"]
    np.testing.assert_allclose(values, [0, 1])
