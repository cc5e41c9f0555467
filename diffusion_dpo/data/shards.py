"""Rows in Parquet shards, image bytes inside: what every verb writes, and how any Parquet is read without loading it.

`datasets.load_dataset("parquet", data_files=...)` reads a shard back with its images decoded, because the schema
carries the features of Hugging Face `datasets` in its metadata.
"""

import difflib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import arrow_files, tars
from diffusion_dpo.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image

ROW_GROUP_SIZE = 16
"""Rows that are read or written at once. Image rows are large, and random reads cost a whole row group."""

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """The `datasets` feature of one of our column types."""
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": "float64" if pa.types.is_floating(kind) else str(kind), "_type": "Value"}


def _schema(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    features = {name: _feature(kind) for name, kind in columns.items()}
    return pa.schema(list(columns.items()), metadata={"huggingface": json.dumps({"info": {"features": features}})})


CANDIDATES = _schema(
    {
        "uid": pa.string(),
        "prompt_id": pa.string(),
        "prompt": pa.string(),
        "index": pa.int64(),
        "seed": pa.int64(),
        "image": _IMAGE,
        "references": pa.list_(_IMAGE),
        "origin": pa.string(),
        "settings_hash": pa.string(),
    }
)
"""candidates/<name>/images-*.parquet; `uid` is the pixel hash of the image, `origin` a JSON object on how it came."""

SCORES = _schema(
    {
        "uid": pa.string(),
        "key": pa.string(),
        "metric": pa.string(),
        "value": pa.float64(),
        "reason": pa.string(),
        "fingerprint": pa.string(),
    }
)
"""candidates/<name>/scores-<scorer>-*.parquet; `key` stands for all that was judged (image, prompt, references),
`value` is null or NaN where the image cannot be scored."""

PAIRS = _schema(
    {
        "pair_id": pa.string(),
        "prompt": pa.string(),
        "chosen": _IMAGE,
        "rejected": _IMAGE,
        "chosen_uid": pa.string(),
        "rejected_uid": pa.string(),
        "chosen_scores": pa.string(),
        "rejected_scores": pa.string(),
        "chosen_origin": pa.string(),
        "rejected_origin": pa.string(),
        "margin": pa.float64(),
        "margin_norm": pa.float64(),
        "label_prob": pa.float64(),
        "strategy": pa.string(),
        "seeds": pa.list_(pa.int64()),
        "source": pa.string(),
    }
)
"""pairs/<name>/pairs-*.parquet; the scores and origins are JSON objects."""

PICKAPIC = _schema(
    {
        "are_different": pa.bool_(),
        "best_image_uid": pa.string(),
        "caption": pa.string(),
        "has_label": pa.bool_(),
        "image_0_uid": pa.string(),
        "image_1_uid": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "num_example_per_prompt": pa.int64(),
        "ranking_id": pa.int64(),
    }
)
"""What `export` writes for other trainers: the columns of Pick-a-Pic that can be known, the images as bytes."""


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows with exactly the schema's columns, the whole file or none of it."""
    names = set(schema.names)
    assert all(set(row) == names for row in rows), f"rows of {path.name} must have the columns {sorted(names)}"
    groups = [list(rows[start : start + ROW_GROUP_SIZE]) for start in range(0, len(rows), ROW_GROUP_SIZE)]
    # PNG and JPEG do not compress further, and dictionaries of images only cost memory.
    options = {"compression": "none", "use_dictionary": False}
    with atomic_path(path) as partial, pq.ParquetWriter(partial, schema, **options) as writer:
        for group in groups:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def read_rows(path: Path, columns: Sequence[str] | None = None, pattern: str = "") -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, or of all matching files of a folder (`parquet_files`), in order of file name.

    Only a few rows are in memory at a time. Raises ConfigError when there is no such file, when a file is damaged, and
    when it lacks one of the columns.
    """
    for file in parquet_files(path, pattern):
        for _, row in located_rows(file, columns):
            yield row


def located_rows(file: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(where, row)` for the rows of one file, Parquet, Arrow or tar; a few are in memory at a time.

    `where` is for the user to find it: `a.parquet row 3`, from 0. Raises ConfigError as `read_rows` does.
    """
    if columns is not None or tars.is_tar(file):
        present = column_names(file)
        _require(file, columns or (), present)
    if tars.is_tar(file):
        yield from tars.located_rows(file, present if columns is None else columns)
        return
    batches = arrow_files.row_batches if arrow_files.is_arrow(file) else _row_batches
    index = 0
    for rows in batches(file, columns, ROW_GROUP_SIZE):
        for row in rows:
            yield f"{file.name} row {index}", row
            index += 1


def _row_batches(file: Path, columns: Sequence[str] | None, size: int) -> Iterator[list[dict[str, Any]]]:
    with _open(file) as parquet:
        batches = parquet.iter_batches(size, columns=columns, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
                rows = batch.to_pylist() if batch is not None else []
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise _damaged(file, error) from error
            if not rows:
                return
            yield rows


def read_columns(file: Path, columns: Sequence[str]) -> list[list[Any]]:
    """Return whole columns of a file without images, each as a list; raises ConfigError as `read_rows` does."""
    if tars.is_tar(file) or arrow_files.is_arrow(file):
        rows = [row for _, row in located_rows(file, columns)]
        return [[row[name] for row in rows] for name in columns]
    with _open(file) as parquet:
        _require(file, columns, parquet.schema_arrow.names)
        try:
            table = parquet.read(columns=list(columns), use_threads=False)
            return [table.column(name).to_pylist() for name in columns]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(file, error) from error


def is_table(file: Path) -> bool:
    """Whether a file is named as one that holds rows, and is not a cache of `datasets`."""
    if arrow_files.is_arrow(file):
        return arrow_files.belongs(file)
    return tars.is_tar(file) or file.suffix == ".parquet"


def tables_by_kind(files: Iterable[Path]) -> list[list[Path]]:
    """Return those of the files that hold rows, tar files, Parquet and Arrow apart, in this order; [] without any."""
    tables = [file for file in files if is_table(file)]
    kinds = (tars.is_tar, lambda file: file.suffix == ".parquet", arrow_files.is_arrow)
    return [some for kind in kinds if (some := [file for file in tables if kind(file)])]


def parquet_files(path: Path, pattern: str = "") -> list[Path]:
    """Return `path` itself, or the files with rows below it, sorted; hidden files and folders are passed over.

    Without a pattern that is the first of these kinds that is there: tar, Parquet, Arrow. Raises ConfigError when
    there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"there is no file or folder {path}")
    found = [file for file in path.rglob(pattern or "*") if file.is_file()]
    visible = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not pattern:
        visible = next(iter(tables_by_kind(visible)), [])
    if not visible:
        raise ConfigError(f"{path} holds no file {pattern or '*.parquet, *.arrow or *.tar'}")
    return sorted(visible)


def column_names(file: Path) -> list[str]:
    """Return the columns of a file with rows; raises ConfigError when it cannot be read."""
    if tars.is_tar(file):
        return tars.column_names(file)
    if arrow_files.is_arrow(file):
        return arrow_files.column_names(file)
    with _open(file) as parquet:
        return list(parquet.schema_arrow.names)


def num_rows(file: Path, lists: Sequence[str] = ()) -> int:
    """Return the number of rows of a file, without reading images; raises ConfigError when it cannot be read.

    Where one of the columns `lists` holds lists, it is the number of their items, an empty list counting as one.
    """
    if tars.is_tar(file):
        return tars.num_rows(file)
    if arrow_files.is_arrow(file):
        return arrow_files.num_rows(file, lists)
    with _open(file) as parquet:
        facts = parquet.metadata
        groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
        leaves = {facts.schema.column(i).path.split(".")[0]: i for i in range(facts.num_columns)}
        wanted = [leaves[name] for name in lists if name in leaves]
        counts = [sum(group.column(i).num_values for group in groups) for i in wanted]
        return max([int(facts.num_rows), *counts])


def encode_png(image: "Image.Image") -> bytes:
    """Return an image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def image_struct(data: bytes) -> dict[str, bytes | None]:
    """Return encoded image bytes as the value of an image column."""
    return {"bytes": data, "path": None}


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, memory_map=True, pre_buffer=False)  # else a whole row group is read at once
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ConfigError:
    if file.is_file() and file.stat().st_size == 0:
        return ConfigError(f"{file} is empty, not a Parquet file; remove it or write it again")
    return ConfigError(
        f"cannot read {file} as Parquet: {' '.join(str(error).split())[:200]}; write or download it again"
    )


def _require(file: Path, wanted: Sequence[str], present: Sequence[str]) -> None:
    for name in wanted:
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{file} has no column {name!r}.{hint} It has: {', '.join(present) or 'none'}")
