"""The judges of identity: real insightface and OpenCV over small ONNX files that find red squares."""

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_dpo.config import ConfigError
from diffusion_dpo.registry import resolve
from diffusion_dpo.scorers import Scorer, ScoreRequest
from diffusion_dpo.scorers.faces import NO_DIRECTION, Face, choose, similarity, unit, version_of
from tests.scorers.tiny_faces import make_detector, make_pack, make_recogniser, make_yunet


def draw(*faces: tuple[int, int, int], green: int = 0) -> Image.Image:
    """An image of 128 px with a red square of 16 px for each (left, top, blue); the bluer, the larger the face."""
    pixels = np.random.default_rng(green).integers(0, 40, (128, 128, 3), dtype=np.uint8)
    for left, top, blue in faces:
        pixels[top : top + 16, left : left + 16] = (250, green, blue)
    return Image.fromarray(pixels)


ONE = draw((56, 56, 0))
OTHER = draw((56, 56, 0), green=60)
THREE = draw((8, 8, 0), (56, 56, 100), (96, 8, 250))
BLACK = Image.new("RGB", (128, 128))


@pytest.fixture(scope="module", params=["arcface", "sface"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, object]]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "arcface":
        return "arcface", {"model": str(make_pack(folder)), "det_size_px": 128}
    recogniser = make_recogniser(folder / "sface.onnx", raw=True)
    return "sface", {"detector_path": make_yunet(folder / "yunet.onnx"), "recognizer_path": recogniser}


def make(kind: tuple[str, dict[str, object]], **settings: object) -> Scorer:
    scorer = resolve("scorers", kind[0])(type=kind[0], **kind[1], **settings)
    scorer.load(torch.device("cpu"))
    return scorer


def ask(scorer: Scorer, image: Image.Image, *references: Image.Image) -> tuple[list[float], str]:
    scores = scorer.score([ScoreRequest(image, "", references)])
    return [float(values[0]) for values in scores.values.values()], scores.reasons[0]


def test_a_face_is_like_itself_and_less_like_another(kind: tuple[str, dict[str, object]]) -> None:
    scorer = make(kind)
    (cosine, count, certainty, area), reason = ask(scorer, ONE, ONE)
    assert (cosine, count, reason) == (pytest.approx(1), 1, "")
    assert 0.5 < certainty <= 1 and 0 < area < 0.5
    assert ask(scorer, OTHER, ONE)[0][0] < 0.999
    both = ask(scorer, ONE, ONE, OTHER)[0][0]
    assert both == pytest.approx((1 + ask(scorer, ONE, OTHER)[0][0]) / 2)
    assert ask(make(kind, references="max"), ONE, ONE, OTHER)[0][0] == pytest.approx(1)
    assert both < ask(make(kind, references="centroid"), ONE, ONE, OTHER)[0][0] < 1


def test_no_face_is_nan_with_a_reason_and_counted(kind: tuple[str, dict[str, object]]) -> None:
    scorer = make(kind)
    swapped = Image.fromarray(np.asarray(ONE)[:, :, ::-1])
    for image in (BLACK, draw(), swapped):
        values, reason = ask(scorer, image, ONE)
        np.testing.assert_array_equal(values, [np.nan, 0, np.nan, np.nan])
        assert reason == "no face in the image"
    values, reason = ask(scorer, ONE, BLACK)
    assert np.isnan(values[0]) and values[1] == 1 and reason == "no face in the reference"
    assert ask(scorer, ONE, BLACK, ONE)[0][0] == pytest.approx(1)


def _face(*embedding: float) -> Face:
    return Face((0.0, 0.0, 8.0, 8.0), 0.9, unit(np.array(embedding)))


