"""Files that are whole or absent, and folders that belong to one run: what every verb writes through."""

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError

MANIFEST = "manifest.json"
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
_REPLACED = re.compile(r"\.(.+)\.[0-9a-f]{8}\.replaced")
_EXCHANGE, _HERE = 2, -100
"""RENAME_EXCHANGE and AT_FDCWD of Linux."""
_HASH = re.compile(r"[0-9a-f]{12,}")
_PLACES = ("path", "data")
"""By which the folders of `score` and `label` went in earlier versions; today by what lies there."""
_LAYOUT = "layout"
"""What of an identity is a number that a verb raises when the rest of its identity, or its files, become others."""
_MAX_SHOWN = 48
"""Characters of a value in a message."""
_PREAMBLE = {MANIFEST, "config.yaml", "environment.json", "cache"}
"""What a verb writes into its folder before it makes anything that is bound to its settings."""


def shown(path: Path) -> str:
    """Return a relative path as it is; of an absolute one, which tells of this machine, its last name."""
    return path.name if path.is_absolute() else str(path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; on success it is fsynced and renamed to `path`, else removed."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def fsync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Make a rename in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put_in_place(staged: Path, final: Path) -> None:
    """Let a folder that was written beside `final` take its place, on the disk for good; one of them is always there.

    Where the system cannot exchange two names at once, a crash between two renames leaves the old folder under another
    name, from which `alone_in` takes it back.
    """
    for folder, _, names in os.walk(staged):
        for name in names:
            fsync_file(Path(folder, name))
        fsync_folder(Path(folder))
    old = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.replaced")
    if not final.exists():
        os.replace(staged, final)
    elif _exchange(staged, final):
        os.replace(staged, old)
    else:
        os.replace(final, old)
        os.replace(staged, final)
    fsync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):  # not Linux
        return False
    return bool(renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0)


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def hashes_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files of a folder, by name; "" for one that is not there."""
    found = {}
    for name in names:
        found[name] = ""
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a folder's manifest, {} when it has none; raises ConfigError when it cannot be read."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a manifest: it holds a {type(data).__name__}")
    return data


def settle(folder: Path, facts: Mapping[str, Any], words: Mapping[str, str]) -> None:
    """Create a folder of a cache and write the `facts` that it is named after; or see that they are still those.

    `words` says what a fact is about. Raises ConfigError, naming what differs, when somebody renamed or copied it.
    """
    facts, path = json.loads(json.dumps(facts)), folder / "facts.json"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None  # missing or damaged: the files know better
    if isinstance(found, dict):
        refuse_others(folder, found, facts, words)
    else:
        write_json(path, facts)


def refuse_others(path: Path, found: Mapping[str, Any], facts: Mapping[str, Any], words: Mapping[str, str]) -> None:
    """Raise ConfigError, naming the first fact that differs, when something was copied or renamed."""
    for name, expected in facts.items():
        if found.get(name) != expected:
            raise ConfigError(
                f"{path} is not what its name says, but of another {words[name]} ({name}: {found.get(name)!r} there, "
                f"{expected!r} here); it was copied or renamed: remove it, or choose another cache_dir"
            )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raise ConfigError when another process of ours is at work in a folder; else keep others out meanwhile.

    What a killed process left half-written is cleared away.
    """
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is working in {folder}; wait for it, or choose another output_dir"
            ) from None
        _clear_up(folder)
        yield


def _clear_up(folder: Path) -> None:
    """Remove what a killed process left half-written; put back the folder that it was replacing."""
    for left in folder.glob(".*"):
        if _PARTIAL.fullmatch(left.name):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        elif found := _REPLACED.fullmatch(left.name):
            if (folder / found[1]).exists():
                shutil.rmtree(left)
            else:
                os.replace(left, folder / found[1])


@contextmanager
def claim(
    folder: Path,
    made_by: str,
    identity: dict[str, Any],
    *,
    facts: Mapping[str, Any] | None = None,
    way_on: str = "choose another output_dir",
) -> Iterator[dict[str, Any]]:
    """Take a folder for one run of a verb: create it, or continue in it if the same identity made it.

    Yields the manifest of the earlier run, {} for a new folder. Raises ConfigError, naming what differs and the
    `way_on`, when the folder belongs to something else, and when another process is at work in it. `identity` is plain
    JSON: the settings that decide the content, and hashes of the inputs, never their place. `facts` stand in the
    manifest from the start, for those who look at a run that is not finished.
    """
    identity = json.loads(json.dumps(identity))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; choose a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # below /proc, say
        raise ConfigError(f"output_dir {folder} cannot be made: {error.strerror}; choose another one") from None
    with alone_in(folder):
        manifest = read_manifest(folder)
        content = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if not manifest and content:
            raise ConfigError(
                f"{folder} already holds {content[0]!r}, which {made_by} did not make; choose another output_dir"
            )
        if manifest and set(content) <= _PREAMBLE and not manifest.get("complete"):
            manifest = {}  # it failed before it made anything, on a wrong setting say: nothing binds it to those
        if not manifest:
            start = {"made_by": made_by, "complete": False, "identity": identity, **(facts or {})}
            write_json(folder / MANIFEST, start)
        elif manifest.get("made_by") != made_by:
            raise ConfigError(
                f"{folder} was made by {manifest.get('made_by')}, not by {made_by}; choose another output_dir"
            )
        else:
            _refuse_changes(folder, manifest.get("identity", {}), identity, way_on)
        yield manifest


def finish(folder: Path, made_by: str, identity: dict[str, Any], **facts: Any) -> None:
    """Write the manifest of a finished folder: what made it, from what, counts, drops by reason."""
    write_json(folder / MANIFEST, {"made_by": made_by, "complete": True, "identity": identity, **facts})


def _refuse_changes(folder: Path, before: Any, now: dict[str, Any], way_on: str) -> None:
    known = before if isinstance(before, dict) else {}
    if known.get(_LAYOUT) != now.get(_LAYOUT):
        raise ConfigError(
            f"{folder} was made by another version of diffusion-dpo, which tells runs apart by other facts. Go on "
            f"with it in that version, or {way_on}"
        )
    lines = list(_differences({key: known[key] for key in known if key in now or key not in _PLACES}, now))
    if lines:
        raise ConfigError(
            "\n".join(
                [
                    f"{folder} belongs to another run. Different, then -> now:",
                    *lines,
                    f"Undo the change to go on with it, or {way_on}",
                ]
            )
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a line for every setting that differs; of blocks of different types the type alone."""
    names = {*before, *now}
    if "type" in names and before.get("type") != now.get("type"):
        names = {"type"}
    for name in sorted(names):
        then, today = before.get(name), now.get(name)
        if isinstance(then, dict) and isinstance(today, dict):
            yield from _differences(then, today, f"{prefix}{name}.")
        elif then != today:
            yield f"  {prefix}{name}: {_short(then)} -> {_short(today)}"


def _short(value: Any) -> str:
    if isinstance(value, str) and _HASH.fullmatch(value):
        return value[:8]
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
