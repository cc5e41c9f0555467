"""LPIPS through the real package: with a trunk of ours it says what the package says with the same trunk."""

import hashlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from diffusion_dpo.config import ConfigError
from diffusion_dpo.scorers import ScoreRequest
from diffusion_dpo.scorers.diversity import Diversity
from diffusion_dpo.scorers.judge import judge
from diffusion_dpo.scorers.lpips import Lpips
from diffusion_dpo.scorers.lpips_model import _TRUNKS, _hub_folder
from tests.photos import photo
from tests.scorers.tiny_models import make_trunk

CPU = torch.device("cpu")
SIDE = 64


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {**make_trunk(tmp_path_factory.mktemp("trunk") / "trunk.pth", "squeeze"), "resolution_px": SIDE}


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [photo(i, (80 + i, 70 - i)) for i in range(4)]


def _loaded(settings: dict[str, Any]) -> Lpips:
    scorer = Lpips(type="lpips", **settings)
    scorer.load(CPU)
    return scorer


def _by_the_package(net: str, monkeypatch: pytest.MonkeyPatch, images: list[Image.Image]) -> np.ndarray:
    """Distances of all images to the first one, the trunk being the random one of `make_trunk`."""
    builder = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}[net]

    def seeded(pretrained: bool) -> torch.nn.Module:
        assert pretrained
        torch.manual_seed(0)
        return builder(weights=None)

    monkeypatch.setattr(torchvision.models, builder.__name__, seeded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=net, verbose=False)
    pixels = [lpips.im2tensor(np.asarray(image.resize((SIDE, SIDE)))) for image in images]
    with torch.no_grad():
        return np.array([float(model(pixels[0], other)) for other in pixels])


@pytest.mark.parametrize("net", ["squeeze", "alex"])
def test_equals_the_package_with_the_same_trunk(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: list[Image.Image]
) -> None:
    settings = {**make_trunk(tmp_path / "trunk.pth", net), "resolution_px": SIDE}
    scorer = _loaded(settings)
    requests = [ScoreRequest(image, references=(photos[0],)) for image in photos]
    values = judge(scorer, requests, batch_size=4).values[f"lpips_{net}"]
    expected = _by_the_package(net, monkeypatch, photos)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-7)
    assert values[0] == 0
    assert values[1:].min() > 1e-3


def test_lower_is_better_and_several_references_are_averaged(trunk: dict[str, Any], photos: list[Image.Image]) -> None:
    scorer = _loaded(trunk)
    assert not scorer.metrics[0].higher_is_better
    references = [(photos[1],), (photos[2],), (photos[1], photos[2])]
    requests = [ScoreRequest(photos[0], references=r) for r in references]
    first, second, both = judge(scorer, requests, batch_size=3).values["lpips_squeeze"]
    assert both == pytest.approx((first + second) / 2, rel=1e-5)


def test_the_net_is_frozen_and_in_eval_mode(trunk: dict[str, Any]) -> None:
    model = _loaded(trunk)._model
    assert model is not None
    assert not any(parameter.requires_grad for parameter in model.net.parameters())
    assert not any(module.training for module in model.net.modules())


def test_the_fingerprint_is_that_of_net_size_and_trunk(trunk: dict[str, Any], tmp_path: Path) -> None:
    before = Lpips(type="lpips", **trunk).fingerprint()
    moved = shutil.copy(trunk["trunk_path"], tmp_path / "elsewhere.pth")
    assert Lpips(type="lpips", **{**trunk, "trunk_path": moved}).fingerprint() == before
    assert Lpips(type="lpips", **{**trunk, "resolution_px": 128}).fingerprint() != before
    assert Lpips(type="lpips", **{**trunk, "net": "alex"}).fingerprint() != before
    moved.write_bytes(moved.read_bytes() + b" ")
    digest = hashlib.sha256(moved.read_bytes()).hexdigest()
    other = {**trunk, "trunk_path": moved, "trunk_sha256": digest}
    assert Lpips(type="lpips", **other).fingerprint() != before


