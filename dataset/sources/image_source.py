"""The seam between a split's images and everything that reads them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from ...errors import ImageError

#: Larger files are bad images, so that none exhausts a worker's memory.
MAX_FILE_BYTES = 512 << 20


class Entry(NamedTuple):
    """An image of a split.

    Attributes:
        key: its name in the split, in UTF-8; of a folder, the path below it with `/` between names.
        label: number of its class among the source's `classes()`; -1 where it has none.
    """

    key: bytes
    label: int


class ImageSource(Protocol):
    """Which images a split has, and their bytes, wherever they are stored.

        from tokenlabel.dataset.sources.folder import FolderSource

        source = FolderSource(Path("imagenet/val"))
        keys = [entry.key.decode() for entry in source.scan()]
        for data in source.read(keys[:64]):
            ...  # bytes of an image file, or an ImageError

    A source is small and can be pickled: a job sends it to each of its processes. Its text, as
    `str()` gives it, is what errors call it.
    """

    def classes(self) -> list[str]:
        """Names of the classes, by their number; none where images have no class."""
        ...

    def scan(self) -> Iterator[Entry]:
        """All images, in the order of their keys' bytes, in constant memory.

        Raises:
            ConfigError: there is no image, or the source cannot be listed.
        """
        ...

    def read(self, keys: Sequence[str]) -> Iterator[bytes | ImageError]:
        """The bytes of each image's file, in order; an error for an image that has none.

        A batch of keys at a time lets a source fetch them together. Not all have to be in memory
        at once.

        Raises:
            StorageError: an image cannot be read for a reason that is not its own.
        """
        ...
