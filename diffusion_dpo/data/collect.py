"""From whatever a PairSource yields to pairs that can be trained on: every image decodes, every pair says one thing.

Pixels and encoded bytes are not kept; a Collected holds light records and reads the source again when it is iterated.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from PIL import Image

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.images import BrokenImage, decode_rgb, middle_square, pixel_hash

_ITEMS_AT_ONCE = 64
_MAX_THREADS = 8
_NAMES_SHOWN = 3

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class PairRecord:
    """What is kept of a pair: everything but its images.

    Sizes are (width, height) in px, uids are pixel hashes; (0, 0) and "" for the side that an image judged by itself
    does not have.
    """

    row: int
    """Position among all that the source yields."""
    where: str
    pair_id: str
    prompt: str
    label_prob: float
    chosen_size_px: tuple[int, int]
    rejected_size_px: tuple[int, int]
    chosen_uid: str
    rejected_uid: str
    chosen_scores: dict[str, float]
    rejected_scores: dict[str, float]
    margin: float | None
    has_mask: bool = False

    @property
    def is_pair(self) -> bool:
        """Whether both sides are there."""
        return bool(self.chosen_uid and self.rejected_uid)


@dataclass(frozen=True)
class Collected:
    """The good pairs of a source, in its order, and what was dropped. Iterating reads the source again."""

    source: PairSource
    records: tuple[PairRecord, ...]
    dropped: tuple[Dropped, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[PreferencePair]:
        """Yield the pairs with their encoded images; raises ConfigError when the data is not what it was."""
        records = iter(self.records)
        record = next(records, None)
        for row, item in enumerate(self.source.read()):
            if record is None:
                return
            if row != record.row:
                continue
            if not isinstance(item, PreferencePair) or item.pair_id != record.pair_id:
                raise ConfigError(f"{record.where} changed while it was being used; start again")
            yield replace(item, chosen_uid=record.chosen_uid, rejected_uid=record.rejected_uid)
            record = next(records, None)
        if record is not None:
            raise ConfigError(f"{record.where} is gone since the data was checked; start again")

    @property
    def drops(self) -> dict[str, int]:
        """How many rows were dropped, by reason, the commonest first."""
        return dict(Counter(drop.reason for drop in self.dropped).most_common())

    @property
    def broken_share(self) -> float:
        """Share of all rows that are broken, in [0, 1]."""
        total = len(self.records) + len(self.dropped)
        return sum(drop.broken for drop in self.dropped) / total if total else 0.0

    @property
    def fingerprint(self) -> str:
        """Hash of the pairs, their order, labels and scores; 32 hex digits."""
        digest = hashlib.sha256()
        for record in self.records:
            scores = (record.chosen_scores, record.rejected_scores)
            line = [record.pair_id, record.label_prob, record.margin, *scores]
            digest.update(json.dumps(line, sort_keys=True).encode())
        return digest.hexdigest()[:32]


def collect(source: PairSource, *, max_broken_share: float) -> Collected:
    """Check every row of a source, say what was dropped and why, and return what is left.

    Raises ConfigError when nothing is left, or when more than `max_broken_share` of the rows are broken.
    """
    found = survey(source)
    total = len(found.records) + len(found.dropped)
    name = f"the data ({source.type or type(source).__name__})"
    if found.broken_share > max_broken_share:
        raise ConfigError(
            f"{found.broken_share:.0%} of the {total} rows of {name} are broken, more than max_broken_share = "
            f"{max_broken_share:g}; mend them, or raise max_broken_share:\n"
            + "\n".join(describe_drops(drop for drop in found.dropped if drop.broken))
        )
    lines = list(describe_drops(found.dropped))
    if not found.records:
        why = f"all {total} rows were dropped:\n" + "\n".join(lines) if total else "it has no rows"
        raise ConfigError(f"no pairs are left of {name}: {why}")
    say(f"{len(found)} pairs of {total} rows of {name}")
    if lines:
        tell = warn if any(drop.broken for drop in found.dropped) else say
        tell("\n".join([f"dropped {len(found.dropped)} rows:", *lines]))
    return found


def survey(source: PairSource) -> Collected:
    """Decode and compare every row of a source, judging nothing: `collect` without messages and limits.

    Dropped are, beside what the source drops itself: images that do not decode, two images with equal pixels, a pair
    that was there before (whichever file format holds it), and pairs that are labelled in both directions.
    """
    kept: dict[tuple[str, ...], PairRecord] = {}
    contradictory: set[tuple[str, ...]] = set()
    dropped: list[Dropped] = []
    with progress("checking pairs", source.num_rows(), "pairs") as advance:
        for checked in in_order(_check, enumerate(source.read())):
            advance()
            if isinstance(checked, Dropped):
                dropped.append(checked)
                continue
            key = (checked.prompt, *sorted((checked.chosen_uid, checked.rejected_uid)))
            before = kept.get(key)
            if key in contradictory or (before is not None and _contradict(before, checked)):
                contradictory.add(key)
                places = [checked.where] if before is None else [before.where, checked.where]
                dropped += [Dropped(where, "labelled in both directions", broken=False) for where in places]
                kept.pop(key, None)
            elif before is not None:
                dropped.append(Dropped(checked.where, "the same pair again", broken=False))
            else:
                kept[key] = checked
    return Collected(source, tuple(kept.values()), tuple(dropped))


def describe_drops(dropped: Iterable[Dropped]) -> Iterator[str]:
    """Yield `  3 x reason (where, where, ...)` for every reason, the commonest first."""
    places = defaultdict(list)
    for drop in dropped:
        places[drop.reason].append(drop.where)
    for reason, where in sorted(places.items(), key=lambda item: -len(item[1])):
        more = ", ..." if len(where) > _NAMES_SHOWN else ""
        yield f"  {len(where)} x {reason} ({', '.join(where[:_NAMES_SHOWN])}{more})"


def _contradict(first: PairRecord, second: PairRecord) -> bool:
    """Whether two records of one pair prefer different images; a tie contradicts nothing."""
    return first.chosen_uid != second.chosen_uid and min(first.label_prob, second.label_prob) > 0.5


def in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield function(item) for every item, in order, a few at a time in threads: decoding images releases the GIL."""
    rest = iter(items)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        while batch := list(islice(rest, _ITEMS_AT_ONCE)):
            yield from pool.map(function, batch)


