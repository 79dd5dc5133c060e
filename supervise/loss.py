"""`TokenLabelLoss`: the objective of token labeling, straight from records."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from ..dataset.targets.token_labels import TokenLabels
from ..dataset.targets.windows import TokenTargets, TokenWindows
from .backbones.backbone import Grid
from .cross_entropy import cross_entropy
from .mixed_labels import MixedLabels

ClassTarget = Literal["label", "crop", "both", "corrected"]
Labels = TokenLabels | MixedLabels | TokenTargets


class TokenLabelLoss(nn.Module):
    r"""The loss of token labeling: cross entropy of the image, and of each of its patches.

        criterion = TokenLabelLoss()
        for images, labels in loader:  # over a TokenLabelDataset
            criterion(student(images), labels).backward()

    It is the objective of LV-ViT (Jiang et al., 2021, arXiv 2104.10858, section 3.2),

    .. math:: w\, H(X^{cls}, y^{cls}) + \beta \frac{1}{N} \sum_i w_i H(X^i, y^i)

    averaged over the batch, where H is the cross entropy with a soft target, `w` is `cls_weight`,
    :math:`\beta` is `dense_weight` and :math:`w_i` is the patch's `weight`. With all weights 1 this
    is the paper's formula. The patches' targets are those of `TokenLabels.targets`, not merged and
    not cut to k; the gradient is the only tensor of shape [B, N, C] that is allocated.

    Both means, over the N patches and over the B images, divide by the full count, whatever the
    weights. So each area of an image counts the same wherever it is; an image with all weights 0
    (`missing="ignore"`) keeps the class token's loss; the loss of mixed labels is the mixture of
    the losses; and the mean of the gradients of processes with equal batches is the gradient of the
    joined batch.

    The class token's target is the image's `label` (unknown, -1: no loss), its `crop` target (where
    the image has no map: its label), or `both`: the mean of the two, or the one that is known.
    `corrected` is what the published code calls ground truth: nine parts of the crop's target and
    one of the label where they disagree on the class, five and five where they agree.

    `TokenLabelLoss.published()` has the defaults of the published code, which are others.

    Args:
        cls_weight: factor of the class token's loss.
        dense_weight: factor of the patches' loss; with 0 the patch logits are ignored, and their
            gradient is 0, as DistributedDataParallel wants it: the natural control of a study.
        cls_target: "label", "crop", "both" or "corrected".
        label_smoothing: mass of the label spread evenly over all classes, as in
            torch.nn.CrossEntropyLoss; the soft targets are left as they are.
        map_smoothing: the same of the soft targets t of crops and patches, in the published code's
            form: t (1 - s + s/C) + s/C, which sums to 1 + s/C.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        cls_weight: float = 1.0,
        dense_weight: float = 0.5,
        cls_target: ClassTarget = "label",
        label_smoothing: float = 0.0,
        map_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("cls_weight", cls_weight), ("dense_weight", dense_weight)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number, 0 or more, got {value}")
        if cls_target not in get_args(ClassTarget):
            raise ValueError(
                f"cls_target must be one of {get_args(ClassTarget)}, got {cls_target!r}"
            )
        for name, value in (("label_smoothing", label_smoothing), ("map_smoothing", map_smoothing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        self.cls_weight = cls_weight
        self.dense_weight = dense_weight
        self.cls_target = cls_target
        self.label_smoothing = label_smoothing
        self.map_smoothing = map_smoothing

    @classmethod
    def published(cls, *, smoothing: float = 0.1, ground_truth: bool = False) -> Self:
        """The loss with the defaults of the published code (zihangJiang/TokenLabeling, `main.py`).

        The class token learns the crop's target, patches weigh as much as it does, and all targets
        are smoothed. Its targets themselves are `labels.sparse(grid, k, rule="published")`.

        Args:
            smoothing: `--smoothing`, of labels and maps.
            ground_truth: `--ground-truth`, the `corrected` target.
        """
        return cls(
            dense_weight=1.0,
            cls_target="corrected" if ground_truth else "crop",
            label_smoothing=smoothing,
            map_smoothing=smoothing,
        )

    def forward(self, output: Any, *labels: Any) -> Tensor:
        """The mean loss of a batch, in float32 (float64 for float64 logits), also under autocast.

        `criterion(output, labels)`, or `criterion(cls_logits, patch_logits, labels)`.

        Args:
            output: of the student, of any floating dtype: cls_logits [B, C], and patch_logits
                [B, N, C], row by row of the grid that the records name, else of a square; or
                cls_logits alone, with `dense_weight=0`, or where the labels are class ids.
            *labels: of the batch, plain or mixed, on the logits' device. Class ids, int64 [B], as
                of a validation set, or probabilities [B, C] give torch's plain cross entropy.
                Before them patch_logits, if `output` are cls_logits alone.

        Raises:
            TypeError: `output` and `labels` are no pair.
            ValueError: shapes do not fit together, or a label is out of range. Labels are checked
                where it costs no synchronisation: on the CPU. On a GPU, and in a compiled graph,
                the device's own index check fails instead.
        """
        cls_logits, patch_logits, targets = _arguments((output, *labels))
        if type(targets) is Tensor and patch_logits is None:
            return torch.nn.functional.cross_entropy(cls_logits, targets)
        if patch_logits is None and self.dense_weight:
            raise TypeError(
                "the patches' loss needs patch logits, but the student gave class logits alone. "
                "Remedy: student.train(), or student(images, patches=True); or "
                "TokenLabelLoss(dense_weight=0)"
            )
        patches = patch_logits if self.dense_weight else None
        grid = _check(cls_logits, patches, targets)
        dtype = torch.promote_types(cls_logits.dtype, torch.float32)
        with torch.autocast(cls_logits.device.type, enabled=False):
            target = self._class_target(targets, cls_logits.shape[1], self.label_smoothing)
            rows = -(target * torch.log_softmax(cls_logits, -1, dtype=dtype)).sum(-1)
            loss = self.cls_weight * rows.mean()
            if patches is None:
                return loss if patch_logits is None else loss + _Ignored.apply(patch_logits)
            if isinstance(targets, MixedLabels):
                parts = targets.parts(grid)
            else:
                windows = (
                    targets.targets(grid)
                    if isinstance(targets, TokenLabels)
                    else targets.windows(cls_logits.shape[1])
                )
                parts = [(windows, windows.weight)]
            if self.map_smoothing:
                parts = [(_smoothed(part, self.map_smoothing), weight) for part, weight in parts]
            return loss + self.dense_weight * cross_entropy(patches, parts).mean()

    def _class_target(self, labels: Labels, num_classes: int, smoothing: float) -> Tensor:
        """Targets of the class tokens, [B, C]; rows of zeros where nothing is known."""
        if isinstance(labels, MixedLabels):
            smoothing = smoothing or labels.label_smoothing
            return labels.mix(self._class_target(labels.labels, num_classes, smoothing))
        label = labels.label.unsqueeze(1)
        known = (label >= 0).float()
        by_label = known * smoothing / num_classes + torch.zeros(
            len(label), num_classes, device=label.device
        ).scatter_(1, label.clamp(min=0), known * (1 - smoothing))
        if self.cls_target == "label":
            return by_label
        crop = _crop(labels, num_classes)
        has_crop = crop.sum(1, keepdim=True) > 0
        agrees = crop.argmax(1, keepdim=True) == label
        if self.map_smoothing:
            even = self.map_smoothing / num_classes
            crop = has_crop * (crop * (1 - self.map_smoothing + even) + even)
        if self.cls_target == "crop":
            return torch.where(has_crop, crop, by_label)
        if self.cls_target == "corrected":
            by_crop = torch.where(agrees, 0.5, 0.9)
            mixed = by_crop * crop + (1 - by_crop) * by_label
            return torch.where(has_crop & (known > 0), mixed, by_label + crop)
        return (by_label + crop) / (known + has_crop).clamp(min=1)


def _smoothed(windows: TokenWindows, smoothing: float) -> TokenWindows:
    """Targets t as t (1 - s + s/C) + s/C, where there are any."""
    num_classes = windows.basis.shape[-1]
    kept = 1 - smoothing + smoothing / num_classes
    even = torch.full_like(windows.basis[:, :1], 1 / num_classes)
    share = smoothing * (windows.weight > 0).to(windows.share.dtype).unsqueeze(-1)
    return windows._replace(
        window=windows.window * kept,
        basis=torch.cat([windows.basis, even], 1),
        share=torch.cat([windows.share * kept, share], -1),
    )


class _Ignored(torch.autograd.Function):
    """0, with a gradient of 0 for the logits, which takes no memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.like = logits.shape, logits.dtype
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        shape, dtype = ctx.like
        return gradient.new_zeros((), dtype=dtype).expand(shape)


def _arguments(args: Sequence[Any]) -> tuple[Tensor, Tensor | None, Any]:
    """Class logits, patch logits or None, and labels, of the two ways to call the loss."""
    if len(args) not in (2, 3):
        raise TypeError(
            f"expected criterion(output, labels) or criterion(cls_logits, patch_logits, labels), "
            f"got {len(args)} arguments"
        )
    *logits, labels = args
    if len(logits) == 1 and isinstance(logits[0], (tuple, list)):
        logits = list(logits[0])
    if not 1 <= len(logits) <= 2 or not all(isinstance(part, Tensor) for part in logits):
        kinds = ", ".join(type(part).__name__ for part in logits)
        raise TypeError(
            f"the student's output must be class logits [B, C] and patch logits [B, N, C], got "
            f"{kinds}. Remedy: pass what a TokenStudent returns"
        )
    if type(labels) is Tensor and labels.dtype == torch.uint8 and labels.ndim == 2:
        labels = TokenLabels.wrap(labels)  # their bytes, as a broadcast to other processes gives
    return logits[0], logits[1] if len(logits) == 2 else None, labels


def _crop(labels: TokenLabels | TokenTargets, num_classes: int) -> Tensor:
    """Soft targets of the crops, [B, C]; 0 where there is none."""
    if isinstance(labels, TokenLabels):
        return labels.crop()
    crop = labels._replace(  # as an image of one patch
        classes=labels.crop_classes.unsqueeze(1),
        probs=labels.crop_probs.unsqueeze(1),
        rest=labels.crop_rest.unsqueeze(1),
        weight=labels.weight.amax(1, keepdim=True),
    )
    return crop.windows(num_classes).dense().squeeze(1)


def _check(cls_logits: Tensor, patch_logits: Tensor | None, labels: Labels) -> Grid:
    """Refuse logits and labels that do not fit together. Returns the grid of the patches."""
    records = labels.labels if isinstance(labels, MixedLabels) else labels
    if not isinstance(records, TokenLabels | TokenTargets):
        raise TypeError(
            f"labels of patch logits must be TokenLabels, MixedLabels or TokenTargets, got "
            f"{type(labels).__name__}. Remedy: pass what a DataLoader over TokenLabelDataset "
            "returns, or what MixUpOrCutMix made of it (timm's and torchvision's own mixing know "
            "class ids only); for class ids, student.eval()"
        )
    label = records.label
    if label.ndim != 1:
        raise ValueError(
            f"labels must be those of a batch, label [B], got {list(label.shape)}. Remedy: use a "
            "DataLoader, or torch.utils.data.default_collate on single samples"
        )
    batch = len(labels if isinstance(labels, MixedLabels) else label)
    patches = 1 if patch_logits is None else patch_logits.shape[1]
    num_classes, grid = cls_logits.shape[-1], (math.isqrt(patches), math.isqrt(patches))
    if isinstance(records, TokenTargets):
        patches = records.weight.shape[1]
    else:
        num_classes, grid = records.num_classes, records.grid or grid
        patches = grid[0] * grid[1]
    for name, logits, shape in (
        ("cls_logits [B, C]", cls_logits, (batch, num_classes)),
        ("patch_logits [B, N, C]", patch_logits, (batch, patches, num_classes)),
    ):
        if logits is None:
            continue
        if logits.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for these labels, got {list(logits.shape)}. Remedy: "
                "pass the labels of these images, build the student with num_classes=store."
                "num_classes and the dataset with grid=student.grid, and leave class and register "
                "tokens out; a map [B, C, h, w] goes in as logits.flatten(2).mT"
            )
        if logits.device != label.device:
            raise ValueError(
                f"labels must be on the logits' device, {logits.device}, got {label.device}. "
                "Remedy: labels.to(device)"
            )
    if label.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = label[(label < -1) | (label >= num_classes)].tolist()
        if wrong:
            raise ValueError(
                f"labels must be in [-1, {num_classes - 1}] for logits of {num_classes} classes, "
                f"got {wrong[0]}. Remedy: label the images with the teacher's classes, or -1"
            )
    return grid
