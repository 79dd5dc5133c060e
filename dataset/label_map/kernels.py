"""How each geometric functional of torchvision moves a `TokenLabelMap`: it composes the path.

Each kernel states the geometry that torchvision's own kernels have, from points of the new image
back to points of the old one. Importing this module registers them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import register_kernel

from .label_map import Size, TokenLabelMap
from .path import (
    Elastic,
    Fold,
    Matrix,
    PixelPath,
    product,
    scaling,
    translation,
)

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def _moves(functional: Callable[..., Any]) -> Callable[[_Kernel], _Kernel]:
    """Decorator for the kernel by which a functional of torchvision moves label maps."""

    def register(kernel: _Kernel) -> _Kernel:
        register_kernel(functional, TokenLabelMap)(kernel)
        return kernel

    return register


@_moves(F.get_size)
def _get_size(inpt: TokenLabelMap) -> list[int]:
    return list(inpt.canvas_size)


@_moves(F.to_dtype)
def _to_dtype(inpt: TokenLabelMap, *_: Any, **__: Any) -> TokenLabelMap:
    return inpt  # an image's dtype says nothing about logits


@_moves(F.erase)
def _erase(inpt: TokenLabelMap, *_: Any, **__: Any) -> TokenLabelMap:
    return inpt  # what is erased keeps its label: the student infers it from the surroundings


@_moves(F.horizontal_flip)
def _horizontal_flip(inpt: TokenLabelMap) -> TokenLabelMap:
    flip: Matrix = (-1.0, 0.0, float(inpt.canvas_size[1]), 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    return inpt.with_path(inpt.path.after(flip), inpt.canvas_size)


@_moves(F.vertical_flip)
def _vertical_flip(inpt: TokenLabelMap) -> TokenLabelMap:
    flip: Matrix = (1.0, 0.0, 0.0, 0.0, -1.0, float(inpt.canvas_size[0]), 0.0, 0.0, 1.0)
    return inpt.with_path(inpt.path.after(flip), inpt.canvas_size)


@_moves(F.crop)
def _crop(inpt: TokenLabelMap, top: int, left: int, height: int, width: int) -> TokenLabelMap:
    path = _source_of_crop(inpt, top, left, height, width)
    return inpt.with_path(path.after(translation(left, top)), (height, width))


def _source_of_crop(inpt: TokenLabelMap, top: int, left: int, height: int, width: int) -> PixelPath:
    """The path from the image that is cropped, where all around it is fill."""
    h, w = inpt.canvas_size
    inside = top >= 0 and left >= 0 and top + height <= h and left + width <= w
    return inpt.path if inside else inpt.path.guarded((h, w))


@_moves(F.center_crop)
def _center_crop(inpt: TokenLabelMap, output_size: int | Sequence[int]) -> TokenLabelMap:
    height, width = _pair(output_size)
    top, left = (
        -((crop - side) // 2) if crop > side else round((side - crop) / 2)
        for crop, side in zip((height, width), inpt.canvas_size, strict=True)
    )
    return _crop(inpt, top, left, height, width)


@_moves(F.five_crop)
def _five_crop(inpt: TokenLabelMap, size: int | Sequence[int]) -> tuple[TokenLabelMap, ...]:
    height, width = _pair(size)
    h, w = inpt.canvas_size
    if height > h or width > w:
        raise ValueError(f"Requested crop size {size} is bigger than input size {(h, w)}")
    corners = [(0, 0), (0, w - width), (h - height, 0), (h - height, w - width)]
    return (
        *(_crop(inpt, top, left, height, width) for top, left in corners),
        _center_crop(inpt, (height, width)),
    )


@_moves(F.ten_crop)
def _ten_crop(
    inpt: TokenLabelMap, size: int | Sequence[int], vertical_flip: bool = False
) -> tuple[TokenLabelMap, ...]:
    flipped = _vertical_flip(inpt) if vertical_flip else _horizontal_flip(inpt)
    return _five_crop(inpt, size) + _five_crop(flipped, size)


@_moves(F.resize)
def _resize(
    inpt: TokenLabelMap,
    size: int | Sequence[int] | None,
    interpolation: Any = None,
    max_size: int | None = None,
    **_: Any,
) -> TokenLabelMap:
    h, w = inpt.canvas_size
    if isinstance(size, Sequence) and len(size) == 2 and max_size is None:
        height, width = size
    else:  # the longer edge rounded by torchvision itself, on an image of no pixels but one point
        sides = [size] if isinstance(size, int) else size
        point = tv_tensors.KeyPoints(torch.zeros(1, 2), canvas_size=(h, w))
        height, width = F.resize(point, sides, max_size=max_size).canvas_size
    if (height, width) == (h, w):
        return inpt
    return inpt.with_path(inpt.path.after(scaling(w / width, h / height)), (height, width))


@_moves(F.resized_crop)
def _resized_crop(
    inpt: TokenLabelMap,
    top: int,
    left: int,
    height: int,
    width: int,
    size: int | Sequence[int],
    **_: Any,
) -> TokenLabelMap:
    if not isinstance(size, Sequence) or len(size) != 2:
        return _resize(_crop(inpt, top, left, height, width), size)
    # Crop and resize in one step: each new map costs as much as either's arithmetic.
    path, (new_height, new_width) = _source_of_crop(inpt, top, left, height, width), size
    x, y = width / new_width, height / new_height
    path = path.after((x, 0.0, float(left), 0.0, y, float(top), 0.0, 0.0, 1.0))
    return inpt.with_path(path, (new_height, new_width))


@_moves(F.pad)
def _pad(
    inpt: TokenLabelMap,
    padding: int | Sequence[int],
    fill: Any = None,
    padding_mode: str = "constant",
) -> TokenLabelMap:
    sides = (padding,) if isinstance(padding, int) else tuple(padding)
    if len(sides) not in (1, 2, 4):
        raise ValueError(f"Padding must be an int or 1, 2 or 4 ints, got {padding}")
    left, top, right, bottom = sides * (4 // len(sides))
    h, w = inpt.canvas_size
    if padding_mode == "constant":
        path = inpt.path.guarded((h, w))
    elif padding_mode in ("edge", "reflect", "symmetric"):
        path = inpt.path.warped(Fold(padding_mode, (h, w)))
    else:
        raise ValueError(
            "padding_mode must be 'constant', 'edge', 'reflect' or 'symmetric', "
            f"got {padding_mode!r}"
        )
    path = path.after(translation(-left, -top))
    return inpt.with_path(path, (top + h + bottom, left + w + right))


@_moves(F.affine)
def _affine(
    inpt: TokenLabelMap,
    angle: float,
    translate: Sequence[float],
    scale: float,
    shear: float | Sequence[float],
    interpolation: Any = None,
    fill: Any = None,
    center: Sequence[float] | None = None,
) -> TokenLabelMap:
    h, w = inpt.canvas_size
    shears = (shear, 0.0) if isinstance(shear, (int, float)) else tuple(shear)
    if len(shears) == 1:
        shears *= 2
    pivot = (w / 2, h / 2) if center is None else (center[0], center[1])
    matrix = product(
        _turned(pivot, angle, scale, (shears[0], shears[1])),
        translation(-translate[0], -translate[1]),
    )
    return inpt.with_path(inpt.path.guarded((h, w)).after(matrix), (h, w))


@_moves(F.rotate)
def _rotate(
    inpt: TokenLabelMap,
    angle: float,
    interpolation: Any = None,
    expand: bool = False,
    center: Sequence[float] | None = None,
    fill: Any = None,
) -> TokenLabelMap:
    h, w = inpt.canvas_size
    turned = _quarter_turns(inpt.path, (h, w), angle, expand) if center is None else None
    if turned is not None:
        return inpt.with_path(*turned)
    pivot_x, pivot_y = (w / 2, h / 2) if center is None else center
    # F.rotate turns counter-clockwise, F.affine clockwise.
    matrix = _turned((pivot_x, pivot_y), -(angle % 360), 1.0, (0.0, 0.0))
    height, width = _expanded((h, w), matrix) if expand else (h, w)
    matrix = product(matrix, translation((w - width) / 2, (h - height) / 2))
    return inpt.with_path(inpt.path.guarded((h, w)).after(matrix), (height, width))


@_moves(F.perspective)
def _perspective(
    inpt: TokenLabelMap,
    startpoints: Sequence[Sequence[int]] | None,
    endpoints: Sequence[Sequence[int]] | None,
    interpolation: Any = None,
    fill: Any = None,
    coefficients: Sequence[float] | None = None,
) -> TokenLabelMap:
    if coefficients is None:
        if startpoints is None or endpoints is None:
            raise ValueError("perspective needs startpoints and endpoints, or coefficients")
        coefficients = _perspective_coefficients(startpoints, endpoints)
    a, b, c, d, e, f, g, h = coefficients
    path = inpt.path.guarded(inpt.canvas_size).after((a, b, c, d, e, f, g, h, 1.0))
    return inpt.with_path(path, inpt.canvas_size)


@_moves(F.elastic)
def _elastic(inpt: TokenLabelMap, displacement: torch.Tensor, **_: Any) -> TokenLabelMap:
    expected = (1, *inpt.canvas_size, 2)
    if displacement.shape != expected:
        raise ValueError(
            f"Argument displacement shape should be {expected}, but given {displacement.shape}"
        )
    path = inpt.path.guarded(inpt.canvas_size).warped(Elastic(displacement))
    return inpt.with_path(path, inpt.canvas_size)


def _pair(size: int | Sequence[int]) -> Size:
    sides = (size,) if isinstance(size, int) else tuple(size)
    if len(sides) not in (1, 2):
        raise ValueError(f"size must be an int or (h, w), got {size}")
    return int(sides[0]), int(sides[-1])


def _expanded(size: Size, matrix: Matrix) -> Size:
    """Canvas that torchvision's `rotate` gives an image it turns by `matrix` with expand=True."""
    h, w = size
    # About the centre, as torchvision does it, and in its float32 and with its tolerance: a corner
    # that falls on a pixel's border is rounded alike.
    center_x, center_y = (
        matrix[2] + matrix[0] * w / 2 + matrix[1] * h / 2 - w / 2,
        matrix[5] + matrix[3] * w / 2 + matrix[4] * h / 2 - h / 2,
    )
    theta = torch.tensor([[*matrix[:2], center_x], [*matrix[3:5], center_y]])
    half = torch.tensor([w / 2, h / 2])
    corners = torch.tensor([[-1.0, -1.0, 1.0], [-1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, -1.0, 1.0]])
    corners[:, :2] *= half
    low, high = (corners @ theta.T).aminmax(dim=0)
    low, high = (((edge + half) * 1e4).trunc() * 1e-4 for edge in (low, high))
    width, height = (high.ceil() - low.floor()).tolist()
    return int(height), int(width)


