"""Where weights are found, and what a file may do that claims to be some: nothing."""

import hashlib
import os
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from diffusion_dpo.config import ConfigError
from diffusion_dpo.scorers.weights import Weights, content_hash, files_of, load_tensors, sha256_of
from tests.scorers.tiny_hub import COMMIT, put_on_hub

PAGE, LICENCE = "https://example.org/model", "MIT"
STATE = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}


def _weights(pretrained: Path | str, revision: str | None = None) -> Weights:
    return Weights("judge", str(pretrained), revision, PAGE, LICENCE)


def test_a_file_and_a_folder_are_found(tmp_path: Path) -> None:
    file = tmp_path / "head.pth"
    file.write_bytes(b"x")
    assert _weights(file).file("other.pth") == file
    assert _weights(tmp_path).file("head.pth") == file


def test_what_is_missing_is_named_with_its_page_place_and_licence(tmp_path: Path) -> None:
    def complaint(what: str) -> str:
        return rf"^scorer judge: {tmp_path} {what}; download it from {PAGE} into {tmp_path} \(licence: MIT\)$"

    with pytest.raises(ConfigError, match=complaint(r"lacks head\.pth")):
        _weights(tmp_path).file("head.pth")
    with pytest.raises(ConfigError, match=complaint(r"lacks config\.json")):
        _weights(tmp_path).folder()
    with pytest.raises(ConfigError, match=complaint(r"lacks preprocessor_config\.json")):
        _weights(tmp_path).folder("processor")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=complaint(r"has config\.json but no model\.safetensors")):
        _weights(tmp_path).folder()
    with pytest.raises(ConfigError, match=r"config\.json is a file; give the folder"):
        _weights(tmp_path / "config.json").folder()


@pytest.mark.parametrize("name", ["org/name", "no/such/folder", "/no/such/file.pth", "name with spaces"])
def test_what_is_neither_here_nor_on_the_hub_is_one_sentence(name: str, cache: Path) -> None:
    for act in (lambda: _weights(name).file("model.pt"), _weights(name).folder):
        with pytest.raises(ConfigError, match=rf"no file or folder {name}, .* hub .*download it from {PAGE}") as info:
            act()
        assert "\n" not in str(info.value)


def test_a_model_in_the_cache_of_the_hub_is_found_and_its_revision_said(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = put_on_hub(cache, {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{ }"})
    assert _weights("org/name").folder() == snapshot
    assert capsys.readouterr().out.count(f"org/name is not pinned; now at revision={COMMIT}") == 1
    assert _weights("org/name", COMMIT).file("model.safetensors") == snapshot / "model.safetensors"
    assert "pinned" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"cannot be had from the hub"):
        _weights("org/name", "v2").folder()


def test_half_a_model_in_the_cache_is_no_model(cache: Path) -> None:
    put_on_hub(cache, {"config.json": b"{}"})
    with pytest.raises(ConfigError, match=r"no model\.safetensors; download it from"):
        _weights("org/name").folder()


def test_a_pickle_is_fetched_only_where_there_are_no_safetensors(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = huggingface_hub.snapshot_download

    def listening(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return original(name, revision=revision, allow_patterns=allow_patterns)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", listening)
    put_on_hub(cache, {"config.json": b"{}", "model.safetensors": b"weights"})
    _weights("org/name").folder()
    assert asked
    assert not any("bin" in pattern for pattern in asked)
    _weights("org/name").file("config.json")
    asked.clear()
    (cache / "models--org--name" / "snapshots" / COMMIT / "model.safetensors").unlink()
    put_on_hub(cache, {"pytorch_model.bin": b"weights"})
    _weights("org/name").folder()
    assert "pytorch_model*.bin" in asked


def test_the_hash_is_of_names_and_bytes(tmp_path: Path, cache: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (there, here):
        folder.mkdir()
        for name in ("model.safetensors", "config.json", "notes.md", ".hidden.json"):
            (folder / name).write_text(name)
    assert [file.name for file in files_of(here)] == ["config.json", "model.safetensors"]
    assert content_hash(files_of(here)) == content_hash(files_of(there))
    (there / "notes.md").write_text("other")
    assert content_hash(files_of(here)) == content_hash(files_of(there))
    (there / "config.json").write_text("other")
    assert content_hash(files_of(here)) != content_hash(files_of(there))
    (here / "model.safetensors").rename(here / "weights.safetensors")
    assert content_hash(files_of(here)) != content_hash([there / "model.safetensors", here / "config.json"])


def test_a_large_file_of_the_hub_is_hashed_by_its_name(cache: Path, tmp_path: Path) -> None:
    snapshot = put_on_hub(cache, {"config.json": b"{}", "model.safetensors": b"weights"})
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(b"weights")
    assert sha256_of(snapshot / copy.name) == sha256_of(copy) == hashlib.sha256(b"weights").hexdigest()
    (snapshot / copy.name).resolve().write_bytes(b"not read at all")
    assert sha256_of(snapshot / copy.name) == sha256_of(copy)
    assert sha256_of(snapshot / "config.json") == hashlib.sha256(b"{}").hexdigest(), "its blob is named by sha1"


def test_tensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "a.pt")
    torch.save({"epoch": 3, "state_dict": STATE}, tmp_path / "b.pt")
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pt", "b.pt", "old.pt"):
        found = load_tensors(tmp_path / name, "judge")
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[key], STATE[key]) for key in STATE)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("through_torch", [True, False])
def test_a_file_that_would_run_code_is_refused(through_torch: bool, tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "bomb.pth"
    if through_torch:
        torch.save({"a": torch.ones(1), "b": _Bomb(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(_Bomb(mark), protocol=2))
    with pytest.raises(ConfigError, match=r"cannot read the weights .*bomb\.pth"):
        load_tensors(file, "judge")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "old.pt"])
def test_a_truncated_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name == "a.safetensors":
        save_file(STATE, file)
    else:
        torch.save(STATE, file, _use_new_zipfile_serialization=name == "a.pt")
    whole = file.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 3):
        file.write_bytes(whole[:size])
        with pytest.raises(
            ConfigError, match=rf"^scorer judge: cannot read the weights {file}: .*; download it again$"
        ):
            load_tensors(file, "judge")


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, torch.ones(2), {"state_dict": {"a": "text"}}])
def test_something_other_than_named_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ConfigError, match="something other than named tensors"):
        load_tensors(tmp_path / "odd.pt", "judge")
