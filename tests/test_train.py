"""The trainer on tiny real models: right from the first step, and the same run however often it is stopped."""

import importlib.metadata
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_dpo import train
from diffusion_dpo.config import ConfigError, dump, load
from diffusion_dpo.data.prompts import prompt_hash
from diffusion_dpo.data.shards import read_rows
from diffusion_dpo.interrupt import Interrupted
from diffusion_dpo.settings import TrainConfig


def make_config(model: Path, pairs: Path, output_dir: Path, *overrides: str) -> TrainConfig:
    common = [
        f"model.pretrained={model}",
        f"data.path={pairs}",
        f"output_dir={output_dir}",
        "max_steps=6",
        "global_batch_size=4",
        "per_device_batch_size=2",
        "checkpointing_steps=2",
        "learning_rate=1e-3",
        "model.lora.rank=2",
        "preview.sampling.num_inference_steps=2",
        "preview.prompts=[abc]",
    ]
    return load(TrainConfig, None, [*common, *overrides])


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def final_state(run_dir: Path) -> dict[str, Any]:
    """Everything that must be equal bit for bit: the last checkpoint, the saved weights and the metrics."""
    last = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    files = [*last.glob("*.safetensors"), *run_dir.glob("adapter/*.safetensors"), *run_dir.glob("unet/*.safetensors")]
    assert len(files) == 3
    tensors = {
        f"{file.name} {name}": tensor.contiguous().numpy().tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }
    return {**tensors, "metrics": (run_dir / "metrics.jsonl").read_text()}


MODES = {
    "lora": [],
    "full": ["model.lora=null"],
    "bf16": ["mixed_precision=bf16"],
    "checkpointing": ["gradient_checkpointing=true"],
}


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


def test_accumulated_micro_batches_equal_one_batch(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    """To float error, which beta (here 100) multiplies and which grows from step to step."""
    for size in (1, 2, 4):
        overrides = [f"per_device_batch_size={size}", "loss.beta=100"]
        train.run(make_config(tiny_sd, tiny_pairs, tmp_path / str(size), *overrides))
    runs = [read_metrics(tmp_path / str(size)) for size in (1, 2, 4)]
    for step, rows in enumerate(zip(*runs, strict=True)):
        for key in ("loss", "grad_norm", "errors/chosen", "errors/reference_rejected"):
            values = [row[key] for row in rows]
            assert values == pytest.approx([values[0]] * 3, rel=1e-4 if step == 0 else 1e-2), key


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_stopped_at_any_step_ends_as_if_it_had_not_been(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, mode: str
):
    """Ctrl-C after each step in turn: saved, left with 130, and continued by the same command."""
    whole = make_config(tiny_sd, tiny_pairs, tmp_path / "whole", *MODES[mode])
    train.run(whole)
    config = make_config(tiny_sd, tiny_pairs, tmp_path / "stopped", *MODES[mode])
    real_step, stops = train.train_step, []

    def interrupted_step(run, step):
        metrics = real_step(run, step)
        if step not in stops:
            stops.append(step)
            signal.raise_signal(signal.SIGINT)
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", interrupted_step)
        for _ in range(6):
            with pytest.raises(Interrupted) as stopped:
                train.run(config)
            assert stopped.value.exit_code == 130
        train.run(config)
    assert stops == list(range(6))
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "whole", "max_steps=30"))
    config = make_config(tiny_sd, tiny_pairs, tmp_path / "killed", "max_steps=30")
    (tmp_path / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "diffusion_dpo", "train", str(tmp_path / "config.yaml")]
    random_moments = random.Random(0)
    killed = 0
    for _ in range(20):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        )
        metrics = tmp_path / "killed" / "metrics.jsonl"
        written = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > written):
            time.sleep(0.005)
        time.sleep(random_moments.uniform(0, 0.4))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert killed >= 3
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert final_state(tmp_path / "killed") == final_state(tmp_path / "whole")


