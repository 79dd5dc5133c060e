"""Records of images that were moved after they were batched: their paths go on, on the device."""

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from .footprints import source_points
from .record import (
    HEAD,
    HEADER,
    LATTICE,
    MIRRORED,
    OUTSIDE,
    SAMPLES,
    SEGMENTS,
    TILTED,
    WORD,
    Grid,
    Records,
)

_REACH = slice(WORD["reach_xx"], WORD["reach_yy"] + 1)
_ROOM = 1.1  # for what a curved path does between the points at which its slope is measured


def follow_matrices(
    records: Records, matrices: Tensor, size: Grid, boxes: Tensor | None = None
) -> Tensor:
    """The records of new images of `size`, uint8 [B, bytes]; `TokenLabels.follow` describes it.

    Args:
        records: of the old images.
        matrices: float64 [B, 3, 3], the last entry of each 1 or 0.
        size: (h, w) of the new images.
        boxes: float64 [B, 4], of the old images.
    """
    old = torch.stack([records.word("canvas_w"), records.word("canvas_h")], 1).double()
    shown = torch.cat([torch.zeros_like(old), old], 1)
    if boxes is not None:
        shown = boxes.clamp(shown[:, :2].repeat(1, 2), shown[:, 2:].repeat(1, 2))
    if records.layout.lattice or records.layout.segments == SEGMENTS:
        points = through(matrices, _centres(size, LATTICE, matrices.device))
        outside = (points < shown[:, None, None, :2]) | (points > shown[:, None, None, 2:])
        points = torch.where(outside.any(-1, keepdim=True), torch.nan, points)
        return follow_points(records, points, size)
    path = records.data[:, HEADER.size : HEAD].contiguous().view(torch.float32)
    path = path.unflatten(1, (SEGMENTS, -1)).double()
    # Where the outermost matrix is upright, so is the old image's outline behind it: the two
    # matrices become one. Elsewhere the path gets one more segment.
    first, fold = path[:, 0, :9].unflatten(1, (3, 3)), path[:, 0, 13:]
    merged = _is_upright(first)
    corners = shown.unflatten(1, (2, 2)) @ first[:, :2, :2].mT + first[:, None, :2, 2]
    low = torch.maximum(corners.amin(1), path[:, 0, 9:11])
    high = torch.minimum(corners.amax(1), path[:, 0, 11:13])
    inner = torch.cat([(first @ matrices).flatten(1), low, high, fold], 1)
    outer = torch.cat([matrices.flatten(1), shown, torch.zeros_like(fold)], 1)
    path = torch.where(
        merged[:, None, None],
        torch.cat([inner[:, None], path[:, 1:]], 1),
        torch.cat([outer[:, None], path[:, :-1]], 1),
    )
    count = records.word("segments") + (~merged).int()
    tilted = ~merged | ~_is_upright(matrices)
    reach = _reach_through(records, matrices, old, size)
    header = _header(records, size, torch.linalg.det(matrices) < 0, tilted, count, reach)
    segments = path.float().flatten(1).view(torch.uint8)
    return torch.cat([header, segments, records.data[:, HEAD:]], 1)


def follow_points(records: Records, points: Tensor, size: Grid) -> Tensor:
    """The records of new images of `size`, as lattices, uint8 [B, bytes].

    Args:
        records: of the old images.
        points: float [B, h, w, 2], the old images' (x, y) in pixels at the centres of h x w equal
            parts of the new ones; NaN or far outside for fill.
        size: (h, w) of the new images.
    """
    old = torch.stack([records.word("canvas_w"), records.word("canvas_h")], 1)[:, None, None]
    points = points.float()
    if points.shape[1:3] != (LATTICE, LATTICE):
        at = 2 * _centres((1, 1), LATTICE, points.device).float() - 1
        points = _sampled(points, at.expand(len(points), -1, -1, -1))
    inside = ((points >= 0) & (points <= old)).all(-1, keepdim=True)
    points = torch.where(inside, points, torch.nan)
    source = torch.stack(source_points(records, *points.unbind(-1)), -1)
    if records.layout.lattice:
        drawn = _sampled(records.lattices(), torch.where(inside, 2 * points / old - 1, 0.0))
        drawn = torch.where(inside, drawn, torch.nan)
        source = torch.where((records.word("lattice") > 0)[:, None, None, None], drawn, source)
    source = torch.where((source >= 0) & (source <= 1), source, torch.nan)
    across = (points[:, :-1, 1:] - points[:, :-1, :-1]).nan_to_num()
    down = (points[:, 1:, :-1] - points[:, :-1, :-1]).nan_to_num()
    turns = (across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0]).sign().sum((1, 2))
    count = torch.zeros_like(records.word("segments"))
    header = _header(records, size, turns < 0, turns == turns, count, _reach_of(records, source))
    header.view(torch.int32)[:, WORD["lattice"]] = 1
    number = torch.where(source.isnan(), OUTSIDE, (source * (OUTSIDE - 1)).round()).int()
    lattice = torch.stack([number & 255, number >> 8], -1).to(torch.uint8).flatten(1)
    planes = records.data[:, HEADER.size : HEAD + records.layout.maps.nbytes]
    record = torch.cat([header, planes, lattice], 1)
    return pad(record, (0, -record.shape[1] % 8))


