"""Every two images of a prompt, as Curriculum-DPO takes them (arXiv 2405.13637): with `min_margin`, and
`train order=curriculum`, which begins with the widest.
"""

from collections import Counter
from itertools import combinations

from diffusion_dpo.strategies import Pick, ScoreTable, Strategy, compare


class AllPairs(Strategy):
    """Every two images: for rankings and curricula; set min_margin and max_pairs_per_prompt."""

    def pick(self, table: ScoreTable) -> tuple[list[Pick], Counter[str]]:
        """Return N (N - 1) / 2 pairs."""
        return compare(table, table.main, combinations(range(len(table)), 2)), Counter()
