"""Whatever stops a run, the same command ends as if nothing had happened; what changed or is damaged is found.

Bit for bit on one machine with as many threads: final weights, optimizer, and every metric of every step.
"""

import errno
import json
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion_dpo import checkpoint, train
from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError, dump
from diffusion_dpo.interrupt import Interrupted
from tests.runs import MODES, final_state, make_config, read_metrics

KINDS = {
    **MODES,
    "ema reference": ["reference.type=ema", "loss.type=linear_dpo"],
    "kto": ["loss.type=kto"],
    "curriculum": ["order=curriculum", "curriculum_stages=2", "curriculum_steps=2", "score_metric=shade"],
    "evaluated": ["evaluation.share=0.3", "evaluation.every_steps=2", "evaluation.num_timesteps=2"],
}


@pytest.mark.parametrize(
    "kind",
    [
        [],
        ["loss.type=kto"],
        ["score_gain_weighting=true", "score_metric=shade"],
        ["safeguard_mu=0.9"],
        ["reference.type=ema", "reference.ema_decay=0.5"],
    ],
)
def test_accumulated_micro_batches_equal_one_batch(tiny_sd: Path, scored_pairs: Path, tmp_path: Path, kind: list[str]):
    """To float error, which beta (here 100) multiplies and which grows from step to step."""
    for size in (1, 2, 4):
        overrides = [f"per_device_batch_size={size}", "loss.beta=100", "preview=null", *kind]
        train.run(make_config(tiny_sd, scored_pairs, tmp_path / str(size), *overrides))
    runs = [read_metrics(tmp_path / str(size)) for size in (1, 2, 4)]
    for step, rows in enumerate(zip(*runs, strict=True)):
        keys = {"loss", "grad_norm", "errors/chosen", "errors/reference_rejected"} & rows[0].keys()
        assert all(row.keys() == rows[0].keys() for row in rows) and len(keys) >= 3
        for key in keys:
            values = [row[key] for row in rows]
            assert values == pytest.approx([values[0]] * 3, rel=1e-4 if step == 0 else 1e-2), key


