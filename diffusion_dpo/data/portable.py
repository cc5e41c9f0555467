"""Encoded images in a form that every program decodes to the pixels that are trained on here."""

import io

from PIL import ExifTags, Image

from diffusion_dpo.data.images import DECODING_ERRORS, FORMATS, decode_rgb
from diffusion_dpo.data.shards import encode_png

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""What Pillow, `datasets` and `webdataset` decode wherever they run; AVIF, for one, is left as bytes by many."""
_PLAIN_MODES = ("RGB", "L", "1", "P", "CMYK", "YCbCr")
"""Modes in which Image.convert("RGB") is all that is to be done; transparency and 16 bits are not among them."""
_TURNING = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Where a PNG may hold an orientation; looking for it otherwise decodes the file."""


def suffix_of(data: bytes) -> str:
    """Return jpg, png or webp of an image that any program shows as it is meant; "" of one to be written anew.

    Those are images that are turned by their EXIF tag, which many loaders ignore, transparent ones,
    whose hidden colours would come to light, those of more than 8 bits, and other file formats.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        suffix = _SUFFIXES.get(str(image.format), "")
        plain = image.mode in _PLAIN_MODES and not image.has_transparency_data
        return suffix if suffix and plain and not _is_turned(image, data) else ""


def portable(data: bytes, suffix: str = "") -> bytes:
    """Return an image as it is where it can stay, and has the `suffix` that is asked for, "" for any; else as a PNG.

    That is upright, RGB, and has the same pixel hash. Nothing (b"") stays nothing.
    """
    found = suffix_of(data) if data else ""
    return data if not data or (found and suffix in ("", found)) else encode_png(decode_rgb(data))


def _is_turned(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG" and not any(mark in data for mark in _TURNING):
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except DECODING_ERRORS:  # metadata that cannot be read turns nothing, as in decode_rgb
        return False
