"""Real photographs for the tests, from scikit-image, in the formats and sizes that people have."""

import functools
import hashlib
import io
from pathlib import Path
from typing import Any

import skimage
from PIL import Image

_FOLDER = Path(skimage.__file__).parent / "data"
NAMES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")


def photo(index: int, size: tuple[int, int] = (96, 64), mode: str = "RGB") -> Image.Image:
    return _whole(index).resize(size).convert(mode)


@functools.cache
def _whole(index: int) -> Image.Image:
    return Image.open(_FOLDER / NAMES[index]).convert("RGB")


def encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:  # noqa: A002 - Pillow's own word
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(index: int, size: tuple[int, int] = (96, 64), mode: str = "RGB") -> bytes:
    return encode(photo(index, size, mode))


def folder_hash(folder: Path) -> str:
    """Hash of all names and contents below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()
