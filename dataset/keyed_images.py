# mypy: allow-subclassing-any
"""Map-style data sets of all kinds: the image, the class and the key of each item."""

import copy
import operator
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from torch.utils.data import IterableDataset, Subset
from torchvision.datasets import ImageFolder

from ..errors import ImageError
from .checks import check_classes, folder_classes
from .sources.decode import decode_image
from .sources.folder import FolderSource, is_hidden
from .sources.image_source import Entry, ImageSource
from .sources.image_table import ImageTable
from .sources.open_source import open_images
from .sources.parquet import IMAGE_COLUMNS, LABEL_COLUMNS, first
from .storage.remote_path import AnyPath
from .store import LabelStore

#: Images whose keys are looked up, to find where their paths begin.
_SAMPLED = 16


class KeyedImages:
    """A map-style data set of images with a key for each, whatever its kind.

    Args:
        images: folder for torchvision's ImageFolder, what else `open_images` takes, or a map-style
            data set whose items are (image, class) pairs or dictionaries with both.
        key: index to key, for data sets that do not name the files of their images, as ImageFolder,
            timm's and tables of Hugging Face do.
        known: whether a key has a map, to find out which folders of a file's path its key has.
        labels: folder of the label set, which may have a scan of the same images.

    Attributes:
        images: the data set.
        key: index to key.
        class_to_idx: number of each class folder; None where the data set does not say.
        transform: that of the data set given; `images` is a copy without it.

    Raises:
        FileNotFoundError: the folder is not there, or has no images.
        TypeError: not a map-style data set, or one that needs `key`.
        ValueError: the data set changes its classes itself.
    """

    def __init__(
        self,
        images: Any,
        key: Callable[[int], str] | None,
        known: Callable[[str], bool],
        labels: AnyPath | None = None,
    ) -> None:
        if isinstance(images, str | os.PathLike):
            source = open_images(os.fspath(images))
            if isinstance(source, FolderSource):
                images = _Folder(images)
                # Order and classes are ImageFolder's, the bytes those of the source.
                images.loader = partial(_load, source, images.root)
            else:
                images = _Stored(ImageTable(source, labels))
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
        if getattr(inner, "transforms", None) is not None and (
            getattr(inner, "transform", None) is None
            or getattr(inner, "target_transform", None) is not None
        ):
            raise ValueError(
                f"images must give their own classes, but {type(inner).__name__} has a "
                "'target_transform' or 'transforms'. Remedy: remove it there; a pipeline belongs "
                "in TokenLabelDataset(transform=...)"
            )
        images, self.transform = _without_transform(images)
        self.images: Any = images
        numbers = getattr(inner, "class_to_idx", None) or getattr(
            getattr(inner, "reader", None), "class_to_idx", None
        )
        if hasattr(inner, "cast_column"):
            names = getattr(inner.features.get(first(LABEL_COLUMNS, inner.features)), "names", [])
            numbers = {name: number for number, name in enumerate(names)}
        self.class_to_idx: dict[str, int] | None = dict(numbers) if numbers else None
        if key is None:
            images = _undecoded(images)
            # Of the module and bound to data, not a closure: the data set is pickled to workers.
            key = partial(_file_key, images, _folders_above(images, known))
        self.key: Callable[[int], str] = key

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Sequence[int]) -> Callable[[int], tuple[Any, int]]:
        """Number of one of the rows to its item; what is stored apart is fetched at once."""
        if isinstance(self.images, _Stored):
            return self.images.batch(rows)
        return lambda number: self[rows[number]]

    def file(self, index: int) -> bytes | None:
        """The bytes of an image's file; None where the data set does not give them."""
        images: Any = self.images
        while isinstance(images, Subset):
            index, images = int(images.indices[index]), images.dataset
        if isinstance(images, _Stored):
            found = next(images.table.read([index]))
            return found if isinstance(found, bytes) else None
        if hasattr(images, "cast_column"):
            stored = _undecoded(images)[index].get(first(IMAGE_COLUMNS, images.features))
            data = stored.get("bytes") if isinstance(stored, Mapping) else None
            return bytes(data) if data else None
        if hasattr(images, "samples"):
            with suppress(OSError):  # loading the image says why
                return Path(images.samples[index][0]).read_bytes()
        return None

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """(image, class); class -1 where there is none."""
        item = self.images[index]
        if isinstance(item, Mapping):
            image = item.get(first(IMAGE_COLUMNS, item))
            label = item.get(first(LABEL_COLUMNS, item))
            if image is None:
                raise TypeError(
                    f"a row needs an image in a column called {', '.join(IMAGE_COLUMNS)}; it has "
                    f"{', '.join(item)}. Remedy: rename the column"
                )
        else:
            try:
                image, label = item
            except (TypeError, ValueError):
                raise TypeError(
                    f"items must be (image, class) pairs or dictionaries, got {type(item).__name__}"
                ) from None
        try:
            # int, NumPy and 0-d tensors of integers alike
            return image, -1 if label is None else operator.index(label)
        except TypeError:
            raise TypeError(
                f"an image's class must be an integer, got {label!r}. Remedy: mix labels after the "
                "data set, on batches"
            ) from None


