"""One image's label map as a PNG: what the teacher saw, and how labels move with the image."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ...dataset.label_map.path import UNIT_BOX
from ...dataset.store import LabelStore
from ..label_sets import ClassNames, Floats, patch_map
from .augmentations import GRID, Augmentation, augmentations
from .image_files import ImageFiles
from .map_facts import OTHER, LegendEntry, legend, viridis
from .output import output_file
from .overlay import INK, class_overlay, font, mass_overlay, shortened

_MARGIN, _GAP, _PANEL = 32, 28, 600
_WIDTH = 2 * _MARGIN + 3 * _PANEL + 2 * _GAP
_TITLE, _TEXT, _SMALL = 30, 22, 19
_LINE = 34  # of the legend
_TILE = (_PANEL - 8) // 2
_GREY = (90, 90, 90)
#: Of the frames of the three augmentations; each is numbered too.
_FRAMES = ("#E69F00", "#56B4E9", "#CC79A7")


def save_png(
    store: LabelStore, key: str, path: Path, images: str | None = None, seed: int = 0
) -> None:
    """Draw one image's map: classes, top-k mass, and three random augmentations with targets.

    Args:
        store: the label set.
        key: the image's key.
        path: PNG file to write; it is replaced as a whole or not at all.
        images: DATA/SPLIT or DATA, or as `open_images` takes them; None for the embedded sample.
        seed: of the augmentations.

    Raises:
        MissingMapError: no such key, or the image has no map.
        ConfigError: the images are not found.
        ImageError: the image cannot be read, or is not the annotated one.
        OutputError: the file cannot be written.
    """
    patches, names = patch_map(store, key), ClassNames(store.classes)
    image = ImageFiles(store, images).read(key)
    augmented = augmentations(image, store, key, seed=seed)
    entry, best, probs = patches.entry, patches.best, patches.probs[..., 0]
    entries = legend(best, probs)
    scale = _PANEL / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    shown = image.resize(size, Image.Resampling.LANCZOS)

    # From top to bottom: two lines of text, three panels, their legends, three pairs of tiles.
    maps = _MARGIN + 2 * _TITLE + 34
    key_top = maps + _TEXT + 14 + size[1] + 16
    tiles = key_top + max(_LINE * -(-(len(entries) + 1) // 2), 2 * _LINE) + 30
    sheet = Image.new("RGB", (_WIDTH, tiles + 2 * _TEXT + 18 + _TILE + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    room = _WIDTH - 2 * _MARGIN
    draw.text((_MARGIN, _MARGIN - 6), shortened(key, _TITLE, room), INK, font(_TITLE))
    label = names[patches.label] if patches.label >= 0 else f"number {entry.label} of the folders"
    (height, width), (pixels, lines) = store.grid, entry.size
    facts = (
        f"label: {label if entry.label >= 0 else 'unknown'}   |   {pixels} x {lines} pixels   |   "
        f"teacher {store.attrs['teacher']}: {height} x {width} patches, top {store.k} of "
        f"{store.num_classes} classes"
    )
    at = (_MARGIN, _MARGIN + _TITLE + 10)
    draw.text(at, shortened(facts, _TEXT, room), _GREY, font(_TEXT))
    panels = {
        "The image, and the three views below": _framed(shown, augmented),
        "Most probable class of each patch": class_overlay(
            shown, best, probs, entries, entry.extent
        ),
        f"Probability that the top {store.k} classes hold": mass_overlay(
            shown, patches.mass, entry.extent
        ),
    }
    columns = [_MARGIN + number * (_PANEL + _GAP) for number in range(3)]
    for left, (title, panel) in zip(columns, panels.items(), strict=True):
        draw.text((left, maps), title, INK, font(_TEXT))
        sheet.paste(panel, (left + (_PANEL - size[0]) // 2, maps + _TEXT + 14))
    _draw_legend(draw, names, entries, best.size, (columns[0], key_top), _PANEL + _GAP)
    _draw_colour_bar(draw, columns[2], key_top, _PANEL)
    for number, augmentation in enumerate(augmented):
        _draw_pair(sheet, draw, (columns[number], tiles), number, augmentation, entries)
    with output_file(path) as temporary:
        sheet.save(temporary, "PNG")


def _framed(image: Image.Image, augmented: Sequence[Augmentation]) -> Image.Image:
    """The image with the outline and the number of each augmentation."""
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    outlines = [augmentation.outline * image.size for augmentation in augmented]
    for outline, colour in zip(outlines, _FRAMES, strict=False):
        points = [tuple(point) for point in outline.tolist()]
        for width, ink in ((7, "black"), (4, colour)):
            draw.line([*points, *points[:2]], ink, width, joint="curve")
    taken: list[tuple[float, float]] = []
    for number, (outline, colour) in enumerate(zip(outlines, _FRAMES, strict=False)):
        taken.append(_free_corner(outline, image.size, taken))
        _draw_badge(draw, taken[-1], str(number + 1), colour)
    return drawn


def _free_corner(
    outline: Floats, size: tuple[int, int], taken: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Where to number a frame: at the corner that the augmented image shows at its top left.

    Farther along the frame's upper side where other numbers are in the way.
    """
    for step in (0.0, 0.2, 0.4, 0.6, 0.8):
        corner = outline[0] + step * (outline[1] - outline[0])
        point = corner * 0.9 + outline.mean(0) * 0.1
        x, y = np.clip(point, 18, np.maximum(np.array(size) - 18, 18)).tolist()
        if all(math.dist((x, y), other) > 34 for other in taken):
            break
    return x, y


