"""Where on its image a published label lies, and a test of which of two places it is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..annotate.classes import is_clear
from ..dataset.label_map.path import UNIT_BOX, Box
from ..errors import ConfigError

#: Pixels of the teachers' input for one cell.
_STRIDE = 32
_NEIGHBOURS = 9
_NAMES = ("centre", "squash", "whole", "detect")


class Geometry(NamedTuple):
    """What of an image the teacher was shown.

    Attributes:
        name: "centre": the square in the middle, after the short side was resized; "squash": all of
            it, squashed; "whole": all of it, whatever the teacher was shown.
        size: side of the square in pixels; 0 of the others.
        crop_pct: fraction of the resized short side that the square's side is.
    """

    name: str
    size: int = 0
    crop_pct: float = 1.0

    def __str__(self) -> str:
        return f"centre:{self.size}:{self.crop_pct:g}" if self.size else self.name

    def extent(self, width: int, height: int) -> Box:
        """The box (x0, y0, x1, y1) of an image in pixels that its label covers, normalised.

        As torchvision's `Resize(floor(size / crop_pct))` and `CenterCrop(size)` have it: the long
        side is cut to whole pixels, and the square's corner is rounded to them.
        """
        if not self.size:
            return UNIT_BOX
        short = math.floor(self.size / self.crop_pct)
        long = int(short * max(width, height) / min(width, height))
        resized = (short, long) if width <= height else (long, short)
        x0, y0, x1, y1 = (
            (round((side - self.size) / 2) + end) / side
            for end in (0, self.size)
            for side in resized
        )
        return x0, y0, x1, y1


def parse_geometry(text: str, grid: tuple[int, int]) -> tuple[Geometry, ...]:
    """The geometry that a user states; two of them for "detect".

    Args:
        text: `centre`, `centre:SIZE`, `centre:SIZE:CROP_PCT`, `squash`, `whole` or `detect`.
        grid: (H, W) of the labels, from which SIZE follows where it is left out.

    Raises:
        ConfigError: it is none of these.
    """
    name, *numbers = text.split(":")
    try:
        size = int(numbers[0]) if numbers else _STRIDE * grid[0]
        crop_pct = float(numbers[1]) if len(numbers) > 1 else 1.0
        is_known = name in _NAMES and len(numbers) <= 2 and (name == "centre" or not numbers)
        if not is_known or size < 1 or not 0 < crop_pct <= 1:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"geometry must be centre, centre:SIZE or centre:SIZE:CROP_PCT (CROP_PCT above 0, at "
            f"most 1), squash, whole or detect; got {text!r}. Remedy: one of these"
        ) from None
    centre = Geometry("centre", size, crop_pct)
    if name == "detect":
        return centre, Geometry("squash")
    return (centre if name == "centre" else Geometry(name),)


def agreement(live: np.ndarray, label: np.ndarray) -> np.ndarray:
    """In which patches a label and a live teacher have the same best class, bool [h, w].

    Args:
        live: best class of each cell, int [h, w], of what the label's teacher may have been shown.
        label: best class of each cell of the label, int [H, W].
    """
    row, column = (
        ((np.arange(count) + 0.5) / count * cells).astype(int)
        for count, cells in zip(live.shape, label.shape, strict=True)
    )
    same: np.ndarray = label[np.ix_(row, column)] == live
    return same


def clearly_better(only: Sequence[int]) -> int | None:
    """Of two geometries the one that fits clearly better: a sign test over the patches.

    Args:
        only: number of patches where the label agrees with the teacher by the one alone. Nine count
            as one answer: a patch and those around it say nearly the same.
    """
    answers = [count // _NEIGHBOURS for count in only]
    clear = [number for number in (0, 1) if is_clear(answers[number], sum(answers), 0.5)]
    return clear[0] if clear else None
