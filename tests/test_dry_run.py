"""`train --dry-run`: it says what a run takes and takes nothing; and what helps a run that is out of memory."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion_dpo.cli import main
from diffusion_dpo.config import load
from diffusion_dpo.dry_run import fitting, relief
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training.memory import GIB, make_estimator


def files(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def test_it_says_steps_epochs_disk_memory_and_cards_and_writes_nothing(
    tiny_sd: Path,
    tiny_pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path), files(tiny_pairs), files(tiny_sd)
    paths = [f"model.pretrained={tiny_sd}", f"data.path={tiny_pairs}"]
    sizes = ["max_steps=9", "evaluation.share=0.2", "reference.type=cached", "reference.num_draws=4"]
    assert main(["train", "--dry-run", *paths, *sizes]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "steps: 9, each of 4 micro-batches of 4: 18.0 epochs of 8 examples from 8 pairs" in out
    assert "held out: 2 pairs of 2 prompts" in out
    assert "reference errors" in out
    assert "saved activations" in out
    assert re.search(r"8 GB [\d.]+ [MG]iB per_device_batch_size=16", out)
    assert (files(tmp_path), files(tiny_pairs), files(tiny_sd)) == before


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["model.pretrained=/no/such"], "there is no file or folder /no/such"),
        (["resolution_px=100"], "resolution_px is 100; this model needs a multiple of 8"),
        (["model.lora.targets=[nothing]"], "fit no layer of the UNet"),
        (["safeguard_mu=0.5", "loss.type=kto"], "safeguard_mu is about the two images of a pair"),
        (["data.path=/no/such"], "/no/such"),
        (["per_device_batch_size=3"], "must be a multiple of per_device_batch_size"),
        (["--find-beta"], "give one of them"),
    ],
)
def test_what_train_would_refuse_is_refused(
    settings: list[str], says: str, tiny_pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if settings[0].startswith("data.path=") else [f"data.path={tiny_pairs}"]
    assert main(["train", "--dry-run", *data, *settings]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err


def test_a_card_gets_the_settings_that_cost_the_least_speed() -> None:
    settings = ["model.lora=null", "resolution_px=256", "preview=null", "global_batch_size=8"]
    config = load(TrainConfig, None, settings)
    estimator = make_estimator(config, "cuda", torch.bfloat16)

    def needs(how: bool) -> float:
        changes = {"gradient_checkpointing": how, "per_device_batch_size": 1}
        return estimator.estimate(config.model_copy(update=changes)).total

    sizes, changes = {}, {}
    for name, budget in {"plenty": 8 * GIB, "one": needs(False), "checkpointed": needs(True), "none": GIB / 2}.items():
        sizes[name], total, changes[name] = fitting(config, estimator, budget)
        assert total <= budget or sizes[name] == 0
    assert sizes["plenty"] == 8 and changes["plenty"] == {}
    assert sizes["one"] == 1 and changes["one"] == {}
    assert sizes["checkpointed"] >= 1 and changes["checkpointed"]
    assert sizes["none"] == 0


def test_relief_names_what_saves_most_and_nothing_that_does_not() -> None:
    common = ["resolution_px=256", "device=cpu", "preview=null"]
    lines = relief(load(TrainConfig, None, [*common, "model.lora=null"]))
    names = [line.partition(":")[0] for line in lines]
    assert len(lines) == 3
    assert {"gradient_checkpointing=true", "per_device_batch_size=2"} < set(names)
    needs = [line.partition(": ")[2].split(" -> ") for line in lines]
    assert len({before for before, _ in needs}) == 1
    after = [float(text.removesuffix(" MiB")) for _, text in needs]
    assert after == sorted(after), "what saves most comes first"
    lines = relief(load(TrainConfig, None, [*common, "gradient_checkpointing=true", "per_device_batch_size=1"]))
    assert not any("gradient_checkpointing" in line or "per_device_batch_size" in line for line in lines)


TRAIN_UNTIL_REFUSED = """
import sys, torch
from diffusion_dpo import cli, train

step, refuse_at = train.train_step, int(sys.argv.pop(1))

def hungry(run, number, batches):
    if number == refuse_at:
        torch.empty(2**50)  # a petabyte: the allocator's own refusal
    return step(run, number, batches)

train.train_step = hungry
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_out_of_memory_says_what_helps_and_loses_nothing(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path) -> None:
    settings = [
        f"model.pretrained={tiny_sd}",
        f"data.path={tiny_pairs}",
        f"output_dir={tmp_path / 'run'}",
        "preview=null",
        "checkpointing_steps=1",
        "max_steps=2",
        "global_batch_size=4",
        "model.lora=null",
    ]

    def train(refuse_at: int, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", TRAIN_UNTIL_REFUSED, str(refuse_at), "train", *settings, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = train(1)
    assert refused.returncode == 2
    assert "error: out of memory: " in refused.stderr
    assert "gradient_checkpointing=true: " in refused.stderr
    assert refused.stderr.count(" -> ") == 3
    assert "Traceback" not in refused.stderr
    saved = tmp_path / "run" / "checkpoints" / "step-00000001"
    before = files(saved)
    assert len(before) >= 3
    assert (
        train(99, "per_device_batch_size=2", "gradient_checkpointing=true", "checkpoints_total_limit=9").returncode
        == 0
    )
    assert files(saved) == before, "the run went on from there"