@pytest.mark.parametrize("net", sorted(_TRUNKS))
def test_a_missing_trunk_is_one_sentence_and_no_download(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    scorer = Lpips(type="lpips", net=net)
    for act in (scorer.fingerprint, lambda: scorer.load(CPU)):
        with pytest.raises(
            ConfigError, match=rf"download it from https://download\.pytorch\.org/models/{_TRUNKS[net]} .*BSD-3"
        ) as info:
            act()
        assert str(tmp_path / "hub" / "checkpoints") in str(info.value)
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("variables", [{"TORCH_HOME": "there"}, {"XDG_CACHE_HOME": "cache"}, {}])
def test_the_folder_is_that_of_torch_hub(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    assert _hub_folder() == Path(torch.hub.get_dir()) / "checkpoints"


def test_torchvision_asks_for_the_same_files() -> None:
    models = torchvision.models
    urls = [
        models.AlexNet_Weights.IMAGENET1K_V1.url,
        models.VGG16_Weights.IMAGENET1K_V1.url,
        models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url,
    ]
    assert [url.rpartition("/")[2] for url in urls] == list(_TRUNKS.values())


def test_another_file_in_the_place_of_the_trunk_is_refused(
    trunk: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = {**trunk, "trunk_sha256": None}
    with pytest.raises(ConfigError, match=r"squeezenet1_1-b8a52dc0\.pth begins with b8a52dc0; download it again"):
        Lpips(type="lpips", **official).load(CPU)
    with pytest.raises(ConfigError, match=r"trunk\.pth is no trunk for net=alex: it lacks features\.10"):
        Lpips(type="lpips", **{**trunk, "net": "alex"}).load(CPU)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(trunk["trunk_path"], folder / _TRUNKS["alex"])
    with pytest.raises(ConfigError, match=rf"{folder / _TRUNKS['alex']} is no trunk"):
        Lpips(type="lpips", **{**trunk, "net": "alex", "trunk_path": None}).load(CPU)


def _diversity(trunk: dict[str, Any]) -> Diversity:
    scorer = Diversity(type="diversity", **trunk)
    scorer.load(CPU)
    return scorer


def _among(images: list[Image.Image]) -> list[ScoreRequest]:
    return [ScoreRequest(image, rivals=(*images[:i], *images[i + 1 :])) for i, image in enumerate(images)]


def test_diversity_is_the_distance_to_the_nearest_and_the_mean(
    trunk: dict[str, Any], photos: list[Image.Image]
) -> None:
    requests = [ScoreRequest(a, references=(b,)) for a in photos for b in photos if a is not b]
    table = judge(_loaded(trunk), requests, batch_size=16).values["lpips_squeeze"].reshape(4, 3)
    values = judge(_diversity(trunk), _among(photos), batch_size=4).values
    np.testing.assert_allclose(values["nearest_lpips_squeeze"], table.min(1), rtol=1e-4)
    np.testing.assert_allclose(values["mean_lpips_squeeze"], table.mean(1), rtol=1e-4)


def test_any_number_of_pairs_is_measured_each_by_itself(trunk: dict[str, Any], photos: list[Image.Image]) -> None:
    model = _loaded(trunk)._model
    assert model is not None
    pairs = [(a, b) for a in range(4) for b in range(4)] * 3  # more than go through a layer at once
    with torch.inference_mode():
        found = model.distances(photos, pairs).tolist()
        alone = {pair: model.distances(photos, [pair]).item() for pair in pairs}
    assert found == pytest.approx([alone[pair] for pair in pairs], rel=1e-5)
    assert len({round(value, 6) for value in found}) == 7  # four to themselves, and six distances


def test_a_near_duplicate_stands_out(trunk: dict[str, Any], photos: list[Image.Image]) -> None:
    twin = photos[0].copy()
    twin.putpixel((3, 3), (255, 0, 0))
    values = judge(_diversity(trunk), _among([*photos, twin]), batch_size=5).values["nearest_lpips_squeeze"]
    assert sorted(np.argsort(values)[:2]) == [0, 4]
    assert values[0] == values[4], "a pair is measured once"
    assert values[0] < 0.2 * min(values[1:4])


def test_no_pair_and_no_image_is_taken_twice(
    trunk: dict[str, Any], photos: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = _diversity(trunk)
    assert scorer._model is not None
    seen: list[tuple[int, int]] = []
    original = type(scorer._model).distances

    def counted(self: Any, images: list[Image.Image], pairs: list[tuple[int, int]]) -> torch.Tensor:
        seen.append((len(images), len(pairs)))
        return original(self, images, pairs)

    monkeypatch.setattr(type(scorer._model), "distances", counted)
    scorer.score(_among(photos))
    assert seen == [(4, 6)]


def test_an_only_image_has_no_diversity(trunk: dict[str, Any], photos: list[Image.Image]) -> None:
    scores = _diversity(trunk).score([ScoreRequest(photos[0])])
    assert all(np.isnan(values).all() for values in scores.values.values())
    assert scores.reasons == ("the only image of its prompt",)
