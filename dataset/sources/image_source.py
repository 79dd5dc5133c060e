"""The seam between a split's images and everything that reads them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from ...errors import ImageError

#: Larger files are bad images, so that none exhausts a worker's memory.
MAX_FILE_BYTES = 512 << 20


class Entry(NamedTuple):
    """An image of a split, and where its bytes are.

    Attributes:
        key: its name in the split, the same however often it is scanned: of a folder, the path
            below it with `/` between names; of a tar, the name of its member.
        class_name: the class that the source gives it; empty where it gives none.
        part: number of the object that holds it, in the order of `ImageSource.parts`.
        start: its first byte in a tar; of a table, the number of its row group.
        size: its bytes in a tar, or in a folder; of a table, its row in that group.
    """

    key: str
    class_name: str = ""
    part: int = 0
    start: int = 0
    size: int = 0


class ImageSource(Protocol):
    """Which images a split has, and their bytes, wherever they are stored.

        from tokenlabel.dataset.sources.folder import FolderSource

        source = FolderSource(Path("imagenet/val"))
        entries = [entry for part in range(len(source.parts())) for entry in source.scan(part)]
        for data in source.read(entries[:64]):
            ...  # bytes of an image file, or an ImageError

    A source is small and can be pickled: a job sends it to each of its processes. Its text, as
    `str()` gives it, is what errors call it, and names it: two of the same text have the same
    images.

    Attributes:
        numbered: names of the classes by number, where the data set itself numbers them; else None.
        in_blocks: whether the images of one (part, start) can only be fetched together, as those of
            a row group of Parquet; a job then fetches each such block once.
    """

    @property
    def numbered(self) -> list[str] | None: ...  # noqa: D102
    @property
    def in_blocks(self) -> bool: ...  # noqa: D102

    def parts(self) -> list[str]:
        """The objects that hold the images, in order: the same ones in each process.

        Raises:
            ConfigError: there is none, or they cannot be listed.
        """
        ...

    def scan(self, part: int) -> Iterator[Entry]:
        """The images of one part in the order in which they are stored, in constant memory.

        Raises:
            ConfigError: the part cannot be listed, or is no such file.
        """
        ...

    def read(self, entries: Sequence[Entry]) -> Iterator[bytes | ImageError]:
        """The bytes of each image's file, in order; an error for an image that has none.

        A batch at a time lets a source fetch them together. Not all have to be in memory at once.

        Raises:
            StorageError: an image cannot be read for a reason that is not its own.
        """
        ...


def size_fault(size: int) -> ImageError | None:
    """What is wrong with a file of so many bytes."""
    if size == 0:
        return ImageError("the file is empty")
    if size > MAX_FILE_BYTES:
        return ImageError(f"the file has {size} bytes (limit {MAX_FILE_BYTES})")
    return None
