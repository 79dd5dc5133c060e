"""Read the file of an image: which faults are the image's own, and which the storage's."""

import errno
import os
import stat
from pathlib import Path

from ...errors import ImageError, StorageError
from .image_source import MAX_FILE_BYTES

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


def size_fault(size: int) -> ImageError | None:
    """What is wrong with a file of so many bytes."""
    if size == 0:
        return ImageError("the file is empty")
    if size > MAX_FILE_BYTES:
        return ImageError(f"the file has {size} bytes (limit {MAX_FILE_BYTES})")
    return None


def _open(path: str, flags: int) -> int:
    # Non-blocking, so that a named pipe called cat.jpg cannot hang the job.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
