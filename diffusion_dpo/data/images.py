"""Encoded image bytes, from anywhere, to RGB pixels of bounded size, or a few words on why not."""

import base64
import hashlib
import io
import struct
from collections.abc import Mapping, Sized
from typing import Any

from PIL import ExifTags, Image, ImageOps

from diffusion_dpo.data.image_kinds import undecoded

MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is decoded. Pillow knows dozens more, some of which start other programs."""

_BASE64_HEADS = (
    b"iVBORw0KGgo",
    b"/9j/",
    b"_9j_",
    b"UklGR",
    b"R0lGOD",
    b"Qk",
    b"SUkqA",
    b"TU0AK",
    b"AAAA",
    b"/woAAA",
    b"AAAADEpYTCA",
)
"""How base64 of PNG, JPEG, WebP, GIF, BMP, TIFF, and of AVIF and its like, begins."""
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_LONGEST_PATH = 4096
_LONGEST_HEAD = 64
A_PATH = "a path instead of image bytes"

# What Pillow's decoders raise on damaged files, the last six on damaged metadata; RuntimeError is AVIF's.
DECODING_ERRORS = (
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


class Unusable(str):
    """In place of a value of a row that cannot be used: a few words on why."""

    __slots__ = ()


class BrokenImage(ValueError):  # noqa: N818 - it names the image's state
    """An image that cannot be used; the message says why in a few words, without naming the image."""


def image_bytes(value: Any) -> bytes:
    """Return the encoded bytes of an image column's value: bytes, base64 text, or a struct of `bytes` and `path`.

    Raises BrokenImage. A path is never followed: a dataset must not read the user's files.
    """
    if isinstance(value, Unusable):
        raise BrokenImage(value)
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(data, bytearray | memoryview) or (isinstance(data, list) and is_bytes_as_numbers(data)):
        data = bytes(data)
    if isinstance(data, str | bytes) and data:
        decoded = _from_base64(data)
        if decoded is not None:
            return decoded
    if isinstance(data, bytes) and data:
        return data
    if isinstance(data, str) and data:
        raise BrokenImage(_explain_text(data))
    if isinstance(value, Mapping) and value.get("path"):
        raise BrokenImage(A_PATH)
    if isinstance(data, list | tuple) and data:
        raise BrokenImage("a list instead of one image")
    is_nan = isinstance(data, float) and data != data  # pandas writes it for what is missing
    raise BrokenImage(
        "no image" if is_nan or data is None or (isinstance(data, Sized) and len(data) == 0) else "not image bytes"
    )


def is_bytes_as_numbers(data: Any) -> bool:
    """Whether a value is a list<uint8>, as JSON and some writers of Parquet hold bytes."""
    return (
        isinstance(data, list) and len(data) > _LONGEST_HEAD and all(type(it) is int and 0 <= it < 256 for it in data)
    )


def _from_base64(data: str | bytes) -> bytes | None:
    """Return the image that is written as base64, or as a data: URI with it; None for anything else."""
    text = data if isinstance(data, bytes) else data.encode("ascii", errors="replace")
    head = text[:_LONGEST_HEAD].lstrip()
    if head.startswith(b"data:"):
        kind, _, text = text.partition(b",")
        if not kind.endswith(b";base64"):
            return None
    elif not head.startswith(_BASE64_HEADS):
        return None
    text = b"".join(text.split()).translate(_URL_SAFE)
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True) or None
    except ValueError:
        return None


def _explain_text(text: str) -> str:
    if text.startswith(("http://", "https://")):
        return "a URL instead of image bytes"
    if len(text) > _LONGEST_PATH or text.startswith("data:"):
        return "text instead of image bytes, and no base64 of an image"
    return A_PATH


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
    except DECODING_ERRORS as error:
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
    except DECODING_ERRORS:
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
    name = undecoded(data)
    if name:
        return f"{name}, which is not decoded here; convert it to PNG or JPEG"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image file"
    return "truncated image file" if "truncated" in str(error).lower() else "damaged image file"
