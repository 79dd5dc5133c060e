"""Which cells of a score map each patch of the student's grid shows, and how much of each."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tokenlabel.dataset.label_map import TokenLabelMap
from tokenlabel.dataset.path import intersection

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Grid = tuple[int, int]
INTERPOLATIONS = ("bilinear", "nearest")
#: Sub-points a cell's width on paths that have no exact weights, and at least so many a patch's.
#: The bilinear map is smooth and needs few; at the steps of the nearest one only many will do.
_POINTS_PER_CELL = {"bilinear": 3, "nearest": 12}
_POINTS_PER_PATCH = {"bilinear": 4, "nearest": 12}
#: Shares below this are rounding: a patch that only touches the picture lies outside it.
_NOTHING = 1e-9


class Axis(NamedTuple):
    """Weights along one axis of a map.

    Attributes:
        weights: float32 [g, n], of n cells for each of g patches; rows sum to 1, or to 0 outside.
        share: float64 [g], share of each patch inside the map.
        first: which cell is the first of the n.
    """

    weights: npt.NDArray[np.float32]
    share: Floats
    first: int

    @property
    def cells(self) -> slice:
        """The n cells."""
        return slice(self.first, self.first + self.weights.shape[1])


class Scattered(NamedTuple):
    """Weights of single cells, as runs of entries, one run a patch.

    Attributes:
        cells: int64 [m], the map's cells that count at all, ascending.
        entries: int64 [e], position in `cells` of each entry.
        weights: float32 [e], the entries' weights; each run sums to 1, or is empty outside the map.
        offsets: int64 [N], where the run of each patch begins.
        share: float64 [N], share of each patch inside the map.
    """

    cells: Indices
    entries: Indices
    weights: npt.NDArray[np.float32]
    offsets: Indices
    share: Floats


class Span(NamedTuple):
    """A row of equal patches along one axis of the map; in cells.

    Attributes:
        start: where the first patch begins.
        length: where the last one ends, from `start`; negative where the picture is mirrored.
        patches: how many.
        cells: number of cells of the map.
        low: first point of [0, cells] that the picture shows.
        high: last point of it.
    """

    start: float
    length: float
    patches: int
    cells: int
    low: float
    high: float


def spans(score_map: TokenLabelMap, grid: Grid) -> tuple[Span, Span, bool]:
    """Where the patches lie on a map whose path is a single upright one.

    Args:
        score_map: the map; its `path.is_single` must hold.
        grid: (h, w) of the student's patches.

    Returns:
        The patches along the map's rows (y) and along its columns (x), and whether the picture is
        transposed: the grid's rows then run along the map's columns.
    """
    h, w = score_map.canvas_size
    a, b, c, d, e, f = score_map.path.matrix[:6]
    transposed = a == e == 0
    patches_x, patches_y = grid if transposed else (grid[1], grid[0])
    step_x, step_y = (b * h, d * w) if transposed else (a * w, e * h)
    box = intersection(score_map.path.box, score_map.extent)
    x0, y0, x1, y1 = score_map.extent
    _, rows, columns, _ = score_map.shape
    if score_map.view == 1:  # of the mirrored picture
        c, step_x, x0, x1 = 1 - c, -step_x, 1 - x1, 1 - x0
        box = (1 - box[2], box[1], 1 - box[0], box[3])
    m, n = rows / (y1 - y0), columns / (x1 - x0)
    # A box beyond the extent shows nothing: from the last point to the last.
    top, left = min((box[1] - y0) * m, rows), min((box[0] - x0) * n, columns)
    bottom, right = max((box[3] - y0) * m, top), max((box[2] - x0) * n, left)
    return (
        Span((f - y0) * m, step_y * m, patches_y, rows, top, bottom),
        Span((c - x0) * n, step_x * n, patches_x, columns, left, right),
        transposed,
    )


def separable_weights(p: Span, q: Span, interpolation: str) -> tuple[Axis, Axis]:
    """Exact weights: integrals of each cell's interpolation kernel over each patch of two spans.

    Both in one go, and with NumPy's plainest functions: on arrays this small a call's own cost is
    all that counts.
    """
    firsts, widths, edges = [], [], []
    for start, length, patches, cells, low, high in (p, q):
        near, far = (start, start + length) if length > 0 else (start + length, start)
        edge = np.arange(patches + 1) * (length / patches)
        edge += start
        if near < low or far > high:
            near, far = min(max(near, low), high), min(max(far, low), high)
            edge = np.minimum(np.maximum(edge, low), high)
        first, last = max(0, int(near - 0.5)), min(cells, int(far + 1.5))
        edge -= first
        firsts.append(first)
        widths.append(last - first)
        edges.append(edge)
    # One cell more on either side: beyond its border, a map goes on as its outermost cell.
    if interpolation == "bilinear":
        x = np.concatenate(edges)[:, None] - np.arange(-0.5, max(widths) + 1)
        x = np.minimum(np.maximum(x, -1), 1)
        integral = x - 0.5 * x * np.absolute(x)  # of the hat 1 - |x|, up to a constant
    else:
        x = np.concatenate(edges)[:, None] - np.arange(-1.0, max(widths) + 1)
        integral = np.minimum(np.maximum(x, 0), 1)
    difference = np.absolute(integral[1:] - integral[:-1])
    return (
        _axis(difference[: p.patches], p, firsts[0], widths[0]),
        _axis(difference[p.patches + 1 :], q, firsts[1], widths[1]),
    )


def _axis(weights: Floats, span: Span, first: int, width: int) -> Axis:
    """Weights with the cells beyond the map's borders counted to the border, and normalised."""
    if first == 0:
        weights[:, 1] += weights[:, 0]
    if first + width == span.cells:
        weights[:, width] += weights[:, width + 1]
    weights = weights[:, 1 : width + 1]
    inside = np.add.reduce(weights, 1)
    share = inside * (span.patches / abs(span.length))
    outside = share < _NOTHING
    if np.logical_or.reduce(outside):
        share[outside] = 0
        weights[outside] = 0
        inside[outside] = 1
    return Axis((weights / inside[:, None]).astype(np.float32), share, first)


