"""Rows that name two image files, the better one first: the format for pairs that are made by hand."""

from collections.abc import Iterator
from typing import Any

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.holding import Holding
from diffusion_dpo.data.records import RecordData
from diffusion_dpo.data.rows import make_pair


class FolderData(RecordData):
    """Image files and a metadata.jsonl, one object a line: `prompt`, and the file names `chosen` and `rejected`.

    Or metadata.csv, .tsv, a .json list, .parquet; or the file with the rows itself, whatever its name. A third file
    name, `mask`, is optional: an image of the same size, white where the two are to be compared.
    """

    keys = ("prompt", "chosen", "rejected")
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
            keys = [*self.keys[1:], *(["mask"] if record.values.get("mask") else [])]
            images = self.images(record, keys)
            if isinstance(images, Dropped):
                yield images
                continue
            chosen, rejected, mask = (*images, None)[:3]
            yield make_pair(record.where, record.values["prompt"], chosen, rejected, mask=mask, source="folder")

    def stamp(self) -> str:
        """Return the state of the rows and of every file that they name."""
        return self.stamp_of_files((*self.keys[1:], "mask"))
