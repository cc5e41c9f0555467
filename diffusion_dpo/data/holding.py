"""What lies at a path: names, suffixes, columns and our own manifest, from one walk that opens nothing large."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.columns import spelling
from diffusion_dpo.files import read_manifest

ROWS = (".jsonl", ".json", ".csv", ".tsv")
"""Suffixes of text files that hold rows."""
METADATA = "metadata"
"""The name, without its suffix, of the file with the rows of a folder of images."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MOST_ENTRIES = 200_000
_FIRST_ROWS = 10
_MOST_TABLES = 8
_NOT_ROWS = {"manifest.json", "captions.jsonl", "environment.json", "metrics.jsonl", "dataset_info.json", "state.json"}


@dataclass(frozen=True)
class Table:
    """Files with rows of one kind, and the names of their columns; of text, the keys of the first rows."""

    files: tuple[Path, ...]
    columns: frozenset[str]

    @property
    def is_text(self) -> bool:
        """Whether the rows are JSON or CSV, which name image files, and hold none."""
        return self.files[0].suffix.lower() in ROWS

    @property
    def is_metadata(self) -> bool:
        """Whether the files are called as those of a folder of images are."""
        return self.files[0].stem == METADATA

    def has(self, *keys: str) -> bool:
        """Whether all of these columns are there, under one of their names."""
        return all(spelling(key, self.columns) for key in keys)


@dataclass(frozen=True)
class Holding:
    """What a path holds; nothing is looked at before it is asked for."""

    path: Path
    table: Table | None = None
    """The rows in question; see `views`."""

    @property
    def root(self) -> Path:
        """The folder, or that of the file."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def files(self) -> tuple[PurePosixPath, ...]:
        """The visible files below `root`, relative to it, sorted; of very many, a part."""
        if self.path.is_file():
            return (PurePosixPath(self.path.name),)
        return tuple(sorted(islice(walk(self.path), _MOST_ENTRIES)))

    @cached_property
    def links(self) -> tuple[str, ...]:
        """The names of links to folders in `root`, which are not followed."""
        return tuple(sorted(it.name for it in self.root.iterdir() if it.is_symlink() and it.is_dir()))

    @property
    def columns(self) -> frozenset[str]:
        """The columns of `table`; empty without one."""
        return self.table.columns if self.table else frozenset()

    @property
    def is_text(self) -> bool:
        """Whether the rows in question are JSON or CSV."""
        return self.table is not None and self.table.is_text

    def has(self, *keys: str) -> bool:
        """Whether the rows in question have all of these columns, under one of their names (`columns.spellings`)."""
        return self.table is not None and self.table.has(*keys)

    @cached_property
    def suffixes(self) -> Counter[str]:
        """How many files have each suffix, in lower case; "" for none."""
        return Counter(file.suffix.lower() for file in self.files)

    @cached_property
    def folders(self) -> frozenset[str]:
        """The names of the folders that lie directly in `root` and hold files."""
        return frozenset(file.parts[0] for file in self.files if len(file.parts) > 1)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of a folder that a verb made, {} of any other."""
        return _manifest(self.root) if self.path.is_dir() else {}

    @cached_property
    def manifest_above(self) -> dict[str, Any]:
        """That of the folder that the path lies in."""
        return _manifest(self.path.resolve().parent)

    def paths(self, *suffixes: str) -> tuple[Path, ...]:
        """Return the files with one of these suffixes."""
        return tuple(self.root / file for file in self.files if file.suffix.lower() in suffixes)

    def views(self) -> Iterator["Holding"]:
        """Yield the same once for every table that it holds, the likeliest first, and once without any.

        Raises ConfigError when a Parquet file is damaged.
        """
        for table in (*self.tables, None):
            view = replace(self, table=table)
            view.__dict__["files"] = self.files  # one walk is enough
            yield view

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """What may hold rows: metadata first, then Parquet, then other text files beside the images."""
        return tuple(_tables(self))


def look_into(path: Path) -> Holding:
    """Return what is at a path, to be walked once; raises ConfigError when there is nothing."""
    if not path.exists():
        on_hub = "; of a data set on the hub, say data.type=hub as well" if _HUB_ID.fullmatch(str(path)) else ""
        raise ConfigError(f"there is no file or folder {path}; name one{on_hub}")
    return Holding(path)


def walk(root: Path) -> Iterator[PurePosixPath]:
    """Yield the visible files below a folder, those of upper folders first; links to folders are not followed.

    Raises ConfigError where a folder cannot be listed: what it holds would be missing without a word.
    """
    level = [root]
    while level:
        below: list[Path] = []
        for folder in level:
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                raise ConfigError(f"cannot list {folder}: {error.strerror}") from None
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    below.append(Path(entry.path))
                elif not (entry.is_symlink() and os.path.isdir(entry.path)):
                    yield PurePosixPath(Path(entry.path).relative_to(root).as_posix())
        level = below


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = read_manifest(folder)
    except ConfigError:  # another program's file of this name
        return {}
    return found if isinstance(found.get("made_by"), str) and isinstance(found.get("identity"), dict) else {}


def _tables(found: Holding) -> Iterator[Table]:
    """Yield metadata files, then tar files, Parquet and Arrow, then other text files that hold rows."""
    from diffusion_dpo.data.shards import column_names, tables_by_kind

    text = [file for file in found.paths(*ROWS) if file.name not in _NOT_ROWS]
    named = [file for file in (*text, *found.paths(".parquet")) if file.stem == METADATA]
    beside = [file for file in named if file.parent == found.root]
    for suffix in (*ROWS, ".parquet"):
        files = tuple(file for file in beside or named if file.suffix.lower() == suffix)
        if files:
            columns = column_names(files[0]) if suffix == ".parquet" else _keys(files[0])
            yield Table(files, frozenset(columns))
    rest = (found.root / file for file in found.files if not file.name.startswith("scores-"))
    for some in tables_by_kind(file for file in rest if file.stem != METADATA):
        yield Table(tuple(some), frozenset(column_names(some[0])))
    above = [file for file in text if file.parent == found.root and file not in named][:_MOST_TABLES]
    yield from _alike({file: _keys(file) for file in above})


def _alike(keys: dict[Path, frozenset[str]]) -> Iterator[Table]:
    """Yield text files, those with the same suffix and the same keys as one table."""
    for kind in dict.fromkeys((file.suffix.lower(), found) for file, found in keys.items() if found):
        yield Table(tuple(file for file, found in keys.items() if (file.suffix.lower(), found) == kind), kind[1])


def _keys(file: Path) -> frozenset[str]:
    """Return the keys of the first rows of a text file, empty when it holds none."""
    from diffusion_dpo.data.records import read_file

    try:
        rows = list(islice(read_file(file), _FIRST_ROWS))
    except (ConfigError, OSError):
        return frozenset()
    return frozenset(key for _, row in rows if isinstance(row, dict) for key in row)
