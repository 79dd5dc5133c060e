"""Passes: looks at one image at several sizes, read onto one grid.

A larger input shows a teacher what a student's small crops will show; the mean of the logits knows
both. A teacher that takes one size only looks at overlapping tiles of the larger image instead.
"""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]


class Pass:
    """One look at the whole image: at once, or by tiles.

    Args:
        look: the teacher, from tiles [B, 3, h, w] to logits [B, h, w, C].
        size: (h, w) of the image in pixels.
        tile: (h, w) of what the teacher sees at a time; `size` for the whole.
        cells: (h, w) of the map that it gives of that.
        grid: (H, W) that the map is read onto.
        device: of the logits.

    Attributes:
        tiles: rows and columns of tiles, which cover the image and overlap alike.
    """

    def __init__(
        self,
        look: Callable[[Tensor], Tensor],
        size: Size,
        tile: Size,
        cells: Size,
        grid: Size,
        device: torch.device,
    ) -> None:
        self._look, self._tile = look, tile
        starts, matrices = [], []
        for side, part, count, wanted in zip(size, tile, cells, grid, strict=True):
            last = -(-side // part) - 1
            starts.append([round(at * (side - part) / max(last, 1)) for at in range(last + 1)])
            parts = [(start / side, (start + part) / side) for start in starts[-1]]
            matrices.append(_reading(wanted, count, parts, device))
        self.tiles = (len(starts[0]), len(starts[1]))
        self._parts = list(zip(product(*starts), product(*matrices), strict=True))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits on the grid, float32 [B, H, W, C], of images [B, 3, h, w] of `size`."""
        height, width = self._tile
        parts = (
            _read(self._look(pixels[..., y : y + height, x : x + width]), down, across)
            for (y, x), (down, across) in self._parts
        )
        total = next(parts)
        for part in parts:
            total += part
        return total


def onto(logits: Tensor, grid: Size) -> Tensor:
    """Read a map [B, h, w, C] onto another grid: area averages of it, bilinear between centres."""
    sides = zip(grid, logits.shape[1:3], strict=True)
    down, across = (_reading(*side, [(0, 1)], logits.device)[0] for side in sides)
    return _read(logits, down, across)


def _read(logits: Tensor, down: Tensor, across: Tensor) -> Tensor:
    return torch.einsum("rh,cw,bhwk->brck", down, across, logits)


def _reading(
    count: int, cells: int, parts: Sequence[tuple[float, float]], device: torch.device
) -> list[Tensor]:
    """Matrices [count, cells] that read maps of parts of an axis onto `count` cells of all of it.

    `parts` are where each begins and ends, as fractions of the axis. The rows of all matrices
    together sum to 1. Where parts overlap, one counts the less the nearer its end is, for beyond it
    the teacher saw nothing.
    """
    edges = np.linspace(0, 1, count + 1)
    found, weights = [], []
    for start, end in parts:
        # In lengths of the part; of a cell that reaches beyond it, what is inside.
        at = ((edges - start) / (end - start)).clip(0, 1)
        middle = (at[1:] + at[:-1]) / 2
        near = np.minimum(middle if start > 0 else np.inf, 1 - middle if end < 1 else np.inf).clip(
            1e-3, 0.5
        )
        weights.append(np.diff(at) * near)
        # Integrals up to each edge of hats around the cells' centres: the weights of a bilinear
        # map. Beyond the outermost centres, the outermost cells go on.
        distance = (at[:, None] * cells - np.arange(-0.5, cells + 1)).clip(-1, 1)
        hats = distance - distance * np.abs(distance) / 2
        hats[:, 1] += hats[:, 0]
        hats[:, -2] += hats[:, -1]
        area = np.diff(hats[:, 1:-1], axis=0)
        found.append(area / np.maximum(area.sum(1, keepdims=True), 1e-12))
    total = np.sum(weights, 0)
    parts_of_all = (area * (w / total)[:, None] for area, w in zip(found, weights, strict=True))
    return [torch.tensor(part, dtype=torch.float32, device=device) for part in parts_of_all]
