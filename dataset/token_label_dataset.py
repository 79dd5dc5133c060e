"""`TokenLabelDataset`: images with the label maps that followed their augmentation."""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.v2 import functional as F

from ..errors import MissingMapError
from .checks import ImageCheck, MissingCount, check_classes
from .keyed_images import KeyedImages
from .label_map.label_map import TokenLabelMap
from .label_map.path import PixelPath
from .store import LabelStore
from .targets.token_labels import TokenLabels
from .transforms import executor
from .transforms.aligned import aligned
from .transforms.to_token_labels import ToTokenLabels

#: Keys that are looked up at the start, where a missing map is no error.
_SAMPLED = 100
Sample = tuple[Any, TokenLabels]


class TokenLabelDataset(Dataset[Sample]):
    """Images with their label maps, augmented together, for any DataLoader.

        dataset = TokenLabelDataset("imagenet/train", "labels/train", transform=train_transform())
        for images, labels in DataLoader(dataset, batch_size=256):
            loss = TokenLabelLoss()(*student(images.to(device)), labels.to(device))

    A map-style data set of (image, TokenLabels), which the default collate makes batches of. A
    sample's labels are a record of its map and of where its crop lies on it; targets are computed
    from them once the batch is on its device.

    Args:
        images: folder of the split (read as torchvision's ImageFolder), or any map-style data set
            of (PIL image or tensor, class): ImageFolder, timm's ImageDataset, a Hugging Face image
            data set, a Subset of these. It must not transform its images itself.
        labels: folder of the split's shards, OUT/SPLIT, or a `LabelStore`.
        transform: any pipeline of torchvision.transforms.v2, called with (image, TokenLabelMap)
            and returning the same; `train_transform()` makes one. Pipelines of timm and of
            torchvision's older transforms are taken as `aligned` makes them. None leaves the image
            as it is. Can be set later, as timm's `create_loader` does.
        grid: the student's patches, (h, w), or one number for a square; `labels.targets()` computes
            those of another grid as well. None: the records do not name one.
        key: index to key, where `images` does not name the files of its images.
        missing: what to do about an image without a map: "error", or "ignore", which gives
            labels whose targets have weight 0, so that the loss falls back on the class; with
            warnings that say how many these are.
        label_source: where `TokenLabels.label` comes from: "images", the classes of `images`;
            "maps", the ground truth stored with the maps; "none", -1 always; or "auto": "maps" for
            a folder, else "images", which must then agree with the maps where these have a class.
            With "auto", maps whose ground truth is no class of the teacher are refused.
        shrink: draw the targets of small crops towards the mean of their image's map, since a cell
            of a map of the whole image is worth less the more it is enlarged: by the fraction
            min(.5, shrink * log2(linear zoom)). 0 turns it off; .3 was nearest to the teacher.
        check: whose pixels are compared with the thumbprint of the annotated image, before the
            transform: "sample", the first 8 images that each process gives and one in 128 after
            that; "always", all; "never", none. The sizes are always compared.
        resized: allow images of another size that show the whole annotated image; not with
            check="never".

    Raises:
        FileNotFoundError, FormatError: as `LabelStore`.
        TypeError, ValueError: an option out of range, `images` of a kind that cannot be matched
            with maps, or classes that are numbered differently.
    """

    def __init__(
        self,
        images: Any,
        labels: str | os.PathLike[str] | LabelStore,
        *,
        transform: Callable[..., Any] | None = None,
        grid: int | tuple[int, int] | None = 14,
        key: Callable[[int], str] | None = None,
        missing: Literal["error", "ignore"] = "error",
        label_source: Literal["auto", "images", "maps", "none"] = "auto",
        shrink: float = 0.0,
        check: Literal["sample", "always", "never"] = "sample",
        resized: bool = False,
    ) -> None:
        for name, value, choices in (
            ("missing", missing, ("error", "ignore")),
            ("label_source", label_source, ("auto", "images", "maps", "none")),
            ("check", check, ("sample", "always", "never")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        if resized and check == "never":
            raise ValueError(
                "resized=True must be checked, for a crop has another size as well. Remedy: "
                'check="sample" or "always"'
            )
        self.store = labels if isinstance(labels, LabelStore) else LabelStore(labels)
        self.images = KeyedImages(images, key, self.store.__contains__)
        self.transform = transform
        self._to_labels = ToTokenLabels(grid, shrink=shrink)
        self._check, self._resized = ImageCheck(self.store, check), resized
        self._ignore_missing = missing == "ignore"
        is_folder = isinstance(images, str | os.PathLike)
        if label_source == "auto":
            check_classes(self.store, self.images.class_to_idx, is_folder)
            label_source = "maps" if is_folder else "auto"
        self._label_source = label_source
        labelled = self.store.ground_truth[:: max(1, len(self.store) // _SAMPLED)]
        if label_source == "maps" and not (labelled >= 0).any():
            warnings.warn(
                f"no image has a label in {self.store.root}, so that the class token learns "
                'nothing from them. Remedy: TokenLabelLoss(cls_target="crop"), or '
                'label_source="images"',
                stacklevel=2,
            )
        if self._ignore_missing:
            self._missing = MissingCount()
            step = max(1, len(self) // _SAMPLED)
            keys = [self.images.key(index) for index in range(0, len(self), step)]
            if lost := [key for key in keys if key not in self.store]:
                warnings.warn(
                    f"{len(lost)} of {len(keys)} images sampled have no map, such as {lost[0]!a}; "
                    f"the labels have {next(iter(self.store.keys), None)!a}. Remedy: check that "
                    "images and labels are of one split; missing='ignore' trains such images on "
                    "their classes alone",
                    stacklevel=2,
                )

    @property
    def transform(self) -> Any:
        """The pipeline, `aligned`."""
        return self._transform

    @transform.setter
    def transform(self, transform: Callable[..., Any] | None) -> None:
        self._transform = aligned(transform)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        """One augmented image and its labels; of a list of indices, a collated batch of them.

        Raises:
            IndexError: there is no such image.
            MissingMapError: the image has no map, and `missing` is "error".
            TypeError: `transform` returned no map.
            ImageError: the image is not the annotated one, by its thumbprint.
            ValueError: the image is not the annotated one: another size, or another class.
        """
        if isinstance(index, list | tuple | range | np.ndarray | Tensor) and np.ndim(index) == 1:
            # What DataLoader(batch_size=None, sampler=BatchSampler(...)) asks for.
            return default_collate(self.__getitems__([int(one) for one in index]))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The same for a batch at a time, as a DataLoader asks for it."""
        # All maps first, then all images, then all records: each while its code is in the cache.
        entries, images, leaves = [], [], []
        for index in indices:
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} is outside the {len(self)} images")
            index %= len(self)
            key = self.images.key(index)
            entries.append((index, key, self._stored(key)))
        for index, key, leaf in entries:
            image, label = self.images[index]
            leaf = self._matched(key, image, label, leaf)
            if self._transform:
                image, leaf = self._checked(executor.run(self._transform, image, leaf))
            images.append(image)
            leaves.append(leaf)
        if not leaves:
            return []
        if self._ignore_missing:
            lost = [key for _, key, leaf in entries if not leaf.planes]
            self._missing.add(len(entries), lost, len(self))
        records = TokenLabels.collate(leaves, self._to_labels.grid, self._to_labels.shrink)
        rows: Any = records.unbind()
        return list(zip(images, rows, strict=True))

    def _stored(self, key: str) -> TokenLabelMap:
        """The map of an image, still without a path; no planes where none is stored."""
        try:
            row = self.store.row(key)
        except MissingMapError:
            if not self._ignore_missing:
                raise
            return TokenLabelMap(b"", self.store.layout, canvas_size=(1, 1))
        leaf = self.store.leaf(row)
        if not (leaf.planes or self._ignore_missing):
            self.store[row]  # raises, and says why there is none
        return leaf

    def _matched(self, key: str, image: Any, label: int, leaf: TokenLabelMap) -> TokenLabelMap:
        """The map of this very image, with the label that `label_source` asks for."""
        height, width = F.get_size(image)
        if not leaf.planes:
            leaf = leaf.with_path(PixelPath.of((height, width)), (height, width))
        else:
            if (height, width) != leaf.canvas_size:
                if not self._resized:
                    raise ValueError(
                        f"{key!r} must be the image that was annotated; that was "
                        f"{leaf.canvas_size[1]} x {leaf.canvas_size[0]} pixels, this one is "
                        f"{width} x {height}. Remedy: use the same files, untransformed, or "
                        "annotate these; resized=True allows copies of another size"
                        + self._check.orientation_hint(key)
                    )
                leaf = leaf.with_path(PixelPath.of((height, width)), (height, width))
            self._check.compare(key, image)
        stored, source = leaf.label, self._label_source
        if source == "auto" and label >= 0 and stored >= 0 and label != stored:
            raise ValueError(
                f"{key!r} is of class {label} in the images and {stored} in the label maps: "
                "the two number their classes differently (ImageFolder over some of ImageNet's "
                'folders does). Remedy: label_source="maps" takes those of the maps, '
                'label_source="images" those of the images'
            )
        if source in ("auto", "maps") and stored >= 0:
            label = stored
        elif source == "none":
            label = -1
        elif source == "maps":
            # The image has no map, and the number that its folder has here need not be that of the
            # maps: of some of ImageNet's folders, ImageFolder numbers the first 0.
            label = self.store.folders.get(key.partition("/")[0], -1)
        leaf.label = label
        return leaf

    def _checked(self, sample: Any) -> tuple[Any, TokenLabelMap]:
        """What the transform returned."""
        image, leaf = sample if isinstance(sample, tuple) and len(sample) == 2 else (sample, None)
        if not isinstance(leaf, TokenLabelMap):
            raise TypeError(
                "transform must return (image, TokenLabelMap), as it got them; the second is "
                f"{type(leaf).__name__}. Remedy: pipelines of torchvision.transforms.v2 do; leave "
                "ToTokenLabels out, as grid and shrink go to TokenLabelDataset"
            )
        self._to_labels.check_inputs([image, leaf])
        return image, leaf
