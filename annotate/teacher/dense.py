"""The per-patch form of a timm classifier: its head, applied at every location of its feature map.

timm's models split into `forward_features` and `forward_head`. A head that pools by averaging
answers for ONE location when it gets a feature map of one cell, so the same call serves every
family. What a head does (average, read the class token, attend, take a maximum) is found by asking
it: random features go through it, and its answers are compared. That holds for any version of timm
and needs no list of architectures; the few that would pass and mislead are listed by name.
"""

import logging
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import TeacherError
from .teacher import TOLERANCE, PatchHead

MEAN_MODE = "classifier at each location; the pooled logits are their mean"
HEAD_MODE = "whole head after average pooling, applied at each location"
TOKEN_MODE = "classifier of the class token, applied to each patch token"
AUX_MODE = "auxiliary per-patch head"

_log = logging.getLogger(__name__)

#: In these, layers of class attention lead to the classifier, and patch tokens never pass them: it
#: would accept patch tokens, but says nothing about them.
_CLASS_ATTENTION = {"Cait", "Xcit", "VOLO"}


def dense_head(net: Any, name: str, features: object, input_size: tuple[int, int]) -> PatchHead:
    """Find the faithful per-patch form of a timm classifier in eval mode.

    Args:
        net: The classifier.
        name: What to call it in an error.
        features: What its `forward_features` gives for an image of `input_size`.
        input_size: (h, w) of the images it will see, in pixels.

    Raises:
        TeacherError: It has no faithful per-patch form.
    """
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise no_patches(name, "its features are neither a feature map nor a sequence of tokens")
    grid, cells, prefix = _layout(net, name, features, input_size)
    if grid[0] * grid[1] < 2:
        raise TeacherError(
            f"A teacher must see more than one patch; {name} gives a {grid[0]}x{grid[1]} map for "
            f"images of {input_size[0]}x{input_size[1]} pixels. Remedy: a larger input_size."
        )
    stages = getattr(net, "feature_info", None)
    stride = stages[-1].get("reduction") if isinstance(stages, list) and stages else None
    if stride and input_size != (grid[0] * stride, grid[1] * stride):
        _log.warning(
            "%s gives a %dx%d map for %dx%d pixels, so patches lie up to some pixels off. "
            "Remedy: an input_size that is a multiple of %d.",
            *(name, *grid, *input_size, stride),
        )
    if type(net).__name__ not in _CLASS_ATTENTION:
        mode, head = _mode(net, name, features, cells, prefix), net.forward_head
    elif getattr(net, "aux_head", None) is None:
        raise no_patches(name, "its classifier lies behind class attention, its patches do not")
    else:
        mode, head = AUX_MODE, lambda x: net.aux_head(x[:, 0])

    def patch_logits(features: Tensor) -> Tensor:
        logits: Tensor = head(cells(features))
        return logits.view(len(features), *grid, -1)

    return PatchHead(grid, mode, mode == MEAN_MODE, patch_logits, net.forward_head)


def no_patches(name: str, reason: str) -> TeacherError:
    """The error for a model without a faithful per-patch form."""
    return TeacherError(
        f"A teacher needs a faithful per-patch form; {name} has none: {reason}. "
        "Remedy: take a teacher of a family that has one: NFNet, EfficientNet, MobileNetV3, "
        "ResNet, RegNet, ConvNeXt, Swin, MaxViT, ViT, DeiT, BEiT, EVA, Mixer, VOLO (with its "
        "auxiliary head); or write one of your own, see docs/teachers.md."
    )


def _layout(
    net: Any, name: str, features: Tensor, input_size: tuple[int, int]
) -> tuple[tuple[int, int], Callable[[Tensor], Tensor], int]:
    """Return the grid, a function that takes features apart, and the number of prefix tokens.

    The function makes [B*H*W, ...] of [B, ...]: feature maps of one cell.
    """
    if features.ndim == 4:
        if getattr(net, "output_fmt", "NCHW") == "NHWC":
            rows, columns = features.shape[1:3]
            return (rows, columns), lambda x: x.flatten(0, 2)[:, None, None, :], 0
        rows, columns = features.shape[2:]
        return (rows, columns), lambda x: x.movedim(1, 3).flatten(0, 2)[:, :, None, None], 0
    volo = type(net).__name__ == "VOLO"
    embed: Any = getattr(net, "patch_embed", None) or getattr(net, "stem", None)
    rows = columns = 0
    if volo:
        rows, columns = net.pos_embed.shape[1:3]
    elif hasattr(embed, "dynamic_feat_size"):
        rows, columns = embed.dynamic_feat_size(input_size)
    elif getattr(embed, "grid_size", None):
        rows, columns = embed.grid_size
    prefix = int(getattr(net, "num_prefix_tokens", 0) or volo)
    if not rows or rows * columns + prefix != features.shape[1]:
        raise no_patches(name, f"its {features.shape[1]} tokens do not lie on a grid it declares")
    # Every token of a one-cell sequence is the patch: the head may read the class token, the
    # distillation token, the mean of the patches, or all of them.
    return (
        (int(rows), int(columns)),
        lambda x: x[:, prefix:].flatten(0, 1)[:, None].expand(-1, prefix + 1, -1),
        prefix,
    )


@torch.inference_mode()
def _mode(net: Any, name: str, like: Tensor, cells: Callable[[Tensor], Tensor], prefix: int) -> str:
    """Find out from random features what the head does, or refuse the model."""
    generator = torch.Generator().manual_seed(0)
    # Large values, so that no activation function is mistaken for a linear one.
    features = 10 * torch.randn(like.shape, generator=generator).to(like.device)
    try:
        pooled = net.forward_head(features)
        located = cells(features)
        dense = net.forward_head(located)
        average = net.forward_head(located.mean(0, keepdim=True))
        if prefix:
            patches = 10 * torch.randn(like.shape, generator=generator).to(like.device)
            token = net.forward_head(torch.cat([features[:, :prefix], patches[:, prefix:]], 1))
    except Exception as error:  # a head with its own idea of the grid, of any kind
        reason = f"its head takes no single location ({type(error).__name__}: {error})"
        raise no_patches(name, reason) from error
    if dense.shape != (len(located), net.num_classes) or pooled.shape != average.shape:
        raise no_patches(name, "its head does not pool to one row of logits an image")
    scale = float(dense.std(0).max())
    if scale == 0:
        raise TeacherError(
            f"A teacher must be trained; the classifier of {name} gives the same logits whatever "
            "it sees (its weights are zero). Remedy: load trained weights."
        )

    def same(one: Tensor, other: Tensor) -> bool:
        return float((one - other).abs().max()) <= TOLERANCE * max(scale, float(one.abs().max()))

    if same(pooled, average):
        return MEAN_MODE if same(pooled, dense.mean(0, keepdim=True)) else HEAD_MODE
    if prefix and same(pooled, token):
        return TOKEN_MODE
    kinds = {type(module).__name__ for module in net.modules()}
    pools = sorted(k for k in kinds if re.search("AttentionPool|AvgMaxPool|AdaptiveMaxPool", k))
    raise no_patches(
        name, "its head does more than average" + f" ({', '.join(pools)})" * bool(pools)
    )
