"""MixUp and CutMix of a batch: its images, and with them its labels."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from ..dataset.targets.token_labels import TokenLabels
from .mixed_labels import MixedLabels, check_records

Mode = Literal["batch", "pair", "elem"]


class MixUpOrCutMix(nn.Module):
    """MixUp or CutMix, drawn for each batch, pair or image, as timm's `Mixup` does.

        mix = MixUpOrCutMix(mixup_alpha=0.8, cutmix_alpha=1.0)
        for images, labels in loader:
            images, labels = mix(images, labels)
            criterion(student(images), labels).backward()

    Takes the arguments of timm's `Mixup`, whose place it can have in a script.

    Args:
        mixup_alpha: of MixUp's Beta distribution; 0 leaves CutMix only.
        cutmix_alpha: of CutMix's Beta distribution; 0 leaves MixUp only.
        cutmix_minmax: (least, most) of the box's sides, as fractions of the image's, instead of
            `cutmix_alpha`.
        prob: probability of mixing at all.
        switch_prob: probability of CutMix rather than MixUp, where both are on.
        mode: draw once for the "batch", for each "pair" of images (the first and the last of the
            batch, and so on, are mixed with each other), or for each one ("elem"). The partner is
            the image before in the batch, except in "pair".
        correct_lam: timm's option; the areas are exact, so that only True is possible.
        label_smoothing: mass of the labels spread evenly over all classes, by a `TokenLabelLoss`
            that has no smoothing of its own.
        num_classes: of the labels, to be compared with theirs; None: any.

    Attributes:
        mixup_enabled: False leaves the images as they are, as timm's `--mixup-off-epoch` asks.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: Mode = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if cutmix_minmax is not None:
            cutmix_alpha = 1.0
            if len(cutmix_minmax) != 2 or not 0 <= cutmix_minmax[0] < cutmix_minmax[1] <= 1:
                raise ValueError(
                    f"cutmix_minmax must be (least, most) in [0, 1], got {cutmix_minmax}"
                )
        if not correct_lam:
            raise ValueError("correct_lam must be True: the labels' areas are exact. Got False")
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= alpha < float("inf"):
                raise ValueError(f"{name} must be a finite number, 0 or more, got {alpha}")
        if not mixup_alpha and not cutmix_alpha:
            raise ValueError(
                "one of mixup_alpha and cutmix_alpha must be above 0, got 0 and 0. Remedy: leave "
                "the transform out, or set prob=0"
            )
        for name, value in (
            ("prob", prob),
            ("switch_prob", switch_prob),
            ("label_smoothing", label_smoothing),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.prob = prob
        self.switch_prob = switch_prob
        self.mode = mode
        self.cutmix_minmax = cutmix_minmax
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.mixup_enabled = True

    def forward(self, images: Tensor, labels: TokenLabels) -> tuple[Tensor, MixedLabels]:
        """Mix every image with another one of the batch.

        Args:
            images: [B, C, H, W]; of a floating dtype, unless only CutMix is on.
            labels: of the same batch.

        Returns:
            New images, and their labels, `MixedLabels` whatever was drawn.

        Raises:
            TypeError: the images cannot be blended, or the labels are not `TokenLabels`.
            ValueError: the two are not of one batch, or it cannot be mixed: a single image, or an
                odd number in pairs.
        """
        labels = self._check(images, labels)
        size, (height, width) = len(images), images.shape[-2:]
        own = torch.arange(size)
        partner = own.flip(0) if self.mode == "pair" else own.roll(1)
        blend, box = self._draw(height, width, {"batch": 1, "elem": size}.get(self.mode, size // 2))
        if self.mode == "pair":
            blend, box = torch.cat([blend, blend.flip(0)]), torch.cat([box, box.flip(0)])
        blend, box = blend.expand(size), box.expand(size, 4)
        mixed = MixedLabels(
            labels,
            partner.to(labels.device),
            blend.float().to(labels.device),
            (box / torch.tensor([width, height] * 2)).to(labels.device),
            label_smoothing=self.label_smoothing,
        )
        return _mix_images(images, partner, blend, box), mixed

    def _draw(self, height: int, width: int, count: int) -> tuple[Tensor, Tensor]:
        """Draw `count` blends, float64, and boxes in pixels, [count, 4], as torchvision does."""
        blend = torch.ones(count, dtype=torch.float64)
        box = torch.zeros(count, 4, dtype=torch.int64)
        mixed = _happens(self.prob if self.mixup_enabled else 0.0, count)
        both = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        cut = mixed & _happens(self.switch_prob if both else float(self.cutmix_alpha > 0), count)
        if self.mixup_alpha:
            blend = _draw_blend(self.mixup_alpha, count).where(mixed & ~cut, blend)
        if self.cutmix_alpha:
            half = 0.5 * (1 - _draw_blend(self.cutmix_alpha, count)).sqrt()
            sides = []
            for side in (width, height):
                if self.cutmix_minmax:
                    least, most = self.cutmix_minmax
                    part = (least + (most - least) * torch.rand(count)) * side
                    start = (torch.rand(count) * (side - part)).round().long()
                    sides.append((start, (start + part.round().long()).clamp(max=side)))
                    continue
                centre, reach = torch.randint(side, (count,)), (half * side).long()
                sides.append(((centre - reach).clamp(min=0), (centre + reach).clamp(max=side)))
            (x0, x1), (y0, y1) = sides
            box = torch.stack([x0, y0, x1, y1], 1).where(cut.unsqueeze(1), box)
        return blend, box

    def _check(self, images: Tensor, labels: TokenLabels) -> TokenLabels:
        labels = check_records(labels)
        if self.num_classes not in (None, labels.num_classes):
            raise ValueError(
                f"num_classes must be the labels' {labels.num_classes}, got {self.num_classes}. "
                "Remedy: build the student with num_classes=store.num_classes"
            )
        if images.ndim != 4:
            raise ValueError(
                f"images must be a batch [B, C, H, W], got {list(images.shape)}. Remedy: mix the "
                "batches of a DataLoader, not single images"
            )
        if len(images) != len(labels):
            raise ValueError(
                f"images and labels must be of one batch, got {len(images)} images and labels of "
                f"{len(labels)}. Remedy: pass what the DataLoader returned together"
            )
        if not self.mixup_enabled:
            return labels
        if self.mixup_alpha and not images.is_floating_point():
            raise TypeError(
                f"MixUp blends images of a floating dtype, got {images.dtype}. Remedy: end the "
                "pipeline of each image with v2.ToDtype(torch.float32, scale=True)"
            )
        if len(images) < 2 or (self.mode == "pair" and len(images) % 2):
            rule = "even" if self.mode == "pair" else "2 or more"
            raise ValueError(
                f"the batch size must be {rule} to mix by {self.mode!r}, got {len(images)}. "
                "Remedy: DataLoader(..., drop_last=True)"
            )
        return labels

    def extra_repr(self) -> str:
        """The options."""
        names = ("mixup_alpha", "cutmix_alpha", "prob", "switch_prob", "mode", "label_smoothing")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _happens(prob: float, count: int) -> Tensor:
    """Bool [count]. A certain event draws no random number, as in torchvision."""
    return torch.rand(count) < prob if 0 < prob < 1 else torch.full((count,), prob == 1)


def _draw_blend(alpha: float, count: int) -> Tensor:
    both = torch.full((count,), float(alpha))
    return torch.distributions.Beta(both, both).sample().double()


def _mix_images(images: Tensor, partner: Tensor, blend: Tensor, box: Tensor) -> Tensor:
    """New images: blended with their partners, which are then pasted into the boxes."""
    originals = images.as_subclass(Tensor)
    others = originals[partner.to(images.device)]
    mixed = originals
    if bool((blend != 1).any()):
        exact = torch.promote_types(images.dtype, torch.float32)
        own = blend.to(images.device).view(-1, 1, 1, 1)
        mixed = (others * (1 - own).to(exact)).add_(originals * own.to(exact)).to(images.dtype)
    if bool((box[:, 2:] > box[:, :2]).any()):
        x0, y0, x1, y1 = box.to(images.device).unsqueeze(-1).unbind(1)
        row, column = (torch.arange(side, device=images.device) for side in images.shape[2:])
        down, across = (row >= y0) & (row < y1), (column >= x0) & (column < x1)
        inside = (down.unsqueeze(2) & across.unsqueeze(1)).unsqueeze(1)
        mixed = torch.where(inside, others, mixed)
    if mixed is originals:
        mixed = originals.clone()
    return tv_tensors.wrap(mixed, like=images) if isinstance(images, tv_tensors.Image) else mixed


class MixUp(MixUpOrCutMix):
    """MixUp (Zhang et al., 2018, arXiv 1710.09412) of images and token labels.

        mix = MixUp(0.8)
        for images, labels in loader:
            images, labels = mix(images, labels)
            criterion(student(images), labels).backward()

    Each image becomes `lam * image + (1 - lam) * partner`. For one seed, the images are those of
    torchvision.transforms.v2.MixUp in the mode "batch".

    Args:
        alpha: of the Beta(alpha, alpha) distribution of lam.
        mode: as for `MixUpOrCutMix`.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, alpha: float = 1.0, *, mode: Mode = "batch") -> None:
        super().__init__(alpha, 0.0, mode=mode)


class CutMix(MixUpOrCutMix):
    """CutMix (Yun et al., 2019, arXiv 1905.04899) of images and token labels.

        mix = CutMix()
        for images, labels in loader:
            images, labels = mix(images, labels)
            criterion(student(images), labels).backward()

    A box of the partner is pasted over each image. For one seed, the images are those of
    torchvision.transforms.v2.CutMix in the mode "batch". A patch's target is the mixture of its own
    and the partner's target there, by the exact areas of the patch outside and inside the box.

    Args:
        alpha: of the Beta(alpha, alpha) distribution of the fraction left of an image.
        mode: as for `MixUpOrCutMix`.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, alpha: float = 1.0, *, mode: Mode = "batch") -> None:
        super().__init__(0.0, alpha, mode=mode)
