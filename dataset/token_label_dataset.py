"""`TokenLabelDataset`: images with the label maps that followed their augmentation."""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from ..errors import MissingMapError
from .keyed_images import KeyedImages
from .label_map.label_map import TokenLabelMap
from .label_map.path import PixelPath
from .store import LabelStore
from .targets.token_labels import TokenLabels
from .transforms import executor
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
            and returning the same; `train_transform()` makes one. None leaves the image as it is.
        grid: the student's patches, (h, w), or one number for a square; `labels.targets()` computes
            those of another grid as well. None: the records do not name one.
        key: index to key, where `images` does not name the files of its images.
        missing: what to do about an image without a map: "error", or "ignore", which gives
            labels whose targets have weight 0, so that the loss falls back on the class; with a
            warning if no image seems to have a map.
        label_source: where `TokenLabels.label` comes from: "images", the classes of `images`;
            "maps", the ground truth stored with the maps; or "auto": "maps" for a folder, else
            "images", which must then agree with the maps where these have a class.
        shrink: draw the targets of small crops towards the mean of their image's map, since a cell
            of a map of the whole image is worth less the more it is enlarged: by the fraction
            min(.5, shrink * log2(linear zoom)). 0 turns it off; .3 was nearest to the teacher.

    Raises:
        FileNotFoundError, FormatError: as `LabelStore`.
        TypeError, ValueError: an option out of range, or `images` of a kind that cannot be matched
            with maps.
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
        label_source: Literal["auto", "images", "maps"] = "auto",
        shrink: float = 0.0,
    ) -> None:
        for name, value, choices in (
            ("missing", missing, ("error", "ignore")),
            ("label_source", label_source, ("auto", "images", "maps")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        self.images = KeyedImages(images, key)
        self.store = labels if isinstance(labels, LabelStore) else LabelStore(labels)
        self.transform = transform
        self._to_labels = ToTokenLabels(grid, shrink=shrink)
        self._ignore_missing = missing == "ignore"
        is_folder = isinstance(images, str | os.PathLike)
        self._label_source = "maps" if label_source == "auto" and is_folder else label_source
        if self._ignore_missing:
            step = max(1, len(self) // _SAMPLED)
            keys = [self.images.key(index) for index in range(0, len(self), step)]
            if keys and not any(key in self.store for key in keys):
                warnings.warn(
                    f"none of {len(keys)} images sampled has a map, such as {keys[0]!r}; the "
                    f"labels have {next(iter(self.store.keys), None)!r}. Remedy: check that images "
                    "and labels are of one split; missing='ignore' trains such images on their "
                    "classes alone",
                    stacklevel=2,
                )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """One augmented image and its labels.

        Raises:
            IndexError: there is no such image.
            MissingMapError: the image has no map, and `missing` is "error".
            TypeError: `transform` returned no map.
            ValueError: the image is not the annotated one: another size, or another class.
        """
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
            if self.transform:
                image, leaf = self._checked(executor.run(self.transform, image, leaf))
            images.append(image)
            leaves.append(leaf)
        if not leaves:
            return []
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
        elif (height, width) != leaf.canvas_size:
            raise ValueError(
                f"{key!r} must be the image that was annotated; that was {leaf.canvas_size[1]} x "
                f"{leaf.canvas_size[0]} pixels, this one is {width} x {height}. Remedy: use the "
                "same files, untransformed, or annotate these"
            )
        stored, source = leaf.label, self._label_source
        if source == "auto" and label >= 0 and stored >= 0 and label != stored:
            raise ValueError(
                f"{key!r} is of class {label} in the images and {stored} in the label maps: "
                "the two number their classes differently (ImageFolder over some of ImageNet's "
                'folders does). Remedy: label_source="maps" takes those of the maps, '
                'label_source="images" those of the images'
            )
        if source != "images" and stored >= 0:
            label = stored
        elif source == "maps" and self.store.attrs.get("label_space") == "teacher":
            # The maps hold the teacher's classes, which a folder's own number need not be: of some
            # of ImageNet's folders, ImageFolder numbers the first 0.
            names = self.store.attrs.get("class_names", [])
            folder = key.partition("/")[0]
            label = names.index(folder) if folder in names else -1
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
