"""What people are asked about: pairs of images under opaque names, whatever they came from.

Every image is written once as a PNG of its own, named by chance: neither its file name, nor its format, nor what a
camera or a program wrote into it says where it came from. items.jsonl, which never leaves the server, knows.
"""

import hashlib
import json
import os
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import cast

from PIL import Image, ImageFilter

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.candidates import find_candidates, find_units
from diffusion_dpo.data.comparisons import is_comparison, read_comparison
from diffusion_dpo.data.images import BrokenImage, decode_rgb
from diffusion_dpo.data.left_out import describe
from diffusion_dpo.data.listing import some
from diffusion_dpo.data.recognise import recognise_either, refusal
from diffusion_dpo.data.shards import encode_png
from diffusion_dpo.data.votes import ITEMS, read_lines
from diffusion_dpo.files import atomic_path
from diffusion_dpo.settings import LabelConfig

IMAGES = "images"
_RUINED = "ruined "


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


_Pair = tuple[str, str, str, str]
"""Prompt, the uids of both images, and the model of the second."""


def make_items(config: LabelConfig, folder: Path) -> list[Item]:
    """Return the items of a study, written into its folder if they are not there yet.

    Raises ConfigError when there is nothing to ask about.
    """
    path = folder / ITEMS
    if path.exists():
        return [Item(**line) for line in read_lines(path)]
    pairs = _choose(config, _find(config))
    num_checks = round(config.checks_share * len(pairs))
    names = _write_images(config, folder, pairs, num_checks)
    items = []
    for number, (prompt, first, second, model) in enumerate(pairs):
        if first in names and second in names:
            ruined = names[_RUINED + first] if number < num_checks else ""
            shown = names[first], names[second]
            items.append(Item(secrets.token_hex(8), prompt, first, second, *shown, ruined, model))
    if not items:
        raise ConfigError(
            f"there is nothing to ask about in {config.path}: "
            + ("every image is broken" if pairs else "no prompt has two different images")
        )
    os.sync()  # the images, all at once: the list of items says that they are there
    with atomic_path(path) as partial:
        partial.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")
    return items


def refuse_other_images(config: LabelConfig, items: Sequence[Item]) -> None:
    """Raise ConfigError where a study is of other images or prompts than those of the settings, wherever they lie."""
    there = set(_choose(config, _find(config)))
    if not there.issuperset((item.prompt, item.first_uid, item.second_uid, item.model) for item in items):
        raise ConfigError(
            f"{config.output_dir} belongs to another study, of other images or prompts; choose another output_dir"
        )


# --- which pairs -----------------------------------------------------------------------------------------------------


def _choose(config: LabelConfig, found: Iterable[_Pair]) -> list[_Pair]:
    """Return the pairs in random order, without those of one image twice, and no more than are asked for."""
    different = dict.fromkeys(pair for pair in found if pair[1] != pair[2])
    return sorted(different, key=lambda pair: _hash(config.seed, "order", *pair))[: config.max_pairs]


def _find(config: LabelConfig) -> Iterator[_Pair]:
    """Yield every pair that may be asked about."""
    if _is_comparison(config):
        for pair in read_comparison(config.path, images=False):
            yield pair.prompt, pair.baseline.uid, pair.other.uid, pair.model
        return
    source = _source(config)
    if source is None:
        yield from _of_candidates(config)
        return
    for line in source.left_out():
        say(f"left out: {line}")
    left_out: dict[str, list[str]] = defaultdict(list)
    for row in source.read():
        if isinstance(row, Dropped):
            left_out[row.reason].append(row.where)
        elif sides := _sides(row):
            # in an order that the label has no part in
            first, second = sorted((uid for uid, _ in sides), key=lambda uid: _hash(config.seed, "first", uid))
            yield row.prompt, first, second, ""
    _warn_of(left_out)


