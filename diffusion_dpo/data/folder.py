"""A folder of image files with a metadata.jsonl: the format for pairs that are made by hand."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.holding import Holding
from diffusion_dpo.data.rows import make_pair
from diffusion_dpo.data.stamps import stamp_of

METADATA = "metadata.jsonl"
EXAMPLE = '{"prompt": "a cat", "chosen": "cat_1.png", "rejected": "cat_2.png"}'
_KEYS = ("prompt", "chosen", "rejected")


class FolderData(PairSource):
    """Image files and a metadata.jsonl, one object a line: `prompt`, and the file names `chosen` and `rejected`.

    A third file name, `mask`, is optional: an image of the same size, white where the two are to be compared.
    """

    path: Path
    """The folder; file names are relative to it and may not leave it."""

    @classmethod
    def recognise(cls, found: Holding) -> dict[str, Any] | None:
        """See PairSource."""
        return {"path": found.root} if found.columns >= set(_KEYS) and found.is_text else None

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every line that is not blank."""
        for where, entry in read_metadata(self.path, _KEYS, EXAMPLE):
            if isinstance(entry, str):
                yield Dropped(where, entry)
                continue
            names = [*_KEYS[1:], *(["mask"] if entry.get("mask") is not None else [])]
            images = {name: read_inside(self.path, entry[name]) for name in names}
            wrong = next((f"{name}: {it}" for name, it in images.items() if isinstance(it, str)), "")
            if wrong:
                yield Dropped(where, wrong)
                continue
            chosen, rejected, mask = images["chosen"], images["rejected"], images.get("mask")
            yield make_pair(where, entry["prompt"], chosen, rejected, mask=mask, source="folder")

    def num_rows(self) -> int:
        """Return the number of lines that are not blank."""
        return count_metadata(self.path, EXAMPLE)

    def stamp(self) -> str:
        """Return the state of the metadata and of every file that it names."""
        return stamp_of(named_files(self.path, (*_KEYS[1:], "mask"), EXAMPLE))


def read_metadata(folder: Path, keys: Sequence[str], example: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield where it is, and the object, or why it is none, of every line of a folder's metadata.jsonl.

    Raises ConfigError, showing `example`, when there is no such file.
    """
    for number, line in _lines(folder, example):
        yield f"{METADATA} line {number}", parse_object(line, keys)


def count_metadata(folder: Path, example: str) -> int:
    """Return how many lines `read_metadata` yields."""
    return sum(1 for _ in _lines(folder, example))


def named_files(folder: Path, keys: Sequence[str], example: str) -> Iterator[Path]:
    """Yield a folder's metadata.jsonl, and the files that its lines name under some keys, whatever they are."""
    yield folder / METADATA
    for _, entry in read_metadata(folder, (), example):
        if isinstance(entry, dict):
            yield from (folder / entry[key] for key in keys if isinstance(entry.get(key), str))


def _lines(folder: Path, example: str) -> Iterator[tuple[int, bytes]]:
    metadata = folder / METADATA
    try:
        with metadata.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except FileNotFoundError:
        raise ConfigError(f"there is no {metadata}; write one line per row, such as {example}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {metadata}: {error.strerror}") from error


def parse_object(line: bytes, keys: Sequence[str]) -> dict[str, Any] | str:
    """Return the object of a line of JSON, or why it is none that has the keys."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return "not valid JSON"
    return check_object(entry, keys)


def check_object(entry: Any, keys: Sequence[str]) -> dict[str, Any] | str:
    """Return what was read of JSON, or why it is no object that has the keys."""
    if not isinstance(entry, dict):
        return "not a JSON object"
    missing = [key for key in keys if key not in entry]
    return f"no {missing[0]!r}" if missing else entry


def read_inside(folder: Path, name: Any) -> bytes | str:
    """Return the bytes of a file inside the folder, or why there are none; links that leave it are not followed."""
    if not isinstance(name, str) or not name or "\0" in name:
        return "not a file name"
    if "://" in name or name.startswith("file:"):
        return "a URL instead of a file name"
    windows = PureWindowsPath(name)
    parts = {*PurePosixPath(name).parts, *windows.parts}
    if name.startswith("/") or windows.drive or windows.root or ".." in parts:
        return "the file name leaves the folder"
    try:
        file = (folder / name).resolve()
        if not file.is_relative_to(folder.resolve()):
            return "the file name leaves the folder"
        return file.read_bytes() if file.is_file() else "no such file"
    except (OSError, RuntimeError, UnicodeEncodeError):  # RuntimeError: a loop of links
        return "the file cannot be read"
