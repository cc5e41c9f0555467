"""The index of a data set: what is known of its pairs but for their images, in Arrow files that are memory-mapped.

A start that finds an index decodes nothing, and keeps nothing of a pair in memory until it is asked for. `index.json`
says what was indexed and in which state; a folder is written whole or not at all.
"""

import errno
import hashlib
import json
import shutil
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say, warn
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.lazy import LazySequence
from diffusion_dpo.data.prompts import prompt_key
from diffusion_dpo.files import put_in_place, write_json

_VERSION = 1
"""Of these files, and of what a survey drops: another one looks at the data again."""
_FACTS = "index.json"
_ROWS_AT_ONCE = 4096

PAIRS = pa.schema(
    {
        "row": pa.int64(),
        "where": pa.large_string(),
        "pair_id": pa.large_string(),
        "prompt": pa.int32(),
        "label_prob": pa.float64(),
        "chosen_width": pa.int32(),
        "chosen_height": pa.int32(),
        "rejected_width": pa.int32(),
        "rejected_height": pa.int32(),
        "chosen_uid": pa.large_string(),
        "rejected_uid": pa.large_string(),
        "chosen_scores": pa.large_string(),
        "rejected_scores": pa.large_string(),
        "margin": pa.float64(),
        "has_mask": pa.bool_(),
    }
)
"""pairs.arrow, one record batch; `prompt` is a row of prompts.arrow, the scores are JSON objects."""
PROMPTS = pa.schema({"text": pa.large_string(), "key": pa.uint64()})
"""prompts.arrow: every distinct prompt once, in order of appearance; see `prompts.prompt_key`."""
DROPPED = pa.schema({"where": pa.large_string(), "reason": pa.large_string(), "broken": pa.bool_()})
"""dropped.arrow: the rows that did not become pairs, in the order of the source."""
_FILES = {"pairs.arrow": PAIRS, "prompts.arrow": PROMPTS, "dropped.arrow": DROPPED}
SURVEYED = pa.schema([pa.field("prompt", pa.large_string()) if it.name == "prompt" else it for it in PAIRS])
_CONTENT = [name for name in PAIRS.names if name not in ("row", "where")]
"""The columns that decide the fingerprint; the text in place of the prompt's number."""


