"""Images that were judged one by one, liked or not: what Diffusion-KTO learns from, without pairs."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from diffusion_dpo.console import say
from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.columns import spelling
from diffusion_dpo.data.labels import Labels, read_likes
from diffusion_dpo.data.records import RecordData, read_rows
from diffusion_dpo.data.rows import make_labelled_image
from diffusion_dpo.data.stamps import stamp_of

_LABEL = "label"


class LabelledData(RecordData):
    """Single images with `prompt`, `image` and `label`: Parquet, or rows that name image files.

    A label is true and false, 1 and 0, 1 and -1, or a word such as good and bad; all labels decide together which.
    """

    noun: ClassVar[str] = "labelled images"
    keys = ("prompt", "image", _LABEL)
    image_keys = ("image",)
    example = '{"prompt": "a cat", "image": "cat_1.png", "label": true}'

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every row, the side that is not there empty; ConfigError when the labels do not say what is liked."""
        files = tuple(self.files())
        labels = _labels_of(files, stamp_of(files))
        for record in self.records():
            images = self.images(record, ("image",)) if not record.fault else Dropped(record.where, record.fault)
            if isinstance(images, Dropped):
                yield images
                continue
            label = labels.probability(record.values[_LABEL])
            yield make_labelled_image(record.where, record.values["prompt"], images[0], label, source="labelled")


@lru_cache(maxsize=8)
def _labels_of(files: tuple[Path, ...], stamp: str) -> Labels:
    """Read all labels of some files in the state `stamp`, and say once how they are understood."""
    found = read_likes(_LABEL, (label for file in files for label in _read_labels(file)))
    say(f"{_LABEL}: {found.summary}")
    return found


def _read_labels(file: Path) -> Iterator[Any]:
    """Yield every label of a file; no image is read."""
    from diffusion_dpo.data import shards

    names = [name] if shards.is_table(file) and (name := spelling(_LABEL, shards.column_names(file))) else []
    if names or not shards.is_table(file):
        rows = (row for _, row in read_rows(file, names))
        yield from (row[name] for row in rows if isinstance(row, dict) and (name := spelling(_LABEL, row)))