@pytest.mark.parametrize("how", ["mean", "max", "centroid"])
def test_an_embedding_without_direction_is_nan_with_a_reason(
    how: str, kind: tuple[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recogniser that gives zeros, or nonsense, for one face does not make it half alike."""
    scorer = make(kind, references=how)
    red, zeros, nonsense = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "blue")
    faces = {(0, 0, 255): _face(3, 4), (0, 0, 0): _face(0, 1e-9), (255, 0, 0): _face(np.nan, 1)}
    monkeypatch.setattr(type(scorer), "find", lambda self, bgr: [faces[tuple(bgr[0, 0])]])
    for image, reference in ((zeros, red), (red, zeros), (zeros, zeros), (nonsense, red), (red, nonsense)):
        values, reason = ask(scorer, image, reference)
        assert np.isnan(values[0]) and values[1] == 1 and reason == NO_DIRECTION
    assert ask(scorer, red, zeros, red)[0][0] == pytest.approx(1), "as a reference without a face"


def test_references_that_cancel_have_no_centroid() -> None:
    there, back = _face(1, 2, 3), _face(-1, -2, -3)
    assert np.isnan(similarity(there, [there, back], "centroid"))
    assert similarity(there, [there, back], "mean") == pytest.approx(0, abs=1e-12)
    nothing = _face(0, 0, 0)
    assert choose([nothing, there], "best_match", (8, 8), [back]) is there, "a cosine of -1 is more than none"


def test_of_three_faces_the_policy_takes_one(kind: tuple[str, dict[str, object]]) -> None:
    areas = {}
    for policy in ("largest", "center", "best_match"):
        values, reason = ask(make(kind, faces=policy), THREE, draw((8, 8, 0)))
        assert values[1] == 3 and reason == ""
        areas[policy] = values[3]
    assert areas["largest"] > areas["center"] > areas["best_match"]
    values, reason = ask(make(kind, faces="single_only"), THREE, ONE)
    assert np.isnan(values[0]) and values[1] == 3 and reason.startswith("3 faces")
    assert ask(make(kind, faces="single_only"), ONE, ONE)[1] == ""


def test_a_face_is_where_it_is_in_an_image_that_is_no_square(kind: tuple[str, dict[str, object]]) -> None:
    scorer = make(kind)
    square = np.asarray(draw((8, 72, 0), (56, 24, 250)))
    wide = np.zeros((128, 192, 3), np.uint8)
    wide[:, 64:] = square
    for pixels, left in ((square, 0), (wide, 64), (wide[:, ::-1].swapaxes(0, 1), None)):
        faces = scorer.find(np.ascontiguousarray(pixels[:, :, ::-1]))
        assert len(faces) == 2
        if left is not None:
            middles = sorted(((face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2) for face in faces)
            assert middles[0] == pytest.approx((left + 8 + 8, 72 + 8), abs=10)
            assert middles[1] == pytest.approx((left + 56 + 8, 24 + 8), abs=10)


def test_the_area_is_the_share_of_the_image_that_the_box_covers() -> None:
    def face(*box: float) -> Face:
        return Face(box, 0.9, unit(np.ones(2)))

    assert face(10, 20, 30, 60).area((200, 100)) == 20 * 40 / (200 * 100)
    assert face(-10, -20, 30, 60).area((200, 100)) == 30 * 60 / (200 * 100)
    assert face(150, 80, 250, 140).area((200, 100)) == 50 * 20 / (200 * 100)
    assert face(250, 10, 300, 50).area((200, 100)) == face(10, 110, 30, 150).area((200, 100)) == 0
    assert face(-9, -9, 300, 300).area((200, 100)) == 1


def test_the_face_in_the_middle_of_a_wide_image() -> None:
    middle, corner = Face((90, 40, 110, 60), 0.9, unit(np.ones(2))), Face((30, 30, 70, 70), 0.9, unit(np.ones(2)))
    assert choose([corner, middle], "center", (200, 100)) is middle
    assert choose([corner, middle], "center", (100, 100)) is corner
    assert choose([corner, middle], "center", (200, 20)) is middle
    low = Face((30, 130, 70, 170), 0.9, unit(np.ones(2)))
    assert choose([corner, low], "center", (100, 300)) is low


def test_a_reference_is_looked_at_once(kind: tuple[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = make(kind)
    find, seen = type(scorer).find, []
    monkeypatch.setattr(type(scorer), "find", lambda self, bgr: seen.append(1) or find(self, bgr))
    scorer.score([ScoreRequest(OTHER, "", (ONE.copy(),)) for _ in range(3)])
    assert len(seen) == 4


def test_settings_change_the_fingerprint(kind: tuple[str, dict[str, object]]) -> None:
    settings = [{}, {"faces": "center"}, {"references": "max"}, {"det_thresh": 0.6}]
    assert len({make(kind, **each).fingerprint() for each in settings}) == len(settings)


def test_opencv_counts_whatever_distribution_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    official = version_of("cv2", "sface")
    assert official.startswith(cv2.__version__)
    there = {"opencv-python-headless"}

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return f"7 of {name}"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert version_of("cv2", "sface") == "7 of opencv-python-headless"
    there.clear()
    assert version_of("cv2", "sface") == cv2.__version__
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sface needs the module cv2: pip install 'diffusion-dpo\[face\]'"):
        version_of("cv2", "sface")


def test_folders_that_insightface_would_stumble_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pack(tmp_path / "antelopev2" / "antelopev2")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.onnx").write_bytes(b"no model")
    (tmp_path / "detector").mkdir()
    make_detector(tmp_path / "detector" / "det.onnx")
    (tmp_path / "recogniser").mkdir()
    make_recogniser(tmp_path / "recogniser" / "rec.onnx")
    for name, message in {
        "antelopev2": "one folder too deep",
        "empty": "holds no ONNX file; download",
        "broken": "cannot be loaded",
        "detector": "no recogniser",
        "recogniser": "cannot be loaded as a pack with a detector",
    }.items():
        with pytest.raises(ConfigError, match=message):
            make(("arcface", {"model": str(tmp_path / name)}))
    with pytest.raises(ConfigError, match=r"there is no folder .*releases.*non-commercial"):
        make(("arcface", {"model": "buffalo_l", "root": tmp_path}))
    with pytest.raises(ConfigError, match=r"detector_path=.* is not a file"):
        make(("sface", {"detector_path": tmp_path / "none.onnx"}))
    capsys.readouterr()
    make(("arcface", {"model": str(make_pack(tmp_path / "good"))}))
    said = capsys.readouterr().out
    assert said.count("non-commercial") == 1 and said.count("\n") == 1 and "CPUExecutionProvider" in said
