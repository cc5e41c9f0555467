"""Images that were judged one by one, liked or not: what Diffusion-KTO learns from, without pairs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.folder import METADATA, count_metadata, named_files, read_inside, read_metadata
from diffusion_dpo.data.holding import Holding
from diffusion_dpo.data.rows import make_labelled_image
from diffusion_dpo.data.stamps import stamp_of

KEYS = ("prompt", "image", "label")
EXAMPLE = '{"prompt": "a cat", "image": "cat_1.png", "label": true}'


class LabelledData(PairSource):
    """Single images with `prompt`, `image` and `label` (true: liked): Parquet, or files with a metadata.jsonl."""

    noun: ClassVar[str] = "labelled images"

    path: Path
    """A Parquet file, a folder of them, or a folder with images and a metadata.jsonl."""

    @classmethod
    def recognise(cls, found: Holding) -> dict[str, Any] | None:
        """See PairSource."""
        return {} if found.columns >= set(KEYS) else None

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every row; the side that is not there is empty."""
        from diffusion_dpo.data import shards

        if (self.path / METADATA).exists():
            for where, entry in read_metadata(self.path, KEYS, EXAMPLE):
                if isinstance(entry, str):
                    yield Dropped(where, entry)
                    continue
                image = read_inside(self.path, entry["image"])
                if isinstance(image, str):
                    yield Dropped(where, f"image: {image}")
                else:
                    yield make_labelled_image(where, entry["prompt"], image, entry["label"], source="labelled")
            return
        for file in shards.parquet_files(self.path):
            for where, row in shards.located_rows(file, KEYS):
                yield make_labelled_image(where, row["prompt"], row["image"], row["label"], source="labelled")

    def num_rows(self) -> int:
        """Return the number of rows, from the files' footers, or of lines that are not blank."""
        from diffusion_dpo.data import shards

        if (self.path / METADATA).exists():
            return count_metadata(self.path, EXAMPLE)
        return sum(shards.num_rows(file) for file in shards.parquet_files(self.path))

    def stamp(self) -> str:
        """Return the state of the files, or of the metadata and every file that it names."""
        from diffusion_dpo.data import shards

        if (self.path / METADATA).exists():
            return stamp_of(named_files(self.path, ("image",), EXAMPLE))
        return stamp_of(shards.parquet_files(self.path))
