"""MixUp and CutMix of a batch of pictures and, in step, of their token targets."""

from typing import Literal

import torch
from torch import Tensor, nn

from tokenlabel.dataset import TokenTargets
from tokenlabel.supervise.mixed import MixedTargets, check_unmixed, mix_targets
from tokenlabel.supervise.mixture import (
    Grid,
    Mixture,
    draw_blend,
    draw_box,
    grid_of,
    mix_images,
    own_shares,
)

__all__ = ["CutMix", "MixUp", "MixUpOrCutMix"]

Mode = Literal["batch", "pair", "elem"]
_MODES = ("batch", "pair", "elem")


class MixUpOrCutMix(nn.Module):
    """MixUp or CutMix, drawn anew for each batch, pair or picture, as timm's `Mixup` does.

    Called as `images, targets = mix(images, targets)` on the batches of a DataLoader.

    Args:
        mixup_alpha: of MixUp's Beta distribution; 0 leaves CutMix only.
        cutmix_alpha: of CutMix's Beta distribution; 0 leaves MixUp only.
        prob: probability of mixing at all.
        switch_prob: probability of CutMix rather than MixUp, where both are on.
        mode: draw once for the "batch", for each "pair" of pictures (the first and the last of the
            batch, and so on, mixed with each other), or for each one ("elem"). But for "pair", the
            partner is the picture before in the batch.
        grid: patches (h, w), or one number for a square; None, for square
            pictures: as many rows as columns.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        *,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: Mode = "batch",
        grid: int | Grid | None = None,
    ) -> None:
        super().__init__()
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= alpha < float("inf"):
                raise ValueError(f"{name} must be a finite number, 0 or more, got {alpha}")
        if not mixup_alpha and not cutmix_alpha:
            raise ValueError(
                "one of mixup_alpha and cutmix_alpha must be above 0, got 0 and 0. Remedy: leave "
                "the transform out, or set prob=0"
            )
        for name, value in (("prob", prob), ("switch_prob", switch_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {_MODES}, got {mode!r}")
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.prob = prob
        self.switch_prob = switch_prob
        self.mode = mode
        self.grid: Grid | None = (grid, grid) if isinstance(grid, int) else grid
        if self.grid is not None and min(self.grid) < 1:
            raise ValueError(f"grid must be patches (h, w), at least 1 each way, got {grid}")

    def forward(self, images: Tensor, targets: TokenTargets) -> tuple[Tensor, MixedTargets]:
        """Mix every picture with another one of the batch.

        Args:
            images: [B, C, H, W]; of a floating dtype, unless only CutMix is on.
            targets: of the same batch.

        Returns:
            New pictures, and their targets, `MixedTargets` whatever was drawn.

        Raises:
            TypeError: the pictures cannot be blended, or the targets are not `TokenTargets`.
            ValueError: the two are not of one batch, or it cannot be mixed: a single picture, an
                odd number in pairs, patches of another grid.
        """
        self._check(images, targets)
        size, (height, width) = len(images), images.shape[-2:]
        # Blended patches need no grid: their shares are all the same.
        grid: Grid = (1, 1)
        if self.cutmix_alpha:
            grid = grid_of(targets.weight.shape[1], self.grid, (height, width))
        own = torch.arange(size)
        partner = own.flip(0) if self.mode == "pair" else own.roll(1)
        draws = {"batch": 1, "pair": size // 2, "elem": size}[self.mode]
        mixture = self._draw(draws, height, width)
        if self.mode == "batch":
            mixture = Mixture(*(part.expand(size, *part.shape[1:]) for part in mixture))
        elif self.mode == "pair":
            mixture = Mixture(*(torch.cat([part, part.flip(0)]) for part in mixture))
        device = targets.weight.device
        shares = own_shares(mixture, (height, width), grid).to(device)
        return (
            mix_images(images, partner, mixture),
            mix_targets(targets, partner.to(device), shares),
        )

    def _draw(self, count: int, height: int, width: int) -> Mixture:
        """Draw `count` mixtures from torch's global generator."""
        blend = torch.ones(count, dtype=torch.float64)
        box = torch.zeros(count, 4, dtype=torch.int64)
        mixed = _happens(self.prob, count)
        both = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        cut = mixed & _happens(self.switch_prob if both else float(self.cutmix_alpha > 0), count)
        if self.mixup_alpha:
            blend = draw_blend(self.mixup_alpha, count).where(mixed & ~cut, blend)
        if self.cutmix_alpha:
            drawn = draw_box(self.cutmix_alpha, count, height, width)
            box = drawn.where(cut.unsqueeze(1), box)
        return Mixture(blend, box)

    def _check(self, images: Tensor, targets: TokenTargets) -> None:
        check_unmixed(targets)
        if images.ndim != 4:
            raise ValueError(
                f"images must be a batch [B, C, H, W], got {list(images.shape)}. Remedy: mix the "
                "batches of a DataLoader, not single pictures"
            )
        if len(images) != len(targets.label):
            raise ValueError(
                f"images and targets must be of one batch, got {len(images)} images and targets of "
                f"{len(targets.label)}. Remedy: pass what the DataLoader gave together"
            )
        if self.mixup_alpha and not images.is_floating_point():
            raise TypeError(
                f"MixUp blends pictures of a floating dtype, got {images.dtype}. Remedy: end the "
                "pipeline of each picture with v2.ToDtype(torch.float32, scale=True)"
            )
        if len(images) < 2 or (self.mode == "pair" and len(images) % 2):
            rule = "even" if self.mode == "pair" else "2 or more"
            raise ValueError(
                f"the batch size must be {rule} to mix by {self.mode!r}, got {len(images)}. "
                "Remedy: DataLoader(..., drop_last=True)"
            )

    def extra_repr(self) -> str:
        """The options."""
        names = ("mixup_alpha", "cutmix_alpha", "prob", "switch_prob", "mode", "grid")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _happens(prob: float, count: int) -> Tensor:
    """Bool [count]; what is certain takes no random number, which keeps step with torchvision."""
    return torch.rand(count) < prob if 0 < prob < 1 else torch.full((count,), prob == 1)


class MixUp(MixUpOrCutMix):
    """MixUp (Zhang et al., 2018, arXiv 1710.09412) of pictures and token targets.

    Each picture becomes `lam * picture + (1 - lam) * partner`. For one seed, the pictures are those
    of torchvision.transforms.v2.MixUp in the mode "batch".

    Args:
        alpha: of the Beta(alpha, alpha) distribution of lam.
        mode: as for `MixUpOrCutMix`.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, alpha: float = 1.0, *, mode: Mode = "batch") -> None:
        super().__init__(alpha, 0.0, mode=mode)


class CutMix(MixUpOrCutMix):
    """CutMix (Yun et al., 2019, arXiv 1905.04899) of pictures and token targets.

    A box of the partner is pasted over each picture. For one seed, the pictures are those of
    torchvision.transforms.v2.CutMix in the mode "batch". A patch's target is the mixture of its own
    and the partner's target there, by the exact areas of the patch outside and inside the box.

    Args:
        alpha: of the Beta(alpha, alpha) distribution of the share left of a picture.
        mode: as for `MixUpOrCutMix`.
        grid: patches (h, w), or one number for a square; None, for square
            pictures: as many rows as columns.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self, alpha: float = 1.0, *, mode: Mode = "batch", grid: int | Grid | None = None
    ) -> None:
        super().__init__(0.0, alpha, mode=mode, grid=grid)
