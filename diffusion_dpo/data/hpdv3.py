"""Rows as in HPDv3 (Ma et al., arXiv 2508.03789): a prompt and the paths of two images, of which the first won."""

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from typing import Any, ClassVar

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.records import Record, RecordData
from diffusion_dpo.data.rows import is_number, make_pair, origin_of

_IMAGES = ("path1", "path2")
_OPTIONAL = ("confidence", "model1", "model2")


class HPDv3Data(RecordData):
    """Rows with `prompt`, `path1` (preferred) and `path2`, in JSON or Parquet.

    Where there are `model1`, `model2` and `confidence`, they are kept as the images' origin. The winner always comes
    first, so its place says nothing of how people saw the two, and no `position` is kept.
    """

    noun: ClassVar[str] = "pairs in the columns of HPDv3"
    keys = ("prompt", *_IMAGES)
    image_keys = _IMAGES
    numbers = ("confidence",)

    soft_labels: bool = False
    """Take `confidence`, from 0.5 to 1, as the probability that the first image is better. Off, because nobody said
    that HPDv3's own is one, and it is null in parts of the data."""

    @property
    def lineage(self) -> frozenset[str]:
        """See PairSource; its prompts are in part those of HPD v2 (arXiv 2508.03789, section 3)."""
        return frozenset({"data: HPD"})

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every row."""
        for record in self.records(_OPTIONAL):
            yield Dropped(record.where, record.fault) if record.fault else self._read_row(record)

    def _read_row(self, record: Record) -> PreferencePair | Dropped:
        where, entry = record.where, record.values
        confidence: Any = entry.get("confidence")
        confidence = float(confidence) if isinstance(confidence, Decimal) else confidence
        if confidence is not None and not is_number(confidence):
            return Dropped(where, "the confidence is not a number")
        if self.soft_labels and (confidence is None or not 0.5 <= confidence <= 1):
            return Dropped(where, "no confidence" if confidence is None else "the confidence is not between 0.5 and 1")
        images = self.images(record, _IMAGES)
        if isinstance(images, Dropped):
            return images
        label_prob = float(confidence) if self.soft_labels else 1.0
        pair = make_pair(where, entry["prompt"], *images, source="hpdv3", label_prob=label_prob)
        if isinstance(pair, Dropped):
            return pair
        known = {} if confidence is None else {"confidence": confidence}
        origins = [origin_of(entry.get(name)) | known for name in ("model1", "model2")]
        return replace(pair, chosen_origin=origins[0], rejected_origin=origins[1])
