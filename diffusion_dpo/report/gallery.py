"""Which pairs of images the report shows, and how they are embedded so that one file stays a reasonable size."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
from PIL import Image

from diffusion_dpo.report import MetricResult, MetricScores, Pair
from diffusion_dpo.report.statistics import pair_differences

MAX_PAIRS = 240
BUDGET_BYTES = 10_000_000
"""Of encoded images; base64 adds a third."""
SMALL_PX = 128
"""Up to this side, images are embedded as they are and enlarged pixel by pixel."""
_LADDER = ((768, 85), (640, 82), (512, 80), (384, 78), (256, 72), (192, 60))
"""(longest side in px, WebP quality), best first."""


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


def choose_pairs(scores: Sequence[MetricScores], shape: tuple[int, int], *, limit: int = MAX_PAIRS) -> list[Pair]:
    """Return the pairs to show, in a fixed random order: all where they fit, else best, worst and random of each metric."""
    everything = [Pair(prompt, seed) for prompt in range(shape[0]) for seed in range(shape[1])]
    order = np.random.default_rng(0).permutation(len(everything)).tolist()
    if len(everything) <= limit:
        return [everything[i] for i in order]
    rankings = [order]
    for metric in scores:
        differences = pair_differences(metric).ravel()
        ranked = [i for i in np.argsort(differences, kind="stable").tolist() if np.isfinite(differences[i])]
        rankings += [ranked, ranked[::-1]]
    chosen: set[int] = set()
    for i in chain.from_iterable(zip_longest(*rankings)):
        if i is not None and len(chosen) < limit:
            chosen.add(i)
    return [everything[i] for i in order if i in chosen]


def embed(images: Sequence[tuple[Pair, tuple[bytes, bytes]]], *, budget_bytes: int = BUDGET_BYTES) -> Wall:
    """Return the pairs as data URIs: small images untouched, others as the best WebP that fits the budget.

    When even the smallest does not fit, later pairs are left out; the note says all of this.
    """
    assert images
    width, height = _open(images[0][1][0]).size
    encoded = [(pair, both) for pair, both in images]
    kept, form = _fit(encoded, budget_bytes, small=max(width, height) <= SMALL_PX)
    note = f"Images are embedded {form}."
    if len(kept) < len(images):
        note += f" {len(images) - len(kept)} of {len(images)} pairs did not fit and were left out."
    shown = tuple(Shown(pair, *(_data_uri(data) for data in both)) for pair, both in kept)
    return Wall(shown, width, height, note)


def _fit(
    images: list[tuple[Pair, tuple[bytes, bytes]]], budget_bytes: int, *, small: bool
) -> tuple[list[tuple[Pair, tuple[bytes, bytes]]], str]:
    if small and sum(len(data) for _, both in images for data in both) <= budget_bytes:
        return images, "exactly as they were drawn"
    sample = [data for _, both in images[:: max(1, len(images) // 8)] for data in both]
    for side_px, quality in _LADDER:
        average = sum(len(_webp(data, side_px, quality)) for data in sample) / len(sample)
        if 2 * average * len(images) <= 0.9 * budget_bytes:
            break
    kept, spent = [], 0
    for pair, (before, after) in images:
        both = (_webp(before, side_px, quality), _webp(after, side_px, quality))
        spent += len(both[0]) + len(both[1])
        if kept and spent > budget_bytes:
            break
        kept.append((pair, both))
    return (
        kept,
        f"as WebP of at most {side_px} px, for a handy file; the originals are in the Parquet files beside this page",
    )


def _webp(data: bytes, side_px: int, quality: int) -> bytes:
    image = _open(data).convert("RGB")
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=quality, method=4)
    return buffer.getvalue()


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def _data_uri(data: bytes) -> str:
    kind = (_open(data).format or "png").lower()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
