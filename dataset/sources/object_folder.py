"""An image folder in a store: one object an image, a prefix for each class."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

from ...errors import ConfigError, ImageError, StorageError
from ..format.keys import EXTENSIONS
from ..storage.remote_path import RemotePath
from .files import size_fault
from .folder import is_hidden
from .image_source import Entry

#: Objects that are read at the same time.
_AT_ONCE = 16


@dataclass(frozen=True)
class ObjectFolder:
    """The images below a prefix; the first folder below it is the class, as in `FolderSource`.

    Each class is a part, listed by a task of its own.
    """

    root: RemotePath
    folders: tuple[str, ...]
    numbered: ClassVar[list[str] | None] = None
    in_blocks: ClassVar[bool] = False

    @classmethod
    def at(cls, root: RemotePath) -> "ObjectFolder":
        """The folder of a prefix.

        Raises:
            ConfigError: there is nothing below it.
            StoreError: it cannot be listed.
        """
        names = [path.name for path in root.iterdir()]
        if not names:
            raise ConfigError(f"there is nothing below {root}. Remedy: check the URL")
        folders = (name for name in names if not name.lower().endswith(EXTENSIONS))
        return cls(root, tuple(name for name in folders if not is_hidden(name)) or ("",))

    def __str__(self) -> str:
        return str(self.root)

    def parts(self) -> list[str]:
        """The prefixes of the classes."""
        return [str(self.root / folder) for folder in self.folders]

    def scan(self, part: int) -> Iterator[Entry]:
        """The images of one class, sorted by the bytes of their keys.

        Raises:
            StoreError: it cannot be listed.
        """
        folder = self.folders[part]
        for below, size in (self.root / folder if folder else self.root).walk():
            hidden = any(map(is_hidden, below.split("/")[:-1]))
            if below.lower().endswith(EXTENSIONS) and not hidden:
                yield Entry(f"{folder}/{below}" if folder else below, folder, part, 0, size)

    def read(self, entries: Sequence[Entry]) -> Iterator[bytes | ImageError]:
        """The bytes of each object; all of them are fetched first, some at a time.

        Raises:
            StorageError: an object is not there any more; StoreError where the store refuses.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            yield from [*pool.map(self._read, entries)]

    def _read(self, entry: Entry) -> bytes | ImageError:
        if fault := size_fault(entry.size):
            return fault
        try:
            return (self.root / entry.key).read_bytes()
        except FileNotFoundError as error:
            raise StorageError(
                f"{error}, though it was listed. Remedy: restore it, and run the same command again"
            ) from error
