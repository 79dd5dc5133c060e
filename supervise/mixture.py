"""One draw of MixUp or CutMix: what is random in it, and what it does to pictures and patches."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors

Grid = tuple[int, int]


class Mixture(NamedTuple):
    """How n pictures are mixed, each with its partner: blended, then pasted over. On the CPU.

    Attributes:
        blend: float64 [n], the picture's own share of each pixel; 1 where nothing is blended.
        box: int64 [n, 4], (x0, y0, x1, y1) in pixels, where the partner is pasted; empty for none.
    """

    blend: Tensor
    box: Tensor


def draw_blend(alpha: float, count: int) -> Tensor:
    """Shares of `count` MixUps, Beta(alpha, alpha), as torchvision's draws that of one."""
    both = torch.full((count,), float(alpha))
    return torch.distributions.Beta(both, both).sample().double()


def draw_box(alpha: float, count: int, height: int, width: int) -> Tensor:
    """Boxes of `count` CutMixes, as torchvision's draws that of one."""
    half = 0.5 * (1 - draw_blend(alpha, count)).sqrt()
    sides = []
    for side in (width, height):
        centre, reach = torch.randint(side, (count,)), (half * side).long()
        sides.append(((centre - reach).clamp(min=0), (centre + reach).clamp(max=side)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], 1)


def mix_images(images: Tensor, partner: Tensor, mixture: Mixture) -> Tensor:
    """Mixed pictures, new.

    Args:
        images: [B, C, H, W]; of a floating dtype if any are blended.
        partner: int64 [B], index of each one's partner.
        mixture: of B.
    """
    pictures = images.as_subclass(Tensor)
    others = pictures[partner.to(images.device)]
    mixed = pictures
    if bool((mixture.blend != 1).any()):
        shape = (-1, 1, 1, 1)
        exact = torch.promote_types(images.dtype, torch.float32)
        own = mixture.blend.to(images.device).view(shape)
        mixed = (others * (1 - own).to(exact)).add_(pictures * own.to(exact)).to(images.dtype)
    if bool((mixture.box[:, 2:] > mixture.box[:, :2]).any()):
        x0, y0, x1, y1 = mixture.box.to(images.device).unsqueeze(-1).unbind(1)
        row, column = (torch.arange(side, device=images.device) for side in images.shape[2:])
        down, across = (row >= y0) & (row < y1), (column >= x0) & (column < x1)
        inside = (down.unsqueeze(2) & across.unsqueeze(1)).unsqueeze(1)
        mixed = torch.where(inside, others, mixed)
    if mixed is pictures:
        mixed = pictures.clone()
    return tv_tensors.wrap(mixed, like=images) if isinstance(images, tv_tensors.Image) else mixed


def own_shares(mixture: Mixture, size: tuple[int, int], grid: Grid) -> Tensor:
    """Share of each patch's area that shows the picture itself, float64 [n, N].

    Exact, also where the edges of patches or box cut one another, or pixels.

    Args:
        mixture: of n.
        size: (h, w) of the pictures in pixels.
        grid: (h, w) of the patches.
    """
    x0, y0, x1, y1 = mixture.box.double().unsqueeze(-1).unbind(1)
    down = _covered(y0, y1, size[0], grid[0])
    across = _covered(x0, x1, size[1], grid[1])
    pasted = (down.unsqueeze(2) * across.unsqueeze(1)).flatten(1)
    return mixture.blend.unsqueeze(1) * (1 - pasted)


def _covered(start: Tensor, end: Tensor, side: int, patches: int) -> Tensor:
    """Share of each patch's side that [start, end] covers, [n, patches]."""
    edges = torch.arange(patches + 1, dtype=torch.float64) * side / patches
    overlap = torch.minimum(end, edges[1:]) - torch.maximum(start, edges[:-1])
    return overlap.clamp(min=0) * patches / side


def grid_of(patches: int, grid: Grid | None, size: tuple[int, int]) -> Grid:
    """Rows and columns of N patches of pictures of `size` (h, w).

    Raises:
        ValueError: `grid` has another number of patches; or is None, and the pictures are not
            square or N is no square number.
    """
    if grid is None:
        side = math.isqrt(patches)
        if side * side != patches or size[0] != size[1]:
            raise ValueError(
                "without a grid, pictures must be square and their patches form a square; the "
                f"pictures are {size[0]} x {size[1]} and the targets have {patches} patches. "
                "Remedy: grid=student.grid, that of TokenLabelDataset"
            )
        return side, side
    if grid[0] * grid[1] != patches:
        raise ValueError(
            f"the grid must be that of the targets; it is {grid[0]} x {grid[1]}, they have "
            f"{patches} patches. Remedy: pass the grid of TokenLabelDataset"
        )
    return grid
