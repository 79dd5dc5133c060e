"""Where other libraries moved an image: read from coordinates that went the same way.

A library that can move a mask with its image moves an image of coordinates with it. What comes back
says for each pixel of the new image which point of the old one it shows, whatever the transform was
and however the library counts pixels; where it fits a matrix, a label map takes the matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..label_map.label_map import TokenLabelMap
from ..targets.follow import through

#: What x + y is short of the third channel. Fill, of whatever colour, is not.
_OFFSET = 7777.0
_SLACK = 0.25
#: Pixels along each side that are asked for a matrix, borders among them.
_ASKED = 24
#: Of resampling: a 32nd of a pixel, old or new, which OpenCV rounds to, and a little.
_ROUNDING = 0.05
#: Of the pixels asked, those that must show some of the image for it to have a matrix.
_FEW = 12
#: Where fill lies: so far out that no mean of it and a pixel of the image is in the image.
_FAR = -1e12


class Geometry(NamedTuple):
    """Where the pixels of new images lie on old ones; pixel i covers [i, i + 1].

    Attributes:
        matrices: float64 [B, 3, 3], from points (x, y, 1) of the new images to points of the old.
        boxes: float64 [B, 4], (x0, y0, x1, y1) of the old images outside which all is fill.
        exact: bool [B], whether matrix and box say all; if not, `points` do.
    """

    matrices: Tensor
    boxes: Tensor
    exact: Tensor


def coordinates(height: int, width: int) -> Tensor:
    """The image to be moved: x, y, and a channel by which fill is told; float32 [3, h, w]."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y, x + y + _OFFSET])


def points(moved: Tensor) -> Tensor:
    """Old (x, y) of each pixel of moved coordinates [B, 3, h, w], [B, h, w, 2]; far off in fill."""
    return torch.where(_shown(moved).unsqueeze(-1), moved[:, :2].movedim(1, -1), _FAR)


def read(moved: Tensor, size: tuple[int, int]) -> Geometry:
    """The geometry of images of coordinates, [B, 3, h, w], that were of `size` (h, w)."""
    rows, columns = (
        torch.linspace(0, side - 1, min(side, _ASKED), device=moved.device).long()
        for side in moved.shape[2:]
    )
    part = moved[:, :, rows][..., columns]
    shown, asked = _shown(part).flatten(1), part[:, :2].flatten(2).mT.double()
    v, u = torch.meshgrid(rows + 0.5, columns + 0.5, indexing="ij")
    at = torch.stack([u, v], -1).double().flatten(0, 1)
    # The old points that are farthest out: without fill, they are at the corners, which are asked.
    whole = (shown, asked)
    if not bool(shown.all()):
        whole = _shown(moved).flatten(1), moved[:, :2].flatten(2).mT.double()
    low = torch.where(whole[0][..., None], whole[1], torch.inf).amin(1)
    high = torch.where(whole[0][..., None], whole[1], -torch.inf).amax(1)
    # The outer pixels show less than they should where resampling stops at the border.
    scale = _slope(_affine(at, asked, shown))
    margin = (1 + 2 * scale)[:, None]
    within = (asked > (low + margin)[:, None]) & (asked < (high - margin)[:, None])
    inner = shown & within.all(-1)
    inner = torch.where((inner.sum(1) >= _FEW)[:, None], inner, shown)
    affine, tilted = _affine(at, asked, inner), _projective(at, asked, inner)
    allowed = _ROUNDING * (1 + scale)
    fits = _error(affine, at, asked, inner) <= allowed
    matrices = torch.where(fits[:, None, None], _without_rounding(affine, at), tilted)
    fits |= _error(tilted, at, asked, inner) <= allowed
    # A pixel shows what lies half a pixel around its centre; at the old image's border, all.
    low, high = low - (scale / 2)[:, None], high + (scale / 2)[:, None]
    sides = at.new_tensor([size[1], size[0]])
    low = torch.where(low < margin, 0.0, low)
    high = torch.where(high > sides - margin, sides, high)
    seen = through(matrices, at)
    first, last, margin = low[:, None], high[:, None], margin[:, None]
    inside = ((seen > first + margin) & (seen < last - margin)).all(-1)
    outside = ((seen < first - margin) | (seen > last + margin)).any(-1)
    wrong = ((inside & ~shown) | (outside & shown)).any(1)
    # Of an image that shows next to nothing, nothing is said: all of it is fill.
    few = (shown.sum(1) < _FEW)[:, None]
    boxes = torch.where(few, 0.0, torch.cat([low, high], 1))
    matrices = torch.where(few[..., None], torch.eye(3).to(matrices), matrices)
    return Geometry(matrices, boxes, (fits & ~wrong) | few[:, 0])


