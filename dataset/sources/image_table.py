"""The images of a source by number and by name, from a scan that is kept in a file."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from ...errors import FormatError, ImageError, StorageError
from ..format.manifest import (
    NAME,
    Manifest,
    Numbered,
    open_manifest,
    parts_digest,
    write_manifest,
)
from ..storage.cache import cache_folder
from ..storage.remote_path import AnyPath, RemotePath, as_path
from .folder import FolderSource, ObjectFolder
from .image_source import Entry, ImageSource
from .scan import entries_of, manifest_blocks, scan_all

#: Objects that are asked for their size at the same time.
_AT_ONCE = 16


class ImageTable:
    """Random access to the images of a source.

        table = ImageTable(open_images("imagenet-train-{0000..1023}.tar"), Path("labels/train"))
        data = next(table.read([table.find("n01440764_10026")]))

    The scan is that of the labels, where they were made from the same source. Else it is made on
    first use, and kept in the folder that TOKENLABEL_CACHE names (default ~/.cache/tokenlabel)
    until the source's files change; that of a folder, which is quick, for this process only.

    Can be pickled: each process opens the file again.

    Args:
        source: of the images.
        labels: folder of a label set, of which the manifest may be used.
    """

    def __init__(self, source: ImageSource, labels: AnyPath | None = None) -> None:
        self.source, self._labels = source, labels

    def __getstate__(self) -> dict[str, object]:
        return {"source": self.source, "_labels": self._labels}

    @cached_property
    def _scan(self) -> Manifest:
        source = self.source
        if self._labels is not None:
            with suppress(FileNotFoundError, FormatError):
                found = open_manifest(self._labels / NAME)
                if (found.source, found.parts) == (str(source), parts_digest(source.parts())):
                    return found
        if isinstance(source, FolderSource | ObjectFolder):
            # Mapped memory outlives the file's name, so the folder may go at once.
            with tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder:
                return self._scanned(Path(folder) / NAME)
        path = cache_folder() / f"images-{self._state()}"
        with suppress(FileNotFoundError, FormatError):
            return open_manifest(path)
        return self._scanned(path)

    def _scanned(self, path: Path) -> Manifest:
        classes: dict[str, int] = {}
        write_manifest(
            path,
            manifest_blocks(scan_all(self.source), self.source, classes),
            lambda: Numbered("folders", None, {name: n for n, name in enumerate(classes)}),
            str(self.source),
            self.source.parts(),
        )
        return open_manifest(path)

    def _state(self) -> str:
        """What changes with the files of the source."""

        def of(part: str) -> str:
            path = as_path(part)
            if isinstance(path, RemotePath):
                return f"{part} {path.size()}"
            with suppress(FileNotFoundError):
                return f"{part} {path.stat().st_size} {path.stat().st_mtime_ns}"
            return part

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            lines = pool.map(of, self.source.parts())
            return hashlib.sha256("\n".join([str(self.source), *lines]).encode()).hexdigest()[:32]

    def __str__(self) -> str:
        return str(self.source)

    def __len__(self) -> int:
        return len(self._scan.keys)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order in which they are first met."""
        return list(self._scan.folders)

    def key(self, row: int) -> str:
        """Name of an image."""
        return self._scan.keys[row]

    def class_of(self, row: int) -> int:
        """Number of an image's class in `classes`; -1 where it has none."""
        return int(self._scan.classes[row])

    def find(self, key: str) -> int:
        """Row of a key, or of the only image of that canonical name; -1 where there is none."""
        return self._scan.keys.find(key)

    def read(self, rows: Sequence[int]) -> Iterator[bytes | ImageError]:
        """The bytes of each image, in order; raises as `ImageSource.read`."""
        return self.source.read(entries_of(self._scan, rows))

    def read_key(self, key: str) -> bytes | ImageError:
        """The bytes of an image by its key, or by its name in another form.

        Raises:
            StorageError: there is none, or it cannot be read.
        """
        if isinstance(self.source, FolderSource) and "_scan" not in vars(self):
            with suppress(StorageError):  # a path below the folder, which need not be scanned
                return next(self.source.read([Entry(key)]))
        if (row := self.find(key)) < 0:
            raise StorageError(
                f"{key!a} is not among the images of {self.source}. Remedy: check it"
            )
        return next(self.read([row]))
