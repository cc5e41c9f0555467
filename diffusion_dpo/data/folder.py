"""Rows that name two image files, the better one first: the format for pairs that are made by hand."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.columns import respell
from diffusion_dpo.data.holding import Holding
from diffusion_dpo.data.layout import model_columns
from diffusion_dpo.data.records import Record, RecordData, read_file
from diffusion_dpo.data.rows import each_of, make_pair, origin_of


class FolderData(RecordData):
    """Image files and a metadata.jsonl, one object a line: `prompt`, and the file names `chosen` and `rejected`.

    Or metadata.csv, .tsv, a .json list, .parquet; or the file with the rows itself, whatever its name. Either may be a
    list of names, which makes a pair of each. A third file name, `mask`, is optional: an image of the same size, white
    where the two are to be compared. Columns such as `chosen_model` and `rejected_model` become the images' origin.
    """

    keys = ("prompt", "chosen", "rejected")
    image_keys = ("chosen", "rejected", "mask")
    example = '{"prompt": "a cat", "chosen": "cat_1.png", "rejected": "cat_2.png"}'

    @classmethod
    def recognise(cls, found: Holding) -> dict[str, Any] | None:
        """See PairSource; Parquet is meant to name files only where it is called as the rows of a folder are."""
        names_files = found.table is not None and (found.table.is_text or found.table.is_metadata)
        return super().recognise(found) if names_files else None

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every row."""
        for record in self.records(images=("mask",)):
            if record.fault:
                yield Dropped(record.where, record.fault)
                continue
            for place, chosen, rejected in each_of(record.where, *(record.values[key] for key in self.keys[1:])):
                values = record.values | {"chosen": chosen, "rejected": rejected}
                yield self._pair(replace(record, where=place, values=values))

    def rows_in(self, file: Path) -> int:
        """See FileData; a row with lists of images counts once for each pair."""
        from diffusion_dpo.data import shards

        if shards.is_table(file):
            return super().rows_in(file)
        rows = [respell(row, self.keys) if isinstance(row, dict) else {} for _, row in read_file(file)]
        return sum(1 for row in rows for _ in each_of("", row.get("chosen"), row.get("rejected")))

    def _pair(self, record: Record) -> PreferencePair | Dropped:
        images = self.images(record, [*self.keys[1:], *(["mask"] if record.values.get("mask") else [])])
        if isinstance(images, Dropped):
            return images
        chosen, rejected, mask = (*images, None)[:3]
        pair = make_pair(record.where, record.values["prompt"], chosen, rejected, mask=mask, source="folder")
        models = model_columns(frozenset(record.values))
        if isinstance(pair, Dropped) or models is None:
            return pair
        origins = [origin_of(record.values[name]) for name in models]
        return replace(pair, chosen_origin=origins[0], rejected_origin=origins[1])