def _turned(
    pivot: tuple[float, float], angle: float, scale: float, shear: tuple[float, float]
) -> Matrix:
    """Inverse of: shear along x, shear along y, scale, turn clockwise; all about `pivot`.

    Angles in degrees, with the signs of torchvision's `affine`.
    """
    turn, shear_x, shear_y = (math.radians(v) for v in (angle, *shear))
    a = math.cos(turn - shear_y) / math.cos(shear_y)
    c = math.sin(turn - shear_y) / math.cos(shear_y)
    b = -(a * math.tan(shear_x) + math.sin(turn))
    d = math.cos(turn) - c * math.tan(shear_x)
    # The determinant of [[a, b], [c, d]] is 1. The cosine of a right angle must be 0, not 6e-17,
    # for a quarter turn to count as rectilinear.
    p, q, r, s = (0.0 if abs(v) < 1e-12 else v / scale for v in (d, -b, -c, a))
    x, y = pivot
    return (p, q, x - p * x - q * y, r, s, y - r * x - s * y, 0.0, 0.0, 1.0)


def _quarter_turns(
    path: PixelPath, size: Size, angle: float, expand: bool
) -> tuple[PixelPath, Size] | None:
    """Path and canvas after a turn that only permutes pixels; None for any other turn."""
    h, w = size
    angle = angle % 360
    if angle == 0:
        return path, size
    if angle == 180:
        return path.after((-1.0, 0.0, w, 0.0, -1.0, h, 0.0, 0.0, 1.0)), size
    if angle == 90 and (expand or h == w):
        return path.after((0.0, -1.0, w, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)), (w, h)
    if angle == 270 and (expand or h == w):
        return path.after((0.0, 1.0, 0.0, -1.0, 0.0, h, 0.0, 0.0, 1.0)), (w, h)
    return None


def _perspective_coefficients(
    startpoints: Sequence[Sequence[int]], endpoints: Sequence[Sequence[int]]
) -> list[float]:
    """The eight coefficients that send `endpoints` (new image) to `startpoints` (old one)."""
    rows, values = [], []
    for (x, y), (u, v) in zip(endpoints, startpoints, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    solution = np.linalg.lstsq(np.array(rows, float), np.array(values, float), rcond=None)[0]
    return [float(value) for value in solution]
