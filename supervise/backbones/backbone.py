"""What a student must know of its backbone: class output, patch features, default input size."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

Grid = tuple[int, int]

OVERRIDE = (
    "For a backbone of another kind, subclass TokenStudent and override `features(self, images)` "
    "to return class logits [B, C] and patch features [B, h, w, D]"
)


class Backbone(NamedTuple):
    """How to use the models of one family.

    Attributes:
        features: (model, images [B, ch, H, W]) to the class output, [B, C] logits or, of a model
            with no classifier, [B, F] features; and the patches' features [B, h, w, D].
        image_size: (H, W) in pixels of the model's default input.
        num_classes: width of the model's classifier; 0 if it has none.
        reset_classifier: (model, number of classes) puts a new classifier in; None if the family
            has no place for one, so that the student must add it.
        embedding: the module that turns images into patch tokens, before any position is added.
        dense: whether `features` gives patch logits instead, from a patch head of the model's own.
    """

    features: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    image_size: Grid
    num_classes: int
    reset_classifier: Callable[[Any, int], None] | None
    embedding: Callable[[Any], nn.Module | None]
    dense: bool = False


def pair(size: int | Sequence[int]) -> Grid:
    """(h, w), of that or of one number for a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def as_map(features: Tensor, images: Tensor, prefix: int = 0, *, channels_last: bool) -> Tensor:
    """Patch features [B, h, w, D] of tokens [B, prefix + N, D] or a feature map.

    Args:
        features: tokens, or a map [B, h, w, D] or [B, D, h, w].
        images: [B, channels, H, W].
        prefix: number of class, distillation and register tokens in front.
        channels_last: whether a feature map is [B, h, w, D].

    Raises:
        ValueError: for what is neither, or tokens that do not fill a grid.
    """
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"a backbone's features must be tokens [B, N, D] or a map of four dimensions, got {got}"
            f". {OVERRIDE}"
        )
    if features.ndim == 4:
        return features if channels_last else features.permute(0, 2, 3, 1)
    patches = features[:, prefix:]
    if patches.shape[1] < 2:
        raise ValueError(
            f"a backbone's features must hold patch tokens, got {list(features.shape)}. {OVERRIDE}"
        )
    grid: Tensor = patches.unflatten(1, grid_of(patches.shape[1], pair(images.shape[-2:])))
    return grid


def grid_of(tokens: int, image_size: Grid) -> Grid:
    """Find the (h, w) of square patches on an image from their number.

    Raises:
        ValueError: if no such grid has that many patches.
    """
    height, width = image_size
    guess = round(math.sqrt(tokens * height / width))
    for rows in (guess, guess - 1, guess + 1):
        if rows < 1 or tokens % rows:
            continue
        columns = tokens // rows
        # Some patch size goes `rows` times into the height and `columns` times into the width,
        # whether what is left over was cut off or padded.
        fits = height * (columns - 1) < width * (rows + 1)
        if fits and width * (rows - 1) < height * (columns + 1):
            return rows, columns
    raise ValueError(
        f"patch tokens must fill a grid; {tokens} tokens of an image of (H, W) = {image_size} do "
        f"not. Remedy: turn off what drops or merges tokens in the backbone. {OVERRIDE}"
    )


def last_linear(module: nn.Module) -> tuple[str, nn.Linear] | None:
    """Name and module of the last linear layer: in a classifier, the one that makes logits."""
    linears = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    return linears[-1] if linears else None


def replace_linear(model: nn.Module, name: str, num_classes: int) -> None:
    """Put a new linear layer of `num_classes` outputs in the place of one of a model's."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, new_linear(old.in_features, num_classes, old.weight))


def new_linear(width: int, num_classes: int, like: Tensor) -> nn.Linear:
    """A classifier with small normal weights (std 0.02) and no bias yet, where `like` lies."""
    linear = nn.Linear(width, num_classes, device=like.device, dtype=like.dtype)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear
