"""The JSON lines of invoke-training's preference data: two image files, a prompt, and which of them is preferred."""

from collections.abc import Iterator
from typing import ClassVar

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.records import Record, RecordData
from diffusion_dpo.data.rows import Ties, make_labelled_pair

_IMAGES = ("image_0", "image_1")
_PREFER = ("prefer_0", "prefer_1")


class InvokeData(RecordData):
    """Rows with `image_0`, `image_1` (file names), `prompt`, `prefer_0` and `prefer_1` (true, false; alike: a tie)."""

    noun: ClassVar[str] = "pairs in the columns of invoke-training"
    keys = ("prompt", *_IMAGES, *_PREFER)
    image_keys = _IMAGES
    numbers = _PREFER

    ties: Ties = "drop"
    """keep trains on ties too, as pairs with label probability 0.5."""

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every row."""
        for record in self.records():
            yield Dropped(record.where, record.fault) if record.fault else self._read_row(record)

    def _read_row(self, record: Record) -> PreferencePair | Dropped:
        where, entry = record.where, record.values
        wrong = next((key for key in _PREFER if not isinstance(entry[key], bool)), None)
        if wrong:
            return Dropped(where, f"{wrong} is neither true nor false")
        first, second = (entry[key] for key in _PREFER)
        images = self.images(record, _IMAGES)
        if isinstance(images, Dropped):
            return images
        label = 0.5 if first == second else float(first)
        return make_labelled_pair(
            where, entry["prompt"], (images[0], images[1]), label, ties=self.ties, source="invoke"
        )
