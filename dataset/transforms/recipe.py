# mypy: allow-subclassing-any
"""The DeiT/timm training recipe, and its evaluation, as v2 pipelines that carry label maps."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .timm import TimmAugment

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def train_transform(
    size: int | Sequence[int] = 224,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "random",
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float | Sequence[float] | None = 0.4,
    force_color_jitter: bool = False,
    erase_prob: float = 0.25,
    hflip: float = 0.5,
    vflip: float = 0.0,
    crop_last: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> v2.Compose:
    """The training recipe of DeiT and timm, with aligned label maps.

        transform = train_transform(224, auto_augment="rand-m9-mstd0.5-inc1")
        dataset = TokenLabelDataset("imagenet/train", "labels/train", transform=transform)
        image, labels = dataset[0]

    Random resized crop, flip, timm's RandAugment (or colour jitter), to float, normalise, random
    erasing with normal noise. Takes any sample v2 takes: (image, map), a dictionary, an image
    alone; images PIL (mode RGB) or uint8 tensors [3, H, W]. Erasing leaves the map as it is: the
    student is to name what was there, as in LV-ViT.

    `auto_augment` draws as `TimmAugment` does, from Python's `random` and NumPy; all else from
    torch's generator. With `num_workers=0`, seed all three.

    Args:
        size: of the output, pixels; an integer for a square, or (height, width).
        scale: bounds of the crop's area as a fraction of the image's.
        ratio: bounds of the crop's width / height.
        interpolation: "bilinear", "bicubic", "nearest", or "random": bilinear or bicubic by draw.
        auto_augment: policy of `TimmAugment`; None for none, which needs no timm.
        color_jitter: strength for brightness, contrast and saturation, or one of each, hue perhaps
            fourth; None for none. As in timm, it is left out when `auto_augment` is on, unless
            that is a 3-Augment or `force_color_jitter` is set.
        force_color_jitter: jitter colours after `auto_augment` too.
        erase_prob: probability of erasing a box of 2 to 33 percent of the area.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        crop_last: flip, augment and jitter the whole image before the crop, as the published code
            of token labeling does (zihangJiang/TokenLabeling), which costs more time.
        mean: of the channels, 0 to 1; also the colour of what comes from outside the image.
        std: of the channels.

    Returns:
        A pipeline; images leave it as float32 `tv_tensors.Image` [3, height, width].

    Raises:
        ImportError: `auto_augment` is given and timm is not installed.
        ValueError: an argument out of range, or an `auto_augment` that timm does not know or that
            cannot carry labels ("augmix").
    """
    size = _height_width(size)
    for name, bounds in (("scale", scale), ("ratio", ratio)):
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
            raise ValueError(f"{name} is (low, high) with 0 < low <= high; got {tuple(bounds)}")
    modes = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)
    crops = [v2.RandomResizedCrop(size, scale, ratio, _mode(mode)) for mode in modes]
    crop = v2.RandomChoice(crops) if len(crops) > 1 else crops[0]
    steps: list[Any] = [] if crop_last else [crop]
    if hflip:
        steps.append(v2.RandomHorizontalFlip(hflip))
    if vflip:
        steps.append(v2.RandomVerticalFlip(vflip))
    if auto_augment:
        fill = [min(255, round(255 * value)) for value in mean]
        steps.append(TimmAugment(auto_augment, fill=fill, interpolation=interpolation))
    if color_jitter and (not auto_augment or force_color_jitter or "3a" in auto_augment):
        if isinstance(color_jitter, int | float):
            color_jitter = (color_jitter,) * 3
        if len(color_jitter) not in (3, 4):
            raise ValueError(
                "color_jitter is one number, or brightness, contrast, saturation and perhaps hue; "
                f"got {len(color_jitter)} numbers"
            )
        steps.append(v2.ColorJitter(*color_jitter))
    if crop_last:
        steps.append(crop)
    steps += _to_normalised(mean, std)
    if erase_prob:
        steps.append(RandomErasing(erase_prob))
    return v2.Compose(steps)


def eval_transform(
    size: int | Sequence[int] = 224,
    *,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> v2.Compose:
    """Evaluation as in timm: resize so that the crop is `crop_pct` of it, centre crop, normalise.

    Args:
        size: of the output, pixels; an integer for a square, or (height, width).
        crop_pct: size of the crop over size of the resized image, in (0, 1].
        interpolation: a `torchvision.transforms.InterpolationMode` by name.
        mean: of the channels, 0 to 1.
        std: of the channels.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be in (0, 1]; got {crop_pct}")
    height, width = _height_width(size)
    around = math.floor(height / crop_pct), math.floor(width / crop_pct)
    resize, crop = ResizeToCover(around, _mode(interpolation)), v2.CenterCrop([height, width])
    return v2.Compose([resize, crop, *_to_normalised(mean, std)])


class RandomErasing(v2.RandomErasing):
    """Erase a random box with normal noise, as timm's mode "pixel"; label maps stay as they are.

    The box covers 2 to 33 percent of the area, with sides in a ratio of 0.3 to 1 / 0.3. It is for
    tensors of normalised images.
    """

    def __init__(self, p: float = 0.25) -> None:
        super().__init__(p, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Erase in images; torchvision would warn about each map it passes through."""
        return inpt if isinstance(inpt, tv_tensors.Mask) else super().transform(inpt, params)


class ResizeToCover(v2.Transform):
    """Resize, keeping the shape, until the image just covers a box.

    Args:
        size: the box, (height, width) in pixels.
        interpolation: a `torchvision.transforms.InterpolationMode`.
    """

    def __init__(self, size: tuple[int, int], interpolation: v2.InterpolationMode) -> None:
        super().__init__()
        self.size = size
        self.interpolation = interpolation

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one image or map."""
        (height, width), (box_height, box_width) = F.get_size(inpt), self.size
        if box_height == box_width:
            # The short side alone: torchvision then rounds the long one down, and so must we.
            new_size = [box_height]
        else:
            shrink = min(height / box_height, width / box_width)
            new_size = [round(height / shrink), round(width / shrink)]
        return F.resize(inpt, new_size, self.interpolation)


def _to_normalised(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    to_float = v2.ToDtype(torch.float32, scale=True)
    return [v2.ToImage(), to_float, v2.Normalize(list(mean), list(std))]


def _height_width(size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"size is a positive integer or (height, width) of them; got {size!r}")
    return pair[0], pair[1]


def _mode(name: str) -> v2.InterpolationMode:
    try:
        return v2.InterpolationMode(name)
    except ValueError:
        known = ", ".join(mode.value for mode in v2.InterpolationMode)
        raise ValueError(
            f"interpolation is one of {known}, or 'random' for training; got {name!r}"
        ) from None
