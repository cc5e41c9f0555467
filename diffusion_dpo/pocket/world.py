"""The pocket world: scenes of one or two coloured shapes, their English captions, and how to draw them.

A world this small has a property that photographs lack: whether an image is what its caption says can be *checked*
(`oracle.py`). That makes it the place where the whole toolkit is proven end to end.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE_PX = 64
SUPERSAMPLING = 4

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "cyan": (70, 205, 225),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, tuple[float, float]] = {"small": (9.0, 10.0), "large": (12.5, 13.5)}  # radius in px
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_MARGIN_PX = 2.0
_GAP_PX = 3.0

_ITEM = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_ITEM}(?: ({'|'.join(RELATIONS)}) {_ITEM})? on an? ({'|'.join(COLORS)}) background")


@dataclass(frozen=True)
class Item:
    """One object of a scene. `size` is None where the caption does not say it (then either size is right)."""

    color: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        return "a " + " ".join(word for word in (self.size, self.color, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """One or two items on a background; with two, `relation` is where the first is, seen from the second."""

    items: tuple[Item, ...]
    background: str
    relation: str | None = None

    @property
    def caption(self) -> str:
        """The caption, which `parse_caption` reads back into an equal scene."""
        return f"{f' {self.relation} '.join(str(item) for item in self.items)} on a {self.background} background"

    @property
    def num_facts(self) -> int:
        """Number of checkable statements: the count, the background, the relation, and each item's words."""
        return 2 + (self.relation is not None) + sum(2 + (item.size is not None) for item in self.items)


def parse_caption(caption: str) -> Scene | None:
    """Return the scene that a caption of this world describes, or None for any other text."""
    match = _CAPTION.fullmatch(" ".join(caption.lower().replace(",", " ").strip(" .").split()))
    if match is None:
        return None
    size_a, color_a, shape_a, relation, size_b, color_b, shape_b, background = match.groups()
    items = [Item(color_a, shape_a, size_a)]
    if relation is not None:
        items.append(Item(color_b, shape_b, size_b))
    return Scene(tuple(items), background, relation)


