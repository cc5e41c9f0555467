"""Rows with the columns of Pick-a-Pic (Kirstain et al., arXiv 2305.01569): two images and a human's choice."""

from collections.abc import Iterator
from pathlib import Path

from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.rows import Ties, make_labelled_pair


class PickapicData(PairSource):
    """Parquet with `jpg_0`, `jpg_1` (encoded images), `label_0` (1: the first is better, 0.5: a tie) and `caption`."""

    path: Path
    """A Parquet file, or a folder of them."""
    ties: Ties = "drop"
    """keep trains on ties too, as pairs with label probability 0.5."""

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every row; a label between 0 and 1 becomes a soft label."""
        from diffusion_dpo.data import shards

        for file in shards.parquet_files(self.path):
            for where, row in shards.located_rows(file, ("caption", "jpg_0", "jpg_1", "label_0")):
                images = (row["jpg_0"], row["jpg_1"])
                yield make_labelled_pair(
                    where, row["caption"], images, row["label_0"], ties=self.ties, source="pickapic"
                )

    def num_rows(self) -> int:
        """Return the number of rows, from the files' footers."""
        from diffusion_dpo.data import shards

        return sum(shards.num_rows(file) for file in shards.parquet_files(self.path))
