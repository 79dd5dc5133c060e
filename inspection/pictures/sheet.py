"""One image's label map as a PNG: what the teacher saw, and how labels move with the image."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ...dataset.format.score_map import ScoreMap
from ...dataset.store import LabelStore
from ..names import ClassNames
from ..patch_map import Floats, patch_map
from .augmentations import GRID, Augmentation, augmentations
from .image_files import PictureFiles
from .legend import (
    LINE,
    SMALL,
    draw_badge,
    draw_colour_bar,
    draw_legend,
)
from .map_facts import LegendEntry, legend, rgb
from .output import output_file
from .overlay import (
    INK,
    class_overlay,
    font,
    mass_overlay,
    shortened,
)

_MARGIN, _GAP, _PANEL = 32, 28, 600
_WIDTH = 2 * _MARGIN + 3 * _PANEL + 2 * _GAP
_TITLE, _TEXT = 30, 22
_TILE = (_PANEL - 8) // 2
#: Of the frames of the three augmentations; each is numbered too.
_FRAMES = ("#E69F00", "#56B4E9", "#CC79A7")


def save_png(
    store: LabelStore, key: str, path: Path, images: Path | None = None, seed: int = 0
) -> None:
    """Draw one image's map: classes, top-k mass, and three random augmentations with targets.

    Args:
        store: the label set.
        key: the image's key.
        path: PNG file to write; it is replaced as a whole or not at all.
        images: folder of the images, DATA/SPLIT or DATA; None for the embedded sample.
        seed: of the augmentations.

    Raises:
        MissingMapError: no such key, or the image has no map.
        ConfigError: the images are not found.
        ImageError: the image cannot be read, or is not the annotated one.
        OutputError: the file cannot be written.
    """
    entry = store[key]
    picture = PictureFiles(store, images).read(key)
    sheet = draw_sheet(store, key, entry, picture, seed)
    with output_file(path) as temporary:
        sheet.save(temporary, "PNG")


def draw_sheet(
    store: LabelStore, key: str, entry: ScoreMap, picture: Image.Image, seed: int = 0
) -> Image.Image:
    """The drawing that `save_png` saves."""
    names = ClassNames(store.classes)
    patches = patch_map(entry)
    best, probs = patches.classes[..., 0], patches.probs[..., 0]
    entries = legend(best, probs)
    augmented = augmentations(picture, store, key, seed=seed)
    scale = _PANEL / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    shown = picture.resize(size, Image.Resampling.LANCZOS)

    maps = _MARGIN + 2 * _TITLE + 34
    key_top = maps + _TEXT + 14 + size[1] + 16
    tiles = key_top + max(LINE * -(-(len(entries) + 1) // 2), 2 * LINE) + 30
    sheet = Image.new("RGB", (_WIDTH, tiles + 2 * _TEXT + 18 + _TILE + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    _header(draw, store, names, key, entry)
    panels = [
        ("The image, and the three views below", _framed(shown, augmented)),
        (
            "Most probable class of each patch",
            class_overlay(shown, best, probs, entries, entry.extent),
        ),
        (
            f"Probability that the top {store.k} classes hold",
            mass_overlay(shown, patches.mass, entry.extent),
        ),
    ]
    for number, (title, panel) in enumerate(panels):
        left = _MARGIN + number * (_PANEL + _GAP)
        draw.text((left, maps), title, INK, font(_TEXT))
        sheet.paste(panel, (left + (_PANEL - size[0]) // 2, maps + _TEXT + 14))
    # Under the first two panels, and under the third.
    draw_legend(draw, names, entries, best.size, (_MARGIN, key_top), _PANEL + _GAP)
    draw_colour_bar(draw, _MARGIN + 2 * (_PANEL + _GAP), key_top, _PANEL)
    for number, augmentation in enumerate(augmented):
        left = _MARGIN + number * (_PANEL + _GAP)
        _pair(sheet, draw, (left, tiles), number, augmentation, entries)
    return sheet


def _header(
    draw: ImageDraw.ImageDraw, store: LabelStore, names: ClassNames, key: str, entry: ScoreMap
) -> None:
    draw.text(
        (_MARGIN, _MARGIN - 6), shortened(key, _TITLE, _WIDTH - 2 * _MARGIN), INK, font(_TITLE)
    )
    label = "unknown"
    if entry.label >= 0:
        known = store.attrs.get("label_space") == "teacher"
        label = names[entry.label] if known else f"number {entry.label} of the folders"
    (height, width), (pixels, lines) = store.grid, entry.size
    facts = (
        f"label: {label}   |   {pixels} x {lines} pixels   |   teacher {store.attrs['teacher']}: "
        f"{height} x {width} patches, top {store.k} of {store.num_classes} classes"
    )
    place = (_MARGIN, _MARGIN + _TITLE + 10)
    draw.text(place, shortened(facts, _TEXT, _WIDTH - 2 * _MARGIN), (90, 90, 90), font(_TEXT))


def _framed(picture: Image.Image, augmented: Sequence[Augmentation]) -> Image.Image:
    """The image with the outline and the number of each augmentation."""
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    outlines = [augmentation.outline * picture.size for augmentation in augmented]
    for outline, colour in zip(outlines, _FRAMES, strict=False):
        points = [tuple(point) for point in outline.tolist()]
        for width, ink in ((7, (0, 0, 0)), (4, rgb(colour))):
            draw.line([*points, *points[:2]], ink, width, joint="curve")
    taken: list[tuple[float, float]] = []
    for number, (outline, colour) in enumerate(zip(outlines, _FRAMES, strict=False)):
        taken.append(_free_place(outline, picture.size, taken))
        draw_badge(draw, taken[-1], str(number + 1), colour)
    return drawn


def _free_place(
    outline: Floats, size: tuple[int, int], taken: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Where to number a frame: at the corner that the augmented image shows at its top left.

    Farther along the frame's upper side where other numbers are in the way.
    """
    place = (0.0, 0.0)
    for share in (0.0, 0.2, 0.4, 0.6, 0.8):
        corner = outline[0] + share * (outline[1] - outline[0])
        point = (corner * 0.9 + outline.mean(0) * 0.1).tolist()
        x, y = (min(max(at, 18), side - 18) for at, side in zip(point, size, strict=True))
        place = (x, y)
        if all(math.dist(place, other) > 34 for other in taken):
            break
    return place


def _pair(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    number: int,
    augmentation: Augmentation,
    entries: Sequence[LegendEntry],
) -> None:
    """An augmented image beside its targets."""
    left, top = at
    draw_badge(draw, (left + 15, top + 13), str(number + 1), _FRAMES[number])
    side = "left" if augmentation.angle >= 0 else "right"
    mirrored = ", mirrored" if augmentation.mirrored else ""
    title = (
        f"crop of {augmentation.share:.0%}{mirrored}, turned {abs(augmentation.angle):.0f} degrees "
    )
    draw.text((left + 42, top), title + side, INK, font(_TEXT))
    top += _TEXT + 14
    tile = augmentation.picture.resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    sheet.paste(tile, (left, top))
    whole = (0.0, 0.0, 1.0, 1.0)
    targets = class_overlay(
        tile, augmentation.best, augmentation.probs, entries, whole, augmentation.shown
    )
    sheet.paste(targets, (left + _PANEL - _TILE, top))
    draw.text((left, top + _TILE + 8), "augmented", (90, 90, 90), font(SMALL))
    text = f"its targets, {GRID} x {GRID}"
    draw.text((left + _PANEL - _TILE, top + _TILE + 8), text, (90, 90, 90), font(SMALL))