class _Stored:
    """The images of a source that is no folder, as a map-style data set of (image, class).

    A class is a number of the data set's own, where it has them; else its place in sorted order.
    """

    def __init__(self, table: ImageTable) -> None:
        self.table, names = table, table.classes
        if (own := table.source.numbered) is None and all(name.isdecimal() for name in names):
            own = [str(number) for number in range(max(map(int, names), default=-1) + 1)]
        number = {name: place for place, name in enumerate(own or sorted(names))}
        self._numbers = np.array([*(number.get(name, -1) for name in names), -1])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        return self.batch([index])(0)

    def batch(self, rows: Sequence[int]) -> Callable[[int], tuple[PIL.Image.Image, int]]:
        data = list(self.table.read(rows))

        def item(number: int) -> tuple[PIL.Image.Image, int]:
            row, found = rows[number], data[number]
            if isinstance(found, ImageError):
                raise ImageError(f"{self.table.key(row)}: {found}") from found
            try:
                image = decode_image(found)
            except ImageError as error:
                raise ImageError(f"{self.table.key(row)}: {error}") from error
            return image, int(self._numbers[self.table.class_of(row)])

        return item


class _Folder(ImageFolder):
    """ImageFolder without the folders that an annotation job leaves out."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Names of the folders that hold images, and their numbers."""
        names = FolderSource(Path(directory)).classes()
        if not names:
            super().find_classes(directory)  # raises
        return names, {name: number for number, name in enumerate(names)}

    @staticmethod
    def make_dataset(directory: str, *args: Any, **kwargs: Any) -> list[tuple[str, int]]:
        """(path, class) of each image."""
        found = ImageFolder.make_dataset(directory, *args, **kwargs)
        folders = {os.path.dirname(path) for path, _ in found}
        shown = {
            folder
            for folder in folders
            if not any(map(is_hidden, _below(directory, folder).split("/")))
        }
        return [(path, label) for path, label in found if os.path.dirname(path) in shown]


def _without_transform(images: Any) -> tuple[Any, Any]:
    """A data set that gives its images as they are, and the transform that it had."""
    if isinstance(images, Subset):
        inner, transform = _without_transform(images.dataset)
        if inner is not images.dataset:
            images = copy.copy(images)
            images.dataset = inner
        return images, transform
    transform = getattr(images, "transform", None)
    if transform is not None:
        images = copy.copy(images)
        images.transform = None
    return images, transform


def _undecoded(images: Any) -> Any:
    """A Hugging Face table of which rows give the path of the image, unread; others as they are."""
    if isinstance(images, Subset):
        images = copy.copy(images)
        images.dataset = _undecoded(images.dataset)
    elif hasattr(images, "cast_column"):
        name = first(IMAGE_COLUMNS, images.features)
        kind = type(images.features.get(name))
        if hasattr(kind, "decode_example"):  # datasets.Image, which need not be imported for it
            images = images.with_format(None).select_columns(name)
            images = images.cast_column(name, kind(decode=False))
    return images


