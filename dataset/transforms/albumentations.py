"""`Albumentations`: pipelines of albumentations 2.x for images with label maps."""

import copy
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..label_map.label_map import TokenLabelMap
from .coordinates import coordinates, follow

_LINEAR = 1  # cv2.INTER_LINEAR


class Albumentations:
    """Runs an albumentations pipeline on an image, and its label map follows.

        import albumentations as A

        pipeline = A.Compose([A.RandomResizedCrop((224, 224)), A.Affine(rotate=(-20, 20))])
        dataset.transform = Albumentations(pipeline)  # or the pipeline itself

    The map follows whatever moves albumentations' masks: crops, flips, padding of every mode,
    affine and perspective transforms, elastic and grid distortions, one's own `DualTransform`.
    What is erased (CoarseDropout, GridDropout) keeps its label, unless it has a `fill_mask`. The
    workers of a DataLoader draw from generators of their own, seeded by torch's.

    Args:
        pipeline: an `albumentations.Compose`; it is copied.

    Raises:
        TypeError: it is no `Compose`, or holds a transform that mixes images or reshapes masks.
    """

    def __init__(self, pipeline: Any) -> None:
        if not hasattr(pipeline, "set_mask_interpolation"):
            raise TypeError(
                f"Albumentations takes an albumentations.Compose of version 2, got {pipeline!r}. "
                "Remedy: Albumentations(albumentations.Compose([...]))"
            )
        for name in _names(pipeline):
            if name in ("Mosaic", "OverlayElements", "Morphological"):
                raise TypeError(
                    f"no label map can follow albumentations.{name}, which changes masks by more "
                    "than their geometry. Remedy: leave it out; mix images after the loader, with "
                    "tokenlabel.MixUpOrCutMix"
                )
        self.pipeline = copy.deepcopy(pipeline)
        self.pipeline.set_mask_interpolation(_LINEAR)
        self._worker: int | None = None

    def __call__(self, image: Any, leaf: TokenLabelMap | None = None) -> Any:
        """The transformed image and its map; of an image alone, the image.

        Args:
            image: PIL image, array [h, w, C], or tensor [C, h, w].
            leaf: its map.

        Returns:
            The image as a tensor [C, h, w] of the pipeline's dtype.
        """
        worker = get_worker_info()
        if worker is not None and worker.seed != self._worker:
            # albumentations' generator is its own, so that each worker and epoch would draw alike.
            self._worker = worker.seed
            self.pipeline.set_random_seed((worker.seed + (self.pipeline.seed or 0)) % 2**32)
        array = image
        if isinstance(image, Tensor):
            array = image.as_subclass(Tensor).permute(1, 2, 0).numpy()
        elif isinstance(image, PIL.Image.Image):
            array = np.asarray(image)
        height, width = array.shape[:2]
        where = (
            {} if leaf is None else {"mask": coordinates(height, width).permute(1, 2, 0).numpy()}
        )
        moved = self.pipeline(image=np.ascontiguousarray(array), **where)
        new = moved["image"]
        if not isinstance(new, Tensor):
            new = np.atleast_3d(new).transpose(2, 0, 1)
            new = torch.from_numpy(np.ascontiguousarray(new))
        if leaf is None:
            return new
        mask = torch.as_tensor(moved["mask"])
        if mask.shape[0] != 3 or mask.shape[1:] != new.shape[1:]:  # ToTensorV2 may transpose it
            mask = mask.permute(2, 0, 1)
        return new, follow(leaf, mask)

    def __repr__(self) -> str:
        return f"Albumentations({self.pipeline!r})"


def _names(transform: Any) -> list[str]:
    """Names of the classes of a transform and of those inside it."""
    inside = getattr(transform, "transforms", ())
    return [type(transform).__name__, *(name for step in inside for name in _names(step))]
