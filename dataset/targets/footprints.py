"""Footprints: which cells of the map each patch of the student shows, and how much of each.

Upright paths (crops, flips, resizes, padding, quarter turns) are exact: a patch is a box on the
map, and its average of the map, which is bilinear between the centres of the cells, is a product of
integrals along the two axes. All other paths are averages over sub-points.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .record import HAS_MAP, LATTICE, MIRRORED, TILTED, Grid, Records

#: Sub-points a cell's width on paths that have no exact weights, and at least so many a patch's.
_POINTS_PER_CELL, _POINTS_PER_PATCH = 3, 4
#: Fractions of a patch below this are rounding: it only touches the image.
_NOTHING = 1e-5
_TINY = 1e-30  # divides what is 0 anyway


class Footprints(NamedTuple):
    """Where the N patches of each image lie on its map. M cells a window.

    Attributes:
        origin: int64 [B, N], the first cell of each patch's window.
        window: float32 [B, N, M], how much of each cell; sums to 1, or to 0 where nothing is shown.
        weight: float32 [B, N], fraction of the patch inside the image and the map.
    """

    origin: Tensor
    window: Tensor
    weight: Tensor


def footprints(records: Records, grid: Grid) -> tuple[Footprints, Tensor]:
    """The footprints of the patches of `grid`, and the cells of a window from its first, [M]."""
    layout = records.layout
    rows, columns = layout.maps.grid
    # A cell's hat is two cells wide, so a patch that spans d cells meets at most ceil(d) + 2 hats.
    across_x, down_x, across_y, down_y = layout.reach
    across, down = across_x / grid[1] + across_y / grid[0], down_x / grid[1] + down_y / grid[0]
    size = _hats(down, rows), _hats(across, columns)
    found = _integrated(records, grid, size)
    if layout.tilted:
        found = _chosen(records.has(TILTED), _sampled(records, grid, size), found)
    there = (found.weight > _NOTHING) & records.has(HAS_MAP)[:, None]
    offsets = torch.arange(size[0], device=there.device)[:, None] * columns
    offsets = (offsets + torch.arange(size[1], device=there.device)).flatten()
    window = torch.where(there[..., None], found.window, 0.0)
    return Footprints(found.origin, window, torch.where(there, found.weight, 0.0)), offsets


def _hats(span: float, cells: int) -> int:
    """How many hats a patch that spans so many cells meets at most, of `cells`."""
    # Counted: torch.compile compares floats that change with the batch, but makes no sizes of them.
    count = min(3, cells)
    while count < cells and count - 2 <= span - 1e-4:
        count += 1
    return count


def _chosen(which: Tensor, one: Footprints, other: Footprints) -> Footprints:
    """Those of `one` for the images of which `which`, bool [B], is true, else of `other`."""
    return Footprints(
        *(
            torch.where(which.view(-1, *[1] * (a.ndim - 1)), a, b)
            for a, b in zip(one, other, strict=True)
        )
    )


def _extent(records: Records) -> list[Tensor]:
    """x0, y0, x1, y1 of the boxes that the maps cover, [B, 1, 1] each."""
    return [records.word(name)[:, None, None] for name in ("x0", "y0", "x1", "y1")]


# --- upright paths: integrals --------------------------------------------------------------------


def _integrated(records: Records, grid: Grid, size: Grid) -> Footprints:
    """Exact windows where the path is one upright matrix: a product of rows and columns."""
    layout = records.layout
    rows, columns = layout.maps.grid
    if layout.segments:
        path = records.paths()[:, 0]
    else:  # lattices only, whose windows come from elsewhere
        path = torch.zeros(len(records.data), 16, device=records.data.device)
        path[:, [0, 4, 8, 11, 12]] = 1
    a, b, c, d, e, f = (path[:, None, None, index] for index in range(6))
    x0, y0, x1, y1 = _extent(records)
    box = path[:, 9:13, None, None].unbind(1)
    low_x, low_y = torch.maximum(box[0], x0), torch.maximum(box[1], y0)
    high_x, high_y = torch.minimum(box[2], x1), torch.minimum(box[3], y1)
    if len(layout.maps.views) > 1:  # the second is of the mirrored image
        turn = records.has(MIRRORED)[:, None, None]
        a, b, c = torch.where(turn, -a, a), torch.where(turn, -b, b), torch.where(turn, 1 - c, c)
        low_x, high_x = torch.where(turn, 1 - high_x, low_x), torch.where(turn, 1 - low_x, high_x)
        x0, x1 = torch.where(turn, 1 - x1, x0), torch.where(turn, 1 - x0, x1)
    height, width = (records.word(name)[:, None, None] for name in ("canvas_h", "canvas_w"))
    right = torch.arange(grid[1] + 1, device=path.device) * (width / grid[1])
    down = torch.arange(grid[0] + 1, device=path.device)[:, None] * (height / grid[0])
    # One of the two matrix entries of each axis is 0, so the coordinates of two opposite corners of
    # each patch suffice.
    corners = [(right[..., :-1], down[:, :-1]), (right[..., 1:], down[:, 1:])]
    per_x, per_y = columns / (x1 - x0), rows / (y1 - y0)
    column, across, inside_x = _integrals(
        [(a * x + b * y + c - x0) * per_x for x, y in corners],
        [(edge - x0) * per_x for edge in (low_x, high_x)],
        columns,
        size[1],
    )
    row, along, inside_y = _integrals(
        [(d * x + e * y + f - y0) * per_y for x, y in corners],
        [(edge - y0) * per_y for edge in (low_y, high_y)],
        rows,
        size[0],
    )
    window = (along[..., :, None] * across[..., None, :]).flatten(-2)
    return Footprints(row * columns + column, window, inside_x * inside_y)


def _integrals(
    ends: list[Tensor], shown: list[Tensor], cells: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals of the cells' hats over the patches' intervals on one axis, in cells.

    `ends` are the intervals' bounds [B, h, w], in either order; `shown` [B, 1, 1] the first and the
    last point of [0, cells] that the image shows. Returns the first cell, int64 [B, N]; amounts of
    `size` cells, [B, N, size], which sum to 1, or to 0 outside; and the fraction inside, [B, N].
    """
    (start, end), (low, high) = ends, shown
    # A box beyond the extent shows nothing: from the last point to the last.
    low = low.clamp(max=cells)
    high = torch.maximum(high, low)
    length = (end - start).abs()
    near = torch.minimum(torch.maximum(torch.minimum(start, end), low), high).flatten(1)
    far = torch.minimum(torch.maximum(torch.maximum(start, end), low), high).flatten(1)
    first = (near - 0.5).floor().clamp(0, cells - size)
    # One cell more on either side: beyond its border, a map continues as its outermost cell.
    centre = first[..., None] + torch.arange(-0.5, size + 1, device=near.device)

    def hat(x: Tensor) -> Tensor:
        """Integral of the hat 1 - |x|, up to a constant."""
        x = x.clamp(-1, 1)
        return x - 0.5 * x * x.abs()

    amount = hat(far[..., None] - centre) - hat(near[..., None] - centre)
    before = amount[..., :1] * (first == 0)[..., None]
    after = amount[..., -1:] * (first == cells - size)[..., None]
    inner = amount[..., 1:-1] + torch.nn.functional.pad(before, (0, size - 1))
    inner = inner + torch.nn.functional.pad(after, (size - 1, 0))
    inside = (far - near) / length.flatten(1).clamp(min=_TINY)
    return first.long(), _normalised(inner), inside


