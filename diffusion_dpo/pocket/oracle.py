"""The oracle of the pocket world: reads an image back into its facts, by segmentation and template overlap.

It has no parameters and was trained on nothing, so no model can have learnt to please it except by drawing the scene.
"""

import functools
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from diffusion_dpo.pocket.world import COLORS, IMAGE_SIZE_PX, SHAPES, SIZES, Item, Scene, outline

MIN_AREA_PX = 40
"""A coloured region smaller than this (after opening by 3 x 3 px) is a speck, not an object."""
MIN_OVERLAP = 0.70
"""A region whose best template overlaps less than this (intersection over union) has no recognisable shape."""
_SIZE_BOUNDARY_PX = (SIZES["small"][1] + SIZES["large"][0]) / 2
_RADII = np.arange(6.5, 15.01, 0.5)
_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class SeenItem:
    """An object found in an image: its names (shape None if unrecognisable), centre (x, y) px, overlap in [0, 1]."""

    color: str
    shape: str | None
    size: str | None
    center: tuple[float, float]
    overlap: float


@dataclass(frozen=True)
class SeenScene:
    """What the oracle sees: the background's colour and every object, largest first."""

    background: str
    items: tuple[SeenItem, ...]


def read_scene(image: Image.Image) -> SeenScene:
    """Read an image (any mode; sizes other than 64 x 64 px are resized) into its facts."""
    rgb = image.convert("RGB")
    if rgb.size != (IMAGE_SIZE_PX, IMAGE_SIZE_PX):
        rgb = rgb.resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX), Image.Resampling.LANCZOS)
    pixels = np.asarray(rgb, dtype=np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    background = _nearest(np.median(border, axis=0))
    labels = ((pixels[:, :, None] - _PALETTE) ** 2).sum(-1).argmin(-1)
    found = []
    for index, color in enumerate(_NAMES):
        if color == background:
            continue
        regions, count = ndimage.label(ndimage.binary_opening(labels == index, np.ones((3, 3))))
        for region in range(1, count + 1):
            core = regions == region
            if core.sum() >= MIN_AREA_PX:
                found.append((core.sum(), _describe(pixels, core, color, background)))
    return SeenScene(background, tuple(item for _, item in sorted(found, key=lambda pair: -pair[0])))


def check(image: Image.Image, scene: Scene) -> tuple[float, bool]:
    """Return the fraction in [0, 1] of the caption's facts that hold in the image, and whether all of them do.

    Objects are matched to the caption's items in the order that makes the most facts hold; an object that is missing
    makes all its facts and the relation fail, an object too many makes the count fail.
    """
    seen = read_scene(image)
    slots: list[SeenItem | None] = [*seen.items, *[None] * max(0, len(scene.items) - len(seen.items))]
    best = max(_facts(scene, chosen) for chosen in permutations(slots, len(scene.items)))
    held = best + (seen.background == scene.background) + (len(seen.items) == len(scene.items))
    return held / scene.num_facts, held == scene.num_facts


def _facts(scene: Scene, chosen: tuple[SeenItem | None, ...]) -> int:
    held = sum(_item_facts(item, seen) for item, seen in zip(scene.items, chosen, strict=True))
    if scene.relation is not None and chosen[0] is not None and chosen[1] is not None:
        dx, dy = (a - b for a, b in zip(chosen[0].center, chosen[1].center, strict=True))
        seen_relation = (
            ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
        )
        held += seen_relation == scene.relation
    return held


def _item_facts(item: Item, seen: SeenItem | None) -> int:
    if seen is None:
        return 0
    return (item.color == seen.color) + (item.shape == seen.shape) + (item.size is not None and item.size == seen.size)


def _nearest(color: np.ndarray) -> str:
    return _NAMES[int(((color - _PALETTE) ** 2).sum(-1).argmin())]


def _describe(pixels: np.ndarray, core: np.ndarray, color: str, background: str) -> SeenItem:
    """Fit every template to a region: the pixels nearer to the object's colour than to the background's."""
    own, other = np.array(COLORS[color], np.float32), np.array(COLORS[background], np.float32)
    coverage = ((pixels - other) @ (own - other)) / ((own - other) ** 2).sum()
    mask = (coverage > 0.5) & ndimage.binary_dilation(core, iterations=2)
    rows, columns = np.nonzero(mask)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    overlap, shape, radius = max(
        (_overlap(mask, box, shape, radius), shape, radius) for shape in SHAPES for radius in _RADII
    )
    size = None if overlap < MIN_OVERLAP else ("small" if radius < _SIZE_BOUNDARY_PX else "large")
    center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    return SeenItem(color, shape if overlap >= MIN_OVERLAP else None, size, center, float(overlap))


def _overlap(mask: np.ndarray, box: tuple[int, int, int, int], shape: str, radius: float) -> float:
    """Intersection over union of a mask and a template whose bounding box is centred on the mask's."""
    template = _template(shape, radius)
    width, height = template.shape[1], template.shape[0]
    if abs(width - (box[2] - box[0])) > 5 or abs(height - (box[3] - box[1])) > 5:
        return 0.0
    left, top = round((box[0] + box[2] - width) / 2), round((box[1] + box[3] - height) / 2)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + width, IMAGE_SIZE_PX), min(top + height, IMAGE_SIZE_PX)
    intersection = (mask[y0:y1, x0:x1] & template[y0 - top : y1 - top, x0 - left : x1 - left]).sum()
    return intersection / (mask.sum() + template.sum() - intersection)


@functools.cache
def _template(shape: str, radius: float) -> np.ndarray:
    """A boolean mask of a shape, cropped to its bounding box."""
    scale, side = 4, 40
    canvas = Image.new("L", (side * scale, side * scale))
    points = [(x * scale, y * scale) for x, y in outline(shape, radius, (side / 2, side / 2))]
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    mask = np.asarray(canvas.resize((side, side), Image.Resampling.BOX)) > 127
    rows, columns = np.nonzero(mask)
    return mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
