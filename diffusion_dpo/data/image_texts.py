"""The texts that programs leave in an image's file, read from its headers alone: no pixel is decoded.

PNG: the chunks tEXt, zTXt, iTXt and eXIf (PNG specification, third edition, section 11.3). JPEG: the segments APP1 and
COM. WebP: the chunk EXIF. EXIF itself is a TIFF directory (CIPA DC-008, section 4.6).
"""

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_BYTES = 1 << 24
"""A longer text is none: the largest graphs of ComfyUI have some hundred kilobytes."""
_EXIF_NAMES = {
    0x010D: "DocumentName",
    0x010E: "ImageDescription",
    0x010F: "Make",
    0x0110: "Model",
    0x0131: "Software",
    0x9286: "UserComment",
}
_EXIF_DIRECTORY = 0x8769
_TEXT_TYPES = (1, 2, 7)
"""Of EXIF values: bytes, ASCII, undefined."""


def read_image_texts(file: BinaryIO) -> tuple[dict[str, str], bool]:
    """Return the texts by their keyword, or by the name of their EXIF tag; and whether the headers were there whole.

    A damaged or cut file gives what stands before the damage. Of two texts with one keyword, the first counts.
    """
    head = file.read(12)
    if head.startswith(_PNG):
        file.seek(8)
        found = _of_png(file)
    elif head.startswith(b"\xff\xd8"):
        file.seek(2)
        found = _of_jpeg(file)
    elif head[:4] == b"RIFF" and head[8:] == b"WEBP":
        found = _of_webp(file)
    else:
        return {}, True
    texts: dict[str, str] = {}
    try:
        for name, text in found:
            texts.setdefault(name, text)
    except (struct.error, zlib.error, ValueError, IndexError):
        return texts, False
    return texts, True


def _of_png(file: BinaryIO) -> Iterator[tuple[str, str]]:
    """Yield the texts of the chunks; those behind the pixels only where there was none before."""
    there = False
    while True:
        size, kind = struct.unpack(">I4s", file.read(8))
        if kind == b"IEND" or (kind == b"IDAT" and there):
            return
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"eXIf") or size > _MOST_BYTES:
            file.seek(size + 4, 1)
            continue
        data = _read(file, size)
        file.seek(4, 1)
        there = True
        if kind == b"eXIf":
            yield from _of_exif(data)
            continue
        name, _, rest = data.partition(b"\0")
        if kind == b"tEXt":
            # Latin-1 by the specification, UTF-8 by those who do not care
            yield name.decode("latin-1"), _utf8_or_latin1(rest)
        elif kind == b"zTXt":
            yield name.decode("latin-1"), _utf8_or_latin1(_inflate(rest[1:]))
        else:
            is_packed = rest[:1] == b"\1"
            text = rest[2:].split(b"\0", 2)[2]  # after the language and the translated keyword
            yield name.decode("latin-1"), (_inflate(text) if is_packed else text).decode("utf-8", "replace")


def _of_jpeg(file: BinaryIO) -> Iterator[tuple[str, str]]:
    while True:
        mark, kind, size = struct.unpack(">BBH", file.read(4))
        if mark != 0xFF or kind in (0xD9, 0xDA) or size < 2:  # the pixels, or no segment at all
            return
        if kind not in (0xE1, 0xFE):
            file.seek(size - 2, 1)
            continue
        data = _read(file, size - 2)
        if kind == 0xFE:
            yield "Comment", _utf8_or_latin1(data.rstrip(b"\0"))
        elif data.startswith(b"Exif\0\0"):
            yield from _of_exif(data[6:])


def _of_webp(file: BinaryIO) -> Iterator[tuple[str, str]]:
    while True:
        kind, size = struct.unpack("<4sI", file.read(8))
        if kind == b"EXIF" and size <= _MOST_BYTES:
            yield from _of_exif(_read(file, size).removeprefix(b"Exif\0\0"))
            return
        file.seek(size + size % 2, 1)


def _of_exif(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield the texts of a TIFF's first directory and of its EXIF directory."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return
    directories = [struct.unpack(f"{order}I", data[4:8])[0]]
    for directory in directories:  # which grows by one
        (count,) = struct.unpack_from(f"{order}H", data, directory)
        for number in range(count):
            entry = directory + 2 + 12 * number
            tag, kind, size = struct.unpack_from(f"{order}HHI", data, entry)
            if tag == _EXIF_DIRECTORY and len(directories) == 1:
                directories.append(struct.unpack_from(f"{order}I", data, entry + 8)[0])
            elif tag in _EXIF_NAMES and kind in _TEXT_TYPES:
                start = entry + 8 if size <= 4 else struct.unpack_from(f"{order}I", data, entry + 8)[0]
                value = data[start : start + size]
                yield _EXIF_NAMES[tag], _user_comment(value) if tag == 0x9286 else _utf8_or_latin1(value.rstrip(b"\0"))


def _user_comment(data: bytes) -> str:
    """Return the text of a UserComment; its first 8 bytes name the encoding, unless a program left them out."""
    code, text = data[:8], data[8:]
    if code == b"UNICODE\0":
        # UTF-16, of either byte order whatever that of the file: Latin letters tell, whose high byte is 0
        is_little = text.startswith(b"\xff\xfe") or text[1::2].count(0) > text[::2].count(0)
        return text.decode("utf-16-le" if is_little else "utf-16-be", "replace").strip("\ufeff\0")
    if code in (b"ASCII\0\0\0", b"\0\0\0\0\0\0\0\0"):
        return _utf8_or_latin1(text.strip(b"\0"))
    if code == b"JIS\0\0\0\0\0":
        return text.strip(b"\0").decode("iso2022_jp", "replace")
    return _utf8_or_latin1(data.rstrip(b"\0"))


def _read(file: BinaryIO, size: int) -> bytes:
    """Return the next `size` bytes; raises ValueError where the file ends before."""
    data = file.read(size)
    if len(data) < size:
        raise ValueError("the file ends too early")
    return data


def _inflate(data: bytes) -> bytes:
    return zlib.decompressobj().decompress(data, _MOST_BYTES)


def _utf8_or_latin1(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")
