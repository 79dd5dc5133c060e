"""`Kornia`: kornia's augmentations for images with label maps, one by one or a batch."""

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from ..label_map.label_map import TokenLabelMap
from .coordinates import coordinates, follow, points, read


class Kornia(nn.Module):
    """Runs kornia augmentations on images, and their labels follow.

        import kornia.augmentation as K

        augment = Kornia(K.AugmentationSequential(K.RandomHorizontalFlip(), K.RandomAffine(20.0)))
        dataset.transform = augment  # an image tensor and its map, in the loader
        images, labels = augment(images, labels)  # or a batch and its TokenLabels, on its device

    The labels follow whatever moves kornia's masks: crops, flips, affine, perspective and elastic
    transforms, padding of every mode. What is erased keeps its label. A batch waits for the device.

    Args:
        augmentation: a module of `kornia.augmentation`, or an `nn.Sequential` of them; copied.

    Raises:
        TypeError: it mixes images.
    """

    def __init__(self, augmentation: nn.Module) -> None:
        super().__init__()
        kornia = import_module("kornia.augmentation")
        keys = import_module("kornia.constants")
        copied: Any = copy.deepcopy(augmentation)
        if not isinstance(copied, kornia.AugmentationSequential):
            steps = copied if type(copied) is nn.Sequential else [copied]
            copied = kornia.AugmentationSequential(*steps)
        copied.extra_args = {
            keys.DataKey.MASK: {"resample": keys.Resample.BILINEAR, "align_corners": None}
        }
        for step in copied.modules():
            if isinstance(step, kornia.MixAugmentationBaseV2):
                raise TypeError(
                    f"no label map can follow kornia's {type(step).__name__}, which mixes images. "
                    "Remedy: leave it out; mix after it, with tokenlabel.MixUpOrCutMix"
                )
            if isinstance(step, kornia.IntensityAugmentationBase2D):
                step.apply_transform_mask = _untouched
        self.augmentation = copied

    def forward(self, images: Any, labels: Any = None) -> Any:
        """The transformed images and their labels; of images alone, the images.

        Args:
            images: [C, h, w] or Pillow's with a `TokenLabelMap`, or [B, C, h, w] with
                `TokenLabels`; integers are brought to floats in [0, 1]. Halves are moved in
                float32, also under autocast, or coordinates would be too coarse.
            labels: those of the images, on the same device.

        Raises:
            NotImplementedError: kornia's own, of augmentations that move no masks.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            images = F.to_dtype(F.to_image(images), torch.float32, scale=True)
        with torch.autocast(images.device.type, enabled=False):
            wide = torch.promote_types(images.dtype, torch.float32)
            moved, labels = self._moved(images.as_subclass(Tensor).to(wide), labels)
        moved = moved.to(images.dtype)
        return moved if labels is None else (moved, labels)

    def _moved(self, images: Tensor, labels: Any) -> tuple[Tensor, Any]:
        batch = images[None] if images.ndim == 3 else images
        if labels is None:
            moved = self.augmentation(batch, data_keys=["input"])
            return moved[0] if images.ndim == 3 else moved, None
        height, width = images.shape[-2:]
        where = coordinates(height, width).to(images.device).expand(len(batch), -1, -1, -1)
        moved, where = self.augmentation(batch, where, data_keys=["input", "mask"])
        if isinstance(labels, TokenLabelMap):
            return moved[0], follow(labels, where[0])
        geometry = read(where, (height, width))
        size = moved.shape[-2], moved.shape[-1]
        if bool(geometry.exact.all()):
            return moved, labels.follow(geometry.matrices, size, geometry.boxes)
        return moved, labels.follow(points(where), size)


def _untouched(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input
