"""Preference pairs. Everything that is imported becomes a PreferencePair; everything downstream reads only this."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion_dpo.config import Plugin

if TYPE_CHECKING:
    from diffusion_dpo.data.holding import Holding


@dataclass(frozen=True)
class PreferencePair:
    """One prompt and two encoded images, the first of them preferred.

    `chosen` and `rejected` are encoded image files (PNG, JPEG, ...), never paths; of an image that was judged by
    itself (liked: chosen, disliked: rejected) the other side is empty. `label_prob` is the probability in [0.5, 1]
    that chosen is the better one; 0.5 is a tie. Ids are stable: they come from the content, never from a position in a
    file.
    """

    pair_id: str
    prompt: str
    chosen: bytes
    rejected: bytes
    label_prob: float = 1.0
    chosen_uid: str = ""
    rejected_uid: str = ""
    chosen_scores: dict[str, float] = field(default_factory=dict)
    rejected_scores: dict[str, float] = field(default_factory=dict)
    chosen_origin: dict[str, Any] = field(default_factory=dict)
    rejected_origin: dict[str, Any] = field(default_factory=dict)
    """How the images came about, as far as somebody said: `model`, `sampler`, `guidance_scale`, `position`, ..."""
    margin: float | None = None
    """By how much chosen is better, in the unit of what decided."""
    margin_norm: float | None = None
    """The same in units of the spread that such margins have within a prompt."""
    strategy: str = ""
    source: str = ""
    where: str = field(default="", compare=False)
    """File and row that it was read from, for messages."""
    mask: bytes = b""
    """An encoded image of the same size, white where errors count; empty: everywhere."""


@dataclass(frozen=True)
class Dropped:
    """A row that did not become a pair: where it is (file and row, for the user to find) and why, in a few words."""

    where: str
    reason: str
    broken: bool = True
    """False for rows that are fine but not wanted (ties); only broken rows count towards the fatal share."""


class PairSource(Plugin):
    """A data set of preference pairs (`data.type`)."""

    noun: ClassVar[str] = "preference pairs"
    """What a path holds that this reads, in words."""

    @classmethod
    def recognise(cls, found: "Holding") -> dict[str, Any] | None:
        """Return the settings beside `path` that read what was found; None when it is not of this kind.

        No row is read for it: names and columns decide. `path` may be among the settings where it is another one.
        """
        return None

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every row once, in a stable order, as a pair or with the reason why it is none.

        A row that cannot be used never raises; a source that cannot be read at all (no such file, missing columns)
        raises ConfigError.
        """
        raise NotImplementedError

    def num_rows(self) -> int:
        """Return how many rows `read` yields, for the progress bar; override it where counting is cheaper."""
        return sum(1 for _ in self.read())

    def stamp(self) -> str | None:
        """Return a text that changes whenever what `read` yields does, without reading the images: see `stamps.py`.

        None: not known. Then every start looks at all of the data again.
        """
        return None

    def left_out(self) -> list[str]:
        """Return what of the path `read` passes over, a line each: rows of other splits, files that are not read."""
        return []

    def labelled_by(self) -> tuple[str, ...]:
        """Return the metrics that decided which image is chosen; () when people did, or when it is not known."""
        return ()

    @property
    def lineage(self) -> frozenset[str]:
        """What judges may have learnt from as well, `data: NAME`, as in Scorer; () when it is not known."""
        return frozenset()
