"""Fixtures that many tests share: small real models and small real data."""

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.pairs import pair_row
from diffusion_dpo.data.rows import make_pair
from diffusion_dpo.data.shards import PAIRS, encode_png, located_rows, write_shard
from diffusion_dpo.pocket.world import distinct_scenes, render
from tests.browser import CHROMIUM
from tests.fakes import make_stable_diffusion, make_stable_diffusion_xl


@pytest.fixture(scope="session", autouse=True)
def default_signals() -> None:
    """Started in the background or by nohup, signals would be ignored, here and in every process the tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Debian's headless Chromium, driven by playwright; of one module, since its event loop stays in the thread."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session", params=["epsilon", "v_prediction"])
def any_sd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion, once predicting epsilon and once v."""
    return make_stable_diffusion(tmp_path_factory.mktemp("sd") / request.param, prediction_type=request.param)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion (epsilon)."""
    return make_stable_diffusion(tmp_path_factory.mktemp("sd") / "tiny")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL (epsilon)."""
    return make_stable_diffusion_xl(tmp_path_factory.mktemp("sdxl") / "tiny")


@pytest.fixture(scope="session", params=["stable_diffusion", "stable_diffusion_xl"])
def any_family(request: pytest.FixtureRequest, tiny_sd: Path, tiny_sdxl: Path) -> tuple[str, Path]:
    """A `model.type` and a tiny model of it."""
    return request.param, tiny_sd if request.param == "stable_diffusion" else tiny_sdxl


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 10 pairs: a pocket scene is chosen over another one for its caption."""
    folder = tmp_path_factory.mktemp("pairs")
    rng, scenes = np.random.default_rng(0), distinct_scenes(0)
    rows = []
    for _ in range(10):
        right, wrong = next(scenes), next(scenes)
        chosen, rejected = (encode_png(render(scene, rng)) for scene in (right, wrong))
        pair = make_pair("test", right.caption, chosen, rejected, source="test")
        assert isinstance(pair, PreferencePair)
        rows.append(pair_row(pair))
    write_shard(folder / "pairs-00000.parquet", rows, PAIRS)
    return folder


@pytest.fixture(scope="session")
def scored_pairs(tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pairs with a score on either side, higher where chosen."""
    folder = tmp_path_factory.mktemp("scored-pairs")
    rows = []
    for number, (_, row) in enumerate(located_rows(tiny_pairs / "pairs-00000.parquet")):
        scores = {"chosen_scores": {"shade": 1 + number / 10}, "rejected_scores": {"shade": 0.05 * number}}
        rows.append(row | {side: json.dumps(values) for side, values in scores.items()})
    write_shard(folder / "pairs-00000.parquet", rows, PAIRS)
    return folder


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Real photographs of different sizes and shapes, one of them grayscale; they ship with scikit-image."""
    from skimage import data

    return [Image.fromarray(picture) for picture in (data.astronaut(), data.coffee(), data.chelsea(), data.camera())]


def encode_jpeg(image: Image.Image) -> bytes:
    """Return an image as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()
