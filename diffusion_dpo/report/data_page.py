"""inspect.html: what a data set holds, and what is wrong with it, on one page; and the same facts as words."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from diffusion_dpo.data import Dropped
from diffusion_dpo.data.collect import describe_drops
from diffusion_dpo.data.contact_sheet import GREEN, GREY, RED, Block
from diffusion_dpo.files import atomic_path
from diffusion_dpo.report import charts
from diffusion_dpo.report.agreement import Tau
from diffusion_dpo.report.confounds import LOUD_ABOVE, METHOD, Predictor
from diffusion_dpo.report.gallery import SMALL_PX, thumbnails
from diffusion_dpo.report.page import asset, fill
from diffusion_dpo.report.words import clean, count, percent, shorten

KEPT_SIDE_PX = 768
"""Images that are to be shown are kept at most this large."""
BETWEEN = "  "
"""What parts the words of a caption that belong on lines of their own, where there is room for them."""
_SIZES_SHOWN = 4
_KINDS = {GREEN: "chosen", RED: "rejected", GREY: "tie", None: ""}

T = TypeVar("T")


class PromptShare(NamedTuple):
    """A prompt and what part of the rows it has."""

    prompt: str
    rows: int
    share: float


class Sheet(NamedTuple):
    """Images to show under one heading."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Scores:
    """The values of one metric: those of chosen and rejected images, or those of all."""

    name: str
    above: np.ndarray
    below: np.ndarray


@dataclass(frozen=True)
class Findings:
    """What was found in a data set. `rows` are lines of (name, value) for the terminal and the page alike."""

    headline: str
    tiles: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    next_command: str
    sheets: tuple[Sheet, ...] = ()
    sides: tuple[str, str] = ("chosen", "rejected")
    scores: tuple[Scores, ...] = ()
    confounds: tuple[Predictor, ...] = ()
    judges: tuple[Predictor, ...] = ()
    """How well each metric predicts the label, in the direction of its values."""
    taus: tuple[Tau, ...] = ()
    is_oriented: bool = False
    """Whether metrics of which less is better were turned round for `taus`."""
    top_prompts: tuple[PromptShare, ...] = ()


def write_page(path: Path, title: str, found: Findings) -> None:
    """Write the page, whole or not at all; it depends on its arguments alone."""
    images = iter(thumbnails([tile.image for sheet in found.sheets for block in sheet.blocks for tile in block.tiles]))
    page = fill(
        "inspect.html.j2",
        style=asset("report.css") + asset("inspect.css"),
        title=clean(title),
        found=found,
        drops=[line.strip() for line in describe_drops(found.dropped)],
        histograms=[(it.name, charts.score_histogram(it.above, it.below, found.sides)) for it in found.scores],
        sheets=[(sheet.title, [_card(block, images) for block in sheet.blocks]) for sheet in found.sheets],
        charts=charts,
        loud_above=LOUD_ABOVE,
        method=METHOD,
        shorten=shorten,
    )
    with atomic_path(path) as partial:
        partial.write_text(page, encoding="utf-8")


def _card(block: Block, images: "Iterable[str]") -> dict[str, Any]:
    tiles = [
        {
            "uri": next(iter(images)),
            "caption": [shorten(part, 80) for part in tile.caption.split(BETWEEN)],
            "kind": _KINDS[tile.edge],
            "size_px": tile.image.size,
            "is_small": max(tile.image.size) <= SMALL_PX,
        }
        for tile in block.tiles
    ]
    return {"prompt": shorten(block.title), "note": block.note, "tiles": tiles}


# --- words -----------------------------------------------------------------------------------------------------------


def describe_predictor(it: Predictor) -> str:
    """Return `AUC 0.78, 95 % interval 0.70 to 0.84; equal in 3 of 40 pairs` for the terminal."""
    if it.auc is None:
        return "not known of both sides of any pair"
    interval = f", 95 % interval {it.interval[0]:.2f} to {it.interval[1]:.2f}" if it.interval else ""
    equal = f"; equal in {it.num_equal} of {it.num_pairs} pairs" if it.num_equal else ""
    return f"AUC {it.auc:.2f}{interval}{equal}"


def describe_tau(tau: Tau) -> str:
    """Return `0.42, 95 % interval 0.30 to 0.55, over 40 prompts`."""
    if tau.mean is None:
        return "no prompt has two images that both tell apart"
    interval = f", 95 % interval {tau.interval[0]:.2f} to {tau.interval[1]:.2f}" if tau.interval else ""
    return f"{tau.mean:.2f}{interval}, over {count(tau.num_prompts, 'prompts')}"


def drop_rows(dropped: Sequence[Dropped]) -> list[tuple[str, str]]:
    """Return the line on what was dropped, by reason."""
    if not dropped:
        return [("dropped", "0")]
    return [(f"dropped: {len(dropped)}", "\n".join(line.strip() for line in describe_drops(dropped)))]


def spread(values: Iterable[float]) -> str:
    """Smallest, median and largest of the numbers that are none of NaN."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return ""
    return f"{min(known):.4g} to {max(known):.4g}, median {statistics.median(known):.4g}"


def sizes(sizes_px: Iterable[tuple[int, int]]) -> str:
    """The commonest sizes, in px."""
    common = Counter(sizes_px).most_common()
    shown = [f"{width} x {height} ({amount})" for (width, height), amount in common[:_SIZES_SHOWN]]
    more = len(common) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "") + " px" if shown else ""


def score_text(scores: dict[str, float]) -> str:
    """Return `clip 0.31  lpips 0.2`."""
    return BETWEEN.join(f"{name} {value:.3g}" for name, value in scores.items())


def spread_evenly(items: Sequence[T], amount: int) -> list[T]:
    """Return at most `amount` items, evenly spread over the sequence, in its order."""
    amount = min(amount, len(items))
    return [items[i * len(items) // amount] for i in range(amount)]


def kept(image: Image.Image) -> Image.Image:
    """Return an image that was decoded to be shown, no larger than it needs to be; changes it in place."""
    image.thumbnail((KEPT_SIDE_PX, KEPT_SIDE_PX))
    return image


def blank_text(amount: int, total: int) -> str:
    """Return `3 of 40 images, 8 %`."""
    return f"{amount} of {total}{f', {percent(amount / total)}' if amount else ''}" if total else ""
