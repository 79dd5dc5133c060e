"""The per-patch form of a classifier: its head, applied at every location of its feature map.

timm's models split into `forward_features` and `forward_head`. A head that pools by averaging
answers for ONE location when it is handed a feature map of one cell, so the same call serves every
family. What a head does (average, read the class token, attend, take a maximum) is found by asking
it: random features go through it, and its answers are compared. That holds for any version of timm
and needs no list of architectures; the few that would pass and mislead are listed by name.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import TeacherError

MEAN_RULE = "classifier at each location; the pooled logits are their mean"
HEAD_RULE = "whole head after average pooling, applied at each location"
TOKEN_RULE = "classifier of the class token, applied to each patch token"
AUX_RULE = "auxiliary per-patch head"

_log = logging.getLogger(__name__)

# Agreement of two orders of summation, as a share of the largest logit: float32 differs by 1e-6,
# TF32 convolutions (a CUDA default) by up to 5e-4, a head that does not average by 0.1 and more.
TOLERANCE = 1e-3

# In these, layers of class attention lead to the classifier, and patch tokens never pass them: it
# would accept patch tokens, but says nothing about them.
_CLASS_ATTENTION = {"Cait", "Xcit", "VOLO"}

_ADVICE = (
    "Remedy: take a teacher of a family that has one: NFNet, EfficientNet, MobileNetV3, ResNet, "
    "RegNet, ConvNeXt, Swin, MaxViT, ViT, DeiT, BEiT, EVA, Mixer, VOLO (with its auxiliary head)."
)


@dataclass(frozen=True)
class DenseForm:
    """A classifier's logits at every location of its features.

    Attributes:
        grid: (H, W) of the map, in cells.
        rule: What the map holds, one of this module's `*_RULE`s.
        exact: Whether the mean of the map equals the pooled logits, up to float error.
        cells: Takes features apart, [B, ...] to [B*H*W, ...], each a feature map of one cell.
        head: Turns the cells into logits, [B*H*W, C].
        pooled: The model's own head, features to logits [B, C].
    """

    grid: tuple[int, int]
    rule: str
    exact: bool
    cells: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    pooled: Callable[[Tensor], Tensor]

    def __call__(self, features: Tensor) -> Tensor:
        """Return the logits [B, H, W, C] at each location of `features` ([B, ...], row-major)."""
        logits = self.head(self.cells(features))
        return logits.view(len(features), *self.grid, -1)


def dense_form(model: nn.Module, name: str, input_size: tuple[int, int]) -> DenseForm:
    """Find the faithful per-patch form of a timm classifier.

    Runs the model once on an empty image, so that the grid is the one it really has.

    Args:
        model: A timm classifier in eval mode.
        name: What to call it in an error.
        input_size: (h, w) of the images it will see, in pixels.

    Raises:
        TeacherError: No classifier, another input size wanted, or no faithful per-patch form.
    """
    net: Any = model
    if not hasattr(net, "forward_features") or not hasattr(net, "forward_head"):
        raise _refusal(name, "it lacks timm's `forward_features` and `forward_head`")
    if not getattr(net, "num_classes", 0):
        raise _refusal(name, "it has no classifier (num_classes is 0)")
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            features = net.forward_features(torch.zeros(1, 3, *input_size, device=device))
    except Exception as error:  # timm raises anything from AssertionError to RuntimeError here
        raise TeacherError(
            f"A teacher must accept its input size; {name} does not take RGB images of "
            f"{input_size[0]}x{input_size[1]} pixels ({type(error).__name__}: {error}). "
            "Remedy: set input_size to one it takes, or leave it out."
        ) from error
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
    if type(model).__name__ in _CLASS_ATTENTION:
        if getattr(net, "aux_head", None) is None:
            raise _refusal(name, "its classifier lies behind class attention, its patches do not")
        return DenseForm(
            grid, AUX_RULE, False, lambda x: x[:, 1:].flatten(0, 1), net.aux_head, net.forward_head
        )
    rule = _head_rule(net, name, features.shape, cells, prefix, device)
    return DenseForm(grid, rule, rule == MEAN_RULE, cells, net.forward_head, net.forward_head)


def _layout(
    net: Any, name: str, features: object, input_size: tuple[int, int]
) -> tuple[tuple[int, int], Callable[[Tensor], Tensor], int]:
    """Return the grid, the function that takes features apart, and the number of prefix tokens."""
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise _refusal(name, "its features are neither one feature map nor one sequence of tokens")
    if features.ndim == 4:
        shape = features.shape
        if getattr(net, "output_fmt", "NCHW") == "NHWC":
            return (shape[1], shape[2]), lambda x: x.flatten(0, 2)[:, None, None, :], 0
        return (shape[2], shape[3]), lambda x: x.movedim(1, 3).flatten(0, 2)[:, :, None, None], 0
    prefix = int(getattr(net, "num_prefix_tokens", 0) or (type(net).__name__ == "VOLO"))
    grid = _token_grid(net, input_size)
    if grid is None or grid[0] * grid[1] + prefix != features.shape[1]:
        raise _refusal(
            name, f"its {features.shape[1]} tokens do not lie on a grid that it tells of"
        )
    # Every token of a one-cell sequence is the patch: the head may read the class token, the
    # distillation token, the mean of the patches, or all of them.
    return grid, lambda x: x[:, prefix:].flatten(0, 1)[:, None].expand(-1, prefix + 1, -1), prefix


def _token_grid(net: Any, input_size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the (H, W) grid of a transformer's patch tokens, or None if it does not tell."""
    if type(net).__name__ == "VOLO":
        return int(net.pos_embed.shape[1]), int(net.pos_embed.shape[2])
    embed: Any = getattr(net, "patch_embed", None) or getattr(net, "stem", None)
    if hasattr(embed, "dynamic_feat_size"):
        rows, columns = embed.dynamic_feat_size(input_size)
    elif getattr(embed, "grid_size", None):
        rows, columns = embed.grid_size
    else:
        return None
    return int(rows), int(columns)


