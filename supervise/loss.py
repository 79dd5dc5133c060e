"""`TokenLabelLoss`: the objective of token labeling, straight from sparse targets."""

from typing import Literal

import torch
from torch import Tensor, nn

from tokenlabel.dataset import TokenTargets
from tokenlabel.supervise.cross_entropy import cross_entropy, sparse_target
from tokenlabel.supervise.loss_inputs import check_inputs
from tokenlabel.supervise.mixed import MixedTargets

ClassTarget = Literal["label", "crop", "both"]
_CLASS_TARGETS = ("label", "crop", "both")


class TokenLabelLoss(nn.Module):
    r"""The token labeling objective of LV-ViT (Jiang et al., 2021, arXiv 2104.10858, section 3.2).

    .. math:: w\, H(X^{cls}, y^{cls}) + \beta \frac{1}{N} \sum_i w_i H(X^i, y^i)

    averaged over the batch, where H is the cross entropy with a soft target, `w` is `cls_weight`,
    :math:`\beta` is `dense_weight` and :math:`w_i` is the patch's `weight`. With all weights 1 this
    is the paper's formula.

    A patch's target gives each listed class its probability and spreads `rest` evenly over the
    classes that it does not list. No tensor of shape [B, N, C] is made but the gradient.

    Both means, over the N patches and over the B images, divide by the full count, whatever the
    weights. So each picture area counts the same wherever it is; an image with all weights 0
    (`missing="ignore"`) is left with the class token's loss; the loss of mixed targets is the
    mixture of the losses; and the mean of the gradients of processes with equal batches is the
    gradient of the joined batch.

    The class token's target is the image's `label` (unknown, -1: no loss), its `crop` target (where
    the image has no map: its label), or `both`: the mean of the two losses, or that of the one that
    is known.

    Args:
        cls_weight: factor of the class token's loss.
        dense_weight: factor of the patches' loss; with 0 the patch logits are not looked at and
            get no gradient.
        cls_target: "label", "crop" or "both".
        label_smoothing: mass of the label spread evenly over all classes, as in
            torch.nn.CrossEntropyLoss; the soft targets are left as they are.

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
    ) -> None:
        super().__init__()
        for name, value in (("cls_weight", cls_weight), ("dense_weight", dense_weight)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number, 0 or more, got {value}")
        if cls_target not in _CLASS_TARGETS:
            raise ValueError(f"cls_target must be one of {_CLASS_TARGETS}, got {cls_target!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        self.cls_weight = cls_weight
        self.dense_weight = dense_weight
        self.cls_target = cls_target
        self.label_smoothing = label_smoothing

    def forward(
        self,
        cls_logits: Tensor,
        patch_logits: Tensor,
        targets: TokenTargets | MixedTargets,
    ) -> Tensor:
        """The mean loss of a batch, in float32 (float64 for float64 logits), also under autocast.

        Args:
            cls_logits: [B, C], any floating dtype.
            patch_logits: [B, N, C], row by row of the grid.
            targets: a collated batch, plain or mixed, on the logits' device.

        Raises:
            TypeError: something is not of the kind or dtype that it must be.
            ValueError: shapes do not fit together, or a class id is out of range. Ids are checked
                where it costs no synchronisation: on the CPU. On a GPU, and in a compiled graph,
                it is the device's own index check that fails.
        """
        check_inputs(cls_logits, patch_logits if self.dense_weight else None, targets)
        dtype = torch.float64 if cls_logits.dtype == torch.float64 else torch.float32
        with torch.autocast(cls_logits.device.type, enabled=False):
            loss = self.cls_weight * self._class_token(cls_logits, targets, dtype).mean()
            if self.dense_weight:
                rows = _soft(patch_logits, targets.classes, targets.probs, targets.rest, dtype)
                loss = loss + self.dense_weight * (rows * targets.weight).mean()
        return loss

    def _class_token(
        self, logits: Tensor, targets: TokenTargets | MixedTargets, dtype: torch.dtype
    ) -> Tensor:
        """Loss of each image's class token, [B]."""
        row, num_classes = logits.unsqueeze(1), logits.shape[1]
        label = targets.label.reshape(len(logits), 1, -1)
        known = (label >= 0).to(dtype)
        if isinstance(targets, MixedTargets):
            known = known * targets.label_probs.unsqueeze(1)
        smooth = self.label_smoothing * (num_classes - 1) / num_classes
        by_label = _soft(row, label.clamp(min=0), known * (1 - smooth), known * smooth, dtype)
        if self.cls_target == "label":
            return by_label.squeeze(1)
        by_crop = _soft(
            row,
            targets.crop_classes.unsqueeze(1),
            targets.crop_probs.unsqueeze(1),
            targets.crop_rest.unsqueeze(1),
            dtype,
        )
        has_map = (targets.weight > 0).any(1, keepdim=True).to(dtype)
        if self.cls_target == "crop":
            return torch.where(has_map > 0, by_crop, by_label).squeeze(1)
        # What the label leaves open, the crop decides.
        to_label = torch.where(has_map > 0, 0.5, 1.0)
        to_crop = has_map * (1 - 0.5 * known.sum(-1))
        return (to_label * by_label + to_crop * by_crop).squeeze(1)


def _soft(
    logits: Tensor, classes: Tensor, probs: Tensor, rest: Tensor, dtype: torch.dtype
) -> Tensor:
    """Cross entropy of each row of [B, N, C] with sparse soft targets."""
    return cross_entropy(logits, sparse_target(classes, probs, rest, logits.shape[2], dtype))
