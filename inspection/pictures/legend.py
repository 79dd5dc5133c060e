"""Parts of a sheet: the legend, the colour bar, numbered badges."""

from collections.abc import Sequence

from PIL import ImageDraw

from ..label_sets import ClassNames
from .map_facts import OTHER, LegendEntry, viridis
from .overlay import INK, font, shortened

SMALL = 19
#: Height of a line of the legend, in pixels.
LINE = 34


def draw_badge(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: str) -> None:
    """A disc with a number, its centre at `at`."""
    draw.ellipse((at[0] - 15, at[1] - 15, at[0] + 15, at[1] + 15), colour, (0, 0, 0), 2)
    draw.text(at, text, (0, 0, 0), font(SMALL), anchor="mm")


def draw_legend(
    draw: ImageDraw.ImageDraw,
    names: ClassNames,
    entries: Sequence[LegendEntry],
    cells: int,
    at: tuple[int, int],
    column: int,
) -> None:
    """Names of the classes, in two columns.

    Args:
        draw: of the sheet.
        names: of the classes.
        entries: the classes that have a letter and a colour.
        cells: patches of the map.
        at: (x, y) of the top left corner.
        column: distance of the columns in pixels.
    """

    def patches(count: int) -> str:
        return f"{count} patch{'' if count == 1 else 'es'}"

    items = []
    for entry in entries:
        mean = f"{entry.mean:.2f}" if entry.mean >= 0.005 else "below 0.01"
        text = f"{names[entry.class_id]}: {patches(entry.patches)}, mean {mean}"
        items.append((entry.letter, entry.colour, text))
    others = cells - sum(entry.patches for entry in entries)
    note = f"other classes: {patches(others)}" if others else "no other classes"
    items.append(("·", OTHER, f"{note}   (A: 0.5 or more, a: less)"))
    rows = -(-len(items) // 2)
    for number, (letter, colour, text) in enumerate(items):
        left = at[0] + number // rows * column
        y = at[1] + number % rows * LINE
        draw.rectangle((left, y, left + 34, y + 26), colour, INK)
        draw.text(
            (left + 17, y + 13),
            letter,
            "white",
            font(SMALL),
            anchor="mm",
            stroke_width=2,
            stroke_fill="black",
        )
        text = shortened(text, SMALL, column - 74)
        draw.text((left + 46, y + 13), text, INK, font(SMALL), anchor="lm")


def draw_colour_bar(draw: ImageDraw.ImageDraw, left: int, top: int, width: int) -> None:
    """The scale of the mass map's colours."""
    last = width - 1
    for x in range(width):
        draw.line((left + x, top, left + x, top + 22), viridis(x / last))
    for mark in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + round(mark * last)
        draw.line((x, top + 22, x, top + 30), INK, 2)
        anchor = {0.0: "la", 1.0: "ra"}.get(mark, "ma")
        draw.text((x, top + 34), f"{mark:g}", INK, font(SMALL), anchor=anchor)
