"""The image files that a label set was made of, each checked against the shards."""

import os
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from ...annotate.sample import sample_images
from ...dataset.format.keys import digest64
from ...dataset.sources.decode import decode_image
from ...dataset.sources.image_table import ImageTable
from ...dataset.sources.open_source import open_images, open_split
from ...dataset.store import LabelStore
from ...errors import ConfigError, ImageError, StorageError

_REMEDY = "Remedy: name what was annotated, DATA/SPLIT or DATA, with --images"


class ImageFiles:
    """The images of a label set, by key.

    Args:
        store: the label set.
        images: of its split, as `open_images` takes them, or the folder of the data set, which
            holds a folder for each split. None: only the embedded sample's images are found by
            themselves.

    Raises:
        ConfigError: the images are not there, or not where None looks for them.
    """

    def __init__(self, store: LabelStore, images: str | os.PathLike[str] | None = None) -> None:
        # The sample's files are installed in one folder, under the names that end their keys.
        self._store, self._flat, split = store, images is None, store.root.name
        example = store.keys[int(np.argmin(store.failed))]  # of the first that was annotated
        if images is None and not PurePosixPath(example).match("imagenet_[0-9][0-9]_*.jpg"):
            raise ConfigError(
                f"the images must be found to be shown, and {store.root} does not record where its "
                f"images are. {_REMEDY}"
            )
        text = str(sample_images()[0].parent) if images is None else os.fspath(images)
        name = self._name(example)
        # As a data set first, in which the split is found without a look at the others.
        for opened in (partial(open_split, text, split), partial(open_images, text)):
            with suppress(StorageError, ConfigError):
                self._source = ImageTable(opened(), store.root)
                self._source.read_key(name)
                return
        raise ConfigError(
            f"the images of {store.root} must be {text}, or its split {split}, under the keys of "
            f"the labels, but there is no {name!r}. {_REMEDY}"
        )

    def _name(self, key: str) -> str:
        return PurePosixPath(key).name if self._flat else key

    def read(self, key: str) -> Image.Image:
        """The image in RGB, as the student sees it (EXIF orientation not applied).

        Raises:
            MissingMapError: the label set has no such key.
            ImageError: the file is not there, is not the annotated one, or cannot be decoded.
        """
        row = self._store.row(key)
        try:
            data = self._source.read_key(self._name(key))
        except (ConfigError, StorageError) as error:
            data = ImageError(str(error).partition(". ")[0])
        if isinstance(data, ImageError):
            raise ImageError(f"cannot read the image {key!r} in {self._source}: {data}. {_REMEDY}")
        digest, annotated = digest64(data), self._store.digest(row)
        if annotated not in (0, digest):  # 0: of a label set that does not record digests
            raise ImageError(
                f"{key!r} in {self._source} must be the image that was annotated, with digest "
                f"{annotated:016x}; its digest is {digest:016x}. {_REMEDY}, or annotate these"
            )
        try:
            image = decode_image(data)
        except ImageError as error:
            raise ImageError(f"the image {key!r} in {self._source}: {error}") from error
        if image.size != (size := tuple(self._store.sizes[row].tolist())):
            raise ImageError(
                f"{key!r} in {self._source} must be the image that was annotated, of {size} "
                f"pixels; it has {image.size}. {_REMEDY}"
            )
        return image
