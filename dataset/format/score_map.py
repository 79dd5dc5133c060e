"""What is stored of one image: the planes of a score map, and what they mean.

This module defines, in NumPy, how stored codes become probabilities; docs/format.md says the same
in words, `targets.cells` in torch for whole batches.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats32 = npt.NDArray[np.float32]

#: Class ids are uint16 up to this many classes, uint32 above.
UINT16_CLASSES = 65536
#: Code of a uint8 plane that holds no class: its probability was below the floor.
DROPPED = 255
#: Steps a nat of the residual's codes.
RESIDUAL_STEPS = 16
#: Least leftover mass of a cell where codes are rounded: rounding can take all of it in a confident
#: cell, and a class that the teacher saw as possible must not become impossible. Measured on real
#: maps: KL per cell .178 without, .156 with it.
LEAST_REST = 1 / 256


class MapLayout(NamedTuple):
    """Shapes and dtypes of a map, the same for all images of a split.

    Attributes:
        views: "identity", perhaps followed by "hflip".
        grid: (H, W) in cells.
        k: K, classes stored a cell.
        num_classes: C, the teacher's classes.
        residual: R, classes by which the leftover mass is spread; 0: evenly over all.
        step: nats a code; 0 for float16 codes, which are the -log probabilities themselves.
        level: whether the log-sum-exp of the logits is stored.
    """

    views: tuple[str, ...]
    grid: tuple[int, int]
    k: int
    num_classes: int
    residual: int = 64
    step: float = 0.25
    level: bool = True

    @property
    def class_dtype(self) -> np.dtype:
        """Dtype of class ids, little-endian."""
        return np.dtype("<u2" if self.num_classes <= UINT16_CLASSES else "<u4")

    def planes(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Dtype and shape, without the row, of the datasets that hold a map, in stored order."""
        views, cells = len(self.views), (len(self.views), self.k, *self.grid)
        planes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
            "codes": (np.dtype("|u1" if self.step else "<f2"), cells),
            "classes": (self.class_dtype, cells),
        }
        if self.residual:
            planes["residual_classes"] = (self.class_dtype, (views, self.residual))
            planes["residual_codes"] = (np.dtype("|u1"), (views, self.residual))
        if self.level:
            planes["level"] = (np.dtype("<f2"), (views, *self.grid))
        return planes

    @property
    def nbytes(self) -> int:
        """Bytes of a map."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.planes().values())


class ScoreMap(NamedTuple):
    """What is stored of one image. V views, K classes a cell, an [H, W] grid, row by row.

    Attributes:
        layout: shapes and dtypes.
        codes: uint8 or float16 [V, K, H, W], -log p of the most probable classes in steps of
            `layout.step` nats, descending in p; 255 (float16: inf) where no class is stored.
        classes: uint16 or uint32 [V, K, H, W], their ids.
        residual_classes: uint16 or uint32 [V, R], the classes that take most of the leftover mass.
        residual_codes: uint8 [V, R], -log of their parts of it in 1/16 nat; 255: none.
        level: float16 [V, H, W], log-sum-exp of the logits; None where it is not stored.
        label: ground-truth class, or -1.
        size: (width, height) of the image in pixels.
        extent: box (x0, y0, x1, y1) of the image, normalised, that the map covers.
    """

    layout: MapLayout
    codes: np.ndarray
    classes: np.ndarray
    residual_classes: np.ndarray
    residual_codes: np.ndarray
    level: np.ndarray | None
    label: int
    size: tuple[int, int]
    extent: tuple[float, float, float, float]

    def probabilities(self, view: int = 0) -> tuple[np.ndarray, Floats32, Floats32]:
        """Classes of each cell, their probabilities, and the mass of all others.

        Returns:
            Class ids [H, W, K]; float32 [H, W, K], 0 where no class is stored; float32 [H, W].
        """
        probs, rest = decode(self.codes[view], self.layout)
        return self.classes[view].transpose(1, 2, 0), probs.transpose(1, 2, 0), rest

    def dense(self, view: int = 0) -> Floats32:
        """The whole distribution of each cell, float32 [H, W, C]: the leftover mass spread."""
        classes, probs, rest = self.probabilities(view)
        ids = np.where(probs > 0, classes, 0).astype(np.int64)
        dense = np.zeros((*rest.shape, self.layout.num_classes), np.float32)
        at = np.indices(ids.shape)
        np.add.at(dense, (at[0], at[1], ids), probs)
        others = np.where(dense > 0, 0, self.residual(view)).astype(np.float32)
        mass = others.sum(-1)
        # Where every class is stored, no other is left to take the rest.
        scale = np.divide(rest, mass, out=np.zeros_like(rest), where=mass > 0)
        whole: Floats32 = dense + others * scale[..., None]
        return whole

    def residual(self, view: int = 0) -> Floats32:
        """How the leftover mass of this image's cells is spread, float32 [C]; sums to 1."""
        classes, codes = self.residual_classes[view], self.residual_codes[view]
        return residual(classes, codes, self.layout.num_classes)

    def logits(self, view: int = 0) -> tuple[np.ndarray, Floats32]:
        """Classes [H, W, K] and raw logits, float32 [H, W, K]; -inf where no class is stored.

        Raises:
            ValueError: the split was stored without `level`.
        """
        if self.level is None:
            raise ValueError(
                "raw logits need the plane `level`, and this split was stored without it. "
                "Remedy: annotate with level: true; probabilities() needs none"
            )
        logs = -nats(self.codes[view], self.layout) + self.level[view].astype(np.float32)
        return self.classes[view].transpose(1, 2, 0), logs.transpose(1, 2, 0)


def nats(codes: np.ndarray, layout: MapLayout) -> Floats32:
    """-log p as float32, inf where no class is stored."""
    if not layout.step:
        return codes.astype(np.float32)
    return np.where(codes == DROPPED, np.inf, codes * np.float32(layout.step)).astype(np.float32)


def decode(codes: np.ndarray, layout: MapLayout) -> tuple[Floats32, Floats32]:
    """Probabilities [..., K, H, W] from codes of that shape, and the leftover mass [..., H, W].

    Rounded codes can add up to more than 1, or leave less than `LEAST_REST`: they are scaled. Where
    every class is stored, no other is left to take a rest, and they are scaled to 1.
    """
    probs = np.exp(-nats(codes, layout))
    total = probs.sum(-3, dtype=np.float32)
    complete = np.count_nonzero(probs, -3) == layout.num_classes
    room = np.where(complete, 0, np.float32(LEAST_REST if layout.step else 0))
    scale = (1 - room) / np.maximum(total, np.float32(1e-30))
    scale = np.where(complete, scale, np.minimum(scale, 1)).astype(np.float32)
    rest = np.where(complete, 0, np.maximum(1 - total, room)).astype(np.float32)
    return probs * scale[..., None, :, :], rest


def residual(classes: np.ndarray, codes: np.ndarray, num_classes: int) -> Floats32:
    """The residual distribution, float32 [C]: the classes that are named, then all others alike."""
    parts = np.where(codes == DROPPED, 0, np.exp(codes / np.float32(-RESIDUAL_STEPS)))
    spread: Floats32 = np.zeros(num_classes, np.float32)
    np.add.at(spread, classes.astype(np.int64), parts.astype(np.float32))
    unnamed = num_classes - np.count_nonzero(spread)
    left = max(1 - float(spread.sum()), 0.0)
    if unnamed:
        spread[spread == 0] = left / unnamed
    spread /= spread.sum()
    return spread
