"""What the loss takes: errors that say rule, value and remedy."""

import torch
from torch import Tensor

from tokenlabel.dataset import TokenTargets
from tokenlabel.supervise.mixed import MixedTargets


def check_inputs(
    cls_logits: Tensor, patch_logits: Tensor | None, targets: TokenTargets | MixedTargets
) -> None:
    """Refuse logits and targets that do not fit together.

    Args:
        cls_logits: [B, C].
        patch_logits: [B, N, C]; None if they are not used.
        targets: a collated batch.

    Raises:
        TypeError, ValueError: as `TokenLabelLoss.forward`.
    """
    _check_targets(targets)
    batch, num_classes = _check_logits(cls_logits, patch_logits)
    if len(targets.label) != batch:
        raise ValueError(
            f"logits and targets must be of one batch; the logits hold {batch} images, the targets "
            f"{len(targets.label)}. Remedy: pass the targets that came with these images"
        )
    if targets.label.device != cls_logits.device:
        raise ValueError(
            f"targets must be on the logits' device, {cls_logits.device}, got "
            f"{targets.label.device}. Remedy: type(targets)(*(t.to(device) for t in targets))"
        )
    patches = targets.weight.shape[1]
    if patch_logits is not None and patch_logits.shape[1] != patches:
        raise ValueError(
            f"the grids must agree: the student has {patch_logits.shape[1]} patches, the targets "
            f"have {patches}. Remedy: TokenLabelDataset(..., grid=student.grid), and no class or "
            "register tokens among the patch logits"
        )
    on_cpu = targets.label.device.type == "cpu"
    if on_cpu and not torch.compiler.is_compiling():  # elsewhere it would wait for the device
        _check_ids(targets, num_classes)


def _check_targets(targets: object) -> None:
    if not isinstance(targets, TokenTargets | MixedTargets):
        raise TypeError(
            f"targets must be TokenTargets or MixedTargets, got {type(targets).__name__}. Remedy: "
            "pass on what a DataLoader over TokenLabelDataset gives, or what MixUp or CutMix made "
            "of it"
        )
    label, probs = targets.label, targets.probs
    mixed = isinstance(targets, MixedTargets)
    if label.ndim != 1 + mixed or probs.ndim != 3:
        raise ValueError(
            f"targets must be collated, label {'[B, 2]' if mixed else '[B]'} and probs [B, N, K]; "
            f"got label {list(label.shape)} and probs {list(probs.shape)}. Remedy: use a "
            "DataLoader, or torch.utils.data.default_collate on single samples"
        )
    for name in ("label", "classes", "crop_classes"):
        ids = getattr(targets, name)
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(
                f"targets.{name} holds class ids and must be int32 or int64, got {ids.dtype}. "
                "Remedy: leave it as it is when the probabilities are cast"
            )
    for name in ("probs", "rest", "weight", "crop_probs", "crop_rest"):
        if not getattr(targets, name).is_floating_point():
            raise TypeError(
                f"targets.{name} must be of a floating dtype, got {getattr(targets, name).dtype}. "
                "Remedy: use the float32 that ToTokenTargets gives"
            )


def _check_logits(cls_logits: Tensor, patch_logits: Tensor | None) -> tuple[int, int]:
    """B and C."""
    for name, logits, dims in (("cls", cls_logits, 2), ("patch", patch_logits, 3)):
        if logits is None:
            continue
        if logits.ndim != dims:
            shape = "[B, C]" if dims == 2 else "[B, N, C]"
            raise ValueError(
                f"{name}_logits must be {shape}, got {list(logits.shape)}. Remedy: "
                "TokenLabelLoss()(cls_logits, patch_logits, targets); a map [B, C, h, w] goes in "
                "as logits.flatten(2).mT"
            )
        if not logits.is_floating_point():
            raise TypeError(
                f"{name}_logits must be of a floating dtype, got {logits.dtype}. Remedy: pass what "
                "the student's heads give"
            )
    batch, num_classes = cls_logits.shape
    if patch_logits is not None and patch_logits.shape[0] != batch:
        raise ValueError(
            f"both heads must speak of one batch; cls_logits hold {batch} images, patch_logits "
            f"{patch_logits.shape[0]}. Remedy: take both from one forward pass"
        )
    if patch_logits is not None and patch_logits.shape[2] != num_classes:
        raise ValueError(
            f"both heads must have the same classes; cls_logits have {num_classes}, patch_logits "
            f"{patch_logits.shape[2]}. Remedy: build both with num_classes=store.num_classes"
        )
    return batch, num_classes


def _check_ids(targets: TokenTargets | MixedTargets, num_classes: int) -> None:
    for name, lowest in (("label", -1), ("classes", 0), ("crop_classes", 0)):
        ids = getattr(targets, name)
        if not ids.numel():
            continue
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < lowest or high >= num_classes:
            raise ValueError(
                f"class ids must be in [{lowest}, {num_classes - 1}] for logits of {num_classes} "
                f"classes; targets.{name} holds {low if low < lowest else high}. Remedy: give the "
                "student num_classes=store.num_classes"
            )
