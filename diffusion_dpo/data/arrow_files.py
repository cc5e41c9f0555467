"""Rows out of Arrow files, as `datasets.save_to_disk` writes them, mapped into memory and read a few at a time."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from diffusion_dpo.config import ConfigError

_STATE = "state.json"


def is_arrow(file: Path) -> bool:
    """Whether a file is named as an Arrow file is."""
    return file.suffix.lower() in (".arrow", ".feather")


def belongs(file: Path) -> bool:
    """Whether an Arrow file is part of the data set that it lies in: `datasets` leaves caches beside them."""
    state = file.parent / _STATE
    try:
        names = [it["filename"] for it in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError):  # not of save_to_disk
        return not file.name.startswith(("cache-", "tmp"))
    return file.name in names


def num_rows(file: Path, lists: Sequence[str] = ()) -> int:
    """Return the number of rows of an Arrow file, see `shards.num_rows`; raises ConfigError when it cannot be read."""
    total, counts = 0, dict.fromkeys(lists, 0)
    for batch in _batches(file):
        total += batch.num_rows
        for name in counts:
            if name in batch.schema.names and _is_list(batch.schema.field(name).type):
                counts[name] += pc.sum(pc.max_element_wise(pc.list_value_length(batch.column(name)), 1)).as_py() or 0
    return max([total, *counts.values()])


def column_names(file: Path) -> list[str]:
    """Return the columns of an Arrow file; raises ConfigError when it cannot be read."""
    try:
        with _open(file) as reader:
            return list(reader.schema.names)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def row_batches(file: Path, columns: Sequence[str] | None, size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows, `size` of them at most at a time; raises ConfigError when the file is damaged."""
    for batch in _batches(file):
        wanted = batch if columns is None else batch.select(list(columns))
        for start in range(0, wanted.num_rows, size):
            try:
                yield wanted.slice(start, size).to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise _damaged(file, error) from error


def _is_list(kind: pa.DataType) -> bool:
    kinds = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in kinds)


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    try:
        with _open(file) as reader:
            if isinstance(reader, pa.RecordBatchFileReader):
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                yield from reader
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _open(file: Path) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    """Open either of the two forms of Arrow's IPC: `datasets` writes streams, most other programs files."""
    source = pa.memory_map(str(file))
    return pa.ipc.open_file(source) if source.read(6) == b"ARROW1" else _stream(source)


def _stream(source: pa.NativeFile) -> pa.RecordBatchStreamReader:
    source.seek(0)
    return pa.ipc.open_stream(source)


def _damaged(file: Path, error: Exception) -> ConfigError:
    if file.is_file() and file.stat().st_size == 0:
        return ConfigError(f"{file} is empty, not an Arrow file; remove it or write it again")
    return ConfigError(
        f"cannot read {file} as Arrow: {' '.join(str(error).split())[:200]}; write or download it again"
    )
