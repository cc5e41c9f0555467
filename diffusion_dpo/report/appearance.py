"""What can be seen of an image without understanding it: light, colour, detail, size, and whether it is blank."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffusion_dpo.data.images import FORMATS
from diffusion_dpo.scorers.brightness import brightness
from diffusion_dpo.scorers.colorfulness import colorfulness
from diffusion_dpo.scorers.saturation import saturation
from diffusion_dpo.scorers.sharpness import sharpness

_SIDE_PX = 512
_GRID = (8, 9)
_BLANK_LEVELS = 3
_GRADIENT_LEVELS = 3
_NEAR_BITS = 6
_NEAR_LEVELS = 10
_COMPARED_AT_MOST = 500


class Appearance(NamedTuple):
    """What is kept of an image: a few numbers and a small hash, never its pixels."""

    brightness: float
    saturation: float
    sharpness: float
    colorfulness: float
    num_bytes: int
    format: str
    size_px: tuple[int, int]
    is_blank: bool
    """Every pixel is of one colour, black mostly: what a safety checker or a failed decoder leaves."""
    cells: bytes
    """Mean colours of a grid of 8 rows x 9 columns, uint8 RGB: what `near_duplicates` compares."""

    @property
    def numbers(self) -> dict[str, float]:
        """What may give a label away, by name."""
        width, height = self.size_px
        return {
            "brightness": self.brightness,
            "saturation": self.saturation,
            "sharpness": self.sharpness,
            "colorfulness": self.colorfulness,
            "file size": float(self.num_bytes),
            "pixels": float(width * height),
            "aspect ratio": width / height,
        }


def look_at(image: Image.Image, data: bytes) -> Appearance:
    """Look at an RGB image and at the encoded bytes that it was decoded from.

    Light and colour are measured on an image of at most about 512 px, so that large images cost little more than their
    decoding.
    """
    small = image.reduce(max(1, round(max(image.size) / _SIDE_PX)))
    with Image.open(io.BytesIO(data), formats=FORMATS) as encoded:
        name = encoded.format or ""
    rows, columns = _GRID
    return Appearance(
        brightness=brightness(small),
        saturation=saturation(small),
        sharpness=sharpness(image),
        colorfulness=colorfulness(small),
        num_bytes=len(data),
        format=name,
        size_px=image.size,
        is_blank=all(high - low <= _BLANK_LEVELS for low, high in image.getextrema()),  # type: ignore[misc]
        cells=small.resize((columns, rows), Image.Resampling.BOX).tobytes(),
    )


def near_duplicates(cells: Sequence[bytes]) -> int:
    """Return how many of some images look like an earlier one among them; of more than 500, of the first 500.

    The hash is dHash (N. Krawetz, "Kind of like that", 2013) on each of R, G and B: whether a cell of the grid is
    clearly darker than its right neighbour, 192 bits. Alike are images that differ in at most 6 of them, and by at
    most 10 of 255 levels in every cell: re-encoded, resized or a little noisier, yet not recoloured.
    """
    if len(cells) < 2:
        return 0
    grids = np.stack([np.frombuffer(it, np.uint8) for it in cells[:_COMPARED_AT_MOST]]).astype(np.int16)
    grids = grids.reshape(-1, *_GRID, 3)
    bits = grids[:, :, 1:] - grids[:, :, :-1] > _GRADIENT_LEVELS
    found = 0
    for i in range(1, len(grids)):
        close = (bits[:i] != bits[i]).sum(axis=(1, 2, 3)) <= _NEAR_BITS
        close &= np.abs(grids[:i] - grids[i]).max(axis=(1, 2, 3)) <= _NEAR_LEVELS
        found += bool(close.any())
    return found