def test_the_number_of_workers_changes_nothing(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    for workers in (0, 1, 4):
        config = make_config(tiny_sd, tiny_pairs, tmp_path / str(workers), f"dataloader_num_workers={workers}")
        train.run(config)
    assert final_state(tmp_path / "0") == final_state(tmp_path / "1") == final_state(tmp_path / "4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_at_any_step_ends_as_if_it_had_not_been(
    tiny_sd: Path, scored_pairs: Path, tmp_path: Path, kind: str
):
    """Ctrl-C after each step in turn: saved, left with 130, and continued by the same command."""
    train.run(make_config(tiny_sd, scored_pairs, tmp_path / "whole", *KINDS[kind]))
    config = make_config(tiny_sd, scored_pairs, tmp_path / "stopped", *KINDS[kind])
    real_step, stops = train.train_step, []

    def interrupted_step(run, step, batches):
        metrics = real_step(run, step, batches)
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


KILLED_AT_THEIR_NTH_EVENTS = """
import os, shutil, signal, sys
from pathlib import Path
import diffusers, peft, safetensors.torch, transformers
from diffusion_dpo import train
from diffusion_dpo.cli import main

left = -1

def event():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def counted(real):
    def wrapper(*args, **kwargs):
        event()
        result = real(*args, **kwargs)
        event()
        return result
    return wrapper

def torn(real):  # a file of a checkpoint is cut off in the middle
    def wrapper(tensors, path, **kwargs):
        real(tensors, path, **kwargs)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        event()
        Path(path).write_bytes(whole)
    return wrapper

os.fsync, os.replace, shutil.rmtree = counted(os.fsync), counted(os.replace), counted(shutil.rmtree)
safetensors.torch.save_file = torn(safetensors.torch.save_file)
train.train_step = counted(train.train_step)
for nth in sys.argv[2:]:
    if pid := os.fork():  # every run is a process of its own; the libraries are imported once
        _, status = os.waitpid(pid, 0)
        staged = any((Path(sys.argv[1]).parent / "killed" / "checkpoints").glob(".staging-*"))
        print(os.waitstatus_to_exitcode(status), int(staged), flush=True)
    else:
        left = int(nth)
        os.dup2(2, 1)
        os._exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.slow
def test_kill_9_at_20_random_moments_changes_nothing(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    """Also between any two system calls of a checkpoint, and within its files."""
    settings = ["max_steps=110", "evaluation.share=0.3", "evaluation.every_steps=7", "preview=null"]
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "whole", *settings))
    config = make_config(tiny_sd, tiny_pairs, tmp_path / "killed", *settings)
    (tmp_path / "config.yaml").write_text(dump(config))
    moments, environment = random.Random(0), {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    nth = [str(moments.randint(20, 120)) for _ in range(20)]
    command = [sys.executable, "-c", KILLED_AT_THEIR_NTH_EVENTS, str(tmp_path / "config.yaml"), *nth, "-1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    ended = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [code for code, _ in ended] == [-signal.SIGKILL] * 20 + [0], done.stderr
    assert sum(staged for _, staged in ended[:20]) >= 5
    assert final_state(tmp_path / "killed") == final_state(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncated", "one bit", "manifest"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_is_used(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
):
    config = make_config(tiny_sd, tiny_pairs, tmp_path)
    train.run(config)
    before = final_state(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000006"
    file = newest / ("manifest.json" if damage == "manifest" else "optimizer.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "manifest":
        data = bytearray(data.replace(b'"steps": 6', b'"steps": 5'))
        assert data != file.read_bytes()
    elif damage == "one bit":
        data[-1] ^= 1
    file.write_bytes(data[:-1] if damage == "truncated" else data)
    capsys.readouterr()
    train.run(config)
    shown = capsys.readouterr().out
    assert f"the checkpoint {newest} is damaged ({file.name} is not what was written)" in shown
    assert "continuing after step 4 of 6" in shown
    assert final_state(tmp_path) == before


def test_a_checkpoint_of_another_run_is_refused(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "other", "seed=1"))
    config = make_config(tiny_sd, tiny_pairs, tmp_path / "run", "max_steps=2")
    train.run(config)
    shutil.copytree(*(tmp_path / name / "checkpoints" / "step-00000006" for name in ("other", "run")))
    with pytest.raises(ConfigError, match=r"the checkpoint of step 6 in .* was saved by another run"):
        train.run(config)


def test_running_a_finished_run_again_changes_nothing_and_more_steps_continue_it(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "whole", "max_steps=8"))
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "again"))
    before = final_state(tmp_path / "again")
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "again"))
    assert final_state(tmp_path / "again") == before
    assert "trained to step 6 already" in capsys.readouterr().out
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "again", "max_steps=8"))
    assert final_state(tmp_path / "again") == final_state(tmp_path / "whole")


def test_a_changed_setting_is_refused_and_named(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path, "max_steps=1"))
    before = final_state(tmp_path)
    with pytest.raises(ConfigError, match=r"(?s)another run.*learning_rate: 0.001 -> 0.002"):
        train.run(make_config(tiny_sd, tiny_pairs, tmp_path, "learning_rate=2e-3"))
    with pytest.raises(ConfigError, match=r"(?s)another run.*weighting.timesteps: constant -> elbo"):
        train.run(make_config(tiny_sd, tiny_pairs, tmp_path, "weighting.timesteps=elbo"))
    assert final_state(tmp_path) == before


def test_a_kl_budget_ends_training_and_stays_ended(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = ["evaluation.share=0.3", "evaluation.every_steps=2", "evaluation.max_kl=1e-6"]
    config = make_config(tiny_sd, tiny_pairs, tmp_path, *settings)
    for _ in range(2):
        train.run(config)
        assert "above evaluation.max_kl: training ended" in capsys.readouterr().out
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert json.loads((tmp_path / "manifest.json").read_text())["steps"] == 2
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == ["step-00000000", "step-00000002"]
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path, *settings[:2], "evaluation.max_kl=null"))
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "whole", *settings[:2]))
    last = (tmp_path / name / "previews" / "step-00000006" / "00.png" for name in (".", "whole"))
    assert len({path.read_bytes() for path in last}) == 1
    assert final_state(tmp_path) == final_state(tmp_path / "whole")


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("latents", "a cached latent"),
        ("prediction", "the model's prediction"),
        ("loss", "the loss"),
        ("grad", "the gradient"),
    ],
)
def test_what_is_not_finite_stops_before_the_weights_change_and_names_the_pairs(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, where: str, what: str
):
    config = make_config(tiny_sd, tiny_pairs, tmp_path, "evaluation.share=0")
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path, "max_steps=2", "evaluation.share=0"))
    real_errors, real_clip = train.denoising_errors, torch.nn.utils.clip_grad_norm_
    real_latents = train.prepare.__globals__["cache"].LatentCache.latents

    def broken_errors(model, batch, **kwargs):
        errors = real_errors(model, batch, **kwargs)
        (errors.policy if where == "prediction" else errors.reference).data[0, 0] = float("nan")
        return errors

    def broken_latents(self, images, flip):
        latents = real_latents(self, images, flip)
        latents[0] = float("inf")
        return latents

    with pytest.MonkeyPatch.context() as patch:
        if where == "latents":
            patch.setattr("diffusion_dpo.data.cache.LatentCache.latents", broken_latents)
        elif where == "grad":
            patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: real_clip(*args) * float("nan"))
        else:
            patch.setattr(train, "denoising_errors", broken_errors)
        with pytest.raises(ConfigError, match=rf"step 3: {what}.* is not finite.*pairs.*: \w{{32}}"):
            train.run(config)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    train.run(config)
    assert len(read_metrics(tmp_path)) == 6


def test_tuning_on_a_lora_resumes_with_that_same_reference(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The start is part of the reference, before and after a stop; another one in its place is refused."""
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "start", "learning_rate=1e-1", "seed=1"))
    on_top = [f"model.adapter_path={tmp_path / 'start'}"]
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "whole", *on_top))
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "stopped", *on_top, "max_steps=3", "preview=null"))
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "stopped", *on_top))
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "plain"))
    first, plain = (read_metrics(tmp_path / name)[0] for name in ("whole", "plain"))
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert first["errors/reference_chosen"] != plain["errors/reference_chosen"]
    shutil.rmtree(tmp_path / "start")
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "start", "learning_rate=2e-1", "seed=1"))
    with pytest.raises(ConfigError, match=r"(?s)another run.*base_weights: \w{8} -> \w{8}\n"):
        train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "stopped", *on_top))


