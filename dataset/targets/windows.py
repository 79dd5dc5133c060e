"""What each patch is taught: windows of a map's cells, for a whole batch, on any device.

The target of a patch is the area average of the map's probabilities over the patch's footprint,
bilinear between the centres of the cells. Cross entropy is linear in its target, so the cells that
a patch shows need not be merged: they stay a window of cells with a weight each.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .cells import LEAST, decode
from .footprints import footprints
from .record import Grid, Records


class TokenWindows(NamedTuple):
    """Soft targets of a batch's patches: linear in the maps' cells, nothing merged or cut.

        windows = labels.targets(grid=14)  # what TokenLabelLoss takes
        windows.weight  # [B, 196], the fraction of each patch that has a target
        target = windows.dense()  # [B, 196, C], for another loss: it takes much more memory

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
        return TokenWindows(*(part if part is self.offsets else part[index] for part in self))

    def dense(self) -> Tensor:
        """The targets as one distribution a patch, float32 [B, N, C]."""
        (batch, patches), (cells, k) = self.origin.shape, self.classes.shape[1:]
        at = (self.origin[..., None] + self.offsets).flatten(1)
        # One index over all cells of the batch: gather would need it expanded to K classes.
        at = (at + cells * torch.arange(batch, device=at.device)[:, None]).flatten()
        ids = self.classes.flatten(0, 1)[at].view(batch, patches, -1)
        values = self.values.flatten(0, 1)[at].view(batch, patches, -1, k)
        values = (values * self.window[..., None]).flatten(2)
        # No matrix product, which autocast would round.
        dense = (self.share.unsqueeze(-1) * self.basis.unsqueeze(1)).sum(2)
        return dense.scatter_add_(2, ids, values)


class TokenTargets(NamedTuple):
    """Soft targets of a batch, merged and cut to K classes, for inspection or another loss.

        targets = labels.sparse(grid=14, k=5)
        targets.classes[0, 97], targets.probs[0, 97]  # of one patch of the first image

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
        others = num_classes - (self.probs > 0).sum(-1, keepdim=True)
        each = torch.where(others > 0, self.rest[..., None] / others.clamp(min=1), 0.0)
        (batch, patches), device = self.weight.shape, self.weight.device
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


def patch_windows(records: Records, grid: Grid) -> TokenWindows:
    """The targets of each patch of `grid`; `TokenLabels.targets` describes it."""
    cells = decode(records)
    (origin, window, weight), offsets = footprints(records, grid)
    at = (origin[..., None] + offsets).flatten(1)
    share = (cells.leftover.gather(1, at).view_as(window) * window).sum(-1, keepdim=True)
    basis = cells.residual[:, None]
    if records.layout.shrink:
        part = records.word("shrink")[:, None, None] * (weight > 0)[..., None]
        rows, columns = records.layout.maps.grid
        mean = cells.mean(torch.full_like(cells.leftover, 1 / (rows * columns)))
        basis = torch.stack([cells.residual, mean], 1)
        share = torch.cat([share * (1 - part), part], -1)
        window = window * (1 - part)
    return TokenWindows(cells.classes, cells.values, origin, offsets, window, basis, share, weight)


def crop_targets(records: Records, pool: str) -> Tensor:
    """One target an image, [B, C]; `TokenLabels.crop` describes it."""
    cells = decode(records)
    # Patches as fine as the cells: what the crop shows of each. Shrinking is for patches only.
    (origin, window, weight), offsets = footprints(records, records.layout.maps.grid)
    at = (origin[..., None] + offsets).flatten(1)
    amount = torch.zeros_like(cells.leftover)
    amount.scatter_add_(1, at, (window * weight[..., None]).flatten(1))
    amount = amount / amount.sum(1, keepdim=True).clamp(min=LEAST)
    if pool == "probs":
        return cells.mean(amount)
    return cells.mean_logits(amount).softmax(-1) * (amount.sum(1, keepdim=True) > 0)
