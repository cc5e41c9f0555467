"""Rows of any table to pairs, by its columns: a better and a worse image, or two and what says which is better."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.counts import num_votes_of, share_of_counts, share_of_shares
from diffusion_dpo.data.holding import ROWS
from diffusion_dpo.data.images import BrokenImage, Unusable, image_bytes
from diffusion_dpo.data.inside import read_inside
from diffusion_dpo.data.labels import Labels, Meaning
from diffusion_dpo.data.layout import Pair, identity_columns
from diffusion_dpo.data.rows import Ties, each_of, make_labelled_pair, make_pair, number, origin_of

_LONGEST_NAME = 4096
"""A longer text is an image itself."""
SCORE = "score"
"""The name under which a score column's values are kept."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns; `decides` says what tells which image is better."""

    prompt: str
    images: Pair
    decides: str
    """`order`: the first always is; or `label`, `votes`, `shares`, `scores`."""
    label: str | None = None
    meaning: Meaning = "probability"
    votes: Pair | None = None
    shares: Pair | None = None
    votes_behind: str | None = None
    num_votes: int = 10
    scores: Pair | None = None
    models: Pair | None = None

    @property
    def required(self) -> list[str]:
        """The columns without which nothing can be read."""
        by = {"label": (self.label,), "votes": self.votes, "shares": self.shares, "scores": self.scores}
        more = [*(by.get(self.decides) or ()), *(self.models or ()), *(self.scores or ())]
        wanted = [self.prompt, *self.images, *more, *([self.votes_behind] if self.votes_behind else [])]
        return list(dict.fromkeys(name for name in wanted if name is not None))

    def names(self, present: Collection[str]) -> tuple[Pair, ...]:
        """Return the columns with what a row calls its two images, which a label may repeat."""
        return _names(frozenset(present), self.images) if self.decides == "label" else ()


@lru_cache(maxsize=64)
def _names(present: frozenset[str], images: Pair) -> tuple[Pair, ...]:
    return tuple(identity_columns(present, images))


def is_text(file: Path) -> bool:
    """Whether a file holds rows as JSON or CSV, whose images are files beside it."""
    return file.suffix.lower() in ROWS