@pytest.mark.parametrize(
    "where",
    [
        "data.encode:_encode_batch",
        "training.previews:draw",
        "checkpoint:_sha256",
        "training.evaluation:HeldOut.evaluate",
    ],
)
def test_sigterm_ends_with_143_and_the_same_command_finishes_the_run(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, where: str
):
    """During encoding, previews, the writing of a checkpoint, and an evaluation."""
    settings = ["evaluation.share=0.3", "evaluation.every_steps=3"]
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "whole", *settings))
    (tmp_path / "config.yaml").write_text(dump(make_config(tiny_sd, tiny_pairs, tmp_path / "run", *settings)))
    real = pkgutil.resolve_name(f"diffusion_dpo.{where}")

    def terminated(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"diffusion_dpo.{where.replace(':', '.')}", terminated)
        assert main(["train", str(tmp_path / "config.yaml")]) == 143
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    signal.signal(signal.SIGTERM, before)
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")


def test_a_disk_that_fills_during_a_save_leaves_the_old_checkpoint(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "whole"))
    (tmp_path / "config.yaml").write_text(dump(make_config(tiny_sd, tiny_pairs, tmp_path / "run")))
    real, calls = checkpoint._sha256, []

    def full(path: Path) -> str:
        calls.append(path)
        if len(calls) > 2:  # while the second checkpoint is written
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_sha256", full)
        assert main(["train", str(tmp_path / "config.yaml")]) == 2
    assert "no space left on the disk" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")


def test_a_checkpoint_before_the_optimizers_first_step_is_continued(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    """As in fp16, whose scaler skips the first steps: the optimizer has no moments yet."""
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "whole", "max_steps=2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp.GradScaler, "step", lambda self, optimizer: None)
        train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "run", "max_steps=1"))
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "run", "max_steps=2"))
    assert len(read_metrics(tmp_path / "run")) == 2


def test_weights_that_are_not_finite_are_never_saved(tiny_sd: Path, tiny_pairs: Path, tmp_path: Path):
    config = make_config(tiny_sd, tiny_pairs, tmp_path, "max_steps=1", "learning_rate=1e39")
    with pytest.raises(ConfigError, match=r"after step 1 the weights are not finite.*learning_rate=1e\+39"):
        train.run(config)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.type=kto", "safeguard_mu=0.5"], "safeguard_mu is about the two images of a pair"),
        (
            ["loss.type=rank_dpo", "order=curriculum", "curriculum_steps=1"],
            "order=curriculum is about the two images of a pair",
        ),
        (["loss.type=mapo", "reference.type=ema"], "reference.type=ema, and loss.type=mapo has no reference"),
        (["score_metric=shade"], "score_metric=shade, and nothing here looks at scores"),
        (["loss.type=capo"], "this training looks at scores.*set score_metric to one of those.*: shade"),
        (["loss.type=capo", "score_metric=hue"], "the chosen image has no finite score 'hue'"),
        (["loss.type=rank_dpo", "score_metric=shade"], r"no prompt has 4 distinct scored images \(loss.list_size\)"),
        (["evaluation.max_kl=1"], "evaluation.max_kl is measured on held-out pairs, and there are none"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    tiny_sd: Path, scored_pairs: Path, tmp_path: Path, settings: list[str], message: str
):
    with pytest.raises(ConfigError, match=message):
        train.run(make_config(tiny_sd, scored_pairs, tmp_path / "run", *settings))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_curriculum_that_never_reaches_all_pairs_is_refused(tiny_sd: Path, scored_pairs: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"order=curriculum takes up all pairs after .* = 100 steps.*max_steps is 6"):
        make_config(tiny_sd, scored_pairs, tmp_path, "order=curriculum")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_byte_in_the_cache_stops_the_run_with_a_sentence_and_the_same_command_mends_it(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, workers: int
):
    settings = ["preview=null", "evaluation.share=0", f"dataloader_num_workers={workers}"]
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "whole", *settings))
    config = make_config(tiny_sd, tiny_pairs, tmp_path / "damaged", *settings, f"cache_dir={tmp_path / 'cache'}")
    shutil.copytree(tmp_path / "whole" / "cache", tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*/pairs-*.safetensors")
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1  # in the last image that is stored
    file.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"is damaged at pair .* the same command encodes it again") as caught:
        train.run(config)
    assert "Traceback" not in str(caught.value)
    train.run(config)
    assert final_state(tmp_path / "damaged") == final_state(tmp_path / "whole")
