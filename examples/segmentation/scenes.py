"""Images and masks in folders, their augmentation, and a small set that is made on the spot."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from segmenter import IGNORED
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

NORMALISE = (
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    v2.ToPureTensor(),
)
#: Of the toy set, by class id.
TOY_CLASSES = ("background", "rows", "columns", "checks", "slopes", "dots")


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """DATA/SPLIT/images/NAME.* with DATA/SPLIT/masks/NAME.png: (image, mask [H, W] of class ids).

    Masks are PNG files of one 8-bit channel or with a palette. 255 is ignored; with
    `reduce_zero_label` so is 0, and the other ids are one lower, as ADE20K wants it.

    Raises:
        FileNotFoundError: there is no such folder, or no images in it.
        ValueError: an image without a mask; or when indexed, a mask of another size, of another
            kind or with a class id out of range, or a file that is no image.
    """

    def __init__(
        self, data: Path, split: str, num_classes: int, reduce_zero_label: bool, transform: Any
    ) -> None:
        root, masks = data / split / "images", data / split / "masks"
        found = sorted(root.rglob("*")) if root.is_dir() else []
        self.files = [path for path in found if path.is_file() and path.name[0] != "."]
        if not self.files:
            raise FileNotFoundError(
                f"--data must hold {split}/images with images and {split}/masks with their masks, "
                f"got no image in {root}. Remedy: check --data"
            )
        self.masks = [masks / path.relative_to(root).with_suffix(".png") for path in self.files]
        missing = [str(path) for path in self.masks if not path.is_file()]
        if missing:
            raise ValueError(
                f"each image in {root} must have a PNG file of its name in {masks}, got none for "
                f"{len(missing)} of {len(self.files)} images ({', '.join(missing[:3])}). "
                "Remedy: add the masks, or remove these images"
            )
        self.num_classes, self.zero, self.transform = num_classes, reduce_zero_label, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.masks[index]
        try:
            image = tv_tensors.Image(Image.open(self.files[index]).convert("RGB"))
            ids = torch.from_numpy(np.array(Image.open(path)))
        except UnidentifiedImageError as error:
            raise ValueError(
                f"a file must be an image: {error}. Remedy: remove the file and its partner"
            ) from error
        if ids.dtype != torch.uint8 or ids.shape != image.shape[-2:]:
            raise ValueError(
                f"a mask must be uint8 of its image's (H, W) = {tuple(image.shape[-2:])}, got "
                f"{ids.dtype} of {tuple(ids.shape)} in {path}. Remedy: a PNG file of class ids"
            )
        if self.zero:
            ids = torch.where((ids == 0) | (ids == IGNORED), IGNORED, ids - 1)
        largest = int(torch.where(ids == IGNORED, 0, ids).max())
        if largest >= self.num_classes:
            raise ValueError(
                f"class ids must be below {self.num_classes}, got {largest} in {path}. "
                "Remedy: --num-classes, or --reduce-zero-label where 0 is no class"
            )
        image, mask = self.transform(image, tv_tensors.Mask(ids))
        return image, mask.long()


class VariedCrop(nn.Module):
    """A random crop, drawn up to 10 times until no class fills more than 3/4 of what is labelled.

    As mmsegmentation's `cat_max_ratio=0.75`.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        fill = {tv_tensors.Image: [124, 116, 104], tv_tensors.Mask: IGNORED}
        self.crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The crop of both."""
        for _ in range(10):
            crop, ids = self.crop(image, mask)
            counts = ids[ids != IGNORED].long().bincount(minlength=2)
            if 4 * counts.max() < 3 * counts.sum():
                break
        return crop, ids


def train_transform(size: int) -> v2.Compose:
    """The published augmentation: scale 0.5 to 2, a crop of `size` pixels, flip, colours."""
    shorter = v2.RandomShortestSize(list(range(size // 2, 2 * size + 1)))
    flip, colours = v2.RandomHorizontalFlip(), v2.RandomPhotometricDistort()
    return v2.Compose([shorter, VariedCrop(size), flip, colours, *NORMALISE])


def paint(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A scene [96, 128, 3] of 2 to 4 textured discs and squares, and its mask [96, 128].

    The class is the texture. Colours, shapes, sizes and positions say nothing about it.
    """
    y, x = np.mgrid[:96, :128]
    pixels = random.uniform(0, 255, (12, 16, 3)).repeat(8, 0).repeat(8, 1)
    mask = np.zeros((96, 128), np.uint8)
    for _ in range(random.integers(2, 5)):
        period, kind = random.integers((3, 1), (6, len(TOY_CLASSES)))
        row, column, radius = random.uniform((10, 10, 14), (86, 118, 30))
        distances = np.hypot(y - row, x - column), np.maximum(abs(y - row), abs(x - column))
        inside = distances[random.integers(2)] < radius
        down, across = y // period % 2, x // period % 2
        dots = (y % (2 * period) < period) & (x % (2 * period) < period)
        textures = (down, across, down ^ across, (x + y) // period % 2, dots.astype(int))
        pixels[inside] = random.uniform(0, 255, (2, 3))[textures[kind - 1][inside]]
        mask[inside] = kind
    noisy = pixels + random.normal(0, 8, pixels.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), mask


def make_toy(folder: Path, counts: tuple[int, int] = (48, 48), seed: int = 0) -> Path:
    """Write train and val of scenes and their masks, unless they are there; return the folder."""
    if folder.exists():
        return folder
    random, half = np.random.default_rng(seed), folder.with_name(f".{folder.name}.tmp")
    for split, count in zip(("train", "val"), counts, strict=True):
        for number in range(count):
            for kind, values in zip(("images", "masks"), paint(random), strict=True):
                path = half / split / kind / f"{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
    return half.rename(folder)