def _read_text(file: Path, keys: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield where it is, and the row, or why it is none that has the keys, of every row of a file of text."""
    from diffusion_dpo.data import records

    for where, row in records.read_file(file):
        missing = [key for key in keys if key not in row] if isinstance(row, dict) else []
        yield where, f"no {missing[0]!r}" if missing else row


def count_rows(file: Path, columns: Columns) -> int:
    """Return the number of pairs and dropped rows that a file yields, without looking at images."""
    from diffusion_dpo.data import shards

    if not is_text(file):
        return shards.num_rows(file, columns.images if columns.decides == "order" else ())
    rows = (row for _, row in _read_text(file, columns.required))
    if columns.decides != "order":
        return sum(1 for _ in rows)
    return sum(len(list(each_of("", *map(row.get, columns.images)))) if isinstance(row, dict) else 1 for row in rows)


def named_files(file: Path, columns: Columns) -> Iterator[Path]:
    """Yield the image files that the rows of a file name, whatever they are."""
    if is_text(file):
        rows = (row for _, row in _read_text(file, ()) if isinstance(row, dict))
        values = (row.get(name) for row in rows for name in columns.images)
        for value in values:
            names = value if isinstance(value, list) else [value]
            yield from (file.parent / name for name in names if isinstance(name, str) and len(name) < _LONGEST_NAME)


def read_labels_of(file: Path, columns: Columns) -> Iterator[tuple[Any, list[tuple[Any, Any]]]]:
    """Yield every label of a file, and what its row calls the two images; no image is read."""
    from diffusion_dpo.data import shards

    assert columns.label is not None
    if is_text(file):
        for _, row in _read_text(file, [columns.label]):
            if isinstance(row, dict):
                yield row[columns.label], [(row[first], row[second]) for first, second in columns.names(row)]
        return
    names = columns.names(shards.column_names(file))
    values, *others = shards.read_columns(file, [columns.label, *(name for pair in names for name in pair)])
    for index, value in enumerate(values):
        yield value, [(others[2 * i][index], others[2 * i + 1][index]) for i in range(len(names))]


def read_table(
    file: Path, columns: Columns, labels: Labels | None, *, ties: Ties, source: str
) -> Iterator[PreferencePair | Dropped]:
    """Yield the rows of a file as pairs; a row with a list of better or worse images once for each."""
    for where, row in _rows(file, columns):
        if isinstance(row, str):
            yield Dropped(where, row)
        elif columns.decides == "order":
            for place, chosen, rejected in each_of(where, *(row[name] for name in columns.images)):
                pair = make_pair(place, row[columns.prompt], chosen, rejected, source=source)
                yield pair if isinstance(pair, Dropped) else _with_facts(pair, row, columns, flipped=False)
        else:
            yield _labelled(where, row, columns, labels, ties=ties, source=source)


def _labelled(
    where: str, row: dict[str, Any], columns: Columns, labels: Labels | None, *, ties: Ties, source: str
) -> PreferencePair | Dropped:
    share = _probability(row, columns, labels)
    first, second = (row[name] for name in columns.images)
    pair = make_labelled_pair(where, row[columns.prompt], (first, second), share, ties=ties, source=source)
    if isinstance(pair, Dropped):
        return pair
    return _with_facts(pair, row, columns, flipped=pair.chosen_origin["position"] == 1)


def _probability(row: dict[str, Any], columns: Columns, labels: Labels | None) -> float | Unusable:
    """Return the probability that the first image of a row is better, or why it is not known."""
    if columns.decides == "label":
        assert labels is not None and columns.label is not None
        names = [(row[first], row[second]) for first, second in columns.names(row)]
        return labels.probability(row[columns.label], names)
    if columns.decides == "votes":
        assert columns.votes is not None
        return share_of_counts(*(row[name] for name in columns.votes))
    if columns.decides == "shares":
        assert columns.shares is not None
        behind = num_votes_of(row[columns.votes_behind]) if columns.votes_behind else None
        first, second = (row[name] for name in columns.shares)
        return share_of_shares(first, second, behind or columns.num_votes)
    first, second = _scores(row, columns)
    if first is None or second is None:
        return Unusable("a score is missing or not a number")
    return 0.5 if first == second else float(first > second)


def _scores(row: dict[str, Any], columns: Columns) -> tuple[float | None, float | None]:
    if columns.scores is None:
        return None, None
    return number(row[columns.scores[0]]), number(row[columns.scores[1]])


def _with_facts(pair: PreferencePair, row: dict[str, Any], columns: Columns, *, flipped: bool) -> PreferencePair:
    """Add scores, margin and models; `flipped`: the second image is the better one."""
    order = -1 if flipped else 1
    chosen, rejected = _scores(row, columns)[::order]
    if chosen is not None and rejected is not None:
        margin = chosen - rejected
        pair = replace(
            pair,
            chosen_scores={SCORE: chosen},
            rejected_scores={SCORE: rejected},
            margin=margin if margin > 0 else None,
        )
    if columns.models is not None:
        ours, theirs = [origin_of(row[name]) for name in columns.models][::order]
        pair = replace(pair, chosen_origin=pair.chosen_origin | ours, rejected_origin=pair.rejected_origin | theirs)
    return pair


def _rows(file: Path, columns: Columns) -> Iterator[tuple[str, dict[str, Any] | str]]:
    from diffusion_dpo.data import shards

    if is_text(file):
        for where, row in _read_text(file, columns.required):
            if isinstance(row, str):
                yield where, row
                continue
            images = _images(file.parent, row, columns)
            missing = next((row[name] for name, it in images.items() if isinstance(it, Unusable)), "")
            yield (
                f"{where}: {missing}" if isinstance(missing, str) and 0 < len(missing) < _LONGEST_NAME else where,
                row | images,
            )
        return
    names = [name for pair in columns.names(shards.column_names(file)) for name in pair]
    yield from shards.located_rows(file, list(dict.fromkeys([*columns.required, *names])))


def _images(folder: Path, row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """Read the files that a row of text names, and decode what it holds itself."""
    return {
        name: [_image(folder, it) for it in row[name]] if isinstance(row[name], list) else _image(folder, row[name])
        for name in columns.images
    }


def _image(folder: Path, value: Any) -> Any:
    try:
        return image_bytes(value)
    except BrokenImage:
        found = read_inside(folder, value) if isinstance(value, str) else value
        return Unusable(found) if isinstance(found, str) else found
