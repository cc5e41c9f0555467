"""Files that are whole or absent, and folders that belong to one run: what every verb writes through."""

import fcntl
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError

MANIFEST = "manifest.json"
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
_PREAMBLE = {MANIFEST, "config.yaml", "environment.json", "cache"}
"""What a verb writes into its folder before it makes anything that is bound to its settings."""


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


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


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
        for left in folder.glob(".*.partial"):
            if _PARTIAL.fullmatch(left.name):  # of a process that was killed
                left.unlink(missing_ok=True)
        yield


@contextmanager
def claim(folder: Path, made_by: str, identity: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Take a folder for one run of a verb: create it, or continue in it if the same identity made it.

    Yields the manifest of the earlier run, {} for a new folder. Raises ConfigError, naming what differs, when the
    folder belongs to something else, and when another process is at work in it. `identity` is plain JSON: the settings
    that decide the content, and fingerprints of the inputs.
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
            write_json(folder / MANIFEST, {"made_by": made_by, "complete": False, "identity": identity})
        elif manifest.get("made_by") != made_by:
            raise ConfigError(
                f"{folder} was made by {manifest.get('made_by')}, not by {made_by}; choose another output_dir"
            )
        else:
            _refuse_changes(folder, manifest.get("identity", {}), identity)
        yield manifest


def finish(folder: Path, made_by: str, identity: dict[str, Any], **facts: Any) -> None:
    """Write the manifest of a finished folder: what made it, from what, counts, drops by reason."""
    write_json(folder / MANIFEST, {"made_by": made_by, "complete": True, "identity": identity, **facts})


def _refuse_changes(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        lines = [f"  {key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed]
        raise ConfigError(
            "\n".join([f"{folder} belongs to another run; choose another output_dir. Different:", *lines])
        )
