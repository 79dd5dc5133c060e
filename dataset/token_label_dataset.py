"""`TokenLabelDataset`: images with the label maps that followed their augmentation."""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from .checks import check_classes
from .keyed_images import KeyedImages
from .mapper import Sample, TokenLabelMapper
from .store import LabelStore

#: Keys that are looked up at the start, where a missing map is no error.
_SAMPLED = 100


class TokenLabelDataset(Dataset[Sample]):
    """Images with their label maps, augmented together, for any DataLoader.

        dataset = TokenLabelDataset("imagenet/train", "labels/train", transform=train_transform())
        for images, labels in DataLoader(dataset, batch_size=256):
            loss = TokenLabelLoss()(student(images.to(device)), labels.to(device))

    A map-style data set of (image, TokenLabels), which the default collate makes batches of. A
    sample's labels are a record of its map and of where its crop lies on it; targets are computed
    from them once the batch is on its device.

    Args:
        images: folder of the split (read as torchvision's ImageFolder), or tars, WebDataset shards,
            Parquet files or a list, local or by URL, as `annotate` takes them; or any map-style
            data set of (PIL image or tensor, class): ImageFolder, timm's ImageDataset, a Hugging
            Face image data set, a Subset of these. A `transform` that it has is taken over. An
            image's map is found by its key; else by its name in another form of the data set, such
            as WebDataset's, if no other image has it; else by the digest of its file.
        labels: folder of the split's shards, OUT/SPLIT, its URL, or a `LabelStore`.
        transform: any pipeline of torchvision.transforms.v2, called with (image, TokenLabelMap)
            and returning the same; `train_transform()` makes one. Pipelines of timm, torchvision's
            older transforms, albumentations and kornia are taken as `aligned` makes them. None:
            that of `images`, or else none. Can be set later, as timm's `create_loader` does.
        grid: the student's patches, (h, w), or one number for a square; or the student itself, or
            timm's name of its model. `labels.targets()` computes those of another grid as well.
            None: the records do not name one.
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
        grid: Any = 14,
        key: Callable[[int], str] | None = None,
        missing: Literal["error", "ignore"] = "error",
        label_source: Literal["auto", "images", "maps", "none"] = "auto",
        shrink: float = 0.0,
        check: Literal["sample", "always", "never"] = "sample",
        resized: bool = False,
    ) -> None:
        self.store = labels if isinstance(labels, LabelStore) else LabelStore(labels)
        find = self.store.keys.find
        self.images = KeyedImages(
            images, key, lambda key: find(key, exact=True) >= 0, self.store.root
        )
        if transform is not None and self.images.transform is not None:
            raise ValueError(
                "transform is given twice, here and to the images. Remedy: leave out one; that of "
                "the images becomes that of image and map"
            )
        if label_source == "auto":
            is_folder = isinstance(images, str | os.PathLike)
            check_classes(self.store, self.images.class_to_idx, is_folder)
            label_source = "maps" if is_folder else "auto"
        self.mapper = TokenLabelMapper(
            self.store,
            transform=self.images.transform if transform is None else transform,
            grid=grid,
            missing=missing,
            label_source=label_source,
            shrink=shrink,
            check=check,
            resized=resized,
        )
        if missing == "ignore":
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
        return self.mapper.transform

    @transform.setter
    def transform(self, transform: Callable[..., Any] | None) -> None:
        self.mapper.transform = transform

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
        count = len(self)
        if wrong := [index for index in indices if not -count <= index < count]:
            raise IndexError(f"index {wrong[0]} is outside the {count} images")
        rows = [index % count for index in indices]
        keys = [self.images.key(row) for row in rows]
        return self.mapper.map_batch(
            keys, self.images.batch(rows), count, lambda number: self.images.file(rows[number])
        )

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes that labels are numbers of, by number; None where unknown."""
        if self.store.attrs.get("label_space") == "teacher":
            return self.store.classes
        return sorted(self.store.folders, key=self.store.folders.__getitem__) or None
