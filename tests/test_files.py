"""Folders that belong to one run by what it is made of, and folders that take another one's place."""

import os
from pathlib import Path
from typing import Any

import pytest

from diffusion_dpo import files
from diffusion_dpo.config import ConfigError
from diffusion_dpo.files import MANIFEST, alone_in, atomic_path, claim, put_in_place, read_manifest


def made(folder: Path, identity: dict[str, Any]) -> None:
    with claim(folder, "train", identity):
        (folder / "weights").touch()


@pytest.mark.parametrize(
    ("before", "now", "lines"),
    [
        ({"seed": 0, "rate": 1e-5}, {"seed": 1, "rate": 1e-5}, ["seed: 0 -> 1"]),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 3, "d": 2}}}, ["a.b.c: 1 -> 3"]),
        ({"weights": "0123456789abcdef"}, {"weights": "fedcba9876543210"}, ["weights: 01234567 -> fedcba98"]),
        (
            {"loss": {"type": "dpo", "beta": 2000, "x": 1}},
            {"loss": {"type": "ipo", "beta": 10}},
            ["loss.type: dpo -> ipo"],
        ),
        ({"model": {"lora": {"rank": 8}}}, {"model": {"lora": None}}, ['model.lora: {"rank": 8} -> null']),
        ({"x": "y" * 400}, {"x": "z"}, [f"x: {'y' * 48}... -> z"]),
        ({"old": 1}, {"new": 2}, ["new: null -> 2", "old: 1 -> null"]),
    ],
)
def test_a_refusal_names_what_differs_and_the_way_to_go_on(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], lines: list[str]
) -> None:
    made(tmp_path, before)
    with pytest.raises(ConfigError) as caught, claim(tmp_path, "train", now, way_on="train on from it"):
        pass
    first, *shown, last = str(caught.value).splitlines()
    assert first == f"{tmp_path} belongs to another run. Different, then -> now:"
    assert [line.strip() for line in shown] == lines
    assert last == "Undo the change to go on with it, or train on from it"
    made(tmp_path, before)  # which is still its run


def test_a_folder_of_another_version_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Not with all that it was known by then, as if that had been changed."""
    made(tmp_path, {"seed": 0, "data": {"path": "pairs"}})
    with pytest.raises(ConfigError) as caught, claim(tmp_path, "train", {"seed": 0, "layout": 2}, way_on="train on"):
        pass
    assert str(caught.value) == (
        f"{tmp_path} was made by another version of diffusion-dpo, which tells runs apart by other facts. Go on with "
        "it in that version, or train on"
    )


def test_scores_and_votes_of_earlier_versions_go_on(tmp_path: Path) -> None:
    """Their manifests named the place of the images."""
    made(tmp_path, {"path": "runs/candidates", "data": None, "seed": 0})
    made(tmp_path, {"seed": 0})
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        made(tmp_path, {"seed": 1})


def test_facts_stand_in_the_manifest_before_the_run_is_finished(tmp_path: Path) -> None:
    with claim(tmp_path, "train", {}, facts={"labelled_by": ["clip"]}):
        assert read_manifest(tmp_path) == {
            "made_by": "train",
            "complete": False,
            "identity": {},
            "labelled_by": ["clip"],
        }


class Stopped(BaseException):
    """The process is killed."""


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("call", range(4))
def test_one_of_two_folders_is_there_whenever_it_stops(
    tmp_path: Path, at_once: bool, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the exchange of Linux and without it; what a kill leaves is cleared up by the next one who is alone in."""
    final = tmp_path / "adapter"
    final.mkdir()
    (final / "weights").write_text("old")
    staged = tmp_path / f".model.{'0' * 8}.partial" / "adapter"
    staged.mkdir(parents=True)
    (staged / "weights").write_text("new")
    calls, seen = 0, []

    def counted(function: Any) -> Any:
        def wrapper(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call + 1:
                raise Stopped
            found = function(*arguments)
            seen.append(final.exists())
            return found

        return wrapper

    with monkeypatch.context() as patch:
        if not at_once:
            patch.setattr(files, "_exchange", lambda first, second: False)
        patch.setattr(files, "_exchange", counted(files._exchange))
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(files, "fsync_folder", lambda folder: None)
        try:
            put_in_place(staged, final)
        except Stopped:
            pass
    assert not at_once or all(seen), "with the exchange it is there all the time"
    with alone_in(tmp_path):
        assert (final / "weights").read_text() == ("old" if call == 0 or (not at_once and call < 3) else "new")
        assert {path.name for path in tmp_path.iterdir()} == {"adapter", ".lock"}


def test_what_is_left_half_written_is_cleared_up(tmp_path: Path) -> None:
    (tmp_path / f".{MANIFEST}.{'1' * 8}.partial").touch()
    (tmp_path / f".adapter.{'2' * 8}.replaced").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / ".mine.partial").touch()
    with alone_in(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"adapter", ".lock", ".mine.partial"}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut keeps only what was fsynced: the content first, and then the name."""
    path, done = tmp_path / "facts.json", list[tuple[str, int, int]]()
    path.write_text("old")
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        state = os.fstat(handle)
        done.append(("fsync", state.st_ino, state.st_size if state.st_ino != tmp_path.stat().st_ino else 0))
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        assert target == path and path.read_text() == "old"
        done.append(("replace", source.stat().st_ino, source.stat().st_size))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_path(path) as partial:
        partial.write_text("longer than the old one")
    file = path.stat()
    assert done == [
        ("fsync", file.st_ino, file.st_size),
        ("replace", file.st_ino, file.st_size),
        ("fsync", tmp_path.stat().st_ino, 0),
    ]
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "longer than the old one" and os.listdir(tmp_path) == ["facts.json"]
