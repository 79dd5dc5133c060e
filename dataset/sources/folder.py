"""An image folder: the files of a split in order, found without holding their names in memory."""

import errno
import heapq
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ...errors import ConfigError, ImageError, StorageError
from .image_source import MAX_FILE_BYTES, Entry

#: Endings of image files, in lower case: torchvision's, so that ImageFolder's images all have rows
#: (listed here because importing torchvision costs a driver or worker 200 MB).
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
#: How many names of a folder are sorted as Python objects at a time.
_RUN = 1 << 15
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

#: Folders of thumbnails and metadata, beside those whose name begins with a dot.
_NO_CLASS = ("@eaDir", "__MACOSX")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderSource:
    """The images of a folder and of all folders in it; each top-level folder is a class.

    Folders that an operating system or an editor made are left out: `.name`, `@eaDir`, `__MACOSX`.

    What counts as an image is its ending, as for torchvision's ImageFolder, in upper or lower case.
    Symbolic links are followed, but not back into a folder that they are in.
    """

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def classes(self) -> list[str]:
        """Names of the top-level folders that hold images, sorted."""
        names = sorted(name for name in _names(str(self.root)) if name.endswith(b"/"))
        found = (name[:-1].decode() for name in names)
        return [name for name in found if _has_image(os.path.join(self.root, name), [])]

    def scan(self) -> Iterator[Entry]:
        """All images, sorted by the bytes of their keys.

        Holds the names of one folder at a time, and those of the folders above it.

        Raises:
            ConfigError: there is no image, a folder cannot be listed, or a name is not UTF-8.
        """
        numbers = {name.encode(): number for number, name in enumerate(self.classes())}
        empty = True
        for key in _scan(str(self.root), b"", []):
            empty = False
            yield Entry(key, numbers.get(key.partition(b"/")[0], -1))
        if empty:
            raise ConfigError(
                f"no images found in {self}: looked in all its folders for files ending in "
                f"{', '.join(EXTENSIONS)}. Remedy: check the path; the images of a split lie in "
                "DATA/SPLIT/CLASS/"
            )

    def read(self, keys: Sequence[str]) -> Iterator[bytes | ImageError]:
        """The bytes of each file, one at a time; an error where the image itself is at fault.

        Raises:
            StorageError: a file cannot be read for a reason that is not its own.
        """
        for key in keys:
            if key.startswith("/") or "\0" in key or ".." in key.split("/"):
                yield ImageError("its key is no path inside the split's folder")
            else:
                yield self._read(os.path.join(self.root, key))

    def _read(self, path: str) -> bytes | ImageError:
        try:
            with open(path, "rb", buffering=0, opener=_open) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    return ImageError("not a regular file")
                if status.st_size == 0:
                    return ImageError("the file is empty")
                if (size := status.st_size) > MAX_FILE_BYTES:
                    return ImageError(f"the file has {size} bytes (limit {MAX_FILE_BYTES})")
                return file.read()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            # The image was listed when the split was scanned. Where it no longer is, its folder
            # may be the empty one that an unmounted file system leaves.
            if error.errno in _OWN_FAULTS and os.path.lexists(path):
                return ImageError(f"cannot be read: {reason}")
            if not self.root.is_dir():
                raise StorageError(
                    f"the image folder {self} is not there on this node. Remedy: mount it on every "
                    "node under the same path"
                ) from error
            raise StorageError(
                f"the image {path} cannot be read: {reason}. That is the storage's fault, not the "
                "image's. Remedy: fix the disk or the mount and run the same command again; if the "
                "image is lost, put an empty file in its place"
            ) from error


def is_hidden(name: str) -> bool:
    """Whether a folder of this name is left out."""
    return name.startswith(".") or name in _NO_CLASS


def open_source(data: Path, split: str) -> FolderSource:
    """The images of a split of a data set.

    Args:
        data: folder that holds a folder for each split.
        split: name of one of these.

    Raises:
        ConfigError: it is not there, or holds no image.
    """
    source = FolderSource((data / split).absolute())
    if not source.root.is_dir():
        found = sorted(p.name for p in data.iterdir() if p.is_dir()) if data.is_dir() else []
        raise ConfigError(
            f"no folder {source}: `data` must hold a folder for each split, and `split` name one; "
            f"{data} holds {', '.join(found[:5]) or 'no folder'}. Remedy: check `data` and `split`"
        )
    next(source.scan())
    return source


def _open(path: str, flags: int) -> int:
    # Non-blocking, so that a named pipe called cat.jpg cannot hang the job.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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
