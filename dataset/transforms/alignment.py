"""`check_alignment`: does a pipeline move label maps with its images?"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..label_map.label_map import TokenLabelMap
from ..targets.token_labels import TokenLabels
from .aligned import aligned

#: Cells of the marked maps along each side, and patches of the images that are compared.
_CELLS, _PATCHES = 16, 28
#: Shades that images and maps are compared by. A function of one shade, whichever, explains all.
_SHADES = 8
#: Of the variation, what the map must explain.
_EXPLAINED = 0.3
#: Share of the draws that must agree, and the patches with a map that a draw must have to count.
_AGREE, _FEWEST = 0.95, 60


class Alignment(NamedTuple):
    """What `check_alignment` found.

    Attributes:
        agreement: fraction of the draws in which the map shows what the image shows.
        shift: median distance between the two, in pixels of the transformed image.
        draws: how many draws told anything.
    """

    agreement: float
    shift: float
    draws: int


class _Draw(NamedTuple):
    image: Tensor  # shade of each patch, [28, 28]
    map: Tensor  # the same, as the map has it
    shown: Tensor  # bool [28, 28], patches that lie inside the image
    patch: float  # pixels a patch


def check_alignment(
    pipeline: Callable[..., Any],
    *,
    draws: int = 64,
    sizes: Sequence[tuple[int, int]] = ((375, 500), (500, 333), (256, 256)),
    tolerance: float = 0.5,
) -> Alignment:
    """Run a pipeline on marked images, and compare them with their maps after it.

        found = check_alignment(v2.Compose([v2.RandomResizedCrop(224), v2.RandomRotation(9)]))
        found.agreement, found.shift  # 1.0, and less than a tenth of a pixel

    Each image has a random pattern of grey, and its map the same pattern as classes. Changes of
    colour do not matter, whatever they are; flips, crops and warps must move both.

    Args:
        pipeline: from (image, `TokenLabelMap`) to (image, map) or (image, `TokenLabels`), or what
            `TokenLabelDataset` takes as `transform`.
        draws: images to try. Their number decides how rare a fault may be and still be found.
        sizes: (h, w) of the images, in turn.
        tolerance: shift in pixels above which image and map count as apart.

    Raises:
        ValueError: image and map do not stay together; says in how many draws, and how they lie to
            each other if it knows.
        TypeError: the pipeline returns something else.
    """
    run = aligned(pipeline)
    found = [_draw(run, sizes[number % len(sizes)], number) for number in range(draws)]
    told = [draw for draw in found if draw is not None]
    if not told:
        raise ValueError(
            "check_alignment found nothing to compare: no image that the pipeline made had a "
            "pattern and a map. Remedy: leave out what blanks images or drops maps"
        )
    agree = [_explained(draw.image, draw.map, draw.shown) >= _EXPLAINED for draw in told]
    share = sum(agree) / len(told)
    if share < _AGREE:
        apart = [draw for draw, fits in zip(told, agree, strict=True) if not fits]
        raise ValueError(
            f"image and label map must stay together; in {len(apart)} of {len(told)} draws they "
            f"did not{_how(apart)}. Remedy: transforms of torchvision.transforms.v2 move both; in "
            "code of your own, label_map.follow(matrix)"
        )
    steps = [_shift(draw) for draw, fits in zip(told, agree, strict=True) if fits]
    shift = float(np.median([step for step in steps if step is not None] or [0.0]))
    if shift > tolerance:
        raise ValueError(
            f"image and label map must stay together within {tolerance} pixels; they lie "
            f"{shift:.2f} apart. Remedy: pixel i covers [i, i + 1], so that a matrix of pixel "
            "centres must be moved by half a pixel on both sides; label_map.follow says how"
        )
    return Alignment(share, shift, len(told))


def _draw(pipeline: Callable[..., Any], size: tuple[int, int], number: int) -> _Draw | None:
    """One marked image through the pipeline; None if nothing can be told by it."""
    pattern = np.random.default_rng(number).integers(0, 2, (_CELLS, _CELLS))
    classes = torch.from_numpy(pattern)[..., None]
    leaf = TokenLabelMap.from_scores(
        torch.zeros(classes.shape),
        classes,
        torch.full((_CELLS, _CELLS), -torch.inf),
        canvas_size=size,
        num_classes=2,
    )
    shades = torch.nn.functional.interpolate(
        torch.from_numpy(pattern)[None, None].float(), size=list(size), mode="bilinear"
    )[0, 0]
    grey = (40 + 175 * shades).round().byte().numpy()
    moved = pipeline(PIL.Image.fromarray(grey).convert("RGB"), leaf)
    image, labels = moved if isinstance(moved, tuple | list) and len(moved) == 2 else (moved, None)
    if isinstance(labels, TokenLabelMap):
        labels = TokenLabels.of(labels)
    if not isinstance(labels, TokenLabels):
        raise TypeError(
            "a pipeline must return (image, TokenLabelMap) or (image, TokenLabels), as it got "
            f"them; the second is {type(labels).__name__}"
        )
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.atleast_3d(image)).movedim(-1, 0)
    image = F.to_image(image).as_subclass(Tensor).float().mean(0)
    patches = torch.nn.functional.interpolate(
        image[None, None], size=(_PATCHES, _PATCHES), mode="area"
    )[0, 0]
    targets = TokenLabels.wrap(labels[None]).targets(_PATCHES)
    shape = (_PATCHES, _PATCHES)
    draw = _Draw(
        patches,
        targets.dense()[0, :, 1].view(shape),
        (targets.weight[0] > 0.999).view(shape),
        (image.shape[0] * image.shape[1]) ** 0.5 / _PATCHES,
    )
    flat = min(float(part[draw.shown].std()) if draw.shown.any() else 0.0 for part in draw[:2])
    scale = float(patches.abs().amax())
    return draw if draw.shown.sum() >= _FEWEST and flat > 1e-3 * max(scale, 1e-6) else None


def _explained(image: Tensor, shades: Tensor, shown: Tensor) -> float:
    """How much of an image's variation some function of the map's shades explains; at most 1."""
    values, bins = image[shown].double(), (shades[shown] * _SHADES).long().clamp(max=_SHADES - 1)
    left = torch.empty_like(values)
    for shade in range(_SHADES):
        which = bins == shade
        left[which] = values[which] - (values[which].median() if which.any() else 0.0)
    # Medians, which the patches that were erased do not move.
    return float(
        1 - left.abs().median() / (values - values.median()).abs().median().clamp(min=1e-9)
    )


def _shift(draw: _Draw) -> float | None:
    """Distance between image and map in pixels, to first order; None where shades are no line."""
    down, across = torch.gradient(draw.map)
    inner = draw.shown.clone()
    inner[[0, -1]] = inner[:, [0, -1]] = False
    columns = [torch.ones_like(draw.map), draw.map, across, down]
    rows = torch.stack([column[inner] for column in columns], 1).double()
    values = draw.image[inner].double()
    if len(values) < _FEWEST:
        return None
    found = torch.linalg.lstsq(rows, values[:, None]).solution[:, 0]
    left = values - rows @ found
    if left.var() > 0.02 * values.var():
        return None
    return float((found[2:] / found[1]).norm()) * draw.patch


def _how(draws: Sequence[_Draw]) -> str:
    """What the maps would have to be for most draws to agree."""
    for turn, left, up in itertools.product((False, True), repeat=3):
        axes = [axis for axis, flip in ((1, left), (0, up)) if flip]
        fits = 0
        for draw in draws:
            shades, shown = (
                (part.mT if turn else part).flip(axes) for part in (draw.map, draw.shown)
            )
            both = shown & draw.shown
            if both.sum() >= _FEWEST:
                fits += _explained(draw.image, shades, both) >= _EXPLAINED
        if fits > 0.7 * len(draws):
            words = [
                *(["transposed"] if turn else []),
                *(["mirrored left to right"] if left else []),
                *(["mirrored top to bottom"] if up else []),
            ]
            return ": the map is " + " and ".join(words)
    return ""
