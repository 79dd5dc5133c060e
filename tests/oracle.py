"""Painted images whose every pixel tells which cell of the map it came from.

`flat` images give each cell one RGB colour, as a photograph would be labelled by hand; from the
transformed image, each patch's colour says which cell it must have as its target. `smooth`
images have a channel for each cell, which holds the cell's share of every pixel, and one more of
ones, which says where the image still is and where fill is: pooled over a patch, the channels are
its target to the last digit that torchvision's own resampling leaves.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tokenlabel.dataset.label_map.label_map import TokenLabelMap
from tokenlabel.dataset.targets.windows import TokenWindows
from tokenlabel.dataset.transforms.to_token_labels import ToTokenLabels

Size = tuple[int, int]
GRIDS: list[Size] = [(14, 14), (16, 16), (7, 7), (24, 24), (12, 16)]
#: A patch shows a cell if more than this share of its pixels have its very colour. In patches
#: of 6 pixels, a border that painting and nearest sampling moved by one makes 2/3 of a half.
CLEAR = 0.7
# The palette: a lattice in RGB, so coarse that rounding does not matter.
_LEVELS, _DARKEST, _STEP = 8, 40, 30


def label_map(cells: Size, canvas_size: Size) -> TokenLabelMap:
    """A map whose cell (r, c) is of class r * W + c for certain."""
    height, width = cells
    return TokenLabelMap.from_scores(
        torch.zeros(height, width, 1),
        torch.arange(height * width).reshape(height, width, 1),
        torch.full((height, width), -torch.inf),
        canvas_size=canvas_size,
    )


def colours(count: int) -> np.ndarray:
    """Distinct RGB colours, none of them near black (fill), uint8 [count, 3]."""
    axes = np.meshgrid(*[np.arange(_LEVELS)] * 3, indexing="ij")
    lattice = _DARKEST + _STEP * np.stack(axes, -1).reshape(-1, 3)
    return np.random.default_rng(0).permutation(lattice)[:count].astype(np.uint8)


def which_colour(pixels: np.ndarray, count: int) -> np.ndarray:
    """Index among `colours(count)` of each pixel [h, w, 3]; -1 for any other colour."""
    palette = colours(count).astype(int)
    table = np.full(_LEVELS**3, -1)
    base = _LEVELS ** np.arange(2, -1, -1)
    table[((palette - _DARKEST) // _STEP) @ base] = np.arange(count)
    level = (pixels.astype(int) - _DARKEST + _STEP // 2) // _STEP
    off = np.abs(pixels - (_DARKEST + _STEP * level)).max(-1)
    known = (off <= 4) & (level.min(-1) >= 0) & (level.max(-1) < _LEVELS)
    return np.where(known, table[np.where(known, level @ base, 0)], -1)


def flat(cells: Size, size: Size) -> np.ndarray:
    """Image [h, w, 3], uint8: each cell in its colour."""
    rows = ((np.arange(size[0]) + 0.5) * cells[0] / size[0]).astype(int)
    columns = ((np.arange(size[1]) + 0.5) * cells[1] / size[1]).astype(int)
    painted: np.ndarray = colours(cells[0] * cells[1])[rows[:, None] * cells[1] + columns]
    return painted


def smooth(cells: Size, size: Size) -> Tensor:
    """Image [cells + 1, h, w], float: each cell's share of each pixel, and a channel of ones."""
    count = cells[0] * cells[1]
    shares = torch.eye(count).reshape(1, count, *cells)
    resize = torch.nn.functional.interpolate
    painted = resize(shares, size=list(size), mode="bilinear", align_corners=False)[0]
    return torch.cat([painted, torch.ones(1, *size)])


