"""From whatever a PairSource yields to pairs that can be trained on: every image decodes, every pair says one thing.

Pixels and encoded bytes are not kept; a Collected is an index on disk and reads the source again when it is iterated.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.images import A_PATH, BrokenImage, decode_rgb, middle_square, pixel_hash
from diffusion_dpo.data.index import Collected, PairRecord, find_index, open_index, pairs_batch, write_index

_ITEMS_AT_ONCE = 64
_ROWS_PER_BATCH = 4096
_MAX_THREADS = 8
_NAMES_SHOWN = 3
_PATHS = "; `save_to_disk` and `push_to_hub` of `datasets` put the files inside, `to_parquet` leaves their paths"
BOTH_DIRECTIONS = "labelled in both directions"
AGAIN = "the same pair again"
SAME_IMAGE = "chosen and rejected are the same image"

T = TypeVar("T")
R = TypeVar("R")
Look = Callable[[int, PreferencePair, tuple[Image.Image | None, Image.Image | None]], None]
"""Gets a pair's row, the pair, and its decoded images, chosen first; None for a side that is not there."""


def collect(
    source: PairSource, *, max_broken_share: float, index_dir: Path | None = None, look: Look | None = None
) -> Collected:
    """Check every row of a source, say what was dropped and why, and return what is left.

    An index of the same data in `index_dir` is taken instead of looking at the data; nothing is written there, which
    is `Collected.save`. `look` is that of `survey`. Raises ConfigError when nothing is left, or when more than
    `max_broken_share` of the rows are broken.
    """
    indexed = find_index(source, index_dir) if index_dir is not None else None
    found = indexed or survey(source, look=look)
    dropped = found.dropped
    total = len(found) + len(dropped)
    name = f"the data ({source.type or type(source).__name__})"
    if found.broken_share > max_broken_share:
        raise ConfigError(
            f"{found.broken_share:.0%} of the {total} rows of {name} are broken, more than max_broken_share = "
            f"{max_broken_share:g}; fix them, or raise max_broken_share:\n"
            + "\n".join(describe_drops(drop for drop in dropped if drop.broken))
        )
    lines = list(describe_drops(dropped))
    if not len(found):
        why = f"all {total} rows were dropped:\n" + "\n".join(lines) if total else "it has no rows"
        raise ConfigError(f"no pairs are left from {name}: {why}")
    for line in source.left_out() if indexed is None else ():
        say(f"left out: {line}")
    say(f"{len(found)} pairs of {total} rows of {name}" + (", as indexed before" if indexed else ""))
    if lines:
        tell = warn if any(drop.broken for drop in dropped) else say
        tell("\n".join([f"dropped {len(dropped)} rows:", *lines]))
    return found


def survey(source: PairSource, *, look: Look | None = None) -> Collected:
    """Decode and compare every row of a source, judging nothing: `collect` without messages, limits and shortcuts.

    `look` is called, in threads, for every pair whose images can be used, while they are decoded.

    Dropped are, beside what the source drops itself: images that do not decode, two images with equal pixels, a pair
    that was there before (whichever file format holds it), and pairs that are labelled in both directions.
    """
    stamp = source.stamp()
    seen = _Seen()
    batches: list[pa.RecordBatch] = [pairs_batch([])]
    waiting: list[PairRecord] = []
    dropped: list[tuple[int, Dropped]] = []
    with progress("checking pairs", source.num_rows(), "pairs") as advance:
        for row, checked in enumerate(in_order(partial(_check, look), enumerate(source.read()))):
            advance()
            fault = checked if isinstance(checked, Dropped) else seen.fault(checked)
            if fault is not None:
                dropped.append((row, fault))
                continue
            assert isinstance(checked, PairRecord)
            waiting.append(checked)
            if len(waiting) == _ROWS_PER_BATCH:
                batches.append(pairs_batch(waiting))
                waiting = []
    pairs = pa.concat_batches([*batches, pairs_batch(waiting)])
    for number in seen.disowned:
        row, where = (pairs.column(name)[number].as_py() for name in ("row", "where"))
        dropped.append((row, Dropped(where, BOTH_DIRECTIONS, broken=False)))
    keep = np.ones(pairs.num_rows, dtype=bool)
    keep[seen.disowned] = False
    temporary = TemporaryDirectory(prefix="diffusion-dpo-")
    in_source_order = [drop for _, drop in sorted(dropped, key=itemgetter(0))]
    write_index(Path(temporary.name), pairs.filter(pa.array(keep)), in_source_order, source, stamp)
    return open_index(source, Path(temporary.name), temporary)


class _Seen:
    """Which pairs were there before, and which image each of them preferred; a short hash and a number a pair."""

    def __init__(self) -> None:
        self.disowned: list[int] = []
        """Numbers of accepted pairs that a later one contradicted."""
        self._accepted: dict[bytes, int] = {}
        """3 x number + preference: 0 is a tie, 1 and 2 the first and second of the sorted images; -1: contradicted."""
        self._count = 0

    def fault(self, record: PairRecord) -> Dropped | None:
        """Accept a pair, or say why it is dropped. A tie contradicts nothing."""
        first, second = sorted((record.chosen_uid, record.rejected_uid))
        key = hashlib.sha256(json.dumps([record.prompt, first, second]).encode()).digest()[:16]
        preference = 0 if record.label_prob == 0.5 else 1 if record.chosen_uid == first else 2
        before = self._accepted.get(key)
        if before is None:
            self._accepted[key] = 3 * self._count + preference
            self._count += 1
            return None
        if before == -1 or {before % 3, preference} == {1, 2}:
            if before != -1:
                self.disowned.append(before // 3)
                self._accepted[key] = -1
            return Dropped(record.where, BOTH_DIRECTIONS, broken=False)
        return Dropped(record.where, AGAIN, broken=False)


def describe_drops(dropped: Iterable[Dropped]) -> Iterator[str]:
    """Yield `  3 x reason (where, where, ...)` for every reason, the commonest first."""
    places = defaultdict(list)
    for drop in dropped:
        places[drop.reason].append(drop.where)
    for reason, where in sorted(places.items(), key=lambda item: -len(item[1])):
        more = ", ..." if len(where) > _NAMES_SHOWN else ""
        hint = _PATHS if reason.endswith(A_PATH) else ""
        yield f"  {len(where)} x {reason} ({', '.join(where[:_NAMES_SHOWN])}{more}){hint}"


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


def _check(look: Look | None, numbered: tuple[int, PreferencePair | Dropped]) -> PairRecord | Dropped:
    row, item = numbered
    if isinstance(item, Dropped):
        return item
    where = item.where or item.pair_id
    facts: list[tuple[str, tuple[int, int]]] = []
    images: list[Image.Image | None] = []
    for side, data in (("chosen", item.chosen), ("rejected", item.rejected)):
        if not data:  # an image that was judged by itself
            facts.append(("", (0, 0)))
            images.append(None)
            continue
        try:
            image = decode_rgb(data)
        except BrokenImage as error:
            return Dropped(where, f"{side}: {error}")
        facts.append((pixel_hash(image), image.size))
        images.append(image)
    (chosen_uid, chosen_size_px), (rejected_uid, rejected_size_px) = facts
    if chosen_uid == rejected_uid:
        return Dropped(where, SAME_IMAGE)
    fault = _mask_fault(item.mask, {chosen_size_px, rejected_size_px})
    if fault:
        return Dropped(where, fault)
    if look is not None:
        look(row, item, (images[0], images[1]))
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