def test_running_a_finished_run_again_changes_nothing_and_more_steps_continue_it(
    tiny_sd, tiny_pairs, tmp_path, capsys
):
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "whole", "max_steps=8"))
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "again"))
    before = final_state(tmp_path / "again")
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "again"))
    assert final_state(tmp_path / "again") == before
    assert "trained to step 6 already" in capsys.readouterr().out
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "again", "max_steps=8"))
    assert final_state(tmp_path / "again") == final_state(tmp_path / "whole")


def test_a_folder_of_another_run_is_refused_and_named(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path, "max_steps=1"))
    before = final_state(tmp_path)
    with pytest.raises(ConfigError, match=r"(?s)another run.*learning_rate: 0.001 then, 0.002 now"):
        train.run(make_config(tiny_sd, tiny_pairs, tmp_path, "learning_rate=2e-3"))
    assert final_state(tmp_path) == before


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    config = make_config(tiny_sd, tiny_pairs, tmp_path)
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path, "max_steps=2"))
    real = train.pair_errors

    def poisoned(model, batch, *, needs_reference):
        errors = real(model, batch, needs_reference=needs_reference)
        errors.chosen.data[0] = float("nan")
        return errors

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ConfigError, match=r"step 3: loss.* is not finite.*pairs \w{32}"),
    ):
        patch.setattr(train, "pair_errors", poisoned)
        train.run(config)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    train.run(config)
    assert len(read_metrics(tmp_path)) == 6


@pytest.mark.parametrize(("mode", "alpha"), [("lora", "null"), ("lora", "8"), ("full", "null")])
def test_plain_diffusers_draws_what_training_draws(
    any_sd: Path, tiny_pairs: Path, tmp_path: Path, mode: str, alpha: str
):
    """In another process, without this package: the saved adapter is the model that the last preview came from."""
    alpha_setting = [f"model.lora.alpha={alpha}"] if mode == "lora" else []
    config = make_config(any_sd, tiny_pairs, tmp_path, "learning_rate=3e-2", *MODES[mode], *alpha_setting)
    train.run(config)
    script = f"""
import sys, torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
pipe = StableDiffusionPipeline.from_pretrained({str(any_sd)!r}, safety_checker=None)
if {mode == "lora"}:
    pipe.load_lora_weights({str(tmp_path / "adapter")!r})
else:
    pipe.unet = UNet2DConditionModel.from_pretrained({str(tmp_path / "unet")!r})
noise = torch.load({str(tmp_path / "noise.pt")!r}, weights_only=True)
image = pipe("abc", latents=noise, num_inference_steps=2, guidance_scale=1.5).images[0]
assert not any(name.startswith("diffusion_dpo") for name in sys.modules)
image.save({str(tmp_path / "plain.png")!r})
"""
    seed = train.image_seed(config.seed, "abc", 0)
    torch.save(torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed))[None], tmp_path / "noise.pt")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    plain, ours, base = (
        np.asarray(Image.open(path), dtype=int)
        for path in (
            tmp_path / "plain.png",
            tmp_path / "previews" / "step-00000006" / "00.png",
            tmp_path / "previews" / "step-00000000" / "00.png",
        )
    )
    assert np.abs(plain - ours).max() <= 1
    assert np.abs(base - ours).max() > 3


def test_the_run_folder_holds_what_it_promises(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    config = make_config(tiny_sd, tiny_pairs, tmp_path)
    assert train.run(config) == tmp_path / "adapter"
    assert load(TrainConfig, tmp_path / "config.yaml") == config
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
        ("model.pretrained=/nowhere", "there is no folder /nowhere"),
        ("data.path=/nowhere", "there is no file or folder /nowhere"),
        ("mixed_precision=fp16", "fp16, which needs cuda"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, override: str, message: str
):
    with pytest.raises(ConfigError, match=message):
        train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "run", override))
