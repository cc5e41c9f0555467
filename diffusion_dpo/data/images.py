"""Encoded image bytes, from anywhere, to RGB pixels of bounded size, or a few words on why not."""

import hashlib
import io
import struct
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is decoded. Pillow knows dozens more, some of which start other programs."""

# What Pillow's decoders raise on damaged files, the last six on damaged metadata; RuntimeError is AVIF's.
_DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError, struct.error),
    *(TypeError, AttributeError, OverflowError, KeyError, IndexError, ZeroDivisionError),
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation of EXIF; 1 is upright."""


class BrokenImage(ValueError):  # noqa: N818 - it names the image's state
    """An image that cannot be used; the message says why in a few words, without naming the image."""


def image_bytes(value: Any) -> bytes:
    """Return the encoded bytes of an image column's value: plain bytes, or a struct of `bytes` and `path`.

    Raises BrokenImage. A path is never followed: a dataset must not read the user's files.
    """
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(data, bytes) and data:
        return data
    if isinstance(data, str) or (isinstance(value, Mapping) and value.get("path")):
        raise BrokenImage("a path instead of image bytes")
    raise BrokenImage("no image" if data is None or data == b"" else "not image bytes")


def middle_square(size_px: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the largest square in the middle of an image of (width, height)."""
    side = min(size_px)
    left, top = (size_px[0] - side) / 2, (size_px[1] - side) / 2
    return left, top, left + side, top + side


def decode_rgb(data: bytes, *, min_side_px: int = 32) -> Image.Image:
    """Return the image as RGB: upright by its EXIF tag, transparency over white, of an animation the first frame.

    Raises BrokenImage when it cannot be decoded, has a side below `min_side_px`, or has more than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) < min_side_px:
                raise BrokenImage(f"smaller than {min_side_px} px")
            if width * height > MAX_PIXELS:
                raise BrokenImage(f"larger than {MAX_PIXELS // 1_000_000} megapixels")
            image.load()
            return _to_rgb(_upright(image))
    except BrokenImage:
        raise
    except Image.DecompressionBombError:
        raise BrokenImage(f"larger than {MAX_PIXELS // 1_000_000} megapixels") from None
    except _DECODING_ERRORS as error:
        raise BrokenImage(_explain(data, error)) from error


def fit_to(image: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """Return the middle of an image at (width, height), scaled to cover it, without distortion."""
    return ImageOps.fit(image, size_px, Image.Resampling.LANCZOS)


def pixel_hash(image: Image.Image) -> str:
    """Return the content id of an RGB image: 32 hex digits, the same whatever file format held the pixels."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:32]


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image by its EXIF orientation; metadata that cannot be read says nothing, and never costs the image."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DECODING_ERRORS:
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenImage("floating-point pixels")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits to 255
        import numpy as np  # here, because the importers' settings are read in a fraction of its import time

        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BrokenImage("32-bit pixels")
        image = Image.fromarray((values // 257).astype(np.uint8))
    if image.has_transparency_data:
        upper = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper).convert("RGB")
    return image.convert("RGB")


def _explain(data: bytes, error: Exception) -> str:
    head = data[:256].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "a web page or SVG, not an image file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image file"
    return "truncated image file" if "truncated" in str(error).lower() else "damaged image file"
