"""Images of a prompt in an order of rank: pairs of them.

As in ImageRewardDB (Xu et al., arXiv 2304.05977), an image a row, and HPDv2 (Wu et al., arXiv 2306.09341), lists.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, ClassVar, Literal

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.holding import Holding
from diffusion_dpo.data.records import Record, RecordData
from diffusion_dpo.data.rows import is_number, make_pair, prompt_fault

_IMAGES = ("image", "image_path", "images", "image_paths", "file_path", "file_paths")
_PREFERENCE = "human_preference"
"""In place of ranks, as in HPDv2's training data: 1 for the preferred image, 0 for another one."""
_RATINGS = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")
_ALONE = "the only image of its prompt"
_EQUAL = "equal ranks"


class RankedData(RecordData):
    """Rows with `prompt`, `rank` (1: the best) and `image` (bytes or a file name) or `image_path`, in JSON or Parquet.

    Rows are compared that share their prompt and, where there is one, their `prompt_id`. A row may also hold a list of
    ranks, or of `human_preference` (1: preferred), and a list of images, `images`, `image_path` or `file_path`; they
    are compared among themselves. Equal ranks make no pair; the margin is the difference of the ranks. The ratings of
    ImageRewardDB are kept as scores.
    """

    noun: ClassVar[str] = "ranked images"
    keys = ("prompt", "rank")
    image_keys = _IMAGES
    numbers = ("rank", *_RATINGS)

    pairs: Literal["all", "best_worst", "adjacent"] = "all"
    """all: every two images of a prompt. best_worst: one pair a prompt; of equals, the first rows. adjacent: images
    with the next rank only."""

    @classmethod
    def recognise(cls, found: Holding) -> dict[str, Any] | None:
        """See PairSource."""
        return super().recognise(found) if any(found.has(name) for name in _IMAGES) else None

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield the pairs of a prompt when its last row has come, or why there are none."""
        sizes = Counter(_group(record) for record in self._rows() if not _fault(record))
        held: dict[str, list[Record]] = defaultdict(list)
        for record in self._rows(_IMAGES):
            if fault := _fault(record):
                yield Dropped(record.where, fault)
                continue
            group = _group(record)
            held[group].append(record)
            if len(held[group]) == sizes[group]:
                yield from self._compare(held.pop(group))

    def num_rows(self) -> int:
        """Return the number of pairs and dropped rows, without looking at images."""
        broken, ranks = 0, defaultdict(list)
        for record in self._rows():
            if _fault(record):
                broken += 1
            else:
                ranks[_group(record)].append(record.values["rank"])
        return broken + sum(len(pick_by_rank(group, self.pairs)) or 1 for group in ranks.values())

    def _rows(self, images: Sequence[str] = ()) -> Iterator[Record]:
        """Yield every image with its rank, of Parquet with its bytes only where they are asked for."""
        for record in self.records(("prompt_id", _PREFERENCE, *_RATINGS), images=images):
            yield from _each_image(record)

    def _compare(self, rows: Sequence[Record]) -> Iterator[PreferencePair | Dropped]:
        picks = pick_by_rank([row.values["rank"] for row in rows], self.pairs)
        if not picks:
            yield Dropped(rows[0].where, _ALONE if len(rows) == 1 else _EQUAL, broken=False)
        for better, worse in picks:
            yield self._pair(rows[better], rows[worse])

    def _pair(self, better: Record, worse: Record) -> PreferencePair | Dropped:
        where = f"{better.where} and {worse.where}"
        margin = worse.values["rank"] - better.values["rank"]
        if margin == 0:
            return Dropped(where, _EQUAL, broken=False)
        images: list[Any] = []
        for row in (better, worse):
            found = self.images(row, [next((key for key in _IMAGES if row.values.get(key) is not None), "image")])
            if isinstance(found, Dropped):
                return replace(found, where=where)
            images += found
        pair = make_pair(where, better.values["prompt"], *images, source="ranked")
        if isinstance(pair, Dropped):
            return pair
        chosen_scores, rejected_scores = (
            {k: row.values[k] for k in _RATINGS if is_number(row.values.get(k))} for row in (better, worse)
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


def _each_image(record: Record) -> Iterator[Record]:
    """Yield a row whose values are lists once for every image; the smaller rank is the better one."""
    if record.fault:
        yield record
        return
    ranks = record.values["rank"]
    if ranks is record.values.get(_PREFERENCE):
        ranks = [_turned(it) for it in ranks] if isinstance(ranks, list) else _turned(ranks)
    if not isinstance(ranks, list):
        yield replace(record, values=record.values | {"rank": _plain(ranks)})
        return
    key = next((key for key in _IMAGES if isinstance(record.values.get(key), list)), "images")
    images = record.values.get(key, [None] * len(ranks))
    if len(images) != len(ranks):
        yield replace(record, fault="not as many ranks as images")
        return
    group = {"prompt": record.values["prompt"], "prompt_id": f"{record.file} {record.where}"}
    for number, (rank, image) in enumerate(zip(ranks, images, strict=True)):
        yield Record(f"{record.where} image {number}", record.file, group | {"rank": _plain(rank), key: image})


def _plain(rank: Any) -> Any:
    return float(rank) if isinstance(rank, Decimal) else rank


def _turned(preference: Any) -> Any:
    return 1 - preference if is_number(preference) else preference


def _group(record: Record) -> str:
    """What the rows of one prompt have in common."""
    return f"{record.values.get('prompt_id')}\n{record.values['prompt']}"


def _fault(record: Record) -> str:
    """Say why a row cannot be ranked, "" when it can."""
    if record.fault or (fault := prompt_fault(record.values["prompt"])):
        return record.fault or fault
    return "" if is_number(record.values["rank"]) else "the rank is not a number"
