"""What people are asked about: pairs of images under opaque names, whatever they came from.

Every image is written once as a PNG of its own, named by chance: neither its file name, nor its format, nor what a
camera or a program wrote into it says where it came from. items.jsonl, which never leaves the server, knows.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import cast

from PIL import Image, ImageFilter

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import progress, warn
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.candidates import Candidate, find_units
from diffusion_dpo.data.comparisons import is_comparison, read_comparison
from diffusion_dpo.data.images import BrokenImage, decode_rgb
from diffusion_dpo.data.recognise import recognise
from diffusion_dpo.data.shards import encode_png
from diffusion_dpo.data.votes import ITEMS, read_lines
from diffusion_dpo.files import atomic_path
from diffusion_dpo.settings import LabelConfig

IMAGES = "images"


@dataclass(frozen=True)
class Item:
    """Two images of a prompt. `first_image` and `second_image` are the names that the page knows them by."""

    id: str
    prompt: str
    first_uid: str
    second_uid: str
    first_image: str
    second_image: str
    ruined_image: str = ""
    """A copy of the first that nobody can prefer, for an attention check."""
    model: str = ""
    """Of a comparison, the model that drew the second image."""


@dataclass(frozen=True)
class _Side:
    data: bytes
    uid: str


_Found = tuple[str, _Side, _Side, str]
"""Prompt, both sides, and the model of the second."""


def make_items(config: LabelConfig, folder: Path) -> list[Item]:
    """Return the items of a study, written into its folder if they are not there yet.

    Raises ConfigError when there is nothing to ask about.
    """
    path = folder / ITEMS
    if path.exists():
        return [Item(**line) for line in read_lines(path)]
    (folder / IMAGES).mkdir(exist_ok=True)
    found = list(_choose(config, _find(config)))
    names: dict[str, str] = {}
    items, num_broken = [], 0
    with progress("images", len(found), "pairs") as advance:
        for number, (prompt, first, second, model) in enumerate(found):
            advance()
            try:
                shown = [_write(folder, side, names) for side in (first, second)]
                checked = number < round(config.checks_share * len(found))
                ruined = _write(folder, _Side(_ruin(first.data), f"ruined {first.uid}"), names) if checked else ""
            except BrokenImage as error:
                num_broken += 1
                warn(f"left out a pair of {prompt[:60]!r}: {error}")
                continue
            items.append(Item(secrets.token_hex(8), prompt, first.uid, second.uid, shown[0], shown[1], ruined, model))
    if not items:
        raise ConfigError(
            f"there is nothing to ask about in {config.path}: "
            + ("every image is broken" if num_broken else "no prompt has two different images")
        )
    os.sync()  # the images, all at once: the list of items says that they are there
    with atomic_path(path) as partial:
        partial.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")
    return items


def _find(config: LabelConfig) -> Iterator[_Found]:
    """Yield every pair that may be asked about."""
    if config.data is None and is_comparison(config.path):
        for pair in read_comparison(config.path):
            yield pair.prompt, _side(pair.baseline), _side(pair.other), pair.model
        return
    source = config.data or recognise(config.path)
    if source is None:
        yield from _of_candidates(config)
        return
    for row in cast(PairSource, source).read():
        if isinstance(row, Dropped):
            warn(f"left out {row.where}: {row.reason}")
        elif isinstance(row, PreferencePair) and row.chosen and row.rejected:
            first, second = _of_pair(row, config.seed)
            yield row.prompt, first, second, ""


def _of_pair(pair: PreferencePair, seed: int) -> list[_Side]:
    """Return both sides in an order that the label has no part in."""
    sides = [
        _Side(pair.chosen, pair.chosen_uid or _content_id(pair.chosen)),
        _Side(pair.rejected, pair.rejected_uid or _content_id(pair.rejected)),
    ]
    return sorted(sides, key=lambda side: _hash(seed, "first", side.uid))


def _of_candidates(config: LabelConfig) -> Iterator[_Found]:
    """Yield pairs of the images of a prompt: neighbours on a ring in random order, then those two apart, and so on."""
    groups: dict[str, dict[str, Candidate]] = {}
    for unit in find_units(config.path):
        for candidate in unit.read():
            if candidate.broken:
                warn(f"left out {candidate.where}: {candidate.broken}")
            elif candidate.group:
                groups.setdefault(candidate.group, {}).setdefault(candidate.uid, candidate)
    for group in groups.values():
        ring = sorted(group.values(), key=lambda it: _hash(config.seed, "ring", it.uid))
        steps = range(1, len(ring) // 2 + 1)
        pairs = ((ring[i], ring[(i + step) % len(ring)]) for step in steps for i in range(len(ring)))
        distinct = {frozenset((a.uid, b.uid)): (a, b) for a, b in pairs if a.uid != b.uid}
        for first, second in islice(distinct.values(), config.pairs_per_prompt):
            yield first.prompt, _side(first), _side(second), ""


def _choose(config: LabelConfig, found: Iterable[_Found]) -> Sequence[_Found]:
    """Return the pairs in random order, without those of one image twice, and no more than are asked for."""
    different = {
        (prompt, a.uid, b.uid, model): (prompt, a, b, model) for prompt, a, b, model in found if a.uid != b.uid
    }
    order = sorted(different, key=lambda key: _hash(config.seed, "order", *key))
    return [different[key] for key in order[: config.max_pairs]]


def _side(candidate: Candidate) -> _Side:
    return _Side(candidate.data, candidate.uid)


def _write(folder: Path, side: _Side, names: dict[str, str]) -> str:
    """Write an image as the page shows it, once; return its name."""
    if side.uid not in names:
        image = decode_rgb(side.data)
        names[side.uid] = secrets.token_hex(16)
        (folder / IMAGES / f"{names[side.uid]}.png").write_bytes(encode_png(image))
    return names[side.uid]


def _ruin(data: bytes) -> bytes:
    """Return an image's coarse, blurred copy."""
    image = decode_rgb(data)
    small = image.resize((max(2, image.width // 16), max(2, image.height // 16)))
    blurred = small.resize(image.size, Image.Resampling.BICUBIC)
    return encode_png(blurred.filter(ImageFilter.GaussianBlur(max(image.size) / 40)))


def _content_id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _hash(seed: int, *parts: str) -> str:
    return hashlib.sha256(json.dumps([seed, *parts]).encode()).hexdigest()
