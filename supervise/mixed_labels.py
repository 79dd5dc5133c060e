"""`MixedLabels`: the labels of a batch whose images were mixed in pairs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..dataset.targets.token_labels import TokenLabels
from ..dataset.targets.windows import TokenTargets, TokenWindows
from .backbones.backbone import Grid, pair

_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class MixedLabels:
    """Labels of B images, each mixed with a partner from the batch: the records, and how they mix.

        images, mixed = MixUpOrCutMix()(images, labels)
        classes, fractions = mixed.label, mixed.label_probs  # [B, 2] each: own, partner

    A patch's target is the mixture of both images' targets there, each counted by its fraction of
    the patch's area times its `weight` (the part of the patch inside image and extent, taken as
    spread evenly over the patch). Padding, and an image without a map, contribute nothing.

    Attributes:
        labels: records of the batch before mixing, [B, bytes].
        partner: int64 [B], the index of each image's partner.
        blend: float32 [B], the fraction of each pixel that is the image's own, outside the box.
        box: float32 [B, 4], (x0, y0, x1, y1) as fractions of the image, where the partner is
            pasted; empty for none.
        patches: whether patches are mixed as well. False for MixToken, whose student returns each
            patch to its image: then only the class token's target is mixed.
        own: int64 [B], the index of each image's own record; None: the records' order.
        label_smoothing: mass of the labels to be spread evenly over all classes by the loss.
    """

    labels: TokenLabels
    partner: Tensor
    blend: Tensor
    box: Tensor
    patches: bool = True
    own: Tensor | None = None
    label_smoothing: float = 0.0

    def __len__(self) -> int:
        return len(self.partner)

    def __getitem__(self, images: Any) -> "MixedLabels":
        """The labels of some images: a slice, or indices or a mask as a tensor or a list."""
        if isinstance(images, int):
            raise TypeError(
                "mixed labels are those of a batch, got one index. Remedy: labels[i : i + 1]"
            )
        own = torch.arange(len(self), device=self.device) if self.own is None else self.own
        partner, blend, box = self.partner[images], self.blend[images], self.box[images]
        return replace(self, own=own[images], partner=partner, blend=blend, box=box)

    @property
    def device(self) -> torch.device:
        """The device that all fields are on."""
        return self.labels.device

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "MixedLabels":
        """The same on another device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def cuda(self, device: int | None = None, non_blocking: bool = False) -> "MixedLabels":
        """The same on a GPU."""
        return self._map(lambda part: part.cuda(device, non_blocking))

    def pin_memory(self) -> "MixedLabels":
        """The same in page-locked memory."""
        return self._map(lambda part: part.pin_memory())

    @property
    def label(self) -> Tensor:
        """int64 [B, 2], classes of the image and of its partner, -1 where unknown."""
        label = self.labels.label
        return torch.stack([self._own(label), label[self.partner]], 1)

    @property
    def label_probs(self) -> Tensor:
        """float32 [B, 2], fractions of the pixels of the image and of its partner."""
        own = self.own_area((1, 1))
        return torch.cat([own, 1 - own], 1)

    def own_area(self, grid: int | Grid) -> Tensor:
        """Fraction of each patch's area that shows the image itself, float32 [B, N].

        Exact, also where the edges of patches or box cut one another, or pixels.
        """
        rows, columns = pair(grid)
        x0, y0, x1, y1 = self.box.unsqueeze(-1).unbind(1)
        pasted = _covered(y0, y1, rows).unsqueeze(2) * _covered(x0, x1, columns).unsqueeze(1)
        return self.blend.unsqueeze(1) * (1 - pasted.flatten(1))

    def parts(self, grid: int | Grid | None = None) -> list[tuple[TokenWindows, Tensor]]:
        """The patches' targets, each with its coefficient [B, N], as `cross_entropy` takes them.

        Args:
            grid: as for `TokenLabels.targets`.
        """
        windows = self.labels.targets(grid)
        if not self.patches:
            windows = windows if self.own is None else windows.take(self.own)
            return [(windows, windows.weight)]
        grid = grid or self.labels.grid
        assert grid is not None  # or there were no targets
        own, partner = self.own_area(grid), windows.take(self.partner)
        windows = windows if self.own is None else windows.take(self.own)
        return [(windows, own * windows.weight), (partner, (1 - own) * partner.weight)]

    def mix(self, rows: Tensor) -> Tensor:
        """Mix what belongs to the records' images, a row each, by fractions of pixels, [B, C]."""
        own, other = self.label_probs.unsqueeze(-1).unbind(1)
        return own * self._own(rows) + other * rows[self.partner]

    def _own(self, rows: Tensor) -> Tensor:
        """The rows of the images themselves, of what has one for each record."""
        return rows if self.own is None else rows[self.own]

    def crop(self, pool: str = "logits") -> Tensor:
        """Soft targets of the mixed crops, [B, C]; as `TokenLabels.crop`."""
        crop = self.mix(self.labels.crop(pool))
        return crop / crop.sum(1, keepdim=True).clamp(min=_LEAST)

    def hard_label(self) -> Tensor:
        """The class of the image that most pixels show, int64 [B]; -1 where unknown."""
        own, partner = self.label.unbind(1)
        return torch.where(self.label_probs[:, 0] >= 0.5, own, partner)

    def sparse(self, grid: int | Grid | None = None, k: int = 10) -> TokenTargets:
        """The k most probable classes of each mixed patch and crop. Allocates [B, N, C].

        Args:
            grid: as for `TokenLabels.targets`.
            k: classes kept for each patch; the mass of the others goes to `rest`.
        """
        parts = self.parts(grid)
        weight = torch.stack([coefficient for _, coefficient in parts]).sum(0)
        mixed = [windows.dense() * coefficient.unsqueeze(-1) for windows, coefficient in parts]
        dense = torch.stack(mixed).sum(0) / weight.clamp(min=_LEAST).unsqueeze(-1)
        return TokenTargets.of(self.hard_label(), weight, dense, self.crop(), k)

    def _map(self, move: Callable[[Any], Any]) -> "MixedLabels":
        own = None if self.own is None else move(self.own)
        partner, blend, box = move(self.partner), move(self.blend), move(self.box)
        labels = move(self.labels)
        return replace(self, labels=labels, own=own, partner=partner, blend=blend, box=box)