def _of_candidates(config: LabelConfig) -> Iterator[_Pair]:
    """Yield pairs of the images of a prompt: neighbours on a ring in random order, then those two apart, and so on."""
    groups: dict[str, tuple[str, set[str]]] = {}
    left_out: dict[str, list[str]] = defaultdict(list)
    without: list[str] = []
    for unit in find_units(config.path, config.prompt_column):
        for candidate in unit.read(images=False):
            if candidate.broken:
                left_out[candidate.broken].append(candidate.where)
            elif candidate.group:
                groups.setdefault(candidate.group, (candidate.prompt, set()))[1].add(candidate.uid)
            else:
                without.append(f"{candidate.where} ({candidate.no_prompt})")
    _warn_of(left_out)
    if without:
        warn(f"{len(without)} images have no prompt and are not asked about: {some(without)}")
    for prompt, uids in groups.values():
        ring = sorted(uids, key=lambda uid: _hash(config.seed, "ring", uid))
        steps = range(1, len(ring) // 2 + 1)
        pairs = ((ring[i], ring[(i + step) % len(ring)]) for step in steps for i in range(len(ring)))
        distinct = {frozenset(pair): pair for pair in pairs}
        for first, second in islice(distinct.values(), config.pairs_per_prompt):
            yield prompt, first, second, ""


def _is_comparison(config: LabelConfig) -> bool:
    return config.data is None and is_comparison(config.path)


def _source(config: LabelConfig) -> PairSource | None:
    """Return the reader of pairs, None for candidates; raises ConfigError when there is neither."""
    found = recognise_either(config.path, cast(PairSource | None, config.data))
    if found.source is None and not found.are_candidates:
        raise ConfigError(refusal(found, "pairs, candidates or a comparison"))
    return found.source


def _sides(row: object) -> tuple[tuple[str, bytes], ...]:
    """Return the uid and the bytes of both images of a pair; () of anything else."""
    if not isinstance(row, PreferencePair) or not row.chosen or not row.rejected:
        return ()
    return (
        (row.chosen_uid or _content_id(row.chosen), row.chosen),
        (row.rejected_uid or _content_id(row.rejected), row.rejected),
    )


# --- their images ----------------------------------------------------------------------------------------------------


def _write_images(config: LabelConfig, folder: Path, pairs: Sequence[_Pair], num_checks: int) -> dict[str, str]:
    """Write the images of the pairs as the page shows them, each once; return their names by uid.

    The first image of the first `num_checks` pairs has a ruined copy, by its uid with _RUINED before it. A broken
    image is told, and has no name.
    """
    (folder / IMAGES).mkdir(exist_ok=True)
    needed = {uid for _, *both, _ in pairs for uid in both}
    checked = {first for _, first, _, _ in pairs[:num_checks]}
    names: dict[str, str] = {}
    left_out: dict[str, list[str]] = defaultdict(list)
    with progress("images", len(needed), "images") as advance:
        for uid, data in _read_images(config):
            if not needed:
                break
            if uid not in needed:
                continue
            needed.remove(uid)
            advance()
            try:
                image = decode_rgb(data)
                names[uid] = _write(folder, image)
                if uid in checked:
                    names[_RUINED + uid] = _write(folder, _ruin(image))
            except BrokenImage as error:
                left_out[str(error)].append(f"image {uid}")
    _warn_of(left_out)
    return names


def _warn_of(left_out: Mapping[str, Sequence[str]]) -> None:
    """Say in one line which images and pairs are not asked about, by reason."""
    if left_out:
        warn(f"left out: {describe(left_out)}")


def _read_images(config: LabelConfig) -> Iterator[tuple[str, bytes]]:
    """Yield the uid and the bytes of all images that there are, some of them more than once."""
    if _is_comparison(config):
        for pair in read_comparison(config.path):
            yield from ((it.uid, it.data) for it in (pair.baseline, pair.other))
        return
    source = _source(config)
    if source is None:
        for unit in find_candidates(config.path, config.prompt_column).units:
            yield from ((it.uid, it.data) for it in unit.read())
        return
    for row in source.read():
        yield from _sides(row)


def _write(folder: Path, image: Image.Image) -> str:
    name = secrets.token_hex(16)
    (folder / IMAGES / f"{name}.png").write_bytes(encode_png(image))
    return name


def _ruin(image: Image.Image) -> Image.Image:
    """Return an image's coarse, blurred copy."""
    small = image.resize((max(2, image.width // 16), max(2, image.height // 16)))
    blurred = small.resize(image.size, Image.Resampling.BICUBIC)
    return blurred.filter(ImageFilter.GaussianBlur(max(image.size) / 40))


def _content_id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _hash(seed: int, *parts: str) -> str:
    return hashlib.sha256(json.dumps([seed, *parts]).encode()).hexdigest()
