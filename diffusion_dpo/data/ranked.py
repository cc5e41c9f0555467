"""Images of a prompt in an order of rank, as in ImageRewardDB (Xu et al., arXiv 2304.05977): pairs of them."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.holding import Holding
from diffusion_dpo.data.records import RecordData, read_records
from diffusion_dpo.data.rows import is_number, make_pair, prompt_fault

_IMAGES = ("image", "image_path")
_RATINGS = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")
_ALONE = "the only image of its prompt"
_EQUAL = "equal ranks"

Row = tuple[str, dict[str, Any]]
"""Where it is, and what is in it."""


class RankedData(RecordData):
    """Rows with `prompt`, `rank` (1: the best) and `image` (bytes or a file name) or `image_path`, in JSON or Parquet.

    Rows are compared that share their prompt and, where there is one, their `prompt_id`. Equal ranks make no pair;
    the margin is the difference of the ranks. The ratings of ImageRewardDB are kept as scores.
    """

    noun: ClassVar[str] = "ranked images"

    pairs: Literal["all", "best_worst", "adjacent"] = "all"
    """all: every two images of a prompt. best_worst: one pair a prompt; of equals, the first rows. adjacent: images
    with the next rank only."""

    @classmethod
    def recognise(cls, found: Holding) -> dict[str, Any] | None:
        """See PairSource."""
        return {} if found.columns >= {"prompt", "rank"} and found.columns & set(_IMAGES) else None

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield the pairs of a prompt when its last row has come, or why there are none."""
        sizes = Counter(_group(entry) for _, entry in self._rows() if isinstance(entry, dict))
        held: dict[str, list[Row]] = defaultdict(list)
        for where, entry in self._rows(_IMAGES):
            if isinstance(entry, str):
                yield Dropped(where, entry)
                continue
            group = _group(entry)
            held[group].append((where, entry))
            if len(held[group]) == sizes[group]:
                yield from self._compare(held.pop(group))

    def num_rows(self) -> int:
        """Return the number of pairs and dropped rows, without looking at images."""
        broken, ranks = 0, defaultdict(list)
        for _, entry in self._rows():
            if isinstance(entry, str):
                broken += 1
            else:
                ranks[_group(entry)].append(entry["rank"])
        return broken + sum(len(pick_by_rank(group, self.pairs)) or 1 for group in ranks.values())

    def stamp(self) -> str:
        """Return the state of the rows and of every file that they name."""
        return self.stamp_of_files(_IMAGES)

    def _rows(self, images: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """Yield every row, or why it cannot be ranked; with its images only where they are asked for."""
        for where, entry in read_records(self.path, ("prompt", "rank"), ("prompt_id", *_RATINGS, *images)):
            yield where, entry if isinstance(entry, str) else _fault(entry) or entry

    def _compare(self, rows: Sequence[Row]) -> Iterator[PreferencePair | Dropped]:
        picks = pick_by_rank([entry["rank"] for _, entry in rows], self.pairs)
        if not picks:
            yield Dropped(rows[0][0], _ALONE if len(rows) == 1 else _EQUAL, broken=False)
        for better, worse in picks:
            yield self._pair(rows[better], rows[worse])

    def _pair(self, better: Row, worse: Row) -> PreferencePair | Dropped:
        where = f"{better[0]} and {worse[0]}"
        margin = worse[1]["rank"] - better[1]["rank"]
        if margin == 0:
            return Dropped(where, _EQUAL, broken=False)
        images: list[Any] = []
        for _, entry in (better, worse):
            found = self.images(entry, [next((key for key in _IMAGES if entry.get(key) is not None), "image")])
            if isinstance(found, str):
                return Dropped(where, found)
            images += found
        pair = make_pair(where, better[1]["prompt"], *images, source="ranked")
        if isinstance(pair, Dropped):
            return pair
        chosen_scores, rejected_scores = (
            {k: row[1][k] for k in _RATINGS if is_number(row[1].get(k))} for row in (better, worse)
        )
        return replace(pair, margin=float(margin), chosen_scores=chosen_scores, rejected_scores=rejected_scores)


def pick_by_rank(ranks: Sequence[float], pairs: str) -> list[tuple[int, int]]:
    """Return the positions (better, worse) of the images to compare; where ranks are equal, in their order.

    What is asked for two of equal rank is among them, so that it can be counted.
    """
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])  # stable: equals stay in the order of their rows
    if len(ranks) < 2:
        return []
    if pairs == "best_worst":
        worst = ranks[order[-1]]
        last = next(i for i in order[1:] if ranks[i] == worst)
        return [(order[0], last)]
    every = itertools.combinations(order, 2)
    if pairs == "all":
        return list(every)
    levels = {rank: level for level, rank in enumerate(sorted(set(ranks)))}
    return [(i, j) for i, j in every if levels[ranks[j]] - levels[ranks[i]] == 1]


def _group(entry: dict[str, Any]) -> str:
    """What the rows of one prompt have in common."""
    return f"{entry.get('prompt_id')}\n{entry['prompt']}"


def _fault(entry: dict[str, Any]) -> str:
    return prompt_fault(entry["prompt"]) or ("" if is_number(entry["rank"]) else "the rank is not a number")
