"""A checkpoint is whole or absent, whatever happens while it is written."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from diffusion_dpo import checkpoint
from diffusion_dpo.config import ConfigError

PARTS = {"trained": {"a": torch.arange(6.0).reshape(2, 3)}, "optimizer": {"a:step": torch.tensor(3.0)}}


def save(folder: Path, step: int, *, keep: int = 2, value: float = 0.0) -> Path:
    parts = {"trained": {"a": torch.full((4,), value)}, "optimizer": PARTS["optimizer"]}
    return checkpoint.save(folder, step, parts, {"scaler": {}}, keep=keep)


def test_what_was_saved_comes_back(tmp_path: Path):
    checkpoint.save(tmp_path, 7, PARTS, {"scaler": {"scale": 2.0}}, keep=1)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (7, {"scaler": {"scale": 2.0}})
    assert all(torch.equal(found.parts[part][name], tensor) for part in PARTS for name, tensor in PARTS[part].items())


@pytest.mark.parametrize("keep", range(1, 7))
def test_only_the_newest_are_kept(tmp_path: Path, keep: int):
    for number in range(1, 9):
        save(tmp_path, 10 * number, keep=keep)
        kept = sorted(path.name for path in tmp_path.iterdir())
        assert kept == [f"step-{10 * n:08d}" for n in range(max(1, number - keep + 1), number + 1)]


def test_no_checkpoint_is_none(tmp_path: Path):
    assert checkpoint.load_latest(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "step"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
):
    save(tmp_path, 10, value=1.0)
    newest = save(tmp_path, 20, value=2.0)
    file = newest / ("manifest.json" if damage in ("manifest", "step") else "trained.safetensors")
    if damage == "remove":
        file.unlink()
    elif damage == "step":
        file.write_text(file.read_text().replace('"step": 20', '"step": 21'))
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data[:-1] if damage in ("truncate", "manifest") else data)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found.step == 10
    assert "step-00000020" in capsys.readouterr().out
    save(tmp_path, 15, keep=1, value=3.0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000015"]


def test_what_a_killed_run_left_is_cleared_up(tmp_path: Path):
    for name in (".staging-01234567", ".step-00000010.01234567.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trained.safetensors").touch()
    save(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path):
    path = save(tmp_path, 10, value=1.0)
    (path / "trained.safetensors").write_bytes(b"")
    assert save(tmp_path, 10, value=2.0) == path
    found = checkpoint.load_latest(tmp_path)
    assert found is not None and found.parts["trained"]["a"].tolist() == [2.0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("call", range(12))
def test_a_failure_at_any_moment_of_saving_leaves_the_old_one(
    tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
):
    """The disk fills up at the n-th write, fsync or rename."""
    save(tmp_path, 10, keep=1, value=1.0)
    count = 0

    def failing(real):
        def wrapper(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call + 1:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace))
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(safetensors.torch, "save_file", failing(safetensors.torch.save_file))
        failed = False
        try:
            save(tmp_path, 20, keep=1, value=2.0)
        except OSError:
            failed = True
    assert failed == (count >= call + 1)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found.parts["trained"]["a"][0] == {10: 1.0, 20: 2.0}[found.step]
    assert failed or found.step == 20
    save(tmp_path, 30, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000030"]


def test_all_is_on_the_disk_before_it_has_its_name_and_the_name_before_old_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A power cut keeps only what was fsynced: every file whole, then their folder, then the renamed name."""
    old = save(tmp_path, 10, keep=1)
    synced: dict[int, int] = {}
    renamed: list[dict[int, int]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        assert old.exists()
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        real_replace(source, target)
        renamed.append(dict(synced))
        synced.clear()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    path = save(tmp_path, 20, keep=1)
    (before,) = renamed
    assert before.keys() >= {file.stat().st_ino for file in [path, *path.iterdir()]}
    assert all(before[file.stat().st_ino] == file.stat().st_size for file in path.iterdir())
    assert set(synced) == {tmp_path.stat().st_ino}
    assert not old.exists()


def rewritten(path: Path, content: bytes) -> None:
    """Put something else into a checkpoint, and make its manifest say that it should be so."""
    file, manifest = path / "trained.safetensors", path / "manifest.json"
    file.write_bytes(content)
    facts = json.loads(manifest.read_text())
    facts["files"][file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del facts["sha256"]
    manifest.write_text(json.dumps(facts | {"sha256": checkpoint._sha256_of_facts(facts)}))


@pytest.mark.parametrize("content", ["text", "empty", "cut", "not_finite", "step"])
def test_a_consistent_manifest_does_not_make_it_whole(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
):
    save(tmp_path, 10, value=1.0)
    path = save(tmp_path, 20, value=2.0)
    whole = (path / "trained.safetensors").read_bytes()
    broken = safetensors.torch.save({"a": torch.tensor([1.0, float("nan"), 2.0, 3.0])})
    rewritten(path, {"text": b"no tensors", "empty": b"", "cut": whole[:-3], "not_finite": broken}.get(content, whole))
    if content == "step":
        facts = json.loads((path / "manifest.json").read_text()) | {"step": None}
        del facts["sha256"]
        text = json.dumps(facts | {"sha256": checkpoint._sha256_of_facts(facts)})
        (path / "manifest.json").write_text(text)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None and found.step == 10
    assert "step-00000020 is damaged" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match=r"is damaged \(.*(header|Header|not finite|int\(\)|incomplete)"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("expected", "says"),
    [
        ({"trained": {"b": torch.zeros(4)}}, r"trained holds nothing for b, of shape \(4,\)"),
        ({"trained": {"a": torch.zeros(5)}}, r"trained holds \(4,\) for a, of shape \(5,\)"),
        ({"ema": {"a": torch.zeros(4)}}, "ema holds nothing for a"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, expected: dict[str, dict[str, Any]], says: str):
    found = checkpoint.load(save(tmp_path, 1))
    with pytest.raises(ConfigError, match=says):
        checkpoint.refuse_misfit(found, expected, tmp_path)
    checkpoint.refuse_misfit(found, {"trained": {"a": torch.zeros(4)}}, tmp_path)


def test_nothing_is_pickled(tmp_path: Path):
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
