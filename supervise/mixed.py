"""Targets of pictures mixed in pairs, sparse still: what each patch shows of either picture."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenlabel.dataset import TokenTargets


class MixedTargets(NamedTuple):
    """Soft targets of a batch of B pictures, each mixed with a partner from the batch.

    The fields of `TokenTargets`, collated, with both pictures' entries side by side: the first K
    are the picture's own, the last K its partner's, each scaled by what that picture contributes to
    the patch. A class may occur in both halves; its probabilities add. Each half keeps its own
    `rest`, mass on the classes that *that half* does not list, so that the target is exactly the
    mixture of the two dense targets. `probs` and `rest` of a patch sum to 1.

    Where the patches are not mixed (`mix_labels`), `classes`, `probs` and `rest` are those of
    `TokenTargets`: [B, N, K], [B, N, K] and [B, N].

    Attributes:
        label: int64 [B, 2], the classes of the picture and of its partner, -1 if unknown.
        classes: int32 [B, N, 2K].
        probs: float32 [B, N, 2K].
        rest: float32 [B, N, 2].
        weight: float32 [B, N], share of the patch that shows a picture with a map.
        crop_classes: int32 [B, 2K], the same for the whole crop.
        crop_probs: float32 [B, 2K].
        crop_rest: float32 [B, 2].
        label_probs: float32 [B, 2], share of the pixels of the picture and of its partner.
    """

    label: Tensor
    classes: Tensor
    probs: Tensor
    rest: Tensor
    weight: Tensor
    crop_classes: Tensor
    crop_probs: Tensor
    crop_rest: Tensor
    label_probs: Tensor


def mix_targets(targets: TokenTargets, partner: Tensor, share: Tensor | float) -> MixedTargets:
    """Targets of pictures that were mixed: patches, crop and label.

    A patch's target is the mixture of the two pictures' targets there, each counted by the area it
    contributes: its share of the patch times its `weight`, that is the part of it that lies inside
    its picture (taken as spread evenly over the patch). The mixture's `weight` is the sum of the
    two. So padding, and pictures without a map, contribute nothing: a patch of one picture with a
    map and one without has the target of the first, at its share as weight.

    Args:
        targets: the batch's targets before mixing.
        partner: int64 [B], the index of each picture's partner in the batch.
        share: each picture's own share of each patch, in [0, 1], broadcast to [B, N]; its
            partner has the remainder.

    Raises:
        TypeError, ValueError: `targets` are not those of a collated, unmixed batch.
    """
    check_unmixed(targets)
    own = _own_area(targets, share)
    area = torch.stack([own, 1 - own], -1)
    return _mix_image(targets, partner, area)._replace(
        **_mix_rows(
            torch.stack([targets.classes, targets.classes[partner]], 2),
            torch.stack([targets.probs, targets.probs[partner]], 2),
            torch.stack([targets.rest, targets.rest[partner]], 2),
            area * _weights(targets, partner),
            area,
        ),
    )


def mix_labels(targets: TokenTargets, partner: Tensor, share: Tensor | float) -> MixedTargets:
    """The same, with the patches' own targets: for a student that puts mixed patches back.

    Only what concerns the class token is mixed: label and crop, the latter as `mix_targets` mixes
    patches, summed over them.

    Args:
        targets: the batch's targets before mixing.
        partner: int64 [B], the index of each picture's partner in the batch.
        share: each picture's own share of each patch, in [0, 1], broadcast to [B, N].

    Raises:
        TypeError, ValueError: `targets` are not those of a collated, unmixed batch.
    """
    check_unmixed(targets)
    own = _own_area(targets, share)
    return _mix_image(targets, partner, torch.stack([own, 1 - own], -1))


def check_unmixed(targets: TokenTargets) -> None:
    """Refuse what is not a collated batch of `TokenTargets`."""
    if isinstance(targets, MixedTargets):
        raise TypeError(
            "a batch can be mixed once; these targets are MixedTargets. Remedy: apply one of "
            "MixUp, CutMix and MixToken to a batch (MixUpOrCutMix draws one of the first two)"
        )
    if not isinstance(targets, TokenTargets):
        raise TypeError(
            f"targets must be TokenTargets, got {type(targets).__name__}. Remedy: pass on what a "
            "DataLoader over TokenLabelDataset gives"
        )
    if targets.label.ndim != 1 or targets.probs.ndim != 3:
        raise ValueError(
            "targets must be collated, label [B] and probs [B, N, K]; got label "
            f"{list(targets.label.shape)} and probs {list(targets.probs.shape)}. Remedy: mix the "
            "batches of a DataLoader, or use torch.utils.data.default_collate"
        )


def _own_area(targets: TokenTargets, share: Tensor | float) -> Tensor:
    """Shares as float64 [B, N]."""
    own = torch.as_tensor(share, dtype=torch.float64, device=targets.weight.device)
    return own.expand(targets.weight.shape)


def _weights(targets: TokenTargets, partner: Tensor) -> Tensor:
    return torch.stack([targets.weight, targets.weight[partner]], -1).double()


def _mix_image(targets: TokenTargets, partner: Tensor, area: Tensor) -> MixedTargets:
    """Mixed label and crop, and the patches' own targets; `area` is float64 [B, N, 2]."""
    pixels = area.mean(1)
    crop = _mix_rows(
        torch.stack([targets.crop_classes, targets.crop_classes[partner]], 1),
        torch.stack([targets.crop_probs, targets.crop_probs[partner]], 1),
        torch.stack([targets.crop_rest, targets.crop_rest[partner]], 1),
        (area * _weights(targets, partner)).mean(1),
        pixels,
    )
    return MixedTargets(
        label=torch.stack([targets.label, targets.label[partner]], 1),
        classes=targets.classes,
        probs=targets.probs,
        rest=targets.rest,
        weight=targets.weight,
        crop_classes=crop["classes"],
        crop_probs=crop["probs"],
        crop_rest=crop["rest"],
        label_probs=pixels.float(),
    )


def _mix_rows(
    classes: Tensor, probs: Tensor, rest: Tensor, part: Tensor, fallback: Tensor
) -> dict[str, Tensor]:
    """Entries [..., 2, K] and rests [..., 2] of two targets, mixed as the parts [..., 2] are.

    Where both parts are 0 there is no target, and `fallback`, which sums to 1, scales the rests.
    """
    weight = part.sum(-1)
    known = (weight > 0).unsqueeze(-1)
    scale = torch.where(known, part / weight.where(weight > 0, 1).unsqueeze(-1), fallback)
    return {
        "classes": classes.flatten(-2),
        "probs": (probs * scale.unsqueeze(-1)).float().flatten(-2),
        "rest": (rest * scale).float(),
        "weight": weight.float(),
    }
