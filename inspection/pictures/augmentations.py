"""Random augmentations of one image with their targets, as a student in training gets them."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms import v2

from ...dataset.label_map.label_map import TokenLabelMap
from ...dataset.store import LabelStore
from ...dataset.targets.token_labels import TokenLabels
from ..label_sets import Floats, Ids

#: The student's patches, for a ViT of 224 pixels and 16 pixels a patch.
GRID = 14
_SIDE = 448  # twice a student's, to look better; the targets do not depend on it


class Augmentation(NamedTuple):
    """One augmented image.

    Attributes:
        image: RGB.
        best: int64 [GRID, GRID], the class of each patch's target.
        probs: [GRID, GRID], its probability.
        shown: bool [GRID, GRID], False for patches that show none of the image.
        outline: float [4, 2], its corners in the source image, normalised (x, y), clockwise as the
            augmented image shows them, from the top left.
        title: the fraction of the image's area that it shows, and how that was flipped and turned.
    """

    image: Image.Image
    best: Ids
    probs: Floats
    shown: npt.NDArray[np.bool_]
    outline: Floats
    title: str


def augmentations(
    image: Image.Image, store: LabelStore, key: str, count: int = 3, seed: int = 0
) -> list[Augmentation]:
    """Crops, flips and turns of an image, through the transforms that training uses."""
    pipeline = v2.Compose(
        [
            v2.RandomResizedCrop(_SIDE, scale=(0.25, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(25, interpolation=v2.InterpolationMode.BILINEAR, fill=128),
        ]
    )
    label_map = store.leaf(store.row(key), (image.height, image.width))
    found = []
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers as they are
        torch.manual_seed(seed)
        for _ in range(count):
            augmented, augmented_map = pipeline(image, label_map)
            targets = TokenLabels.collate([augmented_map]).sparse(GRID, 1)
            best, probs, weight = (
                part.reshape(GRID, GRID).numpy()
                for part in (targets.classes, targets.probs, targets.weight)
            )
            outline, mirrored = outline_of(augmented_map), augmented_map.path.is_mirrored
            x, y = outline.T
            area = 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
            angle = angle_of(outline, mirrored)
            title = (
                f"crop of {area:.0%}{', mirrored' * mirrored}, turned {abs(angle):.0f} degrees "
                f"{'left' if angle >= 0 else 'right'}"
            )
            found.append(
                Augmentation(augmented, best.astype(np.int64), probs, weight > 0, outline, title)
            )
    return found


def outline_of(label_map: TokenLabelMap) -> Floats:
    """Where the corners of the augmented image's content lie in the source, normalised [4, 2]."""
    height, width = label_map.canvas_size
    x, y, _ = label_map.path(
        np.array([0.0, width, width, 0.0]), np.array([0.0, 0.0, height, height])
    )
    return np.stack([x, y], -1)


def angle_of(outline: Floats, mirrored: bool) -> float:
    """Degrees counter-clockwise; from x alone, which a stretched crop scales as a whole."""
    right, down = outline[1, 0] - outline[0, 0], outline[3, 0] - outline[0, 0]
    sign = -1 if mirrored else 1
    return math.degrees(math.atan2(-sign * down, sign * right))
