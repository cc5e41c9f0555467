"""Which pairs of images the report shows, and how they travel with it: inside the page, or as files beside it."""

import base64
import hashlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_dpo.console import progress
from diffusion_dpo.files import atomic_path
from diffusion_dpo.report import BASELINE, Gallery, MetricScores, Pair
from diffusion_dpo.report.statistics import pair_differences

ASSETS = "report_assets"
MAX_PAIRS, MAX_IMAGES = 240, 720
"""Of one page with its images inside."""
BUDGET_BYTES = 10_000_000
"""Of encoded images; base64 adds a third."""
SMALL_PX = 128
"""Up to this side, images are kept as they are and enlarged pixel by pixel."""
_LADDER = ((768, 85), (640, 82), (512, 80), (448, 79), (384, 78), (320, 75), (256, 72), (192, 60))
"""(longest side in px, WebP quality), best first."""
_WEBP_BYTES_PER_PIXEL = 0.3
"""Of a detailed photograph; most need a third of it."""
_ASSET_PX, _ASSET_QUALITY = 1024, 80
_AT_ONCE = 64
"""Pairs that are in memory together while files are written."""
_OURS = re.compile(r"[0-9a-f]{20}\.(webp|png|jpeg)")


@dataclass(frozen=True)
class Shown:
    """One pair of the page: where each model's image is, in the order of the models."""

    pair: Pair
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """The pairs of the page, in random order, and how their images were reduced."""

    shown: tuple[Shown, ...]
    width_px: int
    height_px: int
    num_bytes: int
    """Of the encoded images."""
    note: str


Encoded = Mapping[str, bytes]
"""The image file of every model, the baseline's first."""


def choose_pairs(scores: Sequence[MetricScores], shape: tuple[int, int], *, limit: int | None = None) -> list[Pair]:
    """Return the pairs to show, in a fixed random order; where not all fit, random ones and those that stand out.

    Those are the best and the worst of each metric of each model, and those on which metrics disagree. `shape` is
    (num_prompts, seeds); without a limit all are returned.
    """
    everything = [Pair(prompt, seed) for prompt in range(shape[0]) for seed in range(shape[1])]
    order = np.random.default_rng(0).permutation(len(everything)).tolist()
    if limit is None or limit >= len(everything):
        return [everything[i] for i in order]
    models = [name for name in scores[0].values if name != BASELINE]
    rankings = [order]
    for model in models:
        for values in (*(pair_differences(metric, model) for metric in scores), -disagreement(scores, model)):
            flat = values.ravel()
            ranked = [i for i in np.argsort(flat, kind="stable").tolist() if np.isfinite(flat[i])]
            rankings += [ranked, ranked[::-1]]
        rankings.pop()  # the pairs on which metrics agree most
    turns = chain.from_iterable(zip_longest(*(ranking[:limit] for ranking in rankings)))
    chosen = set(islice(dict.fromkeys(i for i in turns if i is not None), limit))
    return [everything[i] for i in order if i in chosen]


def disagreement(scores: Sequence[MetricScores], model: str) -> np.ndarray:
    """Return how far the metrics contradict each other on each pair, of shape (num_prompts, seeds).

    Each difference is divided by its metric's spread and points up where the model won; the result is the smaller of
    the largest gain and the largest loss, negative where all agree. Informative metrics take part only where there
    are fewer than two others. NaN where fewer than two metrics have a score.
    """
    main = [metric for metric in scores if not metric.auxiliary]
    stack = []
    for metric in main if len(main) > 1 else scores:
        gains = pair_differences(metric, model) * (1 if metric.higher_is_better else -1)
        known = gains[np.isfinite(gains)]
        stack.append(gains / ((float(known.std()) if known.size else 0.0) or 1.0))
    gains = np.stack(stack)
    few = np.isfinite(gains).sum(axis=0) < 2
    highest = np.where(np.isfinite(gains), gains, -np.inf).max(axis=0)
    lowest = np.where(np.isfinite(gains), gains, np.inf).min(axis=0)
    return np.where(few, np.nan, np.minimum(highest, -lowest))


def embed(images: Sequence[tuple[Pair, Encoded]], *, budget_bytes: int = BUDGET_BYTES) -> Selection:
    """Return the pairs as data URIs: small images untouched, others as the best WebP that fits the budget.

    When even the smallest does not fit, later pairs are left out; the note says all of this.
    """
    assert images
    width, height = _open(_first(images)).size
    if (
        max(width, height) <= SMALL_PX
        and sum(len(data) for _, all_ in images for data in all_.values()) <= budget_bytes
    ):
        kept = [(pair, tuple(all_.values())) for pair, all_ in images]
        note = "Images are inside this file, exactly as they were drawn."
    else:
        side_px, quality = _largest_that_fits(images, budget_bytes)
        kept = _reduce(images, budget_bytes, side_px, quality)
        note = (
            f"Images are inside this file as WebP of at most {side_px} px, to keep it handy; the originals are in the "
            "Parquet files beside it."
        )
    if len(kept) < len(images):
        note += f" {len(images) - len(kept)} of {len(images)} pairs did not fit and are left out."
    shown = tuple(Shown(pair, tuple(map(_data_uri, encoded))) for pair, encoded in kept)
    return Selection(shown, width, height, sum(len(data) for _, encoded in kept for data in encoded), note)


