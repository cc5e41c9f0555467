"""Which pairs of images the report shows, and how they are embedded so that one file stays a reasonable size."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

import numpy as np
from PIL import Image

from diffusion_dpo.console import progress
from diffusion_dpo.report import MetricScores, Pair
from diffusion_dpo.report.statistics import pair_differences

MAX_PAIRS = 240
BUDGET_BYTES = 10_000_000
"""Of encoded images; base64 adds a third."""
SMALL_PX = 128
"""Up to this side, images are embedded as they are and enlarged pixel by pixel."""
_LADDER = ((768, 85), (640, 82), (512, 80), (384, 78), (256, 72), (192, 60))
"""(longest side in px, WebP quality), best first."""
_WEBP_BYTES_PER_PIXEL = 0.3
"""Of a detailed photograph; most need a third of it."""


@dataclass(frozen=True)
class Shown:
    """One embedded pair."""

    pair: Pair
    before: str
    after: str


@dataclass(frozen=True)
class Wall:
    """The embedded pairs, in random order, and how their images were reduced."""

    shown: tuple[Shown, ...]
    width_px: int
    height_px: int
    note: str


Encoded = tuple[bytes, bytes]
"""The image files (before, after) of one pair."""


def choose_pairs(scores: Sequence[MetricScores], shape: tuple[int, int], *, limit: int = MAX_PAIRS) -> list[Pair]:
    """Return the pairs to show, in a fixed random order; where not all fit, best, worst and random of each metric.

    `shape` is (num_prompts, seeds).
    """
    everything = [Pair(prompt, seed) for prompt in range(shape[0]) for seed in range(shape[1])]
    order = np.random.default_rng(0).permutation(len(everything)).tolist()
    rankings = [order]
    for metric in scores:
        differences = pair_differences(metric).ravel()
        ranked = [i for i in np.argsort(differences, kind="stable").tolist() if np.isfinite(differences[i])]
        rankings += [ranked, ranked[::-1]]
    turns = chain.from_iterable(zip_longest(*rankings))
    chosen = set(islice(dict.fromkeys(i for i in turns if i is not None), limit))
    return [everything[i] for i in order if i in chosen]


def embed(images: Sequence[tuple[Pair, Encoded]], *, budget_bytes: int = BUDGET_BYTES) -> Wall:
    """Return the pairs as data URIs: small images untouched, others as the best WebP that fits the budget.

    When even the smallest does not fit, later pairs are left out; the note says all of this.
    """
    assert images
    width, height = _open(images[0][1][0]).size
    if max(width, height) <= SMALL_PX and sum(len(data) for _, both in images for data in both) <= budget_bytes:
        kept, note = list(images), "Images are embedded exactly as they were drawn."
    else:
        side_px, quality = _largest_that_fits(images, budget_bytes)
        kept = _reduce(images, budget_bytes, side_px, quality)
        note = (
            f"Images are embedded as WebP of at most {side_px} px, to keep this file handy; the originals are in the "
            "Parquet files beside it."
        )
    if len(kept) < len(images):
        note += f" {len(images) - len(kept)} of {len(images)} pairs did not fit and are left out."
    shown = tuple(Shown(pair, *(_data_uri(data) for data in both)) for pair, both in kept)
    return Wall(shown, width, height, note)


def thumbnails(images: Sequence[Image.Image], *, budget_bytes: int = BUDGET_BYTES) -> list[str]:
    """Return RGB images as data URIs: small ones exactly, others as WebP whose size depends on how many there are."""
    affordable = (step for step in _LADDER if len(images) * step[0] ** 2 * _WEBP_BYTES_PER_PIXEL <= budget_bytes)
    side_px, quality = next(affordable, _LADDER[-1])
    return [_data_uri(_png(it) if max(it.size) <= SMALL_PX else _webp(it, side_px, quality)) for it in images]


def _largest_that_fits(images: Sequence[tuple[Pair, Encoded]], budget_bytes: int) -> tuple[int, int]:
    """Return the first step of the ladder that, judged by some of the images, fits all of them in the budget."""
    sample = [data for _, both in images[:: max(1, len(images) // 8)] for data in both]
    for side_px, quality in _LADDER:
        average = sum(len(_webp(_open(data), side_px, quality)) for data in sample) / len(sample)
        if 2 * average * len(images) <= 0.9 * budget_bytes:
            break
    return side_px, quality


def _reduce(
    images: Sequence[tuple[Pair, Encoded]], budget_bytes: int, side_px: int, quality: int
) -> list[tuple[Pair, Encoded]]:
    kept: list[tuple[Pair, Encoded]] = []
    spent = 0
    with progress("embed", len(images), "pairs") as advance:
        for pair, (before, after) in images:
            both = (_webp(_open(before), side_px, quality), _webp(_open(after), side_px, quality))
            spent += len(both[0]) + len(both[1])
            if kept and spent > budget_bytes:
                break
            kept.append((pair, both))
            advance()
    return kept


def _webp(image: Image.Image, side_px: int, quality: int) -> bytes:
    image = image.convert("RGB")
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=quality, method=2)
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def _data_uri(data: bytes) -> str:
    kind = (_open(data).format or "png").lower()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
