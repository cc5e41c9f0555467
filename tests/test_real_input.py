"""The path of a user with photographs and another Stable Diffusion: Pick-a-Pic columns, mixed sizes, ties, faults."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from diffusion_dpo import train
from diffusion_dpo.config import load
from diffusion_dpo.files import read_manifest
from diffusion_dpo.settings import TrainConfig
from tests.conftest import encode_jpeg
from tests.test_train import MODES, read_metrics


@pytest.fixture(scope="module")
def pickapic(photographs: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real JPEGs: the sharp photograph is preferred to a blurred one of another size; label_0 takes both directions.

    Four good pairs per photograph, one of them grayscale, then a tie, a truncated image and an empty caption.
    """
    rows = []
    for number, photo in enumerate(photographs):
        blurred = photo.filter(ImageFilter.GaussianBlur(6))
        for shrink in (1, 2):
            small = blurred.resize((blurred.width // shrink, blurred.height // shrink))
            sharp, soft = encode_jpeg(photo), encode_jpeg(small)
            rows.append({"jpg_0": sharp, "jpg_1": soft, "label_0": 1.0, "caption": f"a photo {number} {shrink}"})
            rows.append({"jpg_0": soft, "jpg_1": sharp, "label_0": 0.0, "caption": f"the photo {number} {shrink}"})
    jpeg = rows[0]["jpg_0"]
    rows.append({"jpg_0": jpeg, "jpg_1": rows[0]["jpg_1"], "label_0": 0.5, "caption": "a tie"})
    rows.append({"jpg_0": jpeg[: len(jpeg) // 2], "jpg_1": rows[0]["jpg_1"], "label_0": 1.0, "caption": "cut short"})
    path = tmp_path_factory.mktemp("pickapic") / "pickapic.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("any_sd, mode", [("epsilon", "lora"), ("v_prediction", "full")], indirect=["any_sd"])
def test_train_on_photographs(
    any_sd: Path, pickapic: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
):
    settings = [
        f"model.pretrained={any_sd}",
        "data.type=pickapic",
        f"data.path={pickapic}",
        "resolution_px=256",
        "max_steps=12",
        "global_batch_size=8",
        "per_device_batch_size=4",
        "learning_rate=1e-3",
        "loss.beta=2000",
        "max_broken_share=0.1",
        "preview.sampling.num_inference_steps=2",
        f"output_dir={tmp_path}",
        *MODES[mode],
    ]
    before = pickapic.read_bytes()
    adapter = train.run(load(TrainConfig, None, settings))
    manifest = read_manifest(tmp_path)
    assert manifest["num_pairs"] == 16
    assert manifest["drops"] == {"tie": 1, "chosen: truncated image file": 1}
    said = capsys.readouterr().out
    assert "truncated image file (pickapic.parquet row 17)" in said
    metrics = read_metrics(tmp_path)
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert np.isfinite([row["loss"] for row in metrics]).all()
    assert len({row["errors/reference_chosen"] for row in metrics}) == 12
    assert any(adapter.iterdir())
    assert pickapic.read_bytes() == before
    assert Image.open(tmp_path / "previews" / "step-00000012" / "00.png").size == (256, 256)
