"""Several processes are one run: the same samples, the same noise, and one end, whoever is told to stop or dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from diffusion_dpo import train
from diffusion_dpo.config import ConfigError, dump
from diffusion_dpo.processes import Processes
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training.setup import refuse_uneven
from tests.runs import make_config, read_metrics

ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2", "-m"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
SETTINGS = ["loss.beta=100", "learning_rate=1e-4", "evaluation.share=0.3", "evaluation.every_steps=3"]
TRACE = (
    "loss",
    "grad_norm",
    "errors/chosen",
    "errors/reference_chosen",
    "errors/reference_rejected",
    "rewards/margins",
)


@contextmanager
def started(
    config: TrainConfig, *, launcher: Sequence[str] = ACCELERATE, **environment: str
) -> Iterator[subprocess.Popen]:
    """Two processes at work on a run; whatever is left of them at the end is killed."""
    path = config.output_dir.with_suffix(".yaml")
    path.write_text(dump(config))
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [*launcher, "diffusion_dpo", "train", str(path)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        for child in (
            [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
        ):
            child.kill()
        process.communicate()


def finish(config: TrainConfig, **options) -> str:
    with started(config, **options) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def ranks(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes of the run, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        environment = child.environ()
        if (
            "RANK" in environment
            and "diffusion_dpo" in child.cmdline()
            and "torch.distributed.run" not in child.cmdline()
        ):
            found[int(environment["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").exists() or len(read_metrics(run_dir)) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same_run(one: Path, other: Path, *, rel: float = 1e-3) -> None:
    """To 1e-4 in the losses; samples and noise are the same when the reference's errors are, to float error."""
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        assert a.keys() == b.keys()
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        for name in TRACE:
            tight = name.startswith("errors/reference")
            assert b[name] == pytest.approx(a[name], rel=1e-6 if tight else rel, abs=0 if tight else 1e-4), name
        for name in [name for name in a if name.startswith("eval/") and "/se" not in name and "accuracy" not in name]:
            assert b[name] == pytest.approx(a[name], rel=1e-2, abs=1e-5), name  # small differences of large numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", [["preview.prompts=[abc]"], ["model.lora=null", "reference.type=cached", "preview=null"]]
)
def test_two_processes_are_one_run(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, mode: list[str]):
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "one", *SETTINGS, *mode))
    output = finish(make_config(tiny_sd, tiny_pairs, tmp_path / "two", *SETTINGS, *mode))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert output.count("train: dpo on 7 pairs") == 1 and "2 processes x 1 x 2" in output
    caches = [tmp_path / run / "cache" for run in ("one", "two")]
    names = [sorted(path.relative_to(cache) for path in cache.rglob("*.safetensors")) for cache in caches]
    assert names[0] == names[1]


@pytest.mark.slow
def test_sigterm_to_one_stops_both_at_one_step_and_either_number_of_processes_goes_on(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path
):
    endless = ["max_steps=100000", "checkpointing_steps=100000", "preview=null", "evaluation.every_steps=100000"]
    config = make_config(tiny_sd, tiny_pairs, tmp_path / "two", *SETTINGS, *endless)
    with started(config) as process:
        wait_for_step(config.output_dir, 3, process)
        ranks(process)[1].send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    (checkpoint,) = (config.output_dir / "checkpoints").iterdir()
    step = json.loads((checkpoint / "manifest.json").read_text())["step"]
    assert len(read_metrics(config.output_dir)) == step >= 3
    assert output.count(f"stopped after step {step}, which is saved") == 1
    assert process.returncode != 0

    steps = [f"max_steps={step + 2}", f"evaluation.every_steps={step + 2}", "preview=null"]
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "two", *SETTINGS, *steps))  # one goes on with it
    steps = [f"max_steps={step + 4}", f"evaluation.every_steps={step + 2}", "preview=null"]
    finish(make_config(tiny_sd, tiny_pairs, tmp_path / "two", *SETTINGS, *steps))  # and two again
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "whole", *SETTINGS, *steps))
    for a, b in zip(read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "two"), strict=True):
        for name in ("errors/reference_chosen", "errors/reference_rejected"):
            assert a[name] == pytest.approx(b[name], rel=1e-6), "the same samples with the same noise"
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)


