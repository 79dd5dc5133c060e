"""Image folders: on disk, listed without holding their names in memory; and in a store."""

import errno
import heapq
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

from ...errors import ConfigError, ImageError, StorageError
from ..format.keys import EXTENSIONS
from ..storage.remote_path import RemotePath
from .image_source import Entry, size_fault

#: Objects that are read at the same time.
_AT_ONCE = 16
#: How many names of a folder are sorted as Python objects at a time.
_RUN = 1 << 15
#: Folders of thumbnails and metadata, beside those whose name begins with a dot.
_NO_CLASS = ("@eaDir", "__MACOSX")

#: Errors that a file which is there keeps on giving: permission, and links that lead nowhere or to
#: what is no file. All others are the fault of the storage, and a retry may succeed.
_OWN_FAULTS = (
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENXIO,
    errno.ENODEV,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderSource:
    """The images of a folder and of all folders in it; each top-level folder is a class.

    Folders that an operating system or an editor made are left out: `.name`, `@eaDir`, `__MACOSX`.

    What counts as an image is its ending, as for torchvision's ImageFolder, in upper or lower case.
    Symbolic links are followed, but not back into a folder that they are in.
    """

    root: Path
    numbered: ClassVar[list[str] | None] = None
    in_blocks: ClassVar[bool] = False

    def __str__(self) -> str:
        return str(self.root)

    def classes(self) -> list[str]:
        """Names of the top-level folders that hold images, sorted."""
        names = sorted(name for name in _names(str(self.root)) if name.endswith(b"/"))
        found = (name[:-1].decode() for name in names)
        return [name for name in found if _has_image(os.path.join(self.root, name), [])]

    def parts(self) -> list[str]:
        """The folder."""
        return [str(self)]

    def scan(self, part: int = 0) -> Iterator[Entry]:
        """All images, sorted by the bytes of their keys.

        Holds the names of one folder at a time, and those of the folders above it.

        Raises:
            ConfigError: there is no image, a folder cannot be listed, or a name is not UTF-8.
        """
        empty = True
        for name in _scan(str(self.root), b"", []):
            empty, key = False, name.decode()
            folder, below, _ = key.partition("/")
            yield Entry(key, folder if below else "")
        if empty:
            raise ConfigError(
                f"no images found in {self}: looked in all its folders for files ending in "
                f"{', '.join(EXTENSIONS)}. Remedy: check the path; the images of a split lie in "
                "DATA/SPLIT/CLASS/"
            )

    def read(self, entries: Sequence[Entry]) -> Iterator[bytes | ImageError]:
        """The bytes of each file, one at a time; an error where the image itself is at fault.

        Raises:
            StorageError: a file cannot be read for a reason that is not its own.
        """
        for key, *_ in entries:
            if key.startswith("/") or "\0" in key or ".." in key.split("/"):
                yield ImageError("its key is no path inside the split's folder")
            else:
                yield read_file(os.path.join(self.root, key), self.root)


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


def is_hidden(name: str) -> bool:
    """Whether a folder of this name is left out."""
    return name.startswith(".") or name in _NO_CLASS


def _has_image(folder: str, above: list[tuple[int, int]]) -> bool:
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    folders = []
    for name in _names(folder):
        if not name.endswith(b"/"):
            return True
        folders.append(os.path.join(folder, name[:-1].decode()))
    return here not in above and any(_has_image(inner, [*above, here]) for inner in folders)


def _scan(folder: str, prefix: bytes, above: list[tuple[int, int]]) -> Iterator[bytes]:
    """Keys of all images in a folder, whose own key is `prefix` and which lies in those `above`."""
    # Sorted in runs, each one string with NUL, which no name can hold, between its names: an
    # object for each of a million names would be ten times the memory.
    names, runs = _names(folder), []
    while run := sorted(islice(names, _RUN)):
        runs.append(b"\0".join(run))
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        _log.warning("%s links back to a folder above it: left out", folder)
        return
    for name in heapq.merge(*((m[0] for m in re.finditer(rb"[^\0]+", run)) for run in runs)):
        if name.endswith(b"/"):
            child = os.path.join(folder, name[:-1].decode())
            yield from _scan(child, prefix + name, [*above, here])
        else:
            yield prefix + name


def _names(folder: str) -> Iterator[bytes]:
    """Names in a folder, in no order: of images, and of folders, which end in "/".

    So a folder sorts as in the keys of its images, and a walk in order gives keys in order.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link to itself
                    is_folder = False
                if is_folder and is_hidden(entry.name):
                    continue
                if is_folder or entry.name.lower().endswith(EXTENSIONS):
                    yield entry.name.encode() + (b"/" if is_folder else b"")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"keys are UTF-8, but a file name in {folder} is not: {os.fsencode(error.object)!r}. "
            "Remedy: rename it (for example with convmv)"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} cannot be listed: {error.strerror}. Remedy: check the path; give "
            "this user permission to read the folder, or move it out of the split"
        ) from error


def read_file(path: str, folder: Path) -> bytes | ImageError:
    """The bytes of an image's file; an error where the image itself is at fault.

    Args:
        path: the file.
        folder: what is named where it is not mounted, the image folder.

    Raises:
        StorageError: it cannot be read for a reason that is not its own.
    """
    try:
        with open(path, "rb", buffering=0, opener=_open) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return ImageError("not a regular file")
            if fault := size_fault(status.st_size):
                return fault
            return file.read()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        # The image was listed when the split was scanned. Where it no longer is, its folder may be
        # the empty one that an unmounted file system leaves.
        if error.errno in _OWN_FAULTS and os.path.lexists(path):
            return ImageError(f"cannot be read: {reason}")
        if not folder.is_dir():
            raise StorageError(
                f"the image folder {folder} is not there on this node. Remedy: mount it on every "
                "node under the same path"
            ) from error
        raise StorageError(
            f"the image {path} cannot be read: {reason}. That is the storage's fault, not the "
            "image's. Remedy: fix the disk or the mount and run the same command again; if the "
            "image is lost, put an empty file in its place"
        ) from error


def _open(path: str, flags: int) -> int:
    # Non-blocking, so that a named pipe called cat.jpg cannot hang the job.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
