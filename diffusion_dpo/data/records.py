"""Rows of a JSON list, of JSON lines or of Parquet, whose images are files beside them or bytes inside."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import PairSource
from diffusion_dpo.data.folder import METADATA, check_object, parse_object, read_inside
from diffusion_dpo.data.stamps import stamp_of

_PART = 1 << 20
_LONGEST_ITEM = 1 << 26
_SPACE = re.compile(r"[ \t\r\n]*")


class RecordData(PairSource):
    """What importers of such rows have in common."""

    path: Path
    """The rows: a .json, .jsonl or .parquet file, or a folder with a metadata.jsonl or Parquet files."""
    images_dir: Path | None = None
    """The folder that file names are relative to, and may not leave; null: where the rows are."""

    @property
    def folder(self) -> Path:
        """The folder that images are read from."""
        return self.images_dir or (self.path if self.path.is_dir() else self.path.parent)

    def images(self, entry: dict[str, Any], keys: Sequence[str]) -> list[Any] | str:
        """Return the images of a row, what is in the file in place of its name; or why one cannot be read."""
        found = []
        for key in keys:
            value = entry.get(key)
            if isinstance(value, str):
                value = read_inside(self.folder, value)
                if isinstance(value, str):
                    return f"{key}: {value}"
            found.append(value)
        return found

    def num_rows(self) -> int:
        """Return the number of rows, without looking at images."""
        return sum(_count(file) for file in _files(self.path))

    def stamp_of_files(self, keys: Sequence[str]) -> str:
        """Return the state of the rows and of every file that they name under some keys."""
        named = (
            self.folder / entry[key]
            for _, entry in read_records(self.path, (), keys)
            if isinstance(entry, dict)
            for key in keys
            if isinstance(entry.get(key), str)
        )
        return stamp_of(file for files in (_files(self.path), named) for file in files)


def read_records(
    path: Path, keys: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield where it is, and the row, or why it is none with the `keys`, of every row; few are in memory at a time.

    Of Parquet, only the keys and those of the optional ones that are there are read; lists of JSON may be of any
    length. Raises ConfigError when a file cannot be read at all.
    """
    from diffusion_dpo.data import shards

    for file in _files(path):
        if file.suffix == ".parquet":
            present = shards.column_names(file)
            yield from shards.located_rows(file, [*keys, *(name for name in optional if name in present)])
        elif _is_list(file):
            for number, item in enumerate(_read_list(file)):
                yield f"{file.name} item {number}", check_object(item, keys)
        else:
            for number, line in _lines(file):
                yield f"{file.name} line {number}", parse_object(line, keys)


def _count(file: Path) -> int:
    from diffusion_dpo.data import shards

    if file.suffix == ".parquet":
        return shards.num_rows(file)
    return sum(1 for _ in (_read_list(file) if _is_list(file) else _lines(file)))


def _files(path: Path) -> list[Path]:
    from diffusion_dpo.data import shards

    if not path.is_dir():
        return shards.parquet_files(path)  # the file itself, whatever it is, or a ConfigError
    if (path / METADATA).is_file():
        return [path / METADATA]
    if not any(path.rglob("*.parquet")):
        raise ConfigError(f"{path} holds neither {METADATA} nor Parquet; give the file with the rows itself")
    return shards.parquet_files(path)


def _is_list(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as stream:
        yield from ((number, line) for number, line in enumerate(stream, start=1) if line.strip())


def _read_list(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig", errors="surrogatepass") as stream:
        try:
            yield from _items(stream.read)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{file} is no list of JSON objects: {' '.join(str(error).split())[:120]}; write or download it again"
            ) from error


def _items(read: Callable[[int], str]) -> Iterator[Any]:
    """Yield the items of a JSON list as its text comes in, so that a list of a million is never in memory.

    Raises ValueError or RecursionError where it is none.
    """
    decoder = json.JSONDecoder()
    text, size = read(_PART), _PART
    while text.isspace():
        text = read(_PART)
    start = _space(text, 0)  # of the bracket or comma before an item
    while True:
        try:
            begin = _space(text, start + 1)
            if text[begin] == "]":
                end = begin
                break
            item, end = decoder.raw_decode(text, begin)
            end = _space(text, end)
            if text[end] not in ",]":
                raise ValueError(f"{text[end : end + 20]!r} after an item")
        except (ValueError, IndexError) as error:  # wrong, or not all there yet
            more = read(size) if len(text) - start < _LONGEST_ITEM else ""
            if not more:
                raise ValueError("it ends too early" if isinstance(error, IndexError) else str(error)) from error
            text, start, size = text[start:] + more, 0, 2 * size
            continue
        yield item
        if text[end] == "]":
            break
        start, size = end, _PART
    if (text[end + 1 :] + read(_PART)).strip():
        raise ValueError("there is more after it")


def _space(text: str, start: int) -> int:
    """Return where the blanks that begin at `start` end."""
    match = _SPACE.match(text, start)
    assert match is not None  # it matches nothing, too
    return match.end()
