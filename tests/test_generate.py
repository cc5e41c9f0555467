"""Candidates: seeds that belong to a prompt, shards that are whole or absent, and a rerun that fills the gaps."""

from pathlib import Path
from typing import Any

import pytest

from diffusion_dpo import generate
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.data.images import decode_rgb, pixel_hash
from diffusion_dpo.data.shards import read_rows
from diffusion_dpo.sampling import image_seed
from diffusion_dpo.settings import GenerateConfig


def make_config(model: Path, folder: Path, prompts: str = "one\ntwo\nthree\n", *overrides: str) -> GenerateConfig:
    file = folder.parent / "prompts.txt"
    file.write_text(prompts)
    common = [
        f"prompts_path={file}",
        f"model.pretrained={model}",
        "sampling.num_inference_steps=2",
        "sampling.batch_size=2",
        "num_images_per_prompt=2",
        "shard_size=4",
        f"output_dir={folder}",
    ]
    return load(GenerateConfig, None, [*common, *overrides])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_rows(folder, pattern="images-*.parquet"))


def test_every_prompt_gets_its_images_with_their_own_seeds(tiny_sd: Path, tmp_path: Path):
    folder = generate.run(make_config(tiny_sd, tmp_path / "out"))
    rows = rows_of(folder)
    assert [(row["prompt"], row["index"]) for row in rows] == [(p, i) for p in ("one", "two", "three") for i in (0, 1)]
    assert all(row["seed"] == image_seed(0, row["prompt_id"], row["index"]) for row in rows)
    assert len({row["seed"] for row in rows}) == len({row["uid"] for row in rows}) == 6
    assert all(pixel_hash(decode_rgb(row["image"]["bytes"])) == row["uid"] for row in rows)
    assert all(decode_rgb(row["image"]["bytes"]).size == (64, 64) for row in rows)


def test_an_image_does_not_depend_on_the_place_of_its_prompt_or_on_the_batch(tiny_sd: Path, tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    forward = rows_of(generate.run(make_config(tiny_sd, tmp_path / "a" / "out")))
    other = rows_of(
        generate.run(make_config(tiny_sd, tmp_path / "b" / "out", "new\nthree\none\n", "sampling.batch_size=3"))
    )
    first = {(row["prompt"], row["index"]): row for row in forward}
    for row in other:
        if row["prompt"] != "new":
            same = first[row["prompt"], row["index"]]
            assert row["seed"] == same["seed"]
            pixels, before = (decode_rgb(r["image"]["bytes"]).tobytes() for r in (row, same))
            assert max(abs(a - b) for a, b in zip(pixels, before, strict=True)) <= 1


def test_a_rerun_draws_only_what_is_missing(tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = make_config(tiny_sd, tmp_path / "out")
    generate.run(config)
    shards = sorted((tmp_path / "out").glob("images-*.parquet"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    generate.run(config)
    assert "all 6 candidates are there already" in capsys.readouterr().out
    shards[1].unlink()
    generate.run(config)
    assert shards[0].stat().st_mtime_ns == before[shards[0]][1]
    assert [path.read_bytes() for path in shards] == [before[path][0] for path in shards]


def test_prompts_that_are_not_taken_as_they_are_meant_are_said_once(
    tiny_sd: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    long = "one two three four five six seven eight nine ten " * 12
    prompts = f"{long} red\n{long} blue\n(a:1) BREAK\n"
    generate.run(make_config(tiny_sd, tmp_path / "out", prompts))
    out, err = capfd.readouterr()
    assert out.count("2 of 3 prompts are cut, since the text encoder reads 16 tokens") == 1
    assert "; 2 of them become the same as another" in out
    assert (
        out.count("1 of 3 prompts are in the syntax of A1111 or ComfyUI: weights such as (word:1.2) (1), BREAK") == 1
    )
    for wall in ("truncated", "indexing errors"):
        assert wall not in out + err


def test_an_interrupted_run_leaves_whole_shards_and_goes_on(tiny_sd: Path, tmp_path: Path):
    config = make_config(tiny_sd, tmp_path / "out")
    drawn = []

    def stopping(pipeline, requests, sampling, strength):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(len(requests))
        return real(pipeline, requests, sampling, strength)

    real = generate.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "draw", stopping)
        with pytest.raises(KeyboardInterrupt):
            generate.run(config)
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["images-00000.parquet"]
    generate.run(config)
    assert len(rows_of(tmp_path / "out")) == 6


def test_a_folder_of_other_settings_is_refused(tiny_sd: Path, tmp_path: Path):
    generate.run(make_config(tiny_sd, tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"(?s)belongs to another run.*seed: 0 -> 1"):
        generate.run(make_config(tiny_sd, tmp_path / "out", "one\ntwo\nthree\n", "seed=1"))
    with pytest.raises(ConfigError, match="which generate did not make"):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
        generate.run(make_config(tiny_sd, tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not touch"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.pretrained=nowhere", "there is no file or folder nowhere, and it is no hub id"),
        ("prompts_path=null", "give prompts_path"),
        ("model.adapter_path=/nowhere", "/nowhere does not exist; it should hold pytorch_lora_weights"),
        ("sampling.resolution_px=100", "resolution_px is 100; this model needs a multiple of 8"),
        ("model.pretrained={empty}", "it has no model_index.json"),
    ],
)
def test_what_cannot_work_is_one_sentence(tiny_sd: Path, tmp_path: Path, override: str, message: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        generate.run(
            make_config(tiny_sd, tmp_path / "out", "one\n", override.replace("{empty}", str(tmp_path / "empty")))
        )
