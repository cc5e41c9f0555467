"""The trainer on tiny real models: right from the first step to what plain diffusers draws afterwards."""

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_dpo import train
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.data.prompts import prompt_hash
from diffusion_dpo.data.recognise import settle
from diffusion_dpo.data.shards import read_rows
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training import Run
from tests.runs import MODES, assert_drawn_alike, make_config, read_metrics


@pytest.mark.parametrize("mode", MODES)
def test_step_zero_has_loss_ln_2_and_no_reward(any_sd: Path, tiny_pairs: Path, tmp_path: Path, mode: str):
    train.run(make_config(any_sd, tiny_pairs, tmp_path, "max_steps=1", "loss.beta=5000", *MODES[mode]))
    first = read_metrics(tmp_path)[0]
    assert abs(first["loss"] - math.log(2)) < 1e-5
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert first["rewards/accuracies"] == 0.5
    assert first["grad_norm"] > 0


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_training_learns_the_pairs_and_leaves_the_base_alone(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, mode: str
):
    """Ten pairs, all of them in every batch: the margins must grow, and far beyond what the noise of a step makes."""
    before = (tiny_sd / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    sizes = [
        "global_batch_size=20",
        "per_device_batch_size=20",
        "max_steps=40",
        "checkpointing_steps=40",
        "prompt_dropout=0",
    ]
    rates = {
        "lora": ["model.lora.rank=16", "model.lora.targets=[to_v,conv1,conv2]", "learning_rate=1e-3"],
        "full": ["model.lora=null", "learning_rate=1e-4"],
    }
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path, "loss.beta=500", *sizes, *rates[mode]))
    metrics = read_metrics(tmp_path)
    assert [row["step"] for row in metrics] == list(range(1, 41))
    margins = [row["rewards/margins"] for row in metrics]
    assert np.mean(margins[20:]) > 0.03
    assert np.mean(margins[20:]) > 2 * abs(np.mean(margins[:5]))
    assert np.mean([row["loss"] for row in metrics[-10:]]) < math.log(2)
    assert (tiny_sd / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_frozen_reference_does_not_move(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, mode: str):
    """A run that trains hard sees the same reference errors as one that hardly trains."""
    for name, rate in (("still", "1e-12"), ("moving", "1e-2")):
        train.run(make_config(tiny_sd, tiny_pairs, tmp_path / name, f"learning_rate={rate}", *MODES[mode]))
    still, moving = (read_metrics(tmp_path / name) for name in ("still", "moving"))
    for a, b in zip(still, moving, strict=True):
        assert a["errors/reference_chosen"] == b["errors/reference_chosen"]
        assert a["errors/reference_rejected"] == b["errors/reference_rejected"]
    assert still[-1]["errors/chosen"] != moving[-1]["errors/chosen"]


@pytest.mark.parametrize(("mode", "alpha"), [("lora", "null"), ("lora", "8"), ("full", "null")])
def test_plain_diffusers_draws_what_training_draws(
    any_sd: Path, tiny_pairs: Path, tmp_path: Path, mode: str, alpha: str
):
    """In another process, without this package: the saved adapter is the model that the last preview came from."""
    alpha_setting = [f"model.lora.alpha={alpha}"] if mode == "lora" else []
    train.run(make_config(any_sd, tiny_pairs, tmp_path, "learning_rate=3e-2", *MODES[mode], *alpha_setting))
    assert_drawn_alike(tmp_path, any_sd, "StableDiffusionPipeline", guidance=1.5)


def test_the_run_folder_holds_what_it_promises(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    config = make_config(tiny_sd, tiny_pairs, tmp_path)
    assert train.run(config) == tmp_path / "adapter"
    assert load(TrainConfig, tmp_path / "config.yaml") == settle(config)
    assert json.loads((tmp_path / "environment.json").read_text())["torch"] == importlib.metadata.version("torch")
    card = (tmp_path / "README.md").read_text()
    assert "load_lora_weights" in card and "prompts_path=PROMPTS.txt" in card
    assert json.loads((tmp_path / "manifest.json").read_text())["prompt_hashes"] == sorted(
        {prompt_hash(row["prompt"]) for row in read_rows(tiny_pairs, ["prompt"])}
    )
    assert {path.name for path in (tmp_path / "previews").iterdir()} == {"step-00000000", "step-00000006"}
    assert len(list((tmp_path / "checkpoints").iterdir())) == config.checkpoints_total_limit
    weights = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in weights.values())
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name or ".up." in name)
    expected = {"step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    assert all(expected | {"grad_norm", "learning_rate"} <= row.keys() for row in read_metrics(tmp_path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("global_batch_size=5", r"global_batch_size \(5\) must be a multiple of per_device_batch_size \(2\)"),
        ("resolution_px=100", "resolution_px is 100; this model needs a multiple of 8"),
        ("model.lora.targets=[nonsense]", "fit no layer of the UNet"),
        ("model.pretrained=/nowhere", "there is no file or folder /nowhere"),
        ("data.path=/nowhere", "there is no file or folder /nowhere"),
        ("mixed_precision=fp16", "fp16, which needs cuda"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, override: str, message: str
):
    with pytest.raises(ConfigError, match=message):
        train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "run", override))


def test_only_what_the_mask_shows_is_learned(tiny_sd: Path, tmp_path: Path):
    """Images that differ on the right alone: under the left mask the errors of both are nearly the same."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pairs"
    folder.mkdir()
    lines = []
    for number in range(4):
        common = rng.integers(0, 256, (64, 64, 3), np.uint8)
        for name in ("chosen", "rejected"):
            picture = common.copy()
            picture[:, 48:] = rng.integers(0, 256, (64, 16, 3), np.uint8)
            Image.fromarray(picture).save(folder / f"{name}-{number}.png")
        lines.append({"prompt": "abc", "chosen": f"chosen-{number}.png", "rejected": f"rejected-{number}.png"})
    for name, columns in (("left", slice(0, 16)), ("right", slice(48, 64))):
        mask = np.zeros((64, 64), np.uint8)
        mask[:, columns] = 255
        Image.fromarray(mask).save(folder / f"{name}.png")
    differences = {}
    for name in ("left", "right"):
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line | {"mask": f"{name}.png"}) for line in lines))
        run_dir = tmp_path / name
        settings = ["data.type=folder", f"data.path={folder}", "max_steps=1", "preview=null"]
        train.run(make_config(tiny_sd, tmp_path, run_dir, *settings))
        row = read_metrics(run_dir)[0]
        differences[name] = abs(row["errors/chosen"] - row["errors/rejected"])
    assert differences["left"] < differences["right"] / 3


@pytest.mark.parametrize("ema", [[], ["ema_decay=0.5"]])
def test_weights_that_broke_after_the_last_checkpoint_are_not_saved(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, ema: list[str], monkeypatch: pytest.MonkeyPatch
):
    config = make_config(tiny_sd, tiny_pairs, tmp_path, "max_steps=2", "preview=null", *ema)
    train.run(config)
    file = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    before, real = file.read_bytes(), train.preview_if_due

    def breaking(run: Run, *arguments: Any, **settings: Any) -> None:
        real(run, *arguments, **settings)
        with torch.no_grad():
            for values in (run.parameters, run.ema.values if run.ema else {}):
                next(iter(values.values()), torch.zeros(1)).view(-1)[0] = float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(train, "preview_if_due", breaking)
        with pytest.raises(ConfigError, match=r"not finite.* last good checkpoint is .*step-00000002\. The"):
            train.run(config)
    assert file.read_bytes() == before
    train.run(config)
    assert file.read_bytes() == before