@pytest.mark.slow
def test_when_one_dies_the_other_says_so_and_nothing_is_lost(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    endless = ["max_steps=100000", "checkpointing_steps=2", "preview=null", "evaluation.share=0"]
    config = make_config(tiny_sd, tiny_pairs, tmp_path / "two", *endless)
    with started(config) as process:
        wait_for_step(config.output_dir, 5, process)
        ranks(process)[1].kill()
        output, _ = process.communicate(timeout=60)
    assert output.count("error: another process of this run has died") == 1, output
    saved = sorted(path.name for path in (config.output_dir / "checkpoints").glob("step-*"))
    assert len(saved) == config.checkpoints_total_limit
    step = int(saved[-1].removeprefix("step-"))
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "two", *endless, f"max_steps={step + 1}"))
    assert len(read_metrics(config.output_dir)) == step + 1


@pytest.mark.slow
def test_weights_divided_among_processes_train_alike_and_are_saved_whole(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path
):
    """FSDP2, as `accelerate launch --use_fsdp` asks for it; stopped in the middle, with previews and evaluation."""
    full = [*SETTINGS, "model.lora=null", "ema_decay=0.5"]
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "one", *full))
    sharded = {"launcher": TORCHRUN, "ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}
    finish(make_config(tiny_sd, tiny_pairs, tmp_path / "two", *full, "max_steps=3"), **sharded)
    finish(make_config(tiny_sd, tiny_pairs, tmp_path / "two", *full), **sharded)
    assert_same_run(tmp_path / "one", tmp_path / "two", rel=5e-3)  # its weights are in another layout
    one, two = (load_file(tmp_path / run / "unet" / "diffusion_pytorch_model.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    last = load_file(tmp_path / "two" / "checkpoints" / "step-00000006" / "trained.safetensors")
    average = load_file(tmp_path / "two" / "checkpoints" / "step-00000006" / "ema.safetensors")
    base = load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    moved, apart = (
        torch.cat([(weights[name] - base_or_one[name]).flatten() for name in one]).norm()
        for weights, base_or_one in ((one, base), (two, one))
    )
    assert 0 < apart < 0.1 * moved  # Adam steps by the learning rate also where a gradient is noise
    for name in one:
        assert torch.equal(two[name], average[name]), "what is saved is the average"
    assert any(not torch.equal(last[name], average[name]) for name in average)
    settings = [json.loads((tmp_path / run / "unet" / "config.json").read_text()) for run in ("one", "two")]
    assert settings[0]["_class_name"] == settings[1]["_class_name"] == "UNet2DConditionModel"


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], "DeepSpeed, which cannot be used here"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "FSDP2 is for full fine-tuning"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, ["model.lora=null"], "version 1 of FSDP; set it to 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, ["model.lora=null", "optimizer=adafactor"], "set optimizer=adamw"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, [], "start several processes with `accelerate launch` or `torchrun`"),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_said_before_anything_slow(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment, overrides: list[str], message: str
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        train.run(make_config(tiny_sd, tmp_path / "nowhere", tmp_path / "run", *overrides))


def test_a_batch_that_the_processes_do_not_divide_is_refused(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    config = make_config(tiny_sd, tiny_pairs, tmp_path, "global_batch_size=6")
    refuse_uneven(config, Processes(0, 3))
    message = (
        r"global_batch_size \(6\) must be a multiple of per_device_batch_size \(2\) times the number of processes "
        r"\(2\); the nearest are 4 and 8"
    )
    with pytest.raises(ConfigError, match=message):
        refuse_uneven(config, Processes(1, 2))


def test_work_is_shared_without_rest_or_repetition():
    for count in (1, 2, 3, 7):
        shares = [Processes(rank, count).share(range(10)) for rank in range(count)]
        assert sorted(item for share in shares for item in share) == list(range(10))
