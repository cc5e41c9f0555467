"""Rows out of WebDataset and img2dataset tar files: the members that share a name up to its first dot are one row.

`000.jpg`, `000.txt` and `000.json` make a row with `image`, `text` and the keys of the JSON object; `000.chosen.png` a
column `chosen`. A tar is walked once, by its headers; images are read when their row's turn comes.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.images import Unusable

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_IMAGES = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl", "jp2")
_TEXTS = ("txt", "text", "caption", "cls")
_PLAIN = {"txt": "text"}
"""What the columns of members without a name of their own are called, where that is not their suffix."""
_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")
_ROWS_FOR_COLUMNS = 16
_LARGEST_TEXT = 1 << 22
"""Bytes of a text or JSON that are read; a larger one is none."""
_TWICE = Unusable("the tar holds it twice")

Place = tuple[int, int]
"""Where a member's bytes begin in the (decompressed) tar, and their number."""


@dataclass(slots=True)
class Sample:
    """The members of one row, by what follows the first dot of their names, in lower case; None for one that is there
    twice.
    """

    key: str
    members: dict[str, Place | None] = field(default_factory=dict)


def is_tar(file: Path) -> bool:
    """Whether a file is named as a tar is."""
    return file.name.lower().endswith(SUFFIXES)


def num_rows(file: Path) -> int:
    """Return the number of rows of a tar; raises ConfigError when it cannot be read."""
    return len(_index(file))


def column_names(file: Path) -> list[str]:
    """Return the columns that the first rows have; raises ConfigError when the tar cannot be read."""
    with _open(file) as tar:
        rows = [_row(tar, sample, ()) for sample in islice(_index(file), _ROWS_FOR_COLUMNS)]
    return sorted({name for row in rows for name in row})


def located_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(where, row)` in the order of the tar; a column that a row has not is None.

    Raises ConfigError when the tar cannot be read.
    """
    with _open(file) as tar:
        for sample in _index(file):
            try:
                row = _row(tar, sample, columns)
            except (OSError, EOFError, tarfile.TarError) as error:
                raise _damaged(file, error) from error
            yield f"{file.name} {sample.key}", {name: row.get(name) for name in columns}


def _index(file: Path) -> tuple[Sample, ...]:
    """The rows of a tar; that of the few files looked at last is kept."""
    state = file.stat()
    return _walk(file, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4)
def _walk(file: Path, size: int, changed_ns: int) -> tuple[Sample, ...]:
    samples: dict[str, Sample] = {}
    try:
        with _open(file) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory
                match = _NAME.fullmatch(member.name.removeprefix("./"))
                hidden = any(part.startswith(".") or part == "__MACOSX" for part in Path(member.name).parts)
                if not member.isreg() or match is None or hidden:
                    continue
                key, name = match.group(1), match.group(2).lower()
                sample = samples.setdefault(key, Sample(key))
                sample.members[name] = None if name in sample.members else (member.offset_data, member.size)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise _damaged(file, error) from error
    return tuple(samples.values())


def _row(tar: tarfile.TarFile, sample: Sample, columns: Sequence[str]) -> dict[str, Any]:
    """Read the texts of a row, and those images that are among the columns; the others are there as None."""
    row: dict[str, Any] = {"__key__": sample.key}
    facts: dict[str, Any] = {}
    for name, place in sample.members.items():
        stem, _, last = name.rpartition(".")
        kind, _, side = last.partition("_")  # jpg_0 holds a JPEG, and the column keeps its name
        column = stem or (last if side else "image" if kind in _IMAGES else _PLAIN.get(kind, kind))
        if kind not in (*_IMAGES, *_TEXTS, "json"):
            continue
        if place is None:
            row[column] = _TWICE
        elif kind in _IMAGES:
            row[column] = _read(tar, place) if column in columns else None
        elif place[1] > _LARGEST_TEXT:
            continue
        elif kind == "json":
            found = _parsed(_read(tar, place))
            facts |= found if isinstance(found, dict) and not stem else {column: found}
        else:
            row[column] = _read(tar, place).decode("utf-8-sig", errors="replace").strip()
    return facts | row


def _read(tar: tarfile.TarFile, place: Place) -> bytes:
    stream: IO[bytes] = tar.fileobj  # type: ignore[assignment]  # of a compressed tar, that of its content
    stream.seek(place[0])
    data = stream.read(place[1])
    if len(data) < place[1]:
        raise EOFError("it ends too early")
    return data


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _open(file: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(file, "r:*")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ConfigError:
    if file.is_file() and os.path.getsize(file) == 0:
        return ConfigError(f"{file} is empty, not a tar file; remove it or write it again")
    return ConfigError(f"cannot read {file} as tar: {' '.join(str(error).split())[:200]}; write or download it again")