def _covered(start: Tensor, end: Tensor, patches: int) -> Tensor:
    """Fraction of each patch's side that [start, end] covers, [B, patches]."""
    edges = torch.arange(patches + 1, dtype=start.dtype, device=start.device) / patches
    overlap = torch.minimum(end, edges[1:]) - torch.maximum(start, edges[:-1])
    return overlap.clamp(min=0) * patches


def check_records(labels: object) -> TokenLabels:
    """The batch of records that these are; refuses anything else."""
    if type(labels) is Tensor and labels.dtype == torch.uint8 and labels.ndim == 2:
        return TokenLabels.wrap(labels)  # their bytes, as a broadcast to other processes gives
    if isinstance(labels, MixedLabels):
        raise TypeError(
            "a batch can be mixed once; these labels are MixedLabels. Remedy: apply one of MixUp, "
            "CutMix and MixToken to a batch (MixUpOrCutMix draws one of the first two)"
        )
    if not isinstance(labels, TokenLabels):
        raise TypeError(
            f"labels must be TokenLabels, got {type(labels).__name__}. Remedy: pass what a "
            "DataLoader over TokenLabelDataset returns"
        )
    if labels.ndim != 2:
        raise ValueError(
            f"labels must be a batch [B, bytes], got {list(labels.shape)}. Remedy: mix the batches "
            "of a DataLoader, or use torch.utils.data.default_collate"
        )
    return labels
