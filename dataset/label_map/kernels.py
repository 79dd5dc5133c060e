# ruff: noqa: D103  # each kernel is what torchvision's functional of its name does to a label map
"""How each geometric functional of torchvision moves a `TokenLabelMap`: it composes the path.

Each kernel states the geometry that torchvision's own kernels have, from points of the new image
back to points of the old one. Importing this module registers them.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torchvision.transforms.functional import (
    _compute_resized_output_size,
    _get_inverse_affine_matrix,
    _get_perspective_coeffs,
)
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional import register_kernel

from .label_map import Size, TokenLabelMap
from .path import IDENTITY, Elastic, Fold, Matrix, PixelPath, product, scaling, translation

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def _moves(functional: Callable[..., Any]) -> Callable[[_Kernel], _Kernel]:
    """Decorator for the kernel by which a functional of torchvision moves label maps."""
    register: Callable[[_Kernel], _Kernel] = register_kernel(functional, TokenLabelMap)
    return register


@_moves(F.get_size)
def get_size(inpt: TokenLabelMap) -> list[int]:
    return list(inpt.canvas_size)


@_moves(F.to_dtype)
def to_dtype(inpt: TokenLabelMap, *_: Any, **__: Any) -> TokenLabelMap:
    return inpt  # an image's dtype says nothing about logits


@_moves(F.erase)
def erase(inpt: TokenLabelMap, *_: Any, **__: Any) -> TokenLabelMap:
    return inpt  # what is erased keeps its label: the student infers it from the surroundings


@_moves(F.horizontal_flip)
def horizontal_flip(inpt: TokenLabelMap) -> TokenLabelMap:
    flip: Matrix = (-1.0, 0.0, float(inpt.canvas_size[1]), 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    return inpt.with_path(inpt.path.after(flip), inpt.canvas_size)


@_moves(F.vertical_flip)
def vertical_flip(inpt: TokenLabelMap) -> TokenLabelMap:
    flip: Matrix = (1.0, 0.0, 0.0, 0.0, -1.0, float(inpt.canvas_size[0]), 0.0, 0.0, 1.0)
    return inpt.with_path(inpt.path.after(flip), inpt.canvas_size)


@_moves(F.crop)
def crop(inpt: TokenLabelMap, top: int, left: int, height: int, width: int) -> TokenLabelMap:
    path = _source_of_crop(inpt, top, left, height, width)
    return inpt.with_path(path.after(translation(left, top)), (height, width))


def _source_of_crop(inpt: TokenLabelMap, top: int, left: int, height: int, width: int) -> PixelPath:
    """The path from the image that is cropped, where all around it is fill."""
    h, w = inpt.canvas_size
    inside = top >= 0 and left >= 0 and top + height <= h and left + width <= w
    return inpt.path if inside else inpt.path.guarded((h, w))


@_moves(F.center_crop)
def center_crop(inpt: TokenLabelMap, output_size: int | Sequence[int]) -> TokenLabelMap:
    height, width = _pair(output_size)
    # torchvision pads where the crop is larger, and rounds the other way there.
    top, left = (
        -((crop - side) // 2) if crop > side else round((side - crop) / 2)
        for crop, side in zip((height, width), inpt.canvas_size, strict=True)
    )
    return crop(inpt, top, left, height, width)


@_moves(F.five_crop)
def five_crop(inpt: TokenLabelMap, size: int | Sequence[int]) -> tuple[TokenLabelMap, ...]:
    height, width = _pair(size)
    h, w = inpt.canvas_size
    if height > h or width > w:
        raise ValueError(f"a crop must fit the image of (h, w) = {(h, w)}, got {size}")
    corners = [(0, 0), (0, w - width), (h - height, 0), (h - height, w - width)]
    return (
        *(crop(inpt, top, left, height, width) for top, left in corners),
        center_crop(inpt, (height, width)),
    )


@_moves(F.ten_crop)
def ten_crop(
    inpt: TokenLabelMap, size: int | Sequence[int], vertical_flip: bool = False
) -> tuple[TokenLabelMap, ...]:
    flip = F.vertical_flip if vertical_flip else F.horizontal_flip
    return five_crop(inpt, size) + five_crop(flip(inpt), size)


@_moves(F.resize)
def resize(
    inpt: TokenLabelMap, size: int | Sequence[int] | None, max_size: int | None = None, **_: Any
) -> TokenLabelMap:
    h, w = inpt.canvas_size
    if isinstance(size, Sequence) and len(size) == 2 and max_size is None:
        height, width = size
    else:
        sides = [size] if isinstance(size, int) else size
        # The longer side as torchvision rounds it.
        height, width = _compute_resized_output_size((h, w), sides, max_size, sides is None)
    if (height, width) == (h, w):
        return inpt
    return inpt.with_path(inpt.path.after(scaling(w / width, h / height)), (height, width))


@_moves(F.resized_crop)
def resized_crop(
    inpt: TokenLabelMap,
    top: int,
    left: int,
    height: int,
    width: int,
    size: int | Sequence[int],
    **_: Any,
) -> TokenLabelMap:
    if not isinstance(size, Sequence) or len(size) != 2:
        return resize(crop(inpt, top, left, height, width), size)
    # Crop and resize in one step: each new map costs as much as either's arithmetic.
    path, (new_height, new_width) = _source_of_crop(inpt, top, left, height, width), size
    x, y = width / new_width, height / new_height
    path = path.after((x, 0.0, float(left), 0.0, y, float(top), 0.0, 0.0, 1.0))
    return inpt.with_path(path, (new_height, new_width))


@_moves(F.pad)
def pad(
    inpt: TokenLabelMap, padding: int | Sequence[int], padding_mode: str = "constant", **_: Any
) -> TokenLabelMap:
    sides = (padding,) if isinstance(padding, int) else tuple(padding)
    if len(sides) not in (1, 2, 4):
        raise ValueError(f"Padding must be an int or 1, 2 or 4 ints, got {padding}")
    left, top, right, bottom = sides * (4 // len(sides))
    h, w = inpt.canvas_size
    if padding_mode == "constant":  # shows fill, which has no label
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
def affine(
    inpt: TokenLabelMap,
    angle: float,
    translate: Sequence[float],
    scale: float,
    shear: float | Sequence[float],
    center: Sequence[float] | None = None,
    **_: Any,
) -> TokenLabelMap:
    shears = [shear, 0.0] if isinstance(shear, (int, float)) else [*shear, *shear][:2]
    matrix = _affine_matrix(inpt, center, angle, translate, scale, shears)
    return inpt.with_path(inpt.path.guarded(inpt.canvas_size).after(matrix), inpt.canvas_size)


@_moves(F.rotate)
def rotate(
    inpt: TokenLabelMap,
    angle: float,
    interpolation: Any = None,
    expand: bool = False,
    center: Sequence[float] | None = None,
    fill: Any = None,
) -> TokenLabelMap:
    h, w = inpt.canvas_size
    angle = angle % 360
    # Turns that only permute pixels leave no fill, and so need no guard.
    if center is None and (angle in (0, 180) or (angle in (90, 270) and (expand or h == w))):
        turns: dict[float, tuple[Matrix, Size]] = {
            0: (IDENTITY, (h, w)),
            90: ((0.0, -1.0, w, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0), (w, h)),
            180: ((-1.0, 0.0, w, 0.0, -1.0, h, 0.0, 0.0, 1.0), (h, w)),
            270: ((0.0, 1.0, 0.0, -1.0, 0.0, h, 0.0, 0.0, 1.0), (w, h)),
        }
        matrix, canvas = turns[angle]
        return inpt.with_path(inpt.path.after(matrix), canvas)
    # F.rotate turns counter-clockwise, F.affine clockwise.
    matrix = _affine_matrix(inpt, center, -angle, (0, 0), 1.0, (0.0, 0.0))
    height, width = h, w
    if expand:
        # As torchvision rounds it: asked of an image without data.
        blank = torch.empty(1, h, w, device="meta")
        height, width = F.rotate(blank, angle, expand=True, center=center).shape[-2:]
    matrix = product(matrix, translation((w - width) / 2, (h - height) / 2))
    return inpt.with_path(inpt.path.guarded((h, w)).after(matrix), (height, width))


@_moves(F.perspective)
def perspective(
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
        coefficients = _get_perspective_coeffs(startpoints, endpoints)
    a, b, c, d, e, f, g, h = coefficients
    path = inpt.path.guarded(inpt.canvas_size).after((a, b, c, d, e, f, g, h, 1.0))
    return inpt.with_path(path, inpt.canvas_size)


@_moves(F.elastic)
def elastic(inpt: TokenLabelMap, displacement: torch.Tensor, **_: Any) -> TokenLabelMap:
    expected = (1, *inpt.canvas_size, 2)
    if displacement.shape != expected:
        raise ValueError(f"displacement must be {expected}, got {tuple(displacement.shape)}")
    path = inpt.path.guarded(inpt.canvas_size).warped(Elastic(displacement))
    return inpt.with_path(path, inpt.canvas_size)


def _pair(size: int | Sequence[int]) -> Size:
    sides = (size,) if isinstance(size, int) else tuple(size)
    if len(sides) not in (1, 2):
        raise ValueError(f"size must be an int or (h, w), got {size}")
    return int(sides[0]), int(sides[-1])


def _affine_matrix(
    inpt: TokenLabelMap,
    center: Sequence[float] | None,
    angle: float,
    translate: Sequence[float],
    scale: float,
    shear: Sequence[float],
) -> Matrix:
    """Matrix from new points to old ones; angles in degrees, clockwise, as `F.affine` has them."""
    h, w = inpt.canvas_size
    pivot = [w / 2, h / 2] if center is None else [*center]
    matrix = _get_inverse_affine_matrix(pivot, angle, [*translate], scale, [*shear])
    # The cosine of a right angle must be 0, not 6e-17, for a quarter turn to count as rectilinear.
    a, b, c, d, e, f = (0.0 if abs(value) < 1e-12 else value for value in matrix)
    return (a, b, c, d, e, f, 0.0, 0.0, 1.0)
