"""Each of the best images of a prompt against each of the worst (DP2O-SR, arXiv 2510.18851, found it better than one
pair of extremes).
"""

from collections import Counter

from pydantic import Field

from diffusion_dpo.strategies import Pick, ScoreTable, Strategy, compare, ranked


class TopBottom(Strategy):
    """Each of the top k against each of the bottom k: for eight images a prompt and more."""

    top_k: int = Field(2, ge=1)
    """k; at most half of the images."""
    top_share: float | None = Field(None, gt=0, le=0.5)
    """k as a share of the images instead, at least one; DP2O-SR: a quarter for small models, 1/16 for large ones."""

    def pick(self, table: ScoreTable) -> tuple[list[Pick], Counter[str]]:
        """Return k * k pairs."""
        wanted = self.top_k if self.top_share is None else max(1, int(self.top_share * len(table)))
        k = min(wanted, len(table) // 2)
        order = ranked(table.merits[table.main])
        return compare(table, table.main, ((i, j) for i in order[:k] for j in order[-k:])), Counter()
