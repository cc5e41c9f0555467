"""The JSON lines of invoke-training's preference data: two image files, a prompt, and which of them is preferred."""

from collections.abc import Iterator
from typing import Any, ClassVar

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.holding import Holding
from diffusion_dpo.data.records import RecordData, read_records
from diffusion_dpo.data.rows import Ties, make_labelled_pair

_IMAGES = ("image_0", "image_1")
_PREFER = ("prefer_0", "prefer_1")


class InvokeData(RecordData):
    """Rows with `image_0`, `image_1` (file names), `prompt`, `prefer_0` and `prefer_1` (true, false; alike: a tie)."""

    noun: ClassVar[str] = "pairs in the columns of invoke-training"

    ties: Ties = "drop"
    """keep trains on ties too, as pairs with label probability 0.5."""

    @classmethod
    def recognise(cls, found: Holding) -> dict[str, Any] | None:
        """See PairSource."""
        return {} if found.columns >= {"prompt", *_IMAGES, *_PREFER} else None

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every row."""
        for where, entry in read_records(self.path, ("prompt", *_IMAGES, *_PREFER)):
            yield Dropped(where, entry) if isinstance(entry, str) else self._read_row(where, entry)

    def stamp(self) -> str:
        """Return the state of the rows and of every file that they name."""
        return self.stamp_of_files(_IMAGES)

    def _read_row(self, where: str, entry: dict[str, Any]) -> PreferencePair | Dropped:
        wrong = next((key for key in _PREFER if not isinstance(entry[key], bool)), None)
        if wrong:
            return Dropped(where, f"{wrong} is neither true nor false")
        first, second = (entry[key] for key in _PREFER)
        images = self.images(entry, _IMAGES)
        if isinstance(images, str):
            return Dropped(where, images)
        label = 0.5 if first == second else float(first)
        return make_labelled_pair(
            where, entry["prompt"], (images[0], images[1]), label, ties=self.ties, source="invoke"
        )
