"""Image to image from references, and mixtures of ways to draw: what each image is, and what says so."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_dpo import generate
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.data.images import decode_rgb
from diffusion_dpo.mixture import sources_of
from diffusion_dpo.settings import GenerateConfig
from tests.test_generate import rows_of


def make_config(folder: Path, *overrides: str, lacking: bool = False) -> GenerateConfig:
    """Two prompts; the references are 128 x 64: grey sides, in the middle a square, left half red, right half blue."""
    pixels = np.full((64, 128, 3), 128, np.uint8)
    pixels[:, 32:64], pixels[:, 64:96] = (200, 30, 30), (30, 30, 200)
    Image.fromarray(pixels).save(folder / "wide.png")
    prompts: list[dict[str, Any]] = [
        {"prompt": text, "references": ["wide.png"]} for text in ("a red circle", "a dog")
    ]
    if lacking:
        del prompts[1]["references"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    common = [f"prompts_path={folder / 'prompts.jsonl'}", f"output_dir={folder / 'out'}", "num_images_per_prompt=2"]
    return load(GenerateConfig, None, [*common, "sampling.num_inference_steps=4", *overrides])


def drawn(folder: Path, *overrides: str) -> dict[tuple[str, int], np.ndarray]:
    folder.mkdir()
    rows = rows_of(generate.run(make_config(folder, *overrides)))
    return {(r["prompt"], r["index"]): np.asarray(decode_rgb(r["image"]["bytes"])).astype(int) for r in rows}


def test_a_little_strength_keeps_the_references_middle_square_and_all_of_it_does_not(tmp_path: Path) -> None:
    steps = "sampling.num_inference_steps=50"
    square = np.zeros((64, 64, 3), int)
    square[:, :32], square[:, 32:] = (200, 30, 30), (30, 30, 200)
    little = drawn(tmp_path / "little", steps, "strength=0.02")
    everything = drawn(tmp_path / "all", steps, "strength=1")
    squeezed = np.full((64, 64, 3), 128)
    squeezed[:, 16:32], squeezed[:, 32:48] = (200, 30, 30), (30, 30, 200)
    for image in little.values():
        assert abs(image - square).mean() < min(35, abs(image - squeezed).mean() - 10)
    assert min(abs(image - square).mean() for image in everything.values()) > 35


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
def test_image_to_image_does_not_depend_on_the_batch(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    common = (f"model.pretrained={request.getfixturevalue(model)}", "strength=0.5")
    ancestral = 'mixture=[{"scheduler": "euler_ancestral"}]'
    one = drawn(tmp_path / "one", *common, ancestral, "sampling.batch_size=1")
    many = drawn(tmp_path / "many", *common, ancestral, "sampling.batch_size=4")
    assert max(abs(one[key] - many[key]).max() for key in one) <= 1
    assert abs(one["a dog", 0] - one["a dog", 1]).max() > 1


def test_a_prompt_without_a_reference_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    config = make_config(tmp_path, "strength=0.5", "model.pretrained=nowhere", lacking=True)
    with pytest.raises(ConfigError, match="1 of 2 prompts have none, first 'a dog'"):
        generate.run(config)
    with pytest.raises(ConfigError, match=r"strength 0.1 of 4 steps is less than one; give at least 0.25"):
        generate.run(make_config(tmp_path, "strength=0.1"))


def test_each_image_of_a_mixture_is_that_of_its_variant_alone_and_says_so(tiny_sd: Path, tmp_path: Path) -> None:
    variants = [{"name": "soft", "guidance_scale": 1.0}, {"model": {"pretrained": str(tiny_sd)}, "scheduler": "euler"}]
    mixed = drawn(tmp_path / "mixed", f"mixture={json.dumps(variants)}")
    soft = drawn(tmp_path / "soft", "sampling.guidance_scale=1.0")
    other = drawn(tmp_path / "other", f"model.pretrained={tiny_sd}", 'mixture=[{"scheduler": "euler"}]')
    assert abs(soft["a dog", 1] - other["a dog", 1]).max() > 10
    for prompt in ("a red circle", "a dog"):
        assert abs(mixed[prompt, 0] - soft[prompt, 0]).max() <= 1  # other batches
        assert abs(mixed[prompt, 1] - other[prompt, 1]).max() <= 1  # other batches
    for row in rows_of(tmp_path / "mixed" / "out"):
        common = {"num_inference_steps": 4, "position": row["index"]}
        assert (
            json.loads(row["origin"])
            == [
                common | {"variant": "soft", "model": "pocket", "sampler": "DDIMScheduler", "guidance_scale": 1.0},
                common
                | {"variant": "1", "model": tiny_sd.name, "sampler": "EulerDiscreteScheduler", "guidance_scale": 1.5},
            ][row["index"]]
        )


def test_one_model_is_in_memory_at_a_time_and_references_reach_the_candidates(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    load_pipeline = generate.load_pipeline

    def counted(*args: Any, **settings: Any) -> Any:
        gc.collect()
        assert not alive, "the model before is still there"
        pipeline = load_pipeline(*args, **settings)
        alive.add(pipeline.unet)
        return pipeline

    monkeypatch.setattr(generate, "load_pipeline", counted)
    mixture = json.dumps([{}, {"model": {"pretrained": str(tiny_sd)}, "strength": 0.5}, {"guidance_scale": 3}])
    folder = generate.run(make_config(tmp_path, f"mixture={mixture}", "num_images_per_prompt=4", "shard_size=1"))
    rows = rows_of(folder)
    assert [row["prompt"] for row in rows] == ["a red circle"] * 4 + ["a dog"] * 4, "a prompt's images lie together"
    assert [row["index"] for row in rows[:4]] == [0, 3, 1, 2]
    reference = (tmp_path / "wide.png").read_bytes()
    assert all([it["bytes"] for it in row["references"]] == [reference] for row in rows)


def test_a_mixture_goes_on_where_it_was_and_refuses_a_changed_variant(tmp_path: Path) -> None:
    mixture = 'mixture=[{"guidance_scale": 1}, {"guidance_scale": 3}]'
    folder = generate.run(make_config(tmp_path, mixture))
    shards = sorted(folder.glob("images-*.parquet"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    shards[1].unlink()
    generate.run(make_config(tmp_path, mixture))
    assert len(shards) == 2 and shards[0].stat().st_mtime_ns == before[shards[0]][1]
    assert [path.read_bytes() for path in shards] == [before[path][0] for path in shards]
    with pytest.raises(ConfigError, match="belongs to another run"):
        generate.run(make_config(tmp_path, mixture.replace("3", "4")))


@pytest.mark.parametrize(
    ("pretrained", "name"),
    [("/home/me/clients/acme", "acme"), ("owner/name", "owner/name"), ("models/acme", "models/acme")],
)
def test_an_origin_names_no_folder_of_this_machine(pretrained: str, name: str) -> None:
    """It goes into pairs, and with them to whoever gets an export."""
    config = load(GenerateConfig, None, [f"model.pretrained={pretrained}", "model.adapter_path=/home/me/run"])
    (source,) = sources_of(config)
    assert json.loads(source.origin("DDIMScheduler", 0))["model"] == f"{name} + run"
