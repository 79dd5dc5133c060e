"""Map-style data sets of all kinds: the image, the class and the key of each item."""

import io
import operator
import os
from collections.abc import Callable, Mapping, Sequence, Sized
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

Key = Callable[[int], str]


class KeyedImages:
    """A map-style data set of images, whatever its kind.

    Args:
        images: folder for torchvision's ImageFolder, or a map-style data set whose items are
            (image, class) pairs or dictionaries with an image and a class.
        key: index to key, for data sets that do not tell the files of their images.

    Raises:
        FileNotFoundError: the folder is not there, or has no images.
        TypeError: not a map-style data set, or one that needs `key`.
        ValueError: the data set transforms its images itself.
    """

    def __init__(self, images: Any, key: Key | None) -> None:
        if isinstance(images, str | os.PathLike):
            images = ImageFolder(images)
            images.loader = partial(_load, FolderSource(Path(images.root)), _prefix(images))
        map_style = hasattr(images, "__getitem__") and isinstance(images, Sized)
        if isinstance(images, IterableDataset) or not map_style:
            raise TypeError(
                "images must be a folder or a map-style data set (with len() and [index]), because "
                f"labels are looked up by key; got {type(images).__name__}"
            )
        _refuse_transforms(images)
        self.images: Any = images
        self._key = key or _key_of(images)

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        """Key of an image: its path relative to the split, `/` between folders."""
        return self._key(index)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """(image, class), the image in RGB if Pillow holds it; class -1 where there is none."""
        item = self.images[index]
        image, label = _from_columns(item) if isinstance(item, Mapping) else _from_pair(item)
        if isinstance(image, PIL.Image.Image) and image.mode != "RGB":
            image = image.convert("RGB")
        return image, label


def _prefix(images: Any) -> str:
    """What a path of ImageFolder has before its key."""
    return os.path.join(images.root, "")


def _load(source: ImageSource, prefix: str, path: str) -> PIL.Image.Image:
    """What ImageFolder's own loader gives, of the source's bytes."""
    (data,) = source.read([path[len(prefix) :]])
    if isinstance(data, ImageError):
        raise ImageError(f"{path}: {data}") from data
    with PIL.Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _refuse_transforms(images: Any) -> None:
    """An image that was cropped or flipped before its map is there can no longer be matched."""
    if isinstance(images, Subset):
        return _refuse_transforms(images.dataset)
    for name in ("transform", "transforms"):
        if getattr(images, name, None) is not None:
            raise ValueError(
                f"images must come untransformed, but {type(images).__name__} has a {name!r} of "
                "its own, which the label maps would not follow. Remedy: take it away there and "
                "give it to TokenLabelDataset(transform=...)"
            )
    return None


def _key_of(images: Any) -> Key:
    """How the data set tells the file of an image, relative to its root."""
    # Functions of the module, not closures: the data set is pickled to spawned workers.
    if isinstance(images, Subset):
        return partial(_subset_key, images.indices, _key_of(images.dataset))
    if hasattr(images, "samples") and hasattr(images, "root"):
        return partial(_samples_key, images, _prefix(images))
    if callable(getattr(images, "filename", None)) and hasattr(images, "reader"):  # timm
        return partial(_reader_key, images)
    raise TypeError(
        f"{type(images).__name__} does not tell the files of its images. Remedy: pass key, a "
        "function from index to the image's path relative to the annotated split, such as "
        "key=lambda index: names[index]"
    )


def _subset_key(indices: Sequence[int], inner: Key, index: int) -> str:
    return inner(int(indices[index]))


def _samples_key(images: Any, root: str, index: int) -> str:
    path = os.fspath(images.samples[index][0])
    # ImageFolder joins its paths from the root; relpath, for others, costs a tenth of a read.
    below = path[len(root) :] if path.startswith(root) else os.path.relpath(path, root)
    return below if os.sep == "/" else Path(below).as_posix()


def _reader_key(images: Any, index: int) -> str:
    return Path(images.filename(index, absolute=False)).as_posix()


def _from_pair(item: Any) -> tuple[Any, int]:
    try:
        image, label = item
    except (TypeError, ValueError):
        raise TypeError(
            f"items must be (image, class) pairs or dictionaries, got {type(item).__name__}"
        ) from None
    return image, _class(label)


def _from_columns(item: Mapping[str, Any]) -> tuple[Any, int]:
    image = next((item[name] for name in _IMAGE_COLUMNS if name in item), None)
    if image is None:
        raise TypeError(
            f"a row needs an image in a column called {', '.join(_IMAGE_COLUMNS)}; it has "
            f"{', '.join(item)}. Remedy: rename the column"
        )
    return image, _class(next((item[name] for name in _LABEL_COLUMNS if name in item), None))


def _class(label: Any) -> int:
    if label is None:
        return -1
    try:
        return operator.index(label)  # int, NumPy and 0-d tensors of integers alike
    except TypeError:
        raise TypeError(
            f"an image's class must be an integer, got {label!r}. Remedy: mix labels after the "
            "data set, on batches"
        ) from None
