"""Text that people wrote, whatever their editor made of it: byte order marks, UTF-16, line ends of Windows."""

import codecs

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def encoding_of(head: bytes) -> str:
    """Return the encoding of a file of text by its first bytes."""
    return "utf-16" if head.startswith(_UTF16) else "utf-8-sig"


def decode_text(data: bytes) -> str:
    """Return the text of a file: UTF-8, or UTF-16 where its mark says so, without the mark and with plain line ends.

    Raises UnicodeDecodeError for any other encoding.
    """
    text = data.decode(encoding_of(data))
    return text.replace("\r\n", "\n")
