"""The path of a label map: where each point of the current image lies in the source image.

Points are (x, y) with x along the width. A pixel i covers [i, i + 1], so its centre is i + 0.5.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

Points = npt.NDArray[np.float64]
#: Row-major 3x3, for columns (x, y, 1).
Matrix = tuple[float, float, float, float, float, float, float, float, float]
#: (x0, y0, x1, y1), x0 <= x1 and y0 <= y1.
Box = tuple[float, float, float, float]

IDENTITY: Matrix = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
ANYWHERE: Box = (-math.inf, -math.inf, math.inf, math.inf)
UNIT_BOX: Box = (0.0, 0.0, 1.0, 1.0)


def scaling(x: float, y: float) -> Matrix:
    """Matrix that scales x and y."""
    return (x, 0.0, 0.0, 0.0, y, 0.0, 0.0, 0.0, 1.0)


def translation(x: float, y: float) -> Matrix:
    """Matrix that moves by (x, y)."""
    return (1.0, 0.0, x, 0.0, 1.0, y, 0.0, 0.0, 1.0)


def product(p: Matrix, q: Matrix) -> Matrix:
    """Matrix that applies `q`, then `p`."""
    a, b, c, d, e, f, g, h, i = p
    j, k, m, n, o, r, s, t, u = q
    return (
        a * j + b * n + c * s,
        a * k + b * o + c * t,
        a * m + b * r + c * u,
        d * j + e * n + f * s,
        d * k + e * o + f * t,
        d * m + e * r + f * u,
        g * j + h * n + i * s,
        g * k + h * o + i * t,
        g * m + h * r + i * u,
    )


@dataclass(frozen=True, slots=True)
class Fold:
    """Padding that repeats the image: points outside it, folded back inside.

    Attributes:
        mode: "edge", "reflect" or "symmetric", as torchvision pads.
        size: (h, w) of the image in pixels.
    """

    mode: str
    size: tuple[int, int]

    def __call__(self, x: Points, y: Points) -> tuple[Points, Points]:
        """Points of the unpadded image that the padded image shows at (x, y)."""
        return self._fold(x, self.size[1]), self._fold(y, self.size[0])

    def _fold(self, x: Points, size: int) -> Points:
        # In periods of the folded image, since padding may be wider than the image.
        if self.mode == "edge" or (self.mode == "reflect" and size == 1):
            folded = np.clip(x, 0.5, size - 0.5)
        elif self.mode == "reflect":  # about the centres of the outer pixels, which stay single
            last = size - 1
            folded = last - np.abs((x - 0.5) % (2 * last) - last) + 0.5
        else:
            folded = size - np.abs(x % (2 * size) - size)
        return np.where((x < 0) | (x > size), folded, x)


@dataclass(frozen=True, slots=True)
class Elastic:
    """Displacement of every pixel.

    Attributes:
        displacement: float [1, h, w, 2], (x, y) steps in units of half the image's size, as
            torchvision's `elastic` takes them.
    """

    displacement: Tensor

    def __call__(self, x: Points, y: Points) -> tuple[Points, Points]:
        """Points that the displaced image shows at (x, y)."""
        _, h, w, _ = self.displacement.shape
        x, y = np.broadcast_arrays(x, y)
        at = np.nan_to_num(np.stack([x * (2 / w) - 1, y * (2 / h) - 1], -1))
        step = grid_sample(
            self.displacement.detach().permute(0, 3, 1, 2).to("cpu", torch.float64),
            torch.from_numpy(at)[None],
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )[0].numpy()
        return x + step[0] * (w / 2), y + step[1] * (h / 2)


class PixelPath(NamedTuple):
    """Composed geometry, from points of the current image back to the source image.

    A point goes through `matrix`, must then lie in `box` to show any of the image (else it shows
    fill), and continues through `warp` and `inner`. The innermost path ends in the source image,
    normalised: (0, 0) is its top left corner, (1, 1) its bottom right one. Crops, flips, resizes,
    padding and quarter turns in any number stay one matrix and one box.
    """

    matrix: Matrix
    box: Box = ANYWHERE
    warp: Fold | Elastic | None = None
    inner: "PixelPath | None" = None

    @classmethod
    def of(cls, size: tuple[int, int]) -> Self:
        """The path of an untouched image of `size` (h, w) pixels."""
        return cls(scaling(1 / size[1], 1 / size[0]), UNIT_BOX)

    def after(self, matrix: Matrix) -> "PixelPath":
        """The path of a new image whose point p shows this one's point `matrix` p."""
        return PixelPath(product(self.matrix, matrix), self.box, self.warp, self.inner)

    def guarded(self, size: tuple[int, int]) -> "PixelPath":
        """The same path where points outside this image of `size` (h, w) show fill."""
        return self.within((0.0, 0.0, float(size[1]), float(size[0])))

    def within(self, shown: Box) -> "PixelPath":
        """The same path where points of this image outside a box of it show fill."""
        if not self.is_rectilinear:
            # Behind the matrix the image is no upright box: it guards before it, in a new segment.
            return PixelPath(IDENTITY, shown, None, self)
        x0, y0, x1, y1 = transform_box(self.matrix, shown)
        p0, q0, p1, q1 = self.box
        return self._replace(box=(max(x0, p0), max(y0, q0), min(x1, p1), min(y1, q1)))

    def warped(self, warp: Fold | Elastic) -> "PixelPath":
        """The path of a new image whose point p shows this one's point `warp`(p)."""
        return PixelPath(IDENTITY, ANYWHERE, warp, self)

    def segments(self) -> Iterator["PixelPath"]:
        """This path and those inside it, outermost first."""
        part: PixelPath | None = self
        while part is not None:
            yield part
            part = part.inner

    @property
    def is_rectilinear(self) -> bool:
        """True if `matrix` maps upright boxes to upright boxes."""
        a, b, _, d, e, _, g, h, _ = self.matrix
        return g == h == 0 and (b == d == 0 or a == e == 0)

    @property
    def is_single(self) -> bool:
        """True if the path is one rectilinear matrix and one box."""
        return self.inner is None and self.warp is None and self.is_rectilinear

    @property
    def is_mirrored(self) -> bool:
        """True if the current image has the opposite handedness of the source."""
        a, b, c, d, e, f, g, h, i = self.matrix
        negative = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g) < 0
        return negative ^ (self.inner is not None and self.inner.is_mirrored)

    def __call__(self, x: Points, y: Points) -> tuple[Points, Points, npt.NDArray[np.bool_]]:
        """Source points, normalised, of points (x, y) in pixels, and which show the image."""
        a, b, c, d, e, f, g, h, i = self.matrix
        if g == h == 0:
            x, y = a * x + b * y + c, d * x + e * y + f
        else:
            with np.errstate(divide="ignore", invalid="ignore"):  # points on the horizon
                z = 1 / (g * x + h * y + i)
                x, y = (a * x + b * y + c) * z, (d * x + e * y + f) * z
        x0, y0, x1, y1 = self.box
        inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        if self.warp is not None:
            x, y = self.warp(x, y)
        if self.inner is not None:
            x, y, further = self.inner(x, y)
            inside &= further
        return x, y, inside


def transform_box(matrix: Matrix, box: Box) -> Box:
    """The upright box to which a rectilinear matrix maps a box."""
    a, b, c, d, e, f = matrix[:6]
    x0, y0, x1, y1 = box
    p, q = a * x0 + b * y0 + c, a * x1 + b * y1 + c
    r, s = d * x0 + e * y0 + f, d * x1 + e * y1 + f
    return (min(p, q), min(r, s), max(p, q), max(r, s))