def _draw_pair(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    number: int,
    augmentation: Augmentation,
    entries: Sequence[LegendEntry],
) -> None:
    """An augmented image beside its targets."""
    left, top = at
    _draw_badge(draw, (left + 15, top + 13), str(number + 1), _FRAMES[number])
    draw.text((left + 42, top), augmentation.title, INK, font(_TEXT))
    top += _TEXT + 14
    tile = augmentation.image.resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    targets = class_overlay(
        tile, augmentation.best, augmentation.probs, entries, UNIT_BOX, augmentation.shown
    )
    texts = ("augmented", f"its targets, {GRID} x {GRID}")
    for x, drawn, text in zip((left, left + _PANEL - _TILE), (tile, targets), texts, strict=True):
        sheet.paste(drawn, (x, top))
        draw.text((x, top + _TILE + 8), text, _GREY, font(_SMALL))


def _draw_badge(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: str) -> None:
    """A disc with a number, its centre at `at`."""
    draw.ellipse((at[0] - 15, at[1] - 15, at[0] + 15, at[1] + 15), colour, (0, 0, 0), 2)
    draw.text(at, text, (0, 0, 0), font(_SMALL), anchor="mm")


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    names: ClassNames,
    entries: Sequence[LegendEntry],
    cells: int,
    at: tuple[int, int],
    column: int,
) -> None:
    """Names of the classes of a map of `cells` patches, in two columns from the top left `at`."""

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
        y = at[1] + number % rows * _LINE
        draw.rectangle((left, y, left + 34, y + 26), colour, INK)
        draw.text(
            (left + 17, y + 13),
            letter,
            "white",
            font(_SMALL),
            anchor="mm",
            stroke_width=2,
            stroke_fill="black",
        )
        text = shortened(text, _SMALL, column - 74)
        draw.text((left + 46, y + 13), text, INK, font(_SMALL), anchor="lm")


def _draw_colour_bar(draw: ImageDraw.ImageDraw, left: int, top: int, width: int) -> None:
    """The scale of the mass map's colours."""
    last = width - 1
    for x in range(width):
        draw.line((left + x, top, left + x, top + 22), viridis(x / last))
    for mark in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + round(mark * last)
        draw.line((x, top + 22, x, top + 30), INK, 2)
        anchor = {0.0: "la", 1.0: "ra"}.get(mark, "ma")
        draw.text((x, top + 34), f"{mark:g}", INK, font(_SMALL), anchor=anchor)
