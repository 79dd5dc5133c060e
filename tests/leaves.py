"""Maps of all layouts as leaves, and their targets by the definition, written down plainly."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.maps import random_maps
from tokenlabel.dataset import LabelStore, MapLayout, ScoreMap, TokenLabelMap, TokenLabels
from tokenlabel.dataset.format.chunks import shuffle

Size = tuple[int, int]
SIZE = (90, 120)
CLASSES = 60
LAYOUT = MapLayout(("identity",), (6, 8), 5, CLASSES, residual=9)
#: All that a layout can say.
LAYOUTS = {
    "as annotated": LAYOUT,
    "finer codes": LAYOUT._replace(step=0.125),
    "float16": LAYOUT._replace(step=0.0),
    "float16, no residual": LAYOUT._replace(step=0.0, residual=0),
    "no residual": LAYOUT._replace(residual=0),
    "no level": LAYOUT._replace(level=False),
    "all classes named by the residual": LAYOUT._replace(residual=CLASSES),
    "all classes stored": LAYOUT._replace(k=CLASSES),
    "all classes stored, float16": LAYOUT._replace(k=CLASSES, step=0.0),
    "one class": LAYOUT._replace(k=1),
    "uint32 ids": LAYOUT._replace(num_classes=70_000, grid=(2, 3)),
    "one row": LAYOUT._replace(grid=(1, 5)),
    "one column": LAYOUT._replace(grid=(4, 1)),
    "one cell": LAYOUT._replace(grid=(1, 1)),
    "two views": LAYOUT._replace(views=("identity", "hflip")),
}


def made_up(
    layout: MapLayout = LAYOUT, seed: int | list[int] = 0, **options: Any
) -> tuple[TokenLabelMap, ScoreMap]:
    """A random map as a leaf on an image of `SIZE`, and the same as it is read from a store."""
    planes = {name: rows[0] for name, rows in random_maps(layout, 1, seed).items()}
    options = {"canvas_size": SIZE} | options
    leaf = TokenLabelMap(b"".join(map(shuffle, planes.values())), layout, **options)
    views = len(layout.views)
    nothing = {
        "residual_classes": np.empty((views, 0), layout.class_dtype),
        "residual_codes": np.empty((views, 0), np.uint8),
        "level": None,
    }
    height, width = leaf.canvas_size
    return leaf, ScoreMap(
        layout, **nothing | planes, label=leaf.label, size=(width, height), extent=leaf.extent
    )


def stored(store: LabelStore, row: int) -> tuple[TokenLabelMap, ScoreMap]:
    """The map of a store's row, both ways."""
    return store.leaf(row), store[row]


def record(*leaves: TokenLabelMap, **options: Any) -> TokenLabels:
    """A batch of maps."""
    return TokenLabels.collate(leaves, **options)


def dense(leaf: TokenLabelMap, grid: int | Size, **options: Any) -> Tensor:
    """Targets of one map, [N, C]."""
    return record(leaf, **options).targets(grid).dense()[0]


def by_points(
    leaf: TokenLabelMap, score_map: ScoreMap, grid: Size, fine: int, whole: Any = None
) -> tuple[Tensor, Tensor]:
    """Targets [N, C] and weight [N] by their definition: averages over fine x fine points a patch.

    Each point of a patch goes along the path to the source image. There the map, or `whole`
    [H, W, C] in its place, is bilinear between the centres of its cells.
    """
    height, width = leaf.canvas_size
    rows, columns = grid[0] * fine, grid[1] * fine
    x, y, inside = leaf.path(
        (np.arange(columns) + 0.5) * width / columns,
        ((np.arange(rows) + 0.5) * height / rows)[:, None],
    )
    x, y = np.broadcast_to(x, inside.shape), np.broadcast_to(y, inside.shape)
    x0, y0, x1, y1 = score_map.extent
    inside = inside & (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    u, v = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
    if leaf.is_mirrored:
        u = 1 - u
    cells = score_map.layout.grid
    amounts = []
    for at, count in ((v, cells[0]), (u, cells[1])):
        position = np.clip(at * count - 0.5, 0, count - 1)
        amounts.append(np.maximum(0, 1 - np.abs(position[..., None] - np.arange(count))) * 1.0)
    each = np.einsum("yxr,yxc,yx->yxrc", *amounts, inside.astype(float))
    each = (
        each.reshape(grid[0], fine, grid[1], fine, -1).mean((1, 3)).reshape(-1, cells[0] * cells[1])
    )
    weight = each.sum(1)
    whole = score_map.dense(int(leaf.is_mirrored)) if whole is None else whole
    flat = whole.reshape(len(each[0]), -1).astype(float)
    targets = each @ flat / np.maximum(weight, 1e-12)[:, None]
    return torch.from_numpy(targets), torch.from_numpy(weight)