def _header(
    records: Records, size: Grid, turned: Tensor, tilted: Tensor, count: Tensor, reach: Tensor
) -> Tensor:
    """The headers of new records, uint8 [B, bytes]."""
    header = records.data[:, : HEADER.size].clone(memory_format=torch.contiguous_format)
    ints, floats = header.view(torch.int32), header.view(torch.float32)
    turned = turned & (len(records.layout.maps.views) > 1)
    state = records.word("state") ^ (MIRRORED * turned.int())
    ints[:, WORD["state"]] = torch.where(tilted, state | TILTED, state)
    ints[:, WORD["segments"]] = count
    floats[:, WORD["canvas_h"]], floats[:, WORD["canvas_w"]] = size
    floats[:, _REACH] = reach.float()
    return header


def _reach_through(records: Records, matrices: Tensor, old: Tensor, size: Grid) -> Tensor:
    """The words "reach" [B, 4] behind matrices: the steepest slopes of two paths multiply."""
    points = _centres(size, SAMPLES, matrices.device)
    seen = through(matrices, points)
    inside = ((seen >= 0) & (seen <= old[:, None, None])).all(-1)[..., None, None]
    depth = points @ matrices[:, None, 2, :2, None] + matrices[:, None, None, 2:, 2]
    # [B, side, side, 2, 2]: of the old image's (x, y) by the new one's.
    turn = seen[..., None] * matrices[:, None, None, 2:, :2]
    slopes = ((matrices[:, None, None, :2, :2] - turn) / depth[..., None]).abs()
    steepest = torch.where(inside, slopes, 0.0).amax((1, 2))
    curved = (matrices[:, 2, :2] != 0).any(1)[:, None, None]
    steepest = torch.where(curved, _ROOM * steepest, steepest)
    floats = records.data[:, : HEADER.size].contiguous().view(torch.float32)
    # Cells a pixel of the old image, along its x, then its y.
    cells = floats[:, _REACH].double().unflatten(1, (2, 2)) / old[..., None]
    sides = torch.tensor([[size[1]], [size[0]]], dtype=old.dtype, device=old.device)
    reach: Tensor = steepest.mT @ cells * sides
    return reach.flatten(1)


def _reach_of(records: Records, source: Tensor) -> Tensor:
    """The words "reach" [B, 4] of lattices of source points."""
    rows, columns = records.layout.maps.grid
    x0, y0, x1, y1 = (records.word(name) for name in ("x0", "y0", "x1", "y1"))
    cells = torch.stack([columns / (x1 - x0), rows / (y1 - y0)], 1)
    steps = [source.diff(dim=axis).abs().nan_to_num(0.0).amax((1, 2)) for axis in (2, 1)]
    return torch.cat([_ROOM * LATTICE * step * cells for step in steps], 1)


def _is_upright(matrices: Tensor) -> Tensor:
    """Which matrices [B, 3, 3] map upright boxes to upright boxes, bool [B]."""
    a, b, _, d, e, _, g, h, _ = matrices.flatten(1).unbind(1)
    return (g == 0) & (h == 0) & (((b == 0) & (d == 0)) | ((a == 0) & (e == 0)))


def _centres(size: Grid, side: int, device: torch.device) -> Tensor:
    """Centres of side x side equal parts of an image, (x, y) in pixels, float64 [side, side, 2]."""
    at = (torch.arange(side, device=device, dtype=torch.float64) + 0.5) / side
    return torch.stack(torch.meshgrid(at * size[1], at * size[0], indexing="xy"), -1)


def through(matrices: Tensor, points: Tensor) -> Tensor:
    """Points (x, y) [..., 2] through matrices [B, 3, 3]: [B, ..., 2], inf on the horizon."""
    seen = pad(points.flatten(0, -2), (0, 1), value=1.0) @ matrices.mT
    there: Tensor = (seen[..., :2] / seen[..., 2:]).unflatten(1, points.shape[:-1])
    return there


def _sampled(points: Tensor, at: Tensor) -> Tensor:
    """A field of points [B, h, w, 2] at places [B, H, W, 2] in [-1, 1]; NaN beside fill."""
    found = grid_sample(points.movedim(-1, 1), at, padding_mode="border", align_corners=False)
    return found.movedim(1, -1)
