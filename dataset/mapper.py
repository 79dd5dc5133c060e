"""`TokenLabelMapper`: one image and its key, to the augmented image and its labels."""

import os
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ..errors import MissingMapError
from .checks import ImageCheck, MissingCount, check_classes, folder_classes
from .label_map.label_map import TokenLabelMap
from .label_map.path import PixelPath
from .sources.decode import decode_image
from .store import LabelStore
from .targets.token_labels import TokenLabels
from .transforms import executor
from .transforms.aligned import aligned
from .transforms.to_token_labels import ToTokenLabels

#: Ground truth that is looked at, to see whether there is any.
_SAMPLED = 100
Sample = tuple[Any, TokenLabels]


class TokenLabelMapper:
    """What `TokenLabelDataset` does to one sample, for any stream or pipeline.

        mapper = TokenLabelMapper("labels/train", transform=train_transform(64))
        key = mapper.store.keys[0]  # the image's path below the annotated split
        image, labels = mapper(PIL.Image.open(f"imagenet/train/{key}"), key)

    Can be pickled, so that it serves WebDataset's `.map`, Hugging Face's streams and
    `set_transform`, and torchdata's nodes, in any number of workers.

    Args:
        labels: as in `TokenLabelDataset`, like all options below.
        transform: likewise.
        grid: likewise.
        missing: likewise.
        label_source: likewise; "images" is the `label` that the call is given.
        shrink: likewise.
        check: likewise.
        resized: likewise.

    Raises:
        FileNotFoundError, FormatError: as `LabelStore`.
        ValueError: an option out of range, or labels that are no classes of the teacher.
    """

    def __init__(
        self,
        labels: str | os.PathLike[str] | LabelStore,
        *,
        transform: Callable[..., Any] | None = None,
        grid: Any = 14,
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
        self.transform = transform
        self._to_labels = ToTokenLabels(grid, shrink=shrink)
        self._check, self._resized = ImageCheck(self.store, check), resized
        self._missing = MissingCount() if missing == "ignore" else None
        self._label_source, self._folders = label_source, folder_classes(self.store)
        if label_source == "auto":
            check_classes(self.store)
        labelled = self.store.ground_truth[:: max(1, len(self.store) // _SAMPLED)]
        if label_source == "maps" and not (labelled >= 0).any():
            warnings.warn(
                f"no image has a label in {self.store.root}, so that the class token learns "
                'nothing from them. Remedy: TokenLabelLoss(cls_target="crop"), or '
                'label_source="images"',
                stacklevel=3,
            )

    @property
    def transform(self) -> Any:
        """The pipeline, `aligned`."""
        return self._transform

    @transform.setter
    def transform(self, transform: Callable[..., Any] | None) -> None:
        self._transform = aligned(transform)

    def __call__(self, image: Any, key: str, label: int = -1) -> Sample:
        """The augmented image and its labels, `TokenLabels` [bytes].

        Args:
            image: the annotated image, untransformed: Pillow's, a tensor [C, H, W], an array
                [H, W, C], or the bytes of its file, which are decoded as the teacher saw them.
            key: its path below the annotated split, `/` between folders, or its name in another
                form of the data set, such as WebDataset's `__key__`. Of an image given by its
                bytes, the digest of these serves where no key fits.
            label: its class, -1 if unknown.

        Raises:
            MissingMapError: the image has no map, and `missing` is "error".
            TypeError: `transform` returned no map.
            ImageError: the image is not the annotated one, by its thumbprint.
            ValueError: the image is not the annotated one: another size, or another class.
        """
        if not isinstance(image, bytes):
            return self.map_batch([key], lambda _: (image, label), len(self.store))[0]
        shown = decode_image(image)
        return self.map_batch([key], lambda _: (shown, label), len(self.store), lambda _: image)[0]

    def map_batch(
        self,
        keys: Sequence[str],
        load: Callable[[int], tuple[Any, int]],
        epoch: int,
        file: Callable[[int], bytes | None] = lambda _: None,
    ) -> list[Sample]:
        """Several samples at once, which is faster.

        Args:
            keys: of the images.
            load: number of a key to (image, label).
            epoch: images of an epoch, after which missing maps are reported.
            file: number of a key to the bytes of its image's file; asked where no key fits.
        """
        # All maps first, then all images, then all records: each while its code is in the cache.
        rows = [self._row(key, number, file) for number, key in enumerate(keys)]
        self.store.prefetch([row for row in rows if row >= 0])
        stored, images, leaves = [self._stored(row) for row in rows], [], []
        keys = [
            self.store.keys[row] if row >= 0 else key for key, row in zip(keys, rows, strict=True)
        ]
        for number, (key, leaf) in enumerate(zip(keys, stored, strict=True)):
            image, label = load(number)
            image = _as_image(image)
            leaf = self._matched(key, image, label, leaf)
            if self._transform:
                image, leaf = self._checked(executor.run(self._transform, image, leaf))
            images.append(image)
            leaves.append(leaf)
        if not leaves:
            return []
        if self._missing:
            lost = [key for key, leaf in zip(keys, stored, strict=True) if not leaf.planes]
            self._missing.add(len(keys), lost, epoch)
        records = TokenLabels.collate(leaves, self._to_labels.grid, self._to_labels.shrink)
        samples: Any = records.unbind()
        return list(zip(images, samples, strict=True))

    def _row(self, key: str, number: int, file: Callable[[int], bytes | None]) -> int:
        """The row of an image; -1 where it has none, and that is no error."""
        try:
            return self.store.row(key)
        except MissingMapError:
            if data := file(number):
                row = self.store.row_of_file(data)
                if row >= 0:
                    return row
            if self._missing is None:
                raise
            return -1

    def _stored(self, row: int) -> TokenLabelMap:
        """The map of a row, still without a path; no planes where none is stored."""
        if row < 0:
            return TokenLabelMap(b"", self.store.layout, canvas_size=(1, 1))
        leaf = self.store.leaf(row)
        if not leaf.planes and self._missing is None:
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
            folder = unicodedata.normalize("NFC", key.partition("/")[0])
            label = self._folders.get(folder, -1)
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


def _as_image(image: Any) -> Any:
    """An image as transforms take it: Pillow's in RGB, or a tensor [C, H, W].

    An array, as OpenCV gives, keeps its channels in order.
    """
    if isinstance(image, PIL.Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    if isinstance(image, np.ndarray):
        channels = np.moveaxis(np.atleast_3d(image), -1, 0)
        return tv_tensors.Image(torch.from_numpy(channels.copy()))
    return image
