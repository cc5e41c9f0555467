"""Rows with the columns of Pick-a-Pic (Kirstain et al., arXiv 2305.01569): two images and a human's choice."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.columns import spelled_rows
from diffusion_dpo.data.holding import Holding
from diffusion_dpo.data.pairs import labelled_by
from diffusion_dpo.data.rows import Ties, make_labelled_pair, number, pair_id
from diffusion_dpo.data.splits import FileData

_REQUIRED = ("prompt", "jpg_0", "jpg_1", "label_0")
_OPTIONAL = ("has_label", "label_1", "model_0", "model_1")


class PickapicData(FileData):
    """Parquet with `jpg_0`, `jpg_1` (encoded images), `label_0` (1: the first is better, 0.5: a tie) and `caption`.

    Where there are `has_label`, `label_1`, `model_0` and `model_1`, they are heeded.
    """

    noun: ClassVar[str] = "pairs in the columns of Pick-a-Pic"

    path: Path
    """A Parquet file, or a folder of them."""
    ties: Ties = "drop"
    """keep trains on ties too, as pairs with label probability 0.5."""

    @classmethod
    def recognise(cls, found: Holding) -> dict[str, Any] | None:
        """See PairSource."""
        return {} if found.has(*_REQUIRED) and not found.is_text else None

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every row; a label between 0 and 1 becomes a soft label."""
        for file in self.files():
            for where, row in spelled_rows(file, _REQUIRED, _OPTIONAL):
                yield self._read_row(where, row)

    def _read_row(self, where: str, row: dict[str, Any]) -> PreferencePair | Dropped:
        if row.get("has_label") is False:
            return Dropped(where, "no label", broken=False)
        label, images = row["label_0"], (row["jpg_0"], row["jpg_1"])
        if "label_1" in row and label is not None and not _complement(label, row["label_1"]):
            return Dropped(where, "label_0 and label_1 do not add up to 1")
        models = (row.get("model_0"), row.get("model_1"))
        return make_labelled_pair(
            where, row["prompt"], images, label, ties=self.ties, source="pickapic", models=models
        )

    def labelled_by(self) -> tuple[str, ...]:
        """Return what a manifest beside the files says, as `export` writes one; () of the original."""
        return labelled_by(self.path)

    @property
    def lineage(self) -> frozenset[str]:
        """See PairSource; of our own pairs in these columns there is none."""
        return frozenset() if self.labelled_by() else frozenset({"data: Pick-a-Pic"})


def pickapic_row(pair: PreferencePair, *, seed: int, soft_labels: bool, num_pairs_of_prompt: int) -> dict[str, Any]:
    """Return a pair as a row of `shards.PICKAPIC`.

    Which side is image 0 is drawn from the seed and the content, never taken from where the image was before: what
    looks at sides must learn nothing. Without `soft_labels` the label is 1 or 0 whatever its probability; a tie is 0.5
    in any case.
    """
    identity = pair_id(pair.prompt, pair.chosen, pair.rejected)
    chosen = hashlib.sha256(f"{seed} {identity}".encode()).digest()[0] & 1
    certain = pair.label_prob if soft_labels or pair.label_prob == 0.5 else 1.0
    row: dict[str, Any] = {
        "are_different": True,
        "best_image_uid": "tie" if pair.label_prob == 0.5 else pair.chosen_uid,
        "caption": pair.prompt,
        "has_label": True,
        "num_example_per_prompt": num_pairs_of_prompt,
        "ranking_id": int(identity[:15], 16),
    }
    sides = (
        (pair.chosen, pair.chosen_uid, pair.chosen_origin),
        (pair.rejected, pair.rejected_uid, pair.rejected_origin),
    )
    for side, label, (image, uid, origin) in zip((chosen, 1 - chosen), (certain, 1 - certain), sides, strict=True):
        model = str(origin.get("model") or "").encode(errors="replace").decode()
        row |= {f"jpg_{side}": image, f"image_{side}_uid": uid, f"label_{side}": label, f"model_{side}": model}
    return row


def _complement(label: Any, other: Any) -> bool:
    first, second = (float(it) if isinstance(it, bool) else number(it) for it in (label, other))
    return first is not None and second is not None and abs(first + second - 1) <= 1e-6