def _mask_fault(data: bytes, sizes_px: set[tuple[int, int]]) -> str:
    """Say what is wrong with a mask, "" when nothing is."""
    if not data:
        return ""
    try:
        mask = decode_rgb(data)
    except BrokenImage as error:
        return f"mask: {error}"
    if {mask.size} != sizes_px:
        return "mask: not of the size of both images"
    used = mask.convert("F").resize((1, 1), Image.Resampling.BOX, box=middle_square(mask.size))
    return "" if used.getbbox() else "mask: all black in the square that is trained on"


def _check(numbered: tuple[int, PreferencePair | Dropped]) -> PairRecord | Dropped:
    row, item = numbered
    if isinstance(item, Dropped):
        return item
    where = item.where or item.pair_id
    facts = []
    for side, data in (("chosen", item.chosen), ("rejected", item.rejected)):
        if not data:  # an image that was judged by itself
            facts.append(("", (0, 0)))
            continue
        try:
            image = decode_rgb(data)
        except BrokenImage as error:
            return Dropped(where, f"{side}: {error}")
        facts.append((pixel_hash(image), image.size))
    (chosen_uid, chosen_size_px), (rejected_uid, rejected_size_px) = facts
    if chosen_uid == rejected_uid:
        return Dropped(where, "chosen and rejected are the same image")
    fault = _mask_fault(item.mask, {chosen_size_px, rejected_size_px})
    if fault:
        return Dropped(where, fault)
    return PairRecord(
        row=row,
        where=where,
        pair_id=item.pair_id,
        prompt=item.prompt,
        label_prob=item.label_prob,
        chosen_size_px=chosen_size_px,
        rejected_size_px=rejected_size_px,
        chosen_uid=chosen_uid,
        rejected_uid=rejected_uid,
        chosen_scores=item.chosen_scores,
        rejected_scores=item.rejected_scores,
        margin=item.margin,
        has_mask=bool(item.mask),
    )
