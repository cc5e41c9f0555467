"""Images of any shape: a step is of one bucket, and SDXL is told of each image's own size and crop."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_dpo import train
from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.buckets import fit
from diffusion_dpo.data.collect import collect
from diffusion_dpo.data.encode import posterior_noise
from diffusion_dpo.data.images import decode_rgb
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training import Run
from diffusion_dpo.training.errors import add_shared_noise
from diffusion_dpo.training.setup import prepare
from tests.runs import final_state, make_config, read_metrics

SIZES = [((64, 64), (80, 80)), ((150, 100), (90, 64)), ((64, 128), (96, 160)), ((128, 64), (200, 130))] * 5
"""(width, height) of chosen and rejected: three shapes, and never two images of one size in a pair."""
SETTINGS = [
    "model.type=stable_diffusion_xl",
    "data.type=folder",
    "aspect_ratio_buckets=true",
    "bucket_step_px=16",
    "resolution_px=64",
    "random_flip=true",
    "evaluation.share=0.3",
    "evaluation.num_timesteps=2",
    "preview=null",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photographs, as it were: smooth random colours."""
    folder, lines = tmp_path_factory.mktemp("shapes"), []
    rng = np.random.default_rng(0)
    for number, sizes in enumerate(SIZES):
        names = {}
        for side, size in zip(("chosen", "rejected"), sizes, strict=True):
            names[side] = f"{side}-{number}.png"
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
            small.resize(size, Image.Resampling.BICUBIC).save(folder / names[side])
        lines.append(json.dumps({"prompt": f"picture {number}", **names}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def config_of(model: Path, pairs: Path, folder: Path, *overrides: str) -> TrainConfig:
    return make_config(model, pairs, folder, *SETTINGS, *overrides)


def prepared(config: TrainConfig) -> Run:
    live: Any = config.model.load(device=torch.device("cpu"), dtype=torch.float32, seed=0)  # type: ignore[attr-defined]
    return prepare(config, live, collect(config.data, max_broken_share=0), torch.float32)  # type: ignore[arg-type]


def test_every_batch_is_of_one_shape_and_all_shapes_are_trained_on(tiny_sdxl: Path, pairs: Path, tmp_path: Path):
    run = prepared(config_of(tiny_sdxl, pairs, tmp_path))
    shapes, seen = set(), set()
    for step in range(40):
        batch = run.reader[step, 0]
        assert (
            batch.latents.shape[3:] == batch.noise.shape[2:] and batch.latents.shape[3] * batch.latents.shape[4] <= 64
        )
        shapes.add(tuple(batch.latents.shape[3:]))
        seen |= {visit.index for visit in run.reader.visits(step)}
    assert len(shapes) == 3
    assert len(seen) == len(run.reader.examples)


def test_both_images_of_a_pair_are_scaled_cropped_and_mirrored_alike_and_not_distorted(
    tiny_sdxl: Path, pairs: Path, tmp_path: Path
):
    """The cached latents are those of the image, cut to its pair's bucket by `fit`, in which circles stay circles."""
    run = prepared(config_of(tiny_sdxl, pairs, tmp_path))
    data, mirrored = collect(run.config.data, max_broken_share=0), set()  # type: ignore[arg-type]
    for step in range(6):
        batch = run.reader[step, 0]
        for row, visit in enumerate(run.reader.visits(step)[run.reader.places(0)]):
            record = data.records[run.reader.examples[visit.index].images[0][0]]
            number = int(record.prompt.rpartition(" ")[2])
            bucket = (batch.latents.shape[4] * 8, batch.latents.shape[3] * 8)
            noise = posterior_noise(record.pair_id, tuple(batch.noise.shape[1:]))[None]
            flips = []
            for side, name in enumerate(("chosen", "rejected")):
                image = fit(decode_rgb((pairs / f"{name}-{number}.png").read_bytes()), bucket)
                pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
                encoded = [run.model.encode_images(view, noise)[0] for view in (pixels, pixels.flip(3))]
                flips.append([torch.allclose(batch.latents[row, side], latents, atol=1e-4) for latents in encoded])
            assert flips[0] == flips[1] and sum(flips[0]) == 1
            mirrored.add(flips[0][1])
    assert mirrored == {True, False}


def test_the_denoiser_is_told_of_each_images_own_size_and_crop(
    tiny_sdxl: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, told = prepared(config_of(tiny_sdxl, pairs, tmp_path)), []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told.append((args[0], kwargs["added_cond_kwargs"]["time_ids"]))

    run.model.pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
    different = 0
    for step in range(8):
        batch = run.reader[step, 0]
        noisy, timesteps, conditioning, _ = add_shared_noise(run.model, batch)
        run.model.predict(noisy, timesteps, conditioning)
        given, time_ids = told.pop()
        rows = iter(zip(given, time_ids.tolist(), strict=True))
        for side in (0, 1):  # all chosen ones first
            for row, visit in enumerate(run.reader.visits(step)[run.reader.places(0)]):
                latents, ids = next(rows)
                expected = run.model.add_noise(
                    batch.latents[row, side], batch.noise[row], batch.timesteps[row : row + 1]
                )
                assert torch.allclose(latents, expected, atol=1e-6)
                number = int(read_prompt(run, visit.index).rpartition(" ")[2])
                width, height = SIZES[number][side]
                bucket = [side * 8 for side in batch.latents.shape[3:]]
                scale = max(bucket[0] / height, bucket[1] / width)
                crop = [(length * scale - target) / 2 for length, target in zip((height, width), bucket, strict=True)]
                assert ids[:2] == [height, width] and ids[4:] == bucket
                assert np.abs(np.subtract(ids[2:4], crop)).max() <= 1
                different += ids != time_ids[row + (1 - side) * len(batch.noise)].tolist()
    assert different == 2 * 8 * 2, "what one image is told is never what the other one is"


def read_prompt(run: Run, index: int) -> str:
    (pair, _), *_ = run.reader.examples[index].images
    return collect(run.config.data, max_broken_share=0).records[pair].prompt  # type: ignore[arg-type]


@pytest.mark.slow
def test_training_on_shapes_is_stopped_and_continued_like_any_other(tiny_sdxl: Path, pairs: Path, tmp_path: Path):
    cached = ["reference.type=cached", "reference.num_draws=2", "evaluation.share=0"]
    train.run(config_of(tiny_sdxl, pairs, tmp_path / "whole", *cached))
    for steps in (2, 6):
        train.run(config_of(tiny_sdxl, pairs, tmp_path / "parts", *cached, f"max_steps={steps}"))
    assert final_state(tmp_path / "parts") == final_state(tmp_path / "whole")
    train.run(config_of(tiny_sdxl, pairs, tmp_path / "fresh", "evaluation.share=0"))
    for a, b in zip(read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "fresh"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bucket_step_px=20"], "bucket_step_px is 20; this model needs a multiple of 8"),
        (["resolution_px=72"], "resolution_px is 72.*multiple of bucket_step_px = 16"),
        (["order=curriculum", "curriculum_steps=1", "score_metric=x"], "aspect_ratio_buckets and order=curriculum"),
    ],
)
def test_what_buckets_cannot_do_is_said(
    tiny_sdxl: Path, pairs: Path, tmp_path: Path, overrides: list[str], message: str
):
    with pytest.raises(ConfigError, match=message):
        train.run(config_of(tiny_sdxl, pairs, tmp_path, *overrides))


def test_a_photograph_as_jpeg_is_measured_upright(tmp_path: Path, tiny_sdxl: Path):
    """What a phone writes: rotated by its EXIF tag. The size that SDXL is told is that of the upright image."""
    lines = []
    for number in range(2):
        for side in ("chosen", "rejected"):
            picture = Image.fromarray(np.full((64, 96, 3), 40 * number + (side == "chosen") * 90, np.uint8))
            exif = picture.getexif()
            exif[0x0112] = 6
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", exif=exif)
            (tmp_path / f"{side}-{number}.jpg").write_bytes(buffer.getvalue())
        names = {side: f"{side}-{number}.jpg" for side in ("chosen", "rejected")}
        lines.append(json.dumps({"prompt": "a", **names}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    run = prepared(config_of(tiny_sdxl, tmp_path, tmp_path / "run", "evaluation.share=0"))
    ids = run.reader[0, 0].per_image["time_ids"]
    assert (ids[..., :2] == torch.tensor([96.0, 64.0])).all()
    assert (ids[..., 4] > ids[..., 5]).all()
