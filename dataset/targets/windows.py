"""What each patch is taught: windows of a map's cells, for a whole batch, on any device.

The target of a patch is the area average of the map's probabilities over the patch's footprint,
bilinear between the centres of the cells. Cross entropy is linear in its target, so the cells that
a patch shows need not be merged: they stay a window of cells with a weight each.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..format.score_map import DROPPED, LEAST_REST, RESIDUAL_STEPS
from .token_labels import LATTICE, MIRRORED, TILTED

if TYPE_CHECKING:
    from .token_labels import Grid, TokenLabels

#: Sub-points a cell's width on paths that have no exact weights, and at least so many a patch's.
_POINTS_PER_CELL, _POINTS_PER_PATCH = 3, 4
#: Fractions of a patch below this are rounding: it only touches the image.
_NOTHING = 1e-5
#: The least that a logarithm is taken of: classes that got no mass at all.
_LEAST = 1e-12


class TokenWindows(NamedTuple):
    """Soft targets of a batch's patches: linear in the maps' cells, nothing merged or cut.

    B images, N patches row by row, C classes; P cells a map with K classes each; M cells a window;
    G dense distributions an image. The target of patch (b, n) is, for each class c,

        sum over m, k where classes[b, cell, k] = c of window[b, n, m] * values[b, cell, k]
        + sum over g of share[b, n, g] * basis[b, g, c],   with cell = origin[b, n] + offsets[m],

    and sums to 1 where `weight` is above 0.

    Attributes:
        classes: int64 [B, P, K], ids of each cell's classes.
        values: float32 [B, P, K], their probabilities less what `basis` gives them there; 0 where
            no class is stored.
        origin: int64 [B, N], the first cell of each patch's window.
        offsets: int64 [M], the cells of a window, from its first.
        window: float32 [B, N, M], how much of each cell.
        basis: float32 [B, G, C], distributions of the image: how the leftover mass of its cells is
            spread and, for targets that are drawn towards it, the mean of its map.
        share: float32 [B, N, G], how much of each.
        weight: float32 [B, N], fraction of the patch inside the image and the map: 0 in padding,
            and where the image has no map. The target is the average over that part.
    """

    classes: Tensor
    values: Tensor
    origin: Tensor
    offsets: Tensor
    window: Tensor
    basis: Tensor
    share: Tensor
    weight: Tensor

    def take(self, index: Tensor) -> "TokenWindows":
        """The targets of other images of the batch, int64 [B']."""
        return TokenWindows(
            *(
                part if name == "offsets" else part[index]
                for name, part in zip(self._fields, self, strict=True)
            )
        )

    def expand(self) -> tuple[Tensor, Tensor]:
        """Class ids, int64 [B, N, M * K], and their amounts: all entries of each patch."""
        (batch, patches), (cells, k) = self.origin.shape, self.classes.shape[1:]
        at = (self.origin[..., None] + self.offsets).flatten(1)
        at = (at + cells * torch.arange(batch, device=at.device)[:, None]).flatten()
        ids = self.classes.flatten(0, 1)[at].view(batch, patches, -1)
        values = self.values.flatten(0, 1)[at].view(batch, patches, -1, k)
        return ids, (values * self.window[..., None]).flatten(2)

    def dense(self) -> Tensor:
        """The targets as one distribution a patch, float32 [B, N, C]."""
        ids, values = self.expand()
        # No matrix product, which autocast would round.
        spread = (self.share.unsqueeze(-1) * self.basis.unsqueeze(1)).sum(2)
        return spread.scatter_add_(2, ids, values)


class TokenTargets(NamedTuple):
    """Soft targets of a batch, merged and cut to K classes: for looking, or for another loss.

    `probs` and `rest` sum to 1 for each patch and for the crop. Entries without a class have
    probability 0 (and class id 0). Where `weight` is 0 there is no target: `probs` is 0, `rest` 1.

    Attributes:
        label: int64 [B], the images' ground-truth classes, -1 if unknown.
        classes: int64 [B, N, K], class ids of each patch's target, most probable first; N is
            grid_h * grid_w, row by row.
        probs: float32 [B, N, K], their probabilities.
        rest: float32 [B, N], mass on all other classes.
        weight: float32 [B, N], fraction of the patch inside the image and the map.
        crop_classes: int64 [B, K], the same for the whole crop.
        crop_probs: float32 [B, K].
        crop_rest: float32 [B].
    """

    label: Tensor
    classes: Tensor
    probs: Tensor
    rest: Tensor
    weight: Tensor
    crop_classes: Tensor
    crop_probs: Tensor
    crop_rest: Tensor

    @classmethod
    def of(
        cls, label: Tensor, weight: Tensor, patches: Tensor, crop: Tensor, k: int
    ) -> "TokenTargets":
        """The k largest of dense targets, [B, N, C] and [B, C]."""
        parts = []
        for dense in (patches, crop):
            probs, classes = dense.topk(min(k, dense.shape[-1]))
            rest = torch.where(dense.sum(-1) > 0, dense.sum(-1) - probs.sum(-1), 1.0)
            parts.append((classes.where(probs > 0, 0), probs, rest.clamp(min=0)))
        return cls(label, *parts[0], weight, *parts[1])

    def windows(self, num_classes: int) -> TokenWindows:
        """The same as windows: each patch a cell of its own, the rest spread over the others."""
        listed = (self.probs > 0).sum(-1, keepdim=True)
        others = num_classes - listed
        each = torch.where(others > 0, self.rest[..., None] / others.clamp(min=1), 0.0)
        batch, patches = self.weight.shape
        device = self.weight.device
        there = (self.weight > 0)[..., None].to(self.probs.dtype)
        return TokenWindows(
            self.classes.long(),
            torch.where(self.probs > 0, self.probs - each, 0.0),
            torch.arange(patches, device=device).expand(batch, -1),
            torch.zeros(1, dtype=torch.int64, device=device),
            there,
            self.probs.new_full((batch, 1, num_classes), 1 / num_classes),
            each * num_classes * there,
            self.weight,
        )


class _Cells(NamedTuple):
    """A batch's maps decoded: the view that matches each crop.

    Attributes:
        classes: int64 [B, P, K].
        probs: float32 [B, P, K], 0 where no class is stored.
        spread: float32 [B, P], factor of `residual` over the classes that are not stored.
        residual: float32 [B, C].
        given: float32 [B, P, K], what `residual` has for each class.
    """

    classes: Tensor
    probs: Tensor
    spread: Tensor
    residual: Tensor
    given: Tensor

    def dense(self, amount: Tensor) -> Tensor:
        """The mixture [B, C] of the cells by amounts [B, P] that sum to 1."""
        values = torch.where(self.probs > 0, self.probs - self.spread[..., None] * self.given, 0.0)
        total = self.residual * (self.spread * amount).sum(1, keepdim=True)
        values = values * amount[..., None]
        return total.scatter_add(1, self.classes.flatten(1), values.flatten(1)).clamp_(min=0)


def windows(labels: "TokenLabels", grid: "Grid") -> TokenWindows:
    """The targets of each patch of `grid`; `TokenLabels.targets` describes it."""
    return _windows(labels, grid, _cells(labels))


def sparse_targets(labels: "TokenLabels", grid: "Grid", k: int) -> TokenTargets:
    """The same merged and cut; `TokenLabels.sparse` describes it."""
    found = windows(labels, grid)
    crop = crop_targets(labels, "logits")
    return TokenTargets.of(labels.label, found.weight, found.dense(), crop, k)


def crop_targets(labels: "TokenLabels", pool: str) -> Tensor:
    """One target an image, [B, C]; `TokenLabels.crop` describes it."""
    cells = _cells(labels)
    # As fine as the maps are: what the crop shows of each cell.
    found = _windows(labels, labels.record_layout.maps.grid, cells)
    at = (found.origin[..., None] + found.offsets).flatten(1)
    amount = torch.zeros_like(cells.spread)
    amount.scatter_add_(1, at, (found.window * found.weight[..., None]).flatten(1))
    amount = amount / amount.sum(1, keepdim=True).clamp(min=_LEAST)
    if pool == "probs":
        return cells.dense(amount)
    # The mean of the logits, but for a constant: that of the log-probabilities, of which all that
    # are not stored are log(spread) + log(residual).
    spread = cells.spread.clamp(min=_LEAST).log()
    residual = cells.residual.clamp(min=_LEAST).log()
    logs = cells.probs.clamp(min=_LEAST).log() - spread[..., None]
    logs = logs - cells.given.clamp(min=_LEAST).log()
    logs = torch.where(cells.probs > 0, logs, 0.0) * amount[..., None]
    mean = residual.scatter_add(1, cells.classes.flatten(1), logs.flatten(1))
    return mean.softmax(-1) * (amount.sum(1, keepdim=True) > 0)


def _windows(labels: "TokenLabels", grid: "Grid", cells: _Cells) -> TokenWindows:
    layout = labels.record_layout
    rows, columns = layout.maps.grid
    size = _window_size(layout.maps.grid, grid, layout.reach)
    row, across_rows, column, across_columns, weight = _upright(labels, grid, size)
    origin = row * columns + column
    window = (across_rows[..., :, None] * across_columns[..., None, :]).flatten(-2)
    if layout.tilted:
        tilted = labels.has(TILTED)[:, None]
        scattered = _scattered(labels, grid, size)
        origin = torch.where(tilted, scattered[0], origin)
        window = torch.where(tilted[..., None], scattered[1], window)
        weight = torch.where(tilted, scattered[2], weight)
    there = (weight > _NOTHING) & labels.has_map[:, None]
    weight = torch.where(there, weight, 0.0)
    window = torch.where(there[..., None], window, 0.0)
    offsets = torch.arange(size[0], device=window.device)[:, None] * columns
    offsets = (offsets + torch.arange(size[1], device=window.device)).flatten()
    at = (origin[..., None] + offsets).flatten(1)
    share = (cells.spread.gather(1, at).view_as(window) * window).sum(-1, keepdim=True)
    values = torch.where(cells.probs > 0, cells.probs - cells.spread[..., None] * cells.given, 0.0)
    basis = cells.residual[:, None]
    if layout.shrink:
        part = labels.word("shrink")[:, None, None] * there[..., None]
        mean = cells.dense(torch.full_like(cells.spread, 1 / (rows * columns)))
        basis = torch.stack([cells.residual, mean], 1)
        share = torch.cat([share * (1 - part), part], -1)
        window = window * (1 - part)
    return TokenWindows(cells.classes, values, origin, offsets, window, basis, share, weight)


def _cells(labels: "TokenLabels") -> _Cells:
    layout = labels.record_layout.maps
    stored = plane(labels, "codes").flatten(2).mT
    if layout.step:
        probs = torch.where(stored == DROPPED, 0.0, (stored * -layout.step).exp())
    else:
        probs = (-stored).exp()
    total = probs.sum(-1)
    complete = (probs > 0).sum(-1) == layout.num_classes
    room = LEAST_REST * ~complete if layout.step else total.new_zeros(())
    scale = (1 - room) / total.clamp(min=1e-30)
    probs = probs * torch.where(complete, scale, scale.clamp(max=1))[..., None]
    rest = torch.where(complete, 0.0, torch.maximum(1 - total, room))
    classes = plane(labels, "classes").flatten(2).mT.long().contiguous()
    residual = probs.new_full((len(classes), layout.num_classes), 1 / layout.num_classes)
    if layout.residual:
        residual = _spread(
            residual, plane(labels, "residual_classes"), plane(labels, "residual_codes")
        )
    given = residual.gather(1, classes.flatten(1)).view_as(probs)
    left = 1 - torch.where(probs > 0, given, 0.0).sum(-1)
    spread = torch.where(left > _NOTHING, rest / left.clamp(min=_NOTHING), 0.0)
    return _Cells(classes, probs, spread, residual, given)


def plane(labels: "TokenLabels", name: str) -> Tensor:
    """A plane of the view that matches each crop: int32 [B, ...], or float32 of float16."""
    data = labels.plane(name)
    dtype, _ = labels.record_layout.maps.planes()[name]
    if data.shape[2] > 1:
        mirrored = labels.has(MIRRORED).view(-1, *[1] * (data.ndim - 2))
        data = torch.where(mirrored, data[:, :, 1], data[:, :, 0])
    else:
        data = data[:, :, 0]
    if dtype.kind == "f":
        # Copied even where it is contiguous: bytes that lie at an odd offset are no float16.
        items = data.movedim(1, -1).clone(memory_format=torch.contiguous_format)
        return items.view(torch.float16)[..., 0].float()
    number = data[:, 0].int()
    for byte in range(1, dtype.itemsize):
        number = number | (data[:, byte].int() << (8 * byte))
    return number


def _spread(even: Tensor, classes: Tensor, codes: Tensor) -> Tensor:
    """How the leftover mass of each image is spread, float32 [B, C]; `score_map.residual`."""
    parts = torch.where(codes == DROPPED, 0.0, (codes / -RESIDUAL_STEPS).exp())
    unnamed = even.shape[1] - (parts > 0).sum(1, keepdim=True)
    left = (1 - parts.sum(1, keepdim=True)).clamp(min=0) / unnamed.clamp(min=1)
    # Added to what all get, since a dropped entry has some class id as well.
    named = torch.where(parts > 0, parts - left, 0.0)
    spread = left.expand_as(even).scatter_add(1, classes.long(), named)
    return spread / spread.sum(1, keepdim=True)


def _window_size(
    cells: "Grid", grid: "Grid", reach: tuple[float, float, float, float]
) -> tuple[int, int]:
    """Rows and columns of cells that a patch can show at most: its own, and their neighbours."""
    across, down = reach[0] / grid[1] + reach[2] / grid[0], reach[1] / grid[1] + reach[3] / grid[0]
    return min(cells[0], int(down - 1e-4) + 3), min(cells[1], int(across - 1e-4) + 3)


def _upright(
    labels: "TokenLabels", grid: "Grid", size: "Grid"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Exact windows where the path is one upright matrix: a product of rows and columns.

    Returns:
        First row [B, N] and amounts of the rows [B, N, size[0]]; the same of the columns; and the
        fraction of each patch that is inside.
    """
    path = labels.paths()[:, 0] if labels.record_layout.segments else _identity(labels)
    a, b, c, d, e, f = (path[:, None, None, index] for index in range(6))
    x0, y0, x1, y1 = (labels.word(name)[:, None, None] for name in ("x0", "y0", "x1", "y1"))
    box = path[:, 9:13, None, None].unbind(1)
    low_x, low_y = torch.maximum(box[0], x0), torch.maximum(box[1], y0)
    high_x, high_y = torch.minimum(box[2], x1), torch.minimum(box[3], y1)
    if len(labels.record_layout.maps.views) > 1:  # the second is of the mirrored image
        turn = labels.has(MIRRORED)[:, None, None]
        a, b, c = torch.where(turn, -a, a), torch.where(turn, -b, b), torch.where(turn, 1 - c, c)
        low_x, high_x = torch.where(turn, 1 - high_x, low_x), torch.where(turn, 1 - low_x, high_x)
        x0, x1 = torch.where(turn, 1 - x1, x0), torch.where(turn, 1 - x0, x1)
    height, width = (labels.word(name)[:, None, None] for name in ("canvas_h", "canvas_w"))
    right = torch.arange(grid[1] + 1, device=path.device) * (width / grid[1])
    down = torch.arange(grid[0] + 1, device=path.device)[:, None] * (height / grid[0])
    rows, columns = labels.record_layout.maps.grid
    # One of the two matrix entries of each axis is 0, so a corner's coordinates suffice.
    per_x, per_y = columns / (x1 - x0), rows / (y1 - y0)
    column, across, inside_x = _axis(
        [(a * right[..., s] + b * down[:, t] + c - x0) * per_x for s, t in _ENDS],
        [(edge - x0) * per_x for edge in (low_x, high_x)],
        columns,
        size[1],
    )
    row, along, inside_y = _axis(
        [(d * right[..., s] + e * down[:, t] + f - y0) * per_y for s, t in _ENDS],
        [(edge - y0) * per_y for edge in (low_y, high_y)],
        rows,
        size[0],
    )
    return row, along, column, across, inside_x * inside_y


_ENDS = ((slice(None, -1), slice(None, -1)), (slice(1, None), slice(1, None)))


def _identity(labels: "TokenLabels") -> Tensor:
    one = torch.eye(3, device=labels.device).flatten()
    return torch.cat([one, one.new_tensor([0, 0, 1, 1, 0, 0, 0])]).expand(labels.shape[0], -1)


def _axis(
    ends: Sequence[Tensor], shown: Sequence[Tensor], cells: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Integrals of the cells' hats over intervals [B, h, w] of one axis, in cells.

    Args:
        ends: where each patch's interval begins and ends; the other way round in a mirrored image.
        shown: first and last point of [0, cells] that the image shows, [B, 1, 1].
        cells: of the axis.
        size: cells of a window.

    Returns:
        The first cell, int64 [B, N]; amounts of `size` cells, [B, N, size], which sum to 1, or to 0
        outside; and the fraction inside, [B, N].
    """
    (start, end), (low, high) = ends, shown
    # A box beyond the extent shows nothing: from the last point to the last.
    low = low.clamp(max=cells)
    high = torch.maximum(high, low)
    length = (end - start).abs()
    near = torch.minimum(torch.maximum(torch.minimum(start, end), low), high).flatten(1)
    far = torch.minimum(torch.maximum(torch.maximum(start, end), low), high).flatten(1)
    first = (near - 0.5).floor().clamp(0, cells - size)
    # One cell more on either side: beyond its border, a map goes on as its outermost cell.
    centre = first[..., None] + torch.arange(-0.5, size + 1, device=near.device)
    amount = _hat(far[..., None] - centre) - _hat(near[..., None] - centre)
    inner = amount[..., 1:-1]
    edges = torch.stack([amount[..., 0] * (first == 0), amount[..., -1] * (first == cells - size)])
    inner = inner + torch.nn.functional.pad(edges[0][..., None], (0, size - 1))
    inner = inner + torch.nn.functional.pad(edges[1][..., None], (size - 1, 0))
    total = inner.sum(-1)
    inside = (far - near) / length.flatten(1).clamp(min=1e-30)
    amounts = torch.where(total[..., None] > 0, inner / total.clamp(min=1e-30)[..., None], 0.0)
    return first.long(), amounts, inside


def _hat(x: Tensor) -> Tensor:
    """Integral of the hat 1 - |x|, up to a constant."""
    x = x.clamp(-1, 1)
    return x - 0.5 * x * x.abs()


def _scattered(labels: "TokenLabels", grid: "Grid", size: "Grid") -> tuple[Tensor, Tensor, Tensor]:
    """Windows for any path, from sub-points: origin [B, N], window [B, N, M], weight [B, N]."""
    layout = labels.record_layout
    most = max(layout.maps.grid)
    per = [max(_POINTS_PER_PATCH, -(-_POINTS_PER_CELL * most // side)) for side in grid]
    found = _subpoint_windows(labels, grid, size, *_through_segments(labels, grid, per))
    if layout.lattice:
        per = [-(-LATTICE // side) for side in grid]
        drawn = (labels.word("lattice") > 0)[:, None]
        other = _subpoint_windows(labels, grid, size, *_through_lattice(labels, grid, per))
        found = (
            torch.where(drawn, other[0], found[0]),
            torch.where(drawn[..., None], other[1], found[1]),
            torch.where(drawn, other[2], found[2]),
        )
    return found


def _through_lattice(labels: "TokenLabels", grid: "Grid", per: list[int]) -> tuple[Tensor, Tensor]:
    """Source points [B, N, S] of the sub-points, from the nearest point of a lattice."""
    points = labels.lattices()
    for axis in (0, 1):
        count = grid[axis] * per[axis]
        at = ((torch.arange(count, device=points.device) + 0.5) * (LATTICE / count)).long()
        points = points.index_select(axis + 1, at)
    return _by_patch(points[..., 0], grid, per), _by_patch(points[..., 1], grid, per)


def _by_patch(points: Tensor, grid: "Grid", per: list[int]) -> Tensor:
    """[B, grid_h * per_h, grid_w * per_w] as [B, N, S]."""
    parts: Tensor = points.unflatten(2, (grid[1], per[1])).unflatten(1, (grid[0], per[0]))
    return parts.transpose(2, 3).flatten(3).flatten(1, 2)


def _through_segments(labels: "TokenLabels", grid: "Grid", per: list[int]) -> tuple[Tensor, Tensor]:
    """Source points [B, N, S] of the sub-points, NaN for those that show fill."""
    sides = (labels.word("canvas_h"), labels.word("canvas_w"))
    counts = [grid[axis] * per[axis] for axis in (0, 1)]
    y, x = (
        (torch.arange(count, device=side.device) + 0.5) * (side[:, None] / count)
        for count, side in zip(counts, sides, strict=True)
    )
    x = _by_patch(x[:, None, :].expand(-1, counts[0], -1), grid, per)
    y = _by_patch(y[:, :, None].expand(-1, -1, counts[1]), grid, per)
    inside = torch.ones_like(x, dtype=torch.bool)
    for segment in labels.paths().unbind(1):
        a, b, c, d, e, f, g, h, i = (segment[:, index, None, None] for index in range(9))
        z = 1 / (g * x + h * y + i)
        x, y = (a * x + b * y + c) * z, (d * x + e * y + f) * z
        x0, y0, x1, y1, mode, height, width = (
            segment[:, index, None, None] for index in range(9, 16)
        )
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


def _subpoint_windows(
    labels: "TokenLabels", grid: "Grid", size: "Grid", x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Bilinear weights of source points [B, N, S], summed over each patch."""
    rows, columns = labels.record_layout.maps.grid
    x0, y0, x1, y1 = (labels.word(name)[:, None, None] for name in ("x0", "y0", "x1", "y1"))
    inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)  # NaN is nowhere
    u, v = (x - x0) * (columns / (x1 - x0)), (y - y0) * (rows / (y1 - y0))
    if len(labels.record_layout.maps.views) > 1:
        turn = labels.has(MIRRORED)[:, None, None]
        u = torch.where(turn, columns - u, u)
    window = u.new_zeros(*u.shape[:2], size[0] * size[1])
    origin, shares = [], []
    for points, cells, length in ((v, rows, size[0]), (u, columns, size[1])):
        at = torch.where(inside, (points - 0.5).clamp(0, cells - 1), 0.0)
        cell = at.floor().clamp(max=max(cells - 2, 0))
        first = torch.where(inside, cell, float(cells)).amin(-1).clamp(max=cells - length)
        # Beyond the window, which cannot be for a smooth path, the last cell stands for them.
        local = (cell - first[..., None]).clamp(0, max(length - 2, 0)).long()
        origin.append(first.long())
        shares.append((local, at - cell))
    (row, below), (column, right) = shares
    base = row * size[1] + column
    one = inside.to(u.dtype)
    for step, amount in (
        (0, (1 - below) * (1 - right)),
        (min(size[1] - 1, 1), (1 - below) * right),
        (min(size[0] - 1, 1) * size[1], below * (1 - right)),
        (min(size[0] - 1, 1) * size[1] + min(size[1] - 1, 1), below * right),
    ):
        window.scatter_add_(2, base + step, amount * one)
    total = window.sum(-1)
    amounts = torch.where(total[..., None] > 0, window / total.clamp(min=1e-30)[..., None], 0.0)
    return origin[0] * columns + origin[1], amounts, total / u.shape[-1]