def _normalised(amounts: Tensor) -> Tensor:
    """Amounts [..., M] divided by their sums; 0 where these are 0."""
    total = amounts.sum(-1, keepdim=True)
    return torch.where(total > 0, amounts / total.clamp(min=_TINY), 0.0)


# --- all other paths: sub-points -----------------------------------------------------------------


def _sampled(records: Records, grid: Grid, size: Grid) -> Footprints:
    """Windows for any path, from sub-points."""
    most = max(records.layout.maps.grid)
    per = [max(_POINTS_PER_PATCH, -(-_POINTS_PER_CELL * most // side)) for side in grid]
    found = _from_points(records, size, *_through_segments(records, grid, per))
    if records.layout.lattice:
        per = [-(-LATTICE // side) for side in grid]
        points = records.lattices()
        for axis in (0, 1):  # the nearest point of the lattice
            count = grid[axis] * per[axis]
            at = ((torch.arange(count, device=points.device) + 0.5) * (LATTICE / count)).long()
            points = points.index_select(axis + 1, at)
        x, y = (_by_patch(v, grid, per) for v in points.unbind(-1))
        drawn = _from_points(records, size, x, y)
        found = _chosen(records.word("lattice") > 0, drawn, found)
    return found


def _by_patch(points: Tensor, grid: Grid, per: list[int]) -> Tensor:
    """[B, grid_h * per_h, grid_w * per_w] as [B, N, S]."""
    parts: Tensor = points.unflatten(2, (grid[1], per[1])).unflatten(1, (grid[0], per[0]))
    return parts.transpose(2, 3).flatten(3).flatten(1, 2)


def _through_segments(records: Records, grid: Grid, per: list[int]) -> tuple[Tensor, Tensor]:
    """Source points [B, N, S] of the sub-points, NaN for those that show fill."""
    sides = (records.word("canvas_h"), records.word("canvas_w"))
    counts = [grid[axis] * per[axis] for axis in (0, 1)]
    y, x = (
        (torch.arange(count, device=side.device) + 0.5) * (side[:, None] / count)
        for count, side in zip(counts, sides, strict=True)
    )
    x = _by_patch(x[:, None, :].expand(-1, counts[0], -1), grid, per)
    y = _by_patch(y[:, :, None].expand(-1, -1, counts[1]), grid, per)
    return source_points(records, x, y)


def source_points(records: Records, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Points [B, ...] in pixels through the paths' segments: normalised, NaN for fill."""
    inside = torch.ones_like(x, dtype=torch.bool)
    for segment in records.paths().unbind(1):
        values = (segment[:, index].view(-1, *[1] * (x.ndim - 1)) for index in range(16))
        a, b, c, d, e, f, g, h, i, x0, y0, x1, y1, mode, height, width = values
        z = 1 / (g * x + h * y + i)
        x, y = (a * x + b * y + c) * z, (d * x + e * y + f) * z
        inside = inside & (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        x, y = _fold(x, width, mode), _fold(y, height, mode)
    return torch.where(inside, x, torch.nan), torch.where(inside, y, torch.nan)


def _fold(x: Tensor, size: Tensor, mode: Tensor) -> Tensor:
    """Points outside an image of `size`, where padding repeats it; `path.Fold` says the same."""
    last = (size - 1).clamp(min=1)
    edge = torch.minimum(x.clamp(min=0.5), size - 0.5)
    reflect = last - (torch.remainder(x - 0.5, 2 * last) - last).abs() + 0.5
    symmetric = size - (torch.remainder(x, 2 * size.clamp(min=1)) - size).abs()
    folded = torch.where(mode == 2, torch.where(size > 1, reflect, edge), symmetric)
    folded = torch.where(mode == 1, edge, folded)
    return torch.where((mode > 0) & ((x < 0) | (x > size)), folded, x)


def _from_points(records: Records, size: Grid, x: Tensor, y: Tensor) -> Footprints:
    """Bilinear weights of source points [B, N, S], summed over each patch."""
    rows, columns = records.layout.maps.grid
    x0, y0, x1, y1 = _extent(records)
    inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)  # NaN is nowhere
    u, v = (x - x0) * (columns / (x1 - x0)), (y - y0) * (rows / (y1 - y0))
    if len(records.layout.maps.views) > 1:
        u = torch.where(records.has(MIRRORED)[:, None, None], columns - u, u)
    origin, shares = [], []
    for points, cells, length in ((v, rows, size[0]), (u, columns, size[1])):
        at = torch.where(inside, (points - 0.5).clamp(0, cells - 1), 0.0)
        cell = at.floor().clamp(max=max(cells - 2, 0))
        first = torch.where(inside, cell, float(cells)).amin(-1).clamp(max=cells - length)
        # A smooth path has no points beyond the window; others count for its last cell.
        local = (cell - first[..., None]).clamp(0, max(length - 2, 0)).long()
        origin.append(first.long())
        shares.append((local, at - cell))
    (row, below), (column, right) = shares
    base = row * size[1] + column
    one = inside.to(u.dtype)
    window = u.new_zeros(*u.shape[:2], size[0] * size[1])
    # To the next row and column of the window, of which there may be but one.
    next_row, next_column = min(size[0] - 1, 1) * size[1], min(size[1] - 1, 1)
    for step, amount in (
        (0, (1 - below) * (1 - right)),
        (next_column, (1 - below) * right),
        (next_row, below * (1 - right)),
        (next_row + next_column, below * right),
    ):
        window.scatter_add_(2, base + step, amount * one)
    weight = window.sum(-1) / u.shape[-1]
    return Footprints(origin[0] * columns + origin[1], _normalised(window), weight)