def is_held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the held-out tenth of the world.

    The split is by content: sizes are ignored, and "A left of B" is the same content as "B right of A", so no caption
    of the held-out tenth is a rewording of one that was trained on.
    """
    names = [f"{item.color} {item.shape}" for item in scene.items]
    relation = scene.relation or ""
    if relation in ("right of", "below"):
        names, relation = names[::-1], OPPOSITE[relation]
    content = "|".join([*names, relation, scene.background])
    return hashlib.sha256(content.encode()).digest()[0] % 10 == 0


def sample_scene(rng: np.random.Generator, *, num_items: int | None = None, held_out: bool = False) -> Scene:
    """Draw a random scene of the asked-for split; `num_items` None means one or two with equal probability."""
    colors = list(COLORS)
    while True:
        background = colors[rng.integers(len(colors))]
        others = [color for color in colors if color != background]
        items = tuple(
            Item(
                color=others[rng.integers(len(others))],
                shape=SHAPES[rng.integers(len(SHAPES))],
                size=(*SIZES, None)[rng.integers(len(SIZES) + 1)],
            )
            for _ in range(num_items or rng.integers(1, 3))
        )
        relation = RELATIONS[rng.integers(len(RELATIONS))] if len(items) == 2 else None
        scene = Scene(items, background, relation)
        if is_held_out(scene) == held_out:
            return scene


@cache
def num_captions(*, num_items: int | None = None, held_out: bool = False) -> int:
    """Count the captions of a split; of one object there are few (75 held-out ones), of two many thousands."""
    count = 0
    for number in (1, 2) if num_items is None else (num_items,):
        relations = RELATIONS if number == 2 else (None,)
        for background in COLORS:
            named = [Item(color, shape) for color, shape in product(COLORS, SHAPES) if color != background]
            contents = (Scene(items, background, r) for items in product(named, repeat=number) for r in relations)
            wordings = (len(SIZES) + 1) ** number  # of each item a size is said, or none
            count += wordings * sum(is_held_out(scene) == held_out for scene in contents)
    return count


def distinct_scenes(seed: int, *, num_items: int | None = None, held_out: bool = False) -> Iterator[Scene]:
    """Yield random scenes without repeating a caption, until there is none left (see `num_captions`).

    The sequence is a function of the arguments. The last scenes of a large split are slow to come: all are drawn at
    random until each has turned up.
    """
    rng = np.random.default_rng([seed, 2 if num_items is None else num_items, held_out])
    seen: set[str] = set()
    while len(seen) < num_captions(num_items=num_items, held_out=held_out):
        scene = sample_scene(rng, num_items=num_items, held_out=held_out)
        if scene.caption not in seen:
            seen.add(scene.caption)
            yield scene


def fill_sizes(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with every unsaid size chosen at random, as it must be before it can be drawn."""
    names = tuple(SIZES)
    items = tuple(replace(item, size=item.size or names[rng.integers(len(names))]) for item in scene.items)
    return replace(scene, items=items)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw a scene as an RGB image of 64 x 64 px; what the caption leaves open (position, exact size) is random."""
    scene = fill_sizes(scene, rng)
    radii = [float(rng.uniform(*SIZES[item.size or ""])) for item in scene.items]
    canvas = Image.new("RGB", (IMAGE_SIZE_PX * SUPERSAMPLING,) * 2, COLORS[scene.background])
    draw = ImageDraw.Draw(canvas)
    for item, radius, center in zip(scene.items, radii, _place(scene, radii, rng), strict=True):
        points = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in outline(item.shape, radius, center)]
        draw.polygon(points, fill=COLORS[item.color])
    return canvas.resize((IMAGE_SIZE_PX,) * 2, Image.Resampling.BOX)


def outline(shape: str, radius: float, center: tuple[float, float]) -> list[tuple[float, float]]:
    """Return the corners (x, y) in px of a shape whose bounding box is about 2 * radius wide."""
    cx, cy = center
    if shape == "square":
        half = 0.88 * radius
        return [(cx - half, cy - half), (cx + half, cy - half), (cx + half, cy + half), (cx - half, cy + half)]
    if shape == "triangle":
        return [(cx, cy - radius), (cx + radius, cy + 0.8 * radius), (cx - radius, cy + 0.8 * radius)]
    if shape == "cross":
        arm = 0.36 * radius
        corner = [(arm, radius), (arm, arm), (radius, arm), (radius, -arm), (arm, -arm), (arm, -radius)]
        return [(cx + x, cy + y) for x, y in [*corner, *((-x, -y) for x, y in corner)]]
    angles = [2 * math.pi * k / 48 for k in range(48)]
    return [(cx + radius * math.cos(angle), cy + radius * math.sin(angle)) for angle in angles]


def _place(scene: Scene, radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Choose centres (x, y) in px so that everything is inside the image, nothing touches, and the relation holds."""
    low = [_MARGIN_PX + radius for radius in radii]
    high = [IMAGE_SIZE_PX - _MARGIN_PX - radius for radius in radii]
    if scene.relation is None:
        return [(float(rng.uniform(low[0], high[0])), float(rng.uniform(low[0], high[0])))]
    first, second = (0, 1) if scene.relation in ("left of", "above") else (1, 0)
    distance = sum(radii) + _GAP_PX
    start = float(rng.uniform(low[first], max(low[first], high[second] - distance)))
    end = float(rng.uniform(min(start + distance, high[second]), high[second]))
    middle = float(rng.uniform(max(low), min(high)))
    tilt = 0.25 * (end - start) * float(rng.uniform(-1, 1))
    along = {first: start, second: end}
    across = {first: middle - tilt, second: middle + tilt}
    clipped = {k: min(max(across[k], low[k]), high[k]) for k in (0, 1)}
    if scene.relation in ("left of", "right of"):
        return [(along[k], clipped[k]) for k in (0, 1)]
    return [(clipped[k], along[k]) for k in (0, 1)]