def scattered_weights(score_map: TokenLabelMap, grid: Grid, interpolation: str) -> Scattered:
    """Weights for any path, from sub-points of each patch: 4x4 of them, or more for big patches.

    Args:
        score_map: the map.
        grid: (h, w) of the student's patches.
        interpolation: "bilinear" or "nearest".
    """
    h, w = score_map.canvas_size
    _, rows, columns, _ = score_map.shape
    cells, patches = rows * columns, grid[0] * grid[1]
    density, least = _POINTS_PER_CELL[interpolation], _POINTS_PER_PATCH[interpolation]
    down, across = (max(least, -(-density * max(rows, columns) // side)) for side in grid)
    i, j = np.arange(grid[0] * down), np.arange(grid[1] * across)
    points_x = (j.astype(np.float64) + 0.5) * (w / len(j))
    points_y = (i.astype(np.float64) + 0.5) * (h / len(i))
    x, y, inside = score_map.path(points_x, points_y[:, None])
    x0, y0, x1, y1 = score_map.extent
    inside = inside & (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    start = (i[:, None] // down * grid[1] + j // across)[inside] * cells
    u = (np.broadcast_to(x, inside.shape)[inside] - x0) * (columns / (x1 - x0))
    v = (np.broadcast_to(y, inside.shape)[inside] - y0) * (rows / (y1 - y0))
    if score_map.view == 1:  # of the mirrored picture
        u = columns - u
    if interpolation == "bilinear":
        u = np.minimum(np.maximum(u - 0.5, 0), columns - 1)
        v = np.minimum(np.maximum(v - 0.5, 0), rows - 1)
        # The far neighbour of a point on the last cell's centre has weight 0: any cell will do.
        column = np.minimum(u.astype(np.int64), max(columns - 2, 0))
        row = np.minimum(v.astype(np.int64), max(rows - 2, 0))
        u -= column
        v -= row
        start += row * columns + column
        right, below = min(columns - 1, 1), min(rows - 1, 1) * columns
        entries = np.concatenate([start, start + right, start + below, start + (below + right)])
        uv = u * v
        amounts = np.concatenate([1 - u - v + uv, u - uv, v - uv, uv])
    else:  # a point on the far border belongs to the last cell
        column = np.minimum(u.astype(np.int64), columns - 1)
        entries = start + np.minimum(v.astype(np.int64), rows - 1) * columns + column
        amounts = np.ones(len(entries))
    dense = np.bincount(entries, amounts, patches * cells)
    entry = np.flatnonzero(dense > 0)  # ten times as fast on bool as on float
    total = dense.reshape(patches, cells).sum(1)
    patch, cell = np.divmod(entry, cells)
    used = np.zeros(cells, np.int64)
    used[cell] = 1
    position = np.cumsum(used) - 1
    return Scattered(
        np.flatnonzero(used),
        position[cell],
        (dense[entry] / total[patch]).astype(np.float32),
        np.searchsorted(entry, np.arange(patches) * cells),
        total / (down * across),
    )
