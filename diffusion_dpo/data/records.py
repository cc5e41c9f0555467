"""Rows of a JSON list, of JSON lines, CSV or Parquet, whose images are files beside them or bytes inside."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped
from diffusion_dpo.data.columns import respell, spelled_rows
from diffusion_dpo.data.holding import METADATA, ROWS, Holding, look_into, walk
from diffusion_dpo.data.image_kinds import IMAGE_SUFFIXES
from diffusion_dpo.data.inside import MISSING, advise, read_inside
from diffusion_dpo.data.listing import some
from diffusion_dpo.data.splits import ALL, FileData, counted
from diffusion_dpo.data.stamps import stamp_of
from diffusion_dpo.data.tables import read_csv

_PART = 1 << 20
_LONGEST_ITEM = 1 << 26
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """One row: where it is, in which file, and what is in it; or, where it is none, why."""

    where: str
    file: Path
    values: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


class RecordData(FileData):
    """What readers of such rows have in common."""

    keys: ClassVar[tuple[str, ...]]
    """The columns that every row has."""
    image_keys: ClassVar[tuple[str, ...]]
    """The columns that hold images or their names, whether every row has them or not."""
    example: ClassVar[str] = ""
    """One such row, for messages."""
    numbers: ClassVar[tuple[str, ...]] = ()
    """Columns that hold numbers or truth values, which CSV writes as text."""

    path: Path
    """The rows: a .json, .jsonl, .csv, .tsv or .parquet file, or a folder with a metadata file or Parquet."""
    images_dir: Path | None = None
    """The folder that file names are relative to, beside that of the rows, and that links may lead into."""

    @classmethod
    def recognise(cls, found: Holding) -> dict[str, Any] | None:
        """See PairSource."""
        return {} if found.has(*cls.keys) else None

    def every_file(self) -> list[Path]:
        """Return the file, or those of the first table of the folder that has the columns."""
        if not self.path.is_dir():
            return super().every_file()  # the file itself, whatever it is, or a ConfigError
        tables = look_into(self.path).tables
        if not tables:
            such = f"; write one line per row, such as {self.example}" if self.example else ""
            raise ConfigError(f"{self.path} holds neither metadata.jsonl, nor .csv, nor Parquet{such}")
        table = next((table for table in tables if table.has(*self.keys)), tables[0])
        if table.columns and not any(table.has(key) for key in self.keys):
            raise ConfigError(
                f"{table.files[0]} has {', '.join(sorted(table.columns))}, and {', '.join(self.keys)} are needed; "
                "rename them, or give the file with the rows itself"
            )
        return list(table.files)

    def rows_in(self, file: Path) -> int:
        """Return the number of rows of a file, without looking at images."""
        from diffusion_dpo.data import shards

        return super().rows_in(file) if shards.is_table(file) else sum(1 for _ in read_file(file))

    def left_out(self) -> list[str]:
        """See PairSource; of text also the images beside it that no row names, and other files with rows."""
        from diffusion_dpo.data import shards

        lines = super().left_out()
        if not self.path.is_dir() or any(shards.is_table(file) for file in self.files()):
            return lines
        every = self.model_copy(update={"split": ALL})
        used = {os.path.normpath(str(file).replace("\\", "/")) for file in (*every.files(), *every._named())}
        rest = [file for file in walk(self.path) if os.path.normpath(self.path / file) not in used]
        images = [str(file) for file in rest if file.suffix.lower() in IMAGE_SUFFIXES]
        rows = [str(file) for file in rest if _may_hold_rows(file)]
        lines += [f"{counted(len(images), 'image')} that no row names ({some(images)})"] if images else []
        return lines + ([f"{some(rows)}: {self.files()[0].name} is read"] if rows else [])

    def stamp(self) -> str:
        """Return the state of the rows and of every file that they name."""
        return stamp_of(file for files in (self.files(), self._named()) for file in files)

    def records(self, optional: Sequence[str] = (), *, images: Sequence[str] = ()) -> Iterator[Record]:
        """Yield every row, few of them in memory at a time.

        Of Parquet, only the keys and those of the `optional` ones and `images` that are there are read. Raises
        ConfigError when a file cannot be read at all.
        """
        from diffusion_dpo.data import shards

        wanted = (*self.keys, *optional, *images)
        for file in self.files():
            if shards.is_table(file):
                for where, values in spelled_rows(file, self.keys, [*optional, *images]):
                    yield Record(where, file, values)
                continue
            is_csv = file.suffix.lower() in (".csv", ".tsv")
            for where, row in read_file(file):
                if isinstance(row, str):
                    yield Record(where, file, fault=row)
                    continue
                values = respell(row, wanted)
                if is_csv:
                    values |= {key: _value(values[key]) for key in self.numbers if key in values}
                missing = [key for key in self.keys if key not in values]
                yield Record(where, file, values, f"no {missing[0]!r}" if missing else "")

    def images(self, record: Record, keys: Sequence[str]) -> list[Any] | Dropped:
        """Return the images of a row, the content of a file in place of its name; or why one cannot be read."""
        found = []
        for key in keys:
            value = name = record.values.get(key)
            if isinstance(name, str):
                value = self._read(record.file, name)
                if isinstance(value, str):
                    return Dropped(f"{record.where}: {name}", f"{key}: {advise(value)}")
            found.append(value)
        return found

    def _named(self) -> Iterator[Path]:
        """Every file that the rows may mean by the names in them."""
        for record in self.records(images=self.image_keys):
            values = (record.values.get(key) for key in self.image_keys)
            names = [name for value in values for name in (value if isinstance(value, list) else [value])]
            places = (place for name in names if isinstance(name, str) for place in self._places(record.file, name))
            yield from (folder / name for folder, name in places)

    def _places(self, file: Path, name: str) -> list[tuple[Path, str]]:
        """Where a name in a file of rows may be meant: a folder that it may not leave, and the name relative to it."""
        root = self.path if self.path.is_dir() else self.path.parent
        inside = file.parent.relative_to(root).as_posix()
        given = [] if self.images_dir is None else [(self.images_dir, name)]
        return [*given, *([] if inside == "." else [(root, f"{inside}/{name}")]), (root, name)]

    def _read(self, file: Path, name: str) -> bytes | str:
        also = [] if self.images_dir is None else [self.images_dir]
        fault = MISSING
        for folder, inside in self._places(file, name):
            found = read_inside(folder, inside, also=also)
            if isinstance(found, bytes):
                return found
            fault = found if fault == MISSING else fault
        return fault


def _may_hold_rows(file: PurePosixPath) -> bool:
    """Whether a file that is not read may hold rows, too: other metadata, and tables with images inside."""
    from diffusion_dpo.data import shards

    return (file.stem == METADATA and file.suffix.lower() in ROWS) or shards.is_table(Path(file))


def read_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield the same as `read_file`, or of Parquet those of the columns that are there."""
    from diffusion_dpo.data import shards

    if shards.is_table(file):
        present = set(shards.column_names(file))
        yield from shards.located_rows(file, [name for name in columns if name in present])
    else:
        yield from read_file(file)


def read_file(file: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield where it is, and the row, or why it is none, of every row of a text file; a list may be of any length."""
    if file.suffix.lower() in (".csv", ".tsv"):
        yield from read_csv(file)
    elif _is_list(file):
        for number, item in enumerate(_read_list(file)):
            yield f"{file.name} item {number}", item if isinstance(item, dict) else "not a JSON object"
    else:
        for number, line in _lines(file):
            yield f"{file.name} line {number}", parse_object(line)


def parse_object(line: bytes) -> dict[str, Any] | str:
    """Return the object of a line of JSON, or why it is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return "not valid JSON"
    return entry if isinstance(entry, dict) else "not a JSON object"


def _value(text: Any) -> Any:
    """Return the number or truth value that a field of CSV spells; an empty one is none, and any other stays text."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text.strip().lower() or "null")
    except ValueError:
        return text


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
