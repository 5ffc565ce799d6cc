# ruff: noqa: PLC0415 - matplotlib takes a second to import, so it is imported when text is drawn
"""Grids of images with captions."""

import math
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from tljax.runtime.errors import RequestError

INK = "#222222"


def image_grid(
    images: Sequence[UInt8[np.ndarray, "_height _width 3"]],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    cell: int = 160,
) -> Image.Image:
    """Arrange images in rows of square cells, each with its caption below.

    An image keeps its proportions and is centered in its cell. If its side is at most half of the
    cell it is enlarged by a whole number with hard edges, so that its pixels can be counted.

    Args:
        images: RGB images of any sizes.
        captions: one for each image. Newlines break lines, long lines end in an ellipsis, and
            characters without a glyph become a replacement character.
        columns: number of cells in a row; None makes a nearly square grid.
        cell: side of a cell, in pixels.

    Returns:
        An RGB image.

    Raises:
        RequestError: if there are no images, or not as many captions as images.
    """
    if not images:
        raise RequestError("image grid: no images: pass at least one")
    if captions is not None and len(captions) != len(images):
        raise RequestError(
            f"image grid: {len(captions)} captions for {len(images)} images: pass one for each"
        )
    font = _font(max(9, round(cell / 13)))
    lines = [text.split("\n") for text in captions] if captions else [[]] * len(images)
    line_height = sum(font.getmetrics()) + 1
    caption_height = line_height * max(map(len, lines))
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    gap = max(2, cell // 20)
    step_x, step_y = cell + gap, cell + caption_height + gap

    grid = Image.new("RGB", (gap + columns * step_x, gap + rows * step_y), "white")
    draw = ImageDraw.Draw(grid)
    for i, pixels in enumerate(images):
        x, y = gap + i % columns * step_x, gap + i // columns * step_y
        image = _fit(Image.fromarray(pixels), cell)
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), "#f2f2f2")
        grid.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
        for j, line in enumerate(lines[i]):
            text = _ellipsize(printable(line), font, cell)
            draw.text((x, y + cell + 1 + j * line_height), text, INK, font)
    return grid


def _fit(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    filter_ = Image.Resampling.LANCZOS
    if scale >= 2:
        scale, filter_ = math.floor(scale), Image.Resampling.NEAREST
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), filter_)


def _ellipsize(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font_path() -> Path:
    import matplotlib as mpl

    return Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_path(), size)


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_path())).get_charmap())


def printable(text: str) -> str:
    """Replace the characters for which DejaVu Sans has no glyph by a replacement character."""
    return "".join(
        c
        if ord(c) in _glyphs() and unicodedata.category(c)[0] != "C"
        else "\N{REPLACEMENT CHARACTER}"
        for c in unicodedata.normalize("NFC", text)
    )
