"""The best image of a prompt against the worst: one pair a prompt."""

from collections import Counter

from diffusion_dpo.strategies import Pick, ScoreTable, Strategy, compare, ranked


class BestWorst(Strategy):
    """The best image against the worst: for few images a prompt."""

    def pick(self, table: ScoreTable) -> tuple[list[Pick], Counter[str]]:
        """Return one pair."""
        order = ranked(table.merits[table.main])
        return compare(table, table.main, [(order[0], order[-1])]), Counter()