@torch.inference_mode()
def _head_rule(
    net: Any,
    name: str,
    shape: torch.Size,
    cells: Callable[[Tensor], Tensor],
    prefix: int,
    device: torch.device,
) -> str:
    """Find out from random features what the head does, or refuse the model."""
    generator = torch.Generator().manual_seed(0)
    # Large values, so that no activation function is mistaken for a linear one.
    features = 10 * torch.randn(shape, generator=generator).to(device)
    try:
        pooled = net.forward_head(features)
        located = cells(features)
        dense = net.forward_head(located)
        average = net.forward_head(located.mean(0, keepdim=True))
        if prefix:
            patches = 10 * torch.randn(shape, generator=generator).to(device)
            token = net.forward_head(torch.cat([features[:, :prefix], patches[:, prefix:]], 1))
    except Exception as error:  # a head with its own idea of the grid, of any kind
        raise _refusal(
            name, f"its head takes no single location ({type(error).__name__}: {error})"
        ) from error
    if dense.shape != (len(located), net.num_classes) or pooled.shape != average.shape:
        raise _refusal(name, "its head does not pool to one row of logits an image")
    scale = float(dense.std(0).max())
    if scale == 0:
        raise TeacherError(
            f"A teacher must be trained; the classifier of {name} gives the same logits whatever "
            "it sees (its weights are zero). Remedy: load trained weights."
        )

    def same(one: Tensor, other: Tensor) -> bool:
        return float((one - other).abs().max()) <= TOLERANCE * max(scale, float(one.abs().max()))

    if same(pooled, average):
        return MEAN_RULE if same(pooled, dense.mean(0, keepdim=True)) else HEAD_RULE
    if prefix and same(pooled, token):
        return TOKEN_RULE
    kinds = {type(module).__name__ for module in net.modules()}
    pools = sorted(k for k in kinds if re.search("AttentionPool|AvgMaxPool|AdaptiveMaxPool", k))
    raise _refusal(name, "its head does more than average" + f" ({', '.join(pools)})" * bool(pools))


def _refusal(name: str, reason: str) -> TeacherError:
    return TeacherError(
        f"A teacher needs a faithful per-patch form; {name} has none: {reason}. {_ADVICE}"
    )
