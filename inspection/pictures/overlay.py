"""Draw what a map says over its image."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ..patch_map import Floats, Ids
from .map_facts import OTHER, LegendEntry, letters_of, rgb, viridis

INK = (20, 20, 20)
_ALPHA = 0.5
_SMALLEST_LETTERED = 8  # pixels a cell

Box = tuple[float, float, float, float]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@cache
def font(size: int) -> Font:
    """DejaVu Sans where it is installed, for its many scripts; else what Pillow brings along."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


@cache
def _writes_ascii_only() -> bool:
    """Whether there is only Pillow's own font, which shows boxes for all other letters."""
    try:
        ImageFont.truetype("DejaVuSans.ttf", 10)
    except OSError:
        return True
    return False


def printable(text: str) -> str:
    """The text with a backslash escape for each character that would not show, or not in place."""
    ascii_only = _writes_ascii_only()
    return "".join(
        c if c.isprintable() and (c.isascii() or not ascii_only) else ascii(c)[1:-1] for c in text
    )


def shortened(text: str, size: int, width: float) -> str:
    """The printable text, without its middle if it would be wider than `width` pixels."""
    text = printable(text)
    if font(size).getlength(text) <= width:
        return text
    for keep in range(min(len(text), 400) - 1, 1, -1):
        short = f"{text[: keep // 2]}...{text[-(keep - keep // 2) :]}"
        if font(size).getlength(short) <= width:
            return short
    return ""


def class_overlay(
    picture: Image.Image,
    best: Ids,
    probs: Floats,
    entries: Sequence[LegendEntry],
    extent: Box,
    shown: npt.NDArray[np.bool_] | None = None,
) -> Image.Image:
    """The image under the colour and the letter of each patch's class.

    Args:
        picture: RGB.
        best: int [H, W], the class of each patch.
        probs: [H, W], its probability.
        entries: the classes that have a colour and a letter.
        extent: box (x0, y0, x1, y1) of the image, normalised, that the patches cover.
        shown: bool [H, W]; patches without a target are hatched.
    """
    colours = {entry.class_id: rgb(entry.colour) for entry in entries}
    drawn = _tinted(
        picture, best.shape, extent, lambda r, c: colours.get(int(best[r, c]), rgb(OTHER))
    )
    draw = ImageDraw.Draw(drawn)
    letters = letters_of(best, probs, entries)
    for row, column, box in _cells(best.shape, extent, picture.size):
        if shown is not None and not shown[row, column]:
            _hatch(drawn, box)
        else:
            _letter(draw, box, letters[row][column])
    return drawn


def mass_overlay(picture: Image.Image, mass: Floats, extent: Box) -> Image.Image:
    """The image in grey under the colour of each patch's top-k mass, [H, W]."""
    grey = picture.convert("L").convert("RGB")
    return _tinted(grey, mass.shape, extent, lambda r, c: viridis(float(mass[r, c])), 0.75)


def _tinted(
    picture: Image.Image,
    grid: tuple[int, ...],
    extent: Box,
    colour: Callable[[int, int], tuple[int, int, int]],
    alpha: float = _ALPHA,
) -> Image.Image:
    tint = picture.copy()
    draw = ImageDraw.Draw(tint)
    for row, column, box in _cells(grid, extent, picture.size):
        if box[2] > box[0] and box[3] > box[1]:
            draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour(row, column))
    return Image.blend(picture, tint, alpha)


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


def _letter(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], letter: str) -> None:
    side = min(box[2] - box[0], box[3] - box[1])
    if side < _SMALLEST_LETTERED:
        return
    draw.text(
        ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2),
        letter,
        (255, 255, 255),
        font(min(max(round(side * 0.62), 8), 26)),
        anchor="mm",
        stroke_width=1 if side < 24 else 2,
        stroke_fill=(0, 0, 0),
    )


def _hatch(picture: Image.Image, box: tuple[int, int, int, int]) -> None:
    """Diagonal stripes; at the same places in every cell, so that they run on."""
    y, x = np.mgrid[box[1] : box[3], box[0] : box[2]]
    stripes = np.where(((x + y) % 8 < 2)[..., None], 150, 225).repeat(3, -1).astype(np.uint8)
    picture.paste(Image.fromarray(stripes), box[:2])
