"""Logits of a whole batch as the planes that shards hold, on the device that has the logits."""

import math

import torch
from torch import Tensor

from ...dataset.format.score_map import DROPPED, RESIDUAL_STEPS, MapLayout

_FLOAT16_MAX = torch.finfo(torch.float16).max


def encode(logits: Tensor, layout: MapLayout, floor: float = 0.0) -> dict[str, Tensor]:
    """Encode one view of B score maps; `tokenlabel.dataset.format.score_map` is what decodes them.

    Args:
        logits: float32 [B, H, W, C].
        layout: of the planes; K and R must be at most C.
        floor: classes less probable than this are dropped, but for the first of each cell.

    Returns:
        The planes of `layout` by name, without the axis of views: codes and classes [B, K, H, W],
        residual_classes and residual_codes [B, R], level [B, H, W]. A cell with logits that are
        not finite drops its first class too.
    """
    level = logits.logsumexp(-1)
    scores, classes = logits.topk(layout.k)
    nats = level[..., None] - scores
    kept = nats <= (-math.log(floor) if floor > 0 else _FLOAT16_MAX)
    kept[..., 0] = nats[..., 0].isfinite()
    if layout.step:
        codes = (nats / layout.step).round().clamp(max=DROPPED - 1)
        codes = torch.where(kept, codes, DROPPED).to(torch.uint8)
    else:
        codes = torch.where(kept, nats.clamp(max=_FLOAT16_MAX), torch.inf).half()
    ids = getattr(torch, layout.class_dtype.name)
    planes = {"codes": codes, "classes": classes.where(kept, 0).to(ids)}
    planes = {name: plane.movedim(-1, 1).contiguous() for name, plane in planes.items()}
    if layout.residual:
        left = (logits - level[..., None]).exp_()
        left.scatter_(-1, classes, torch.where(kept, 0.0, left.gather(-1, classes)))
        # Of classes with equal mass the lower ids are taken: `topk` does not say which it takes.
        mass = left.mean((1, 2))
        named = mass.argsort(descending=True, stable=True)[:, : layout.residual].sort().values
        parts = mass.gather(1, named) / mass.sum(1, keepdim=True)
        codes = (parts.log() * -RESIDUAL_STEPS).round()
        codes = torch.where(codes < DROPPED, codes, DROPPED).to(torch.uint8)
        planes |= {"residual_classes": named.to(ids), "residual_codes": codes}
    if layout.level:
        planes["level"] = level.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half()
    return planes