def _shown(moved: Tensor) -> Tensor:
    """Which pixels of moved coordinates [B, 3, h, w] are of the old image, bool [B, h, w]."""
    x, y, third = moved.unbind(1)
    return (third - x - y - _OFFSET).abs() < _SLACK


def _error(matrices: Tensor, at: Tensor, to: Tensor, which: Tensor) -> Tensor:
    """The largest distance of what matrices say from the truth, in old pixels, [B]."""
    off = (through(matrices, at) - to).abs().amax(-1)
    return torch.where(which, off.nan_to_num(torch.inf), 0.0).amax(1)


def _slope(affine: Tensor) -> Tensor:
    """Pixels of the old image a pixel of the new one, [B]."""
    slope: Tensor = torch.linalg.matrix_norm(affine[:, :2, :2]) / 2**0.5
    return slope


def _solve(rows: Tensor, values: Tensor, which: Tensor) -> Tensor:
    """Least squares of rows [B, N, P] for values [B, N, Q]; where nothing is known, about 0."""
    rows, values = rows * which[..., None], values * which[..., None]
    square = rows.mT @ rows
    square = square + 1e-9 * torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    solved: Tensor = torch.linalg.solve(square, rows.mT @ values)
    return solved


def _normalised(at: Tensor) -> tuple[Tensor, Tensor]:
    """Points [N, 2] of pixels brought to about [-1, 1], as [N, 3], and the matrix that does it."""
    (x, y), zero, one = 2 / at.amax(0), at.new_zeros(()), at.new_ones(())
    matrix = torch.stack([x, zero, -one, zero, y, -one, zero, zero, one]).view(3, 3)
    return torch.nn.functional.pad(at, (0, 1), value=1.0) @ matrix.mT, matrix


def _affine(at: Tensor, to: Tensor, which: Tensor) -> Tensor:
    """The affine matrices [B, 3, 3] nearest to points [B, N, 2] of `at` [N, 2]."""
    near, normaliser = _normalised(at)
    found = _solve(near.expand(len(to), -1, -1), to, which).mT
    last = found.new_tensor([0.0, 0.0, 1.0]).expand(len(found), 1, -1)
    return torch.cat([found, last], 1) @ normaliser


def _projective(at: Tensor, to: Tensor, which: Tensor) -> Tensor:
    """The homographies [B, 3, 3] nearest to points [B, N, 2] of `at` [N, 2]."""
    near, normaliser = _normalised(at)
    near = near.expand(len(to), -1, -1)
    size = torch.where(which[..., None], to, 0.0).amax((1, 2), keepdim=True).clamp(min=1.0)
    to, zero = to / size, torch.zeros_like(near)
    by_x, by_y = -near[..., :2] * to[..., :1], -near[..., :2] * to[..., 1:]
    rows = torch.cat([torch.cat([near, zero, by_x], -1), torch.cat([zero, near, by_y], -1)], 1)
    values = torch.cat([to[..., :1], to[..., 1:]], 1)
    found = _solve(rows, values, which.repeat(1, 2))[..., 0]
    found = torch.cat([found, torch.ones_like(found[:, :1])], 1).unflatten(1, (3, 3))
    matrices = torch.cat([found[:, :2] * size, found[:, 2:]], 1) @ normaliser
    return matrices / matrices[:, 2:, 2:]


def _without_rounding(affine: Tensor, at: Tensor) -> Tensor:
    """Affine matrices whose slopes and steps are whole where rounding is all that they lack."""
    part = affine[:, :2, :2]
    near = part.round()
    small = (part - near).abs() * at.amax() < _ROUNDING / 5
    # About the middle of the image, which stays where it is.
    slopes = torch.where(small, near, part)
    middle = at.amax(0) / 2
    shift = affine[:, :2, 2] + (part - slopes) @ middle
    shift = torch.where((shift - shift.round()).abs() < _ROUNDING / 5, shift.round(), shift)
    return torch.cat([torch.cat([slopes, shift[..., None]], 2), affine[:, 2:]], 1)


def follow(leaf: TokenLabelMap, moved: Tensor) -> TokenLabelMap:
    """The map of an image whose coordinates, float [3, h, w], were moved with it."""
    geometry, size = read(moved[None], leaf.canvas_size), (moved.shape[1], moved.shape[2])
    if geometry.exact[0]:
        return leaf.follow(geometry.matrices[0], size, geometry.boxes[0].tolist())
    return leaf.follow(points(moved[None])[0], size)