def pool(image: Tensor, grid: Size) -> Tensor:
    """Area average of an image [C, h, w] over each patch, [N, C]; patches may cut pixels."""
    weights = []
    for side, patches in zip(image.shape[-2:], grid, strict=True):
        edges = torch.arange(patches + 1, dtype=torch.float64) * side / patches
        pixels = torch.arange(side, dtype=torch.float64)
        covered = (edges[:, None] - pixels).clamp(0, 1)
        weights.append(covered.diff(dim=0) * patches / side)
    pooled = torch.einsum("iy,cyx,jx->ijc", weights[0], image.double(), weights[1])
    return pooled.reshape(grid[0] * grid[1], -1)


def agreement(
    transform: Callable[..., Any], cells: Size, size: Size, grid: Size, pil: bool
) -> tuple[int, int]:
    """Patches of a transformed flat image that clearly show one cell, and how many of them have
    that cell as their most probable class.
    """
    painted = flat(cells, size)
    image: Any = (
        PIL.Image.fromarray(painted) if pil else tv_tensors.Image(painted.transpose(2, 0, 1))
    )
    image, labels = v2.Compose([transform, ToTokenLabels(grid)])(image, label_map(cells, size))
    tensor = v2.functional.to_dtype(v2.functional.to_image(image), torch.uint8, scale=True)
    pixels = tensor.numpy().transpose(1, 2, 0)
    count = cells[0] * cells[1]
    shown = which_colour(pixels, count)
    row, column = (
        ((np.arange(side) + 0.5) * patches / side).astype(int)
        for side, patches in zip(shown.shape, grid, strict=True)
    )
    patch = row[:, None] * grid[1] + column
    pixels_of = np.bincount(patch.ravel(), minlength=grid[0] * grid[1])
    votes = np.bincount(
        (patch * (count + 1) + shown + 1).ravel(), minlength=len(pixels_of) * (count + 1)
    ).reshape(-1, count + 1)[:, 1:]
    clear = votes.max(1) > CLEAR * pixels_of
    right = votes.argmax(1) == labels[None].targets().dense()[0].argmax(1).numpy()
    return int(clear.sum()), int(right[clear].sum())


class Distance(NamedTuple):
    """How far targets are from pooled colours.

    Attributes:
        variation: mean total variation over the patches that lie at least half inside.
        inner: the same over those that lie inside.
        weight: mean difference between `weight` and the patches' share inside the image.
    """

    variation: float
    inner: float
    weight: float


def distance(
    transform: Callable[..., Any],
    cells: Size,
    size: Size,
    grid: Size,
    *,
    pil: bool = False,
) -> Distance:
    """Distance between the targets of a transformed image and its pooled channels."""
    painted = smooth(cells, size)
    images = _as_pil(painted) if pil else [tv_tensors.Image(painted)]
    pipeline = v2.Compose([transform, ToTokenLabels(grid)])
    *images, labels = pipeline(*images, label_map(cells, size))
    targets: TokenWindows = labels[None].targets()
    if pil:
        planes = torch.cat([F.pil_to_tensor(image) for image in images]) / 255
    else:
        planes = images[0].as_subclass(Tensor)
    pooled = pool(planes, grid)
    shares, weight = pooled[:, : cells[0] * cells[1]], pooled[:, -1]
    truth = shares / weight.clamp(min=1e-9)[:, None]
    variation = 0.5 * (truth - targets.dense()[0]).abs().sum(1)
    both = torch.minimum(weight, targets.weight[0])
    return Distance(
        *(float(variation[both > limit].mean().nan_to_num()) for limit in (0.5, 0.999)),
        float((weight - targets.weight[0]).abs().mean()),
    )


def _as_pil(painted: Tensor) -> list[PIL.Image.Image]:
    """The channels as RGB images, the last of them filled up by repeating the last channel."""
    missing = -len(painted) % 3
    planes: Sequence[Tensor] = torch.cat([painted, painted[-1:].expand(missing, -1, -1)]).split(3)
    return [F.to_pil_image((plane * 255).round().to(torch.uint8)) for plane in planes]