def write_assets(folder: Path, pairs: Sequence[Pair], gallery: Gallery) -> Selection:
    """Write the images of all pairs into `report_assets/` of a folder, and remove those of an earlier report there.

    Files are named by a hash of the image and of how it is encoded, so that what is there already is not made again.
    Some pairs at a time, in the order in which they lie on disk.
    """
    assets = folder / ASSETS
    assets.mkdir(exist_ok=True)
    found: dict[Pair, tuple[str, ...]] = {}
    size, num_bytes = (0, 0), 0
    ordered = sorted(pairs, key=lambda pair: (pair.seed, pair.prompt))
    there = {path.name for path in assets.iterdir()}
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers,
        progress("report_assets", len(pairs), "pairs") as advance,
    ):
        for start in range(0, len(ordered), _AT_ONCE):
            chunk = ordered[start : start + _AT_ONCE]
            images = gallery.read(chunk)
            size = size if any(size) else _open(next(iter(images[chunk[0]].values()))).size
            flat = [data for pair in chunk for data in images[pair].values()]
            names = list(workers.map(lambda data: _write_asset(assets, data, there), flat))
            per_pair = len(names) // len(chunk)
            for number, pair in enumerate(chunk):
                found[pair] = tuple(names[number * per_pair : (number + 1) * per_pair])
            advance(len(chunk))
    wanted = {name for names in found.values() for name in names}
    clear_assets(folder, keep=wanted)
    num_bytes = sum((assets / name).stat().st_size for name in wanted)
    note = (
        f"Images are files in {ASSETS}/ beside this page, which belongs to it; the originals are in the Parquet files."
    )
    shown = tuple(Shown(pair, tuple(f"{ASSETS}/{name}" for name in found[pair])) for pair in pairs)
    return Selection(shown, *size, num_bytes, note)


def clear_assets(folder: Path, *, keep: set[str]) -> None:
    """Remove the images of an earlier report, and the folder if nothing else is in it; other files stay."""
    assets = folder / ASSETS
    if not assets.is_dir():
        return
    for path in assets.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in keep:
            path.unlink()
    if not any(assets.iterdir()):
        assets.rmdir()


def _write_asset(folder: Path, data: bytes, there: set[str]) -> str:
    image = _open(data)
    as_is = max(image.size) <= SMALL_PX
    kind = (image.format or "png").lower() if as_is else "webp"
    how = "" if as_is else f"{_ASSET_PX} {_ASSET_QUALITY} {_METHOD}"
    name = f"{hashlib.sha256(how.encode() + data).hexdigest()[:20]}.{kind}"
    if name not in there:
        encoded = data if as_is else _webp(image, _ASSET_PX, _ASSET_QUALITY)
        with atomic_path(folder / name) as partial:
            partial.write_bytes(encoded)
    return name


def thumbnails(images: Sequence[Image.Image], *, budget_bytes: int = BUDGET_BYTES) -> list[str]:
    """Return RGB images as data URIs: small ones exactly, others as WebP whose size depends on how many there are."""
    affordable = (step for step in _LADDER if len(images) * step[0] ** 2 * _WEBP_BYTES_PER_PIXEL <= budget_bytes)
    side_px, quality = next(affordable, _LADDER[-1])
    return [_data_uri(_png(it) if max(it.size) <= SMALL_PX else _webp(it, side_px, quality)) for it in images]


def _largest_that_fits(images: Sequence[tuple[Pair, Encoded]], budget_bytes: int) -> tuple[int, int]:
    """Return the first step of the ladder that, judged by some of the images, fits all of them in the budget."""
    sample = [data for _, all_ in images[:: max(1, len(images) // 8)] for data in all_.values()]
    num_images = sum(len(all_) for _, all_ in images)
    for side_px, quality in _LADDER:
        average = sum(len(_webp(_open(data), side_px, quality)) for data in sample) / len(sample)
        if average * num_images <= 0.9 * budget_bytes:
            break
    return side_px, quality


def _reduce(
    images: Sequence[tuple[Pair, Encoded]], budget_bytes: int, side_px: int, quality: int
) -> list[tuple[Pair, tuple[bytes, ...]]]:
    kept: list[tuple[Pair, tuple[bytes, ...]]] = []
    spent = 0
    with progress("embed", len(images), "pairs") as advance:
        for pair, all_ in images:
            encoded = tuple(_webp(_open(data), side_px, quality) for data in all_.values())
            spent += sum(map(len, encoded))
            if kept and spent > budget_bytes:
                break
            kept.append((pair, encoded))
            advance()
    return kept


_METHOD = 2
"""WebP's effort, 0 to 6."""


def _webp(image: Image.Image, side_px: int, quality: int) -> bytes:
    image = image.convert("RGB")
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=quality, method=_METHOD)
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def _first(images: Sequence[tuple[Pair, Encoded]]) -> bytes:
    return next(iter(images[0][1].values()))


def _data_uri(data: bytes) -> str:
    kind = (_open(data).format or "png").lower()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
