"""Made-up records, for tests of what is taught with them."""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tests.leaves import made_up as leaves_made_up
from tokenlabel.dataset import MapLayout, TokenLabels, TokenWindows
from tokenlabel.dataset.targets.record import WORDS

SIZE = (32, 32)


def made_up(
    batch: int,
    num_classes: int = 30,
    *,
    grid: tuple[int, int] | None = (3, 3),
    cells: tuple[int, int] = (5, 5),
    k: int = 5,
    residual: int = 4,
    shrink: float = 0.0,
    seed: int = 0,
) -> TokenLabels:
    """Records of a batch: random maps; crops, some flipped or padded."""
    rng = np.random.default_rng(seed)
    layout = MapLayout(("identity",), cells, k, num_classes, residual)
    leaves = []
    for index in range(batch):
        label, top, left = rng.integers([num_classes, 20, 20]).tolist()
        leaf, _ = leaves_made_up(layout, [seed, index], canvas_size=(40, 48), label=label)
        leaf = F.resized_crop(leaf, top, left, 20, 28, SIZE)
        leaf = F.horizontal_flip(leaf) if index % 2 else leaf
        leaf = F.crop(leaf, -6, 3, *SIZE) if index % 3 == 2 else leaf
        leaves.append(leaf)
    return TokenLabels.collate(leaves, grid, shrink)


def with_word(labels: TokenLabels, row: int, **words: int) -> TokenLabels:
    """The records with words of one header replaced: `label`, or `state` (0: no map)."""
    changed = labels.clone()
    for name, value in words.items():
        changed.as_subclass(Tensor).view(torch.int32)[row, WORDS.index(name)] = value
    return changed


def exact(windows: TokenWindows) -> Tensor:
    """The targets by their definition, [B, N, C] in float64: one class of one cell at a time."""
    *_, num_classes = windows.basis.shape
    batch, patches, cells = windows.window.shape
    target = torch.zeros(batch, patches, num_classes, dtype=torch.float64)
    for b in range(batch):
        for n in range(patches):
            for m in range(cells):
                cell = windows.origin[b, n] + windows.offsets[m]
                values = windows.values[b, cell].double() * windows.window[b, n, m].double()
                for c, value in zip(windows.classes[b, cell], values, strict=True):
                    target[b, n, c] += value
            target[b, n] += windows.share[b, n].double() @ windows.basis[b].double()
    return target