class DamagedIndex(ValueError):  # noqa: N818 - it names the index's state
    """An index that cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class PairRecord:
    """What is kept of a pair: everything but its images.

    Sizes are (width, height) in px, uids are pixel hashes; (0, 0) and "" for the side that an image judged by itself
    does not have.
    """

    row: int
    """Position among all that the source yields."""
    where: str
    pair_id: str
    prompt: str
    label_prob: float
    chosen_size_px: tuple[int, int]
    rejected_size_px: tuple[int, int]
    chosen_uid: str
    rejected_uid: str
    chosen_scores: dict[str, float]
    rejected_scores: dict[str, float]
    margin: float | None
    has_mask: bool = False

    @property
    def is_pair(self) -> bool:
        """Whether both sides are there."""
        return bool(self.chosen_uid and self.rejected_uid)


@dataclass(frozen=True)
class Collected:
    """The good pairs of a source, in its order, and what was dropped. Iterating reads the source again."""

    source: PairSource
    folder: Path
    facts: dict[str, Any]
    _pairs: pa.RecordBatch
    _prompts: pa.RecordBatch
    _dropped: pa.RecordBatch
    _temporary: "TemporaryDirectory[str] | None" = None
    """Held because `folder` goes with it."""

    def __len__(self) -> int:
        return int(self._pairs.num_rows)

    def __iter__(self) -> Iterator[PreferencePair]:
        """Yield the pairs with their encoded images; raises ConfigError when the data is not what it was."""
        records = iter(self.records)
        record = next(records, None)
        for row, item in enumerate(self.source.read()):
            if record is None:
                return
            if row != record.row:
                continue
            if not isinstance(item, PreferencePair) or item.pair_id != record.pair_id:
                raise ConfigError(f"{record.where} changed while it was being used; start again")
            yield replace(item, chosen_uid=record.chosen_uid, rejected_uid=record.rejected_uid)
            record = next(records, None)
        if record is not None:
            raise ConfigError(f"{record.where} is gone since the data was checked; start again")

    @property
    def records(self) -> Sequence[PairRecord]:
        """What is known of every pair; a record is read from the index each time that it is asked for."""
        columns = {name: self._pairs.column(name) for name in PAIRS.names}
        texts = self._prompts.column("text")

        def record(index: int) -> PairRecord:
            row = {name: column[index].as_py() for name, column in columns.items()}
            return PairRecord(
                prompt=texts[row.pop("prompt")].as_py(),
                chosen_size_px=(row.pop("chosen_width"), row.pop("chosen_height")),
                rejected_size_px=(row.pop("rejected_width"), row.pop("rejected_height")),
                chosen_scores=json.loads(row.pop("chosen_scores")),
                rejected_scores=json.loads(row.pop("rejected_scores")),
                **row,
            )

        return LazySequence(len(self), record)

    @property
    def fingerprint(self) -> str:
        """Hash of the pairs, their images, order, prompts, labels and scores; 32 hex digits."""
        return str(self.facts["fingerprint"])

    @property
    def has_masks(self) -> bool:
        """Whether any pair has a mask."""
        return bool(pc.any(self._pairs.column("has_mask")).as_py())

    @property
    def is_pair(self) -> np.ndarray:
        """Of every pair, whether both sides are there, bool (N,); the others are images judged by themselves."""
        sides = [pc.binary_length(self._pairs.column(f"{side}_uid")).to_numpy() for side in ("chosen", "rejected")]
        return np.asarray(np.minimum(*sides) > 0)

    @property
    def prompt_codes(self) -> np.ndarray:
        """Of every pair, the number of its prompt among `prompts`, int32 (N,), mapped from the file."""
        return np.asarray(self._pairs.column("prompt").to_numpy())

    @property
    def prompts(self) -> Sequence[str]:
        """Every distinct prompt once, in order of appearance."""
        return LazySequence(self._prompts.num_rows, lambda i: str(self._prompts.column("text")[i]))

    @property
    def prompt_keys(self) -> np.ndarray:
        """`prompts.prompt_key` of every one of `prompts`, uint64; equal for those that differ in outer spaces only."""
        return np.asarray(self._prompts.column("key").to_numpy())

    def sizes_px(self, side: str, pairs: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return (width, height) of one side, "chosen" or "rejected", of some pairs or all, int32 (N, 2)."""
        columns = [self._pairs.column(f"{side}_{name}").to_numpy()[pairs] for name in ("width", "height")]
        return np.stack(columns, axis=1)

    @property
    def dropped(self) -> tuple[Dropped, ...]:
        """The rows that did not become pairs, in the order of the source."""
        return tuple(Dropped(**row) for row in self._dropped.to_pylist())

    @property
    def drops(self) -> dict[str, int]:
        """How many rows were dropped, by reason, the commonest first."""
        return dict(Counter(drop.reason for drop in self.dropped).most_common())

    @property
    def broken_share(self) -> float:
        """Share of all rows that are broken, in [0, 1]."""
        dropped = self.dropped
        total = len(self) + len(dropped)
        return sum(drop.broken for drop in dropped) / total if total else 0.0

    def save(self, index_dir: Path) -> None:
        """Put the index where a later `find_index` looks for it, unless that is where it is from.

        A source that cannot name its state would never find it again, and has none saved.
        """
        target = _place(self.source, index_dir)
        if self.folder == target or self.facts["stamp"] is None:
            return
        index_dir.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            shutil.copytree(self.folder, staged)
            try:
                put_in_place(staged, target)
            except OSError as error:  # another run with the same data put its own there: as good as ours
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def pairs_batch(records: Iterable[PairRecord]) -> pa.RecordBatch:
    """Return records as rows for `write_index`, their prompts as text."""
    columns: dict[str, list[Any]] = {name: [] for name in SURVEYED.names}
    for it in records:
        (chosen_width, chosen_height), (rejected_width, rejected_height) = it.chosen_size_px, it.rejected_size_px
        values = (
            *(it.row, _readable(it.where), it.pair_id, it.prompt, it.label_prob),
            *(chosen_width, chosen_height, rejected_width, rejected_height, it.chosen_uid, it.rejected_uid),
            *(json.dumps(scores, sort_keys=True) for scores in (it.chosen_scores, it.rejected_scores)),
            *(it.margin, it.has_mask),
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return pa.RecordBatch.from_pydict(columns, SURVEYED)


def write_index(
    folder: Path, pairs: pa.RecordBatch, dropped: Iterable[Dropped], source: PairSource, stamp: str | None
) -> None:
    """Write the index of pairs (as of `pairs_batch`) into a folder; `stamp` is from before it was read."""
    encoded = pairs.column("prompt").dictionary_encode()
    keys = [prompt_key(text) for text in encoded.dictionary.to_pylist()]
    columns = {name: pairs.column(name) for name in PAIRS.names} | {"prompt": encoded.indices}
    batches = {
        "pairs.arrow": pa.RecordBatch.from_pydict(columns, PAIRS),
        "prompts.arrow": pa.RecordBatch.from_pydict({"text": encoded.dictionary, "key": keys}, PROMPTS),
        "dropped.arrow": pa.RecordBatch.from_pylist(
            [asdict(drop) | {"where": _readable(drop.where)} for drop in dropped], DROPPED
        ),
    }
    for name, batch in batches.items():
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
    facts = {
        "format": _VERSION,
        "source": _settings(source),
        "stamp": stamp,
        "fingerprint": _fingerprint(pairs),
        "num_pairs": pairs.num_rows,
        "crc32": {name: _checksum(folder / name) for name in _FILES},
    }
    write_json(folder / _FACTS, facts)


def open_index(source: PairSource, folder: Path, temporary: "TemporaryDirectory[str] | None" = None) -> Collected:
    """Return what a folder's index says of a source; raises DamagedIndex when it cannot be read as it was written."""
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        for name, checksum in facts["crc32"].items():
            if _checksum(folder / name) != checksum:
                raise DamagedIndex(f"{name} is not as it was written")
        batches = [_read_batch(folder / name, schema) for name, schema in _FILES.items()]
        return Collected(source, folder, facts, batches[0], batches[1], batches[2], temporary)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise DamagedIndex(str(error)) from error


def find_index(source: PairSource, index_dir: Path) -> Collected | None:
    """Return the index of a source in its present state; None, saying why, where there is none that can be used."""
    folder = _place(source, index_dir)
    if not folder.exists() or (stamp := source.stamp()) is None:
        return None
    try:
        found = open_index(source, folder)
    except DamagedIndex as error:
        warn(f"the index of the data in {folder} is damaged ({error}); looking at all of it again")
        return None
    if found.facts["source"] != _settings(source) or found.facts["stamp"] != stamp:
        say("the data changed since it was indexed; looking at all of it again")
        return None
    return found


def _settings(source: PairSource) -> dict[str, Any]:
    return {"class": type(source).__qualname__, **source.model_dump(mode="json")}


def _place(source: PairSource, index_dir: Path) -> Path:
    settings = json.dumps([_VERSION, _settings(source)], sort_keys=True)
    return index_dir / hashlib.sha256(settings.encode()).hexdigest()[:16]


def _readable(where: str) -> str:
    """Return a place as valid Unicode, which the name of a file need not be."""
    return where.encode(errors="replace").decode()


def _read_batch(path: Path, schema: pa.Schema) -> pa.RecordBatch:
    """Map the one record batch of a file; pages are read when they are looked at."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    if batch.schema != schema:
        raise DamagedIndex(f"{path.name} has other columns")
    return batch


def _checksum(path: Path) -> int:
    """Checksum of a file, read through a small buffer: mapped pages would count as the process's memory."""
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _fingerprint(pairs: pa.RecordBatch) -> str:
    digest = hashlib.sha256()
    for start in range(0, pairs.num_rows, _ROWS_AT_ONCE):
        for row in pairs.slice(start, _ROWS_AT_ONCE).select(_CONTENT).to_pylist():
            digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()[:32]
