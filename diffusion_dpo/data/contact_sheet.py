"""A contact sheet: many small images on one page, in blocks that share a title. Pillow only."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GREEN, RED, GREY = (46, 160, 87), (214, 69, 65), (150, 154, 160)

_TILE_PX = 168
_TILES_PER_ROW = 8
_GAP_PX = 6
_EDGE_PX = 3
_MARGIN_PX = 28
_TITLE_LINES = 2
_PAGE, _MAT, _INK, _FAINT = (255, 255, 255), (241, 242, 244), (32, 34, 38), (116, 120, 128)


@dataclass(frozen=True)
class Tile:
    """One RGB image, a few words underneath, and the colour of its edge, if it has one."""

    image: Image.Image
    caption: str = ""
    edge: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Block:
    """Tiles that belong together, what they have in common, and a few words on how they differ."""

    title: str
    tiles: tuple[Tile, ...]
    note: str = ""


def draw_sheet(heading: str, blocks: Sequence[Block]) -> Image.Image:
    """Return the page as RGB: blocks of equal size, left to right, each title under its tiles."""
    columns = min(max((len(block.tiles) for block in blocks), default=1), _TILES_PER_ROW)
    lines = math.ceil(max((len(block.tiles) for block in blocks), default=1) / columns)
    across = min(_TILES_PER_ROW // columns, max(len(blocks), 1))
    caption, title, large = (ImageFont.load_default(size) for size in (13, 15, 20))
    line_px = 20
    tile_height = _TILE_PX + line_px + _GAP_PX
    width = columns * (_TILE_PX + _GAP_PX) - _GAP_PX
    height = lines * tile_height + _TITLE_LINES * line_px
    top = _MARGIN_PX + 40
    page_size = (
        2 * _MARGIN_PX + across * (width + _MARGIN_PX) - _MARGIN_PX,
        top + math.ceil(len(blocks) / across) * (height + _MARGIN_PX),
    )
    page = Image.new("RGB", page_size, _PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN_PX, _MARGIN_PX), _fit(heading, large, page.width - 2 * _MARGIN_PX), _INK, large)
    for number, block in enumerate(blocks):
        left = _MARGIN_PX + number % across * (width + _MARGIN_PX)
        upper = top + number // across * (height + _MARGIN_PX)
        for i, tile in enumerate(block.tiles):
            x, y = left + i % columns * (_TILE_PX + _GAP_PX), upper + i // columns * tile_height
            _draw_tile(page, draw, tile, x, y)
            draw.text((x, y + _TILE_PX + 4), _fit(tile.caption, caption, _TILE_PX), _FAINT, caption)
        for i, line in enumerate(_wrap(" · ".join(filter(None, [block.note, block.title])), title, width)):
            draw.text((left, upper + lines * tile_height + i * line_px), line, _INK, title)
    return page


def _draw_tile(page: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, x: int, y: int) -> None:
    """Draw one image, whole and centred on its mat, upscaled where it is small."""
    draw.rectangle((x, y, x + _TILE_PX - 1, y + _TILE_PX - 1), fill=_MAT)
    room = _TILE_PX - 2 * _EDGE_PX
    scale = room / max(tile.image.size)
    size = (max(1, round(tile.image.width * scale)), max(1, round(tile.image.height * scale)))
    corner = (x + (_TILE_PX - size[0]) // 2, y + (_TILE_PX - size[1]) // 2)
    page.paste(tile.image.resize(size, Image.Resampling.LANCZOS), corner)
    if tile.edge is not None:
        draw.rectangle((x, y, x + _TILE_PX - 1, y + _TILE_PX - 1), outline=tile.edge, width=_EDGE_PX)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text into at most _TITLE_LINES lines of `width` px, the last one shortened."""
    words = text.split()
    lines: list[str] = []
    while words and len(lines) < _TITLE_LINES - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(_fit(" ".join(words[:count]), font, width))
        words = words[count:]
    return [*lines, _fit(" ".join(words), font, width)]


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shorten a text to `width` px, with an ellipsis where something is missing."""
    text = " ".join(text.split())[:width]  # no letter is narrower than a pixel; long texts are slow to measure
    if font.getlength(text) <= width:
        return text
    too_long = bisect_right(range(len(text)), width, key=lambda n: math.ceil(font.getlength(text[:n] + "...")))
    return text[: max(too_long - 1, 0)].rstrip() + "..."