def _load(source: ImageSource, root: str, path: str) -> PIL.Image.Image:
    """The image as the teacher was shown it, from the source's bytes."""
    (data,) = source.read([Entry(_below(root, path))])
    if isinstance(data, ImageError):
        raise ImageError(f"{path}: {data}") from data
    try:
        return decode_image(data)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def _folders_above(images: Any, known: Callable[[str], bool]) -> int:
    """How many folders there are between the data set's root and that of the annotated split.

    0 unless a path without that many folders has a map, and no other number is possible:
    torchvision's ImageNet has its split in a folder below its root.
    """
    count = len(images)
    found = Counter[int]()
    for index in range(0, count, max(1, count // _SAMPLED)):
        parts = _file_key(images, 0, index).split("/")  # raises for a kind without file names
        found.update(n for n in range(len(parts)) if known("/".join(parts[n:])))
    return next(iter(found)) if len(found) == 1 else 0


def _file_key(images: Any, above: int, index: int) -> str:
    """The path of an item's file, `/` between folders, without the first `above` of them."""
    if isinstance(images, Subset):
        return _file_key(images.dataset, above, int(images.indices[index]))
    key = None
    if isinstance(images, _Stored):
        key = images.table.key(index)
    elif hasattr(images, "samples") and hasattr(images, "root"):
        key = _below(images.root, os.fspath(images.samples[index][0]))
    elif callable(getattr(images, "filename", None)) and hasattr(images, "reader"):  # timm
        key = Path(images.filename(index, absolute=False)).as_posix()
    elif hasattr(images, "cast_column"):
        stored = images[index].get(first(IMAGE_COLUMNS, images.features))
        if isinstance(stored, Mapping) and stored["path"]:
            key = Path(stored["path"]).as_posix()
    if key is not None:
        return key.split("/", above)[-1] if above else key
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


def validation_dataset(
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str] | LabelStore,
    transform: Any = None,
) -> ImageFolder:
    """An image folder whose classes are numbered as in label maps, to validate a student on.

        validation = validation_dataset("imagenet/val", "labels/train", eval_transform(224))
        for images, classes in DataLoader(validation, batch_size=4):
            correct = student.eval()(images).argmax(1) == classes

    torchvision's ImageFolder numbers the folders that are there: of some of ImageNet's folders, the
    first would be class 0.

    Args:
        images: folder of a split, with a folder for each class.
        labels: folder of the label maps' shards, OUT/SPLIT, its URL, or a `LabelStore`.
        transform: of the images.

    Returns:
        A torchvision ImageFolder of (image, class).

    Raises:
        FileNotFoundError: a folder is not there, or has no images.
        ValueError: a folder is no class that the labels know, or shares its name with another; or
            the labels are no classes of the teacher.
    """
    store = labels if isinstance(labels, LabelStore) else LabelStore(labels)
    check_classes(store)
    found, names = _Folder(images, transform), store.classes or []
    count = Counter(names)  # a name that two classes share is neither's
    known = {name: number for number, name in enumerate(names) if count[name] == 1}
    known |= folder_classes(store)
    numbers = [known.get(unicodedata.normalize("NFC", name), -1) for name in found.classes]
    if unknown := [name for name, number in zip(found.classes, numbers, strict=True) if number < 0]:
        raise ValueError(
            f"each folder must be a class of {store.root}; {unknown[0]!a} is none, "
            f"{', '.join(map(ascii, [*known][:3]))}, … are. Remedy: leave it out, or rename it"
        )
    found.class_to_idx = dict(zip(found.classes, numbers, strict=True))
    found.samples = [(path, numbers[label]) for path, label in found.samples]
    found.imgs, found.targets = found.samples, [label for _, label in found.samples]
    return found
