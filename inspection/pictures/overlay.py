"""A map drawn over its image."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ...dataset.label_map.path import Box
from ..label_sets import Floats, Ids
from .map_facts import OTHER, LegendEntry, letters_of, viridis

INK = (20, 20, 20)
_FONT = "DejaVuSans.ttf"
_SMALLEST_LETTERED = 8  # pixels a cell

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@cache
def font(size: int) -> Font:
    """DejaVu Sans where it is installed, for its many scripts; else Pillow's own."""
    try:
        return ImageFont.truetype(_FONT, size)
    except OSError:
        return ImageFont.load_default(size)


def shortened(text: str, size: int, width: float) -> str:
    """The text without its middle if it would be wider than `width` pixels.

    Characters that would not show, or not where they stand, become backslash escapes.
    """
    # Pillow's own font shows boxes for all that is not ASCII.
    ascii_only = not str(getattr(font(size), "path", "")).endswith(_FONT)
    text = "".join(
        c if c.isprintable() and (c.isascii() or not ascii_only) else ascii(c)[1:-1] for c in text
    )
    if font(size).getlength(text) <= width:
        return text
    for keep in range(min(len(text), 400) - 1, 1, -1):
        short = f"{text[: keep // 2]}...{text[-(keep - keep // 2) :]}"
        if font(size).getlength(short) <= width:
            return short
    return ""


def class_overlay(
    image: Image.Image,
    best: Ids,
    probs: Floats,
    entries: Sequence[LegendEntry],
    extent: Box,
    shown: npt.NDArray[np.bool_] | None = None,
) -> Image.Image:
    """The image under the colour and the letter of each patch's class.

    Args:
        image: RGB.
        best: int [H, W], the class of each patch.
        probs: [H, W], its probability.
        entries: the classes that have a colour and a letter.
        extent: box (x0, y0, x1, y1) of the image, normalised, that the patches cover.
        shown: bool [H, W]; patches without a target are hatched.
    """
    colours = {entry.class_id: entry.colour for entry in entries}
    drawn = _tinted(image, best, extent, lambda class_id: colours.get(class_id, OTHER), 0.5)
    draw = ImageDraw.Draw(drawn)
    letters = letters_of(best, probs, entries)
    for row, column, box in _cells(best.shape, extent, image.size):
        left, top, right, bottom = box
        side = min(right - left, bottom - top)
        if shown is not None and not shown[row, column]:
            # Diagonal stripes, counted from the image's corner so that they run on across cells.
            y, x = np.mgrid[top:bottom, left:right]
            stripes = np.where(((x + y) % 8 < 2)[..., None], 150, 225).repeat(3, -1)
            drawn.paste(Image.fromarray(stripes.astype(np.uint8)), box[:2])
        elif side >= _SMALLEST_LETTERED:
            draw.text(
                ((left + right) / 2, (top + bottom) / 2),
                letters[row][column],
                (255, 255, 255),
                font(min(max(round(side * 0.62), 8), 26)),
                anchor="mm",
                stroke_width=1 if side < 24 else 2,
                stroke_fill=(0, 0, 0),
            )
    return drawn


def mass_overlay(image: Image.Image, mass: Floats, extent: Box) -> Image.Image:
    """The image in grey under the colour of each patch's top-k mass, [H, W]."""
    grey = image.convert("L").convert("RGB")  # colours of the image would look like mass
    return _tinted(grey, mass, extent, viridis, 0.75)


def _tinted(
    image: Image.Image,
    values: np.ndarray,
    extent: Box,
    colour: Callable[[Any], str | tuple[int, int, int]],
    alpha: float,
) -> Image.Image:
    tint = image.copy()
    draw = ImageDraw.Draw(tint)
    for row, column, (left, top, right, bottom) in _cells(values.shape, extent, image.size):
        if right > left and bottom > top:
            fill = colour(values[row, column].item())
            draw.rectangle((left, top, right - 1, bottom - 1), fill)
    return Image.blend(image, tint, alpha)


def _cells(
    grid: tuple[int, ...], extent: Box, size: tuple[int, int]
) -> list[tuple[int, int, tuple[int, int, int, int]]]:
    """(row, column, box in pixels) of each patch."""
    height, width = grid
    x = np.rint(np.linspace(extent[0], extent[2], width + 1) * size[0]).astype(int).tolist()
    y = np.rint(np.linspace(extent[1], extent[3], height + 1) * size[1]).astype(int).tolist()
    return [
        (row, column, (x[column], y[row], x[column + 1], y[row + 1]))
        for row in range(height)
        for column in range(width)
    ]
