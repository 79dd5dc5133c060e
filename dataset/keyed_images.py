"""Map-style data sets of all kinds: the image, the class and the key of each item."""

import io
import operator
import os
from collections.abc import Callable, Mapping, Sized
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
from torch.utils.data import IterableDataset, Subset
from torchvision.datasets import ImageFolder

from ..errors import ImageError
from .sources.folder import FolderSource
from .sources.image_source import ImageSource

#: Columns of a row that is a dictionary, as Hugging Face `datasets` name them.
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")


class KeyedImages:
    """A map-style data set of images with a key for each, whatever its kind.

    Args:
        images: folder for torchvision's ImageFolder, or a map-style data set whose items are
            (image, class) pairs or dictionaries with an image and a class.
        key: index to key, for data sets that do not name the files of their images.

    Raises:
        FileNotFoundError: the folder is not there, or has no images.
        TypeError: not a map-style data set, or one that needs `key`.
        ValueError: the data set transforms its images itself.
    """

    def __init__(self, images: Any, key: Callable[[int], str] | None) -> None:
        if isinstance(images, str | os.PathLike):
            images = ImageFolder(images)
            # Order and classes are ImageFolder's, the bytes those of the source.
            images.loader = partial(_load, FolderSource(Path(images.root)), images.root)
        map_style = hasattr(images, "__getitem__") and isinstance(images, Sized)
        if isinstance(images, IterableDataset) or not map_style:
            raise TypeError(
                "images must be a folder or a map-style data set (with len() and [index]), because "
                f"labels are looked up by key; got {type(images).__name__}"
            )
        inner = images
        while isinstance(inner, Subset):
            inner = inner.dataset
        # An image that was cropped or flipped before its map is there can no longer be matched.
        for name in ("transform", "transforms"):
            if getattr(inner, name, None) is not None:
                raise ValueError(
                    f"images must come untransformed, but {type(inner).__name__} has a {name!r} of "
                    "its own, which the label maps would not follow. Remedy: remove it there and "
                    "give it to TokenLabelDataset(transform=...)"
                )
        self.images: Any = images
        # Of the module and bound to data, not a closure: the data set is pickled to workers.
        self.key: Callable[[int], str] = key or partial(_file_key, images)
        if key is None and len(images):
            self.key(0)  # raises for a kind that has no file names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """(image, class), the image in RGB if Pillow holds it; class -1 where there is none."""
        item = self.images[index]
        if isinstance(item, Mapping):
            image = next((item[name] for name in _IMAGE_COLUMNS if name in item), None)
            label = next((item[name] for name in _LABEL_COLUMNS if name in item), None)
            if image is None:
                raise TypeError(
                    f"a row needs an image in a column called {', '.join(_IMAGE_COLUMNS)}; it has "
                    f"{', '.join(item)}. Remedy: rename the column"
                )
        else:
            try:
                image, label = item
            except (TypeError, ValueError):
                raise TypeError(
                    f"items must be (image, class) pairs or dictionaries, got {type(item).__name__}"
                ) from None
        if isinstance(image, PIL.Image.Image) and image.mode != "RGB":
            image = image.convert("RGB")
        try:
            # int, NumPy and 0-d tensors of integers alike
            return image, -1 if label is None else operator.index(label)
        except TypeError:
            raise TypeError(
                f"an image's class must be an integer, got {label!r}. Remedy: mix labels after the "
                "data set, on batches"
            ) from None


def _load(source: ImageSource, root: str, path: str) -> PIL.Image.Image:
    """The image that ImageFolder's own loader gives, from the source's bytes."""
    (data,) = source.read([_below(root, path)])
    if isinstance(data, ImageError):
        raise ImageError(f"{path}: {data}") from data
    with PIL.Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _file_key(images: Any, index: int) -> str:
    """The path of an item's file below the data set's root, `/` between folders."""
    if isinstance(images, Subset):
        return _file_key(images.dataset, int(images.indices[index]))
    if hasattr(images, "samples") and hasattr(images, "root"):
        return _below(images.root, os.fspath(images.samples[index][0]))
    if callable(getattr(images, "filename", None)) and hasattr(images, "reader"):  # timm
        return Path(images.filename(index, absolute=False)).as_posix()
    raise TypeError(
        f"{type(images).__name__} does not name the files of its images. Remedy: pass key, a "
        "function from index to the image's path relative to the annotated split, such as "
        "key=lambda index: names[index]"
    )


def _below(root: str, path: str) -> str:
    # ImageFolder joins its paths from the root; relpath, for others, costs a tenth of a read.
    prefix = os.path.join(root, "")
    below = path[len(prefix) :] if path.startswith(prefix) else os.path.relpath(path, root)
    return below if os.sep == "/" else Path(below).as_posix()
