"""An image folder: the files of a split in order, found without holding their names in memory."""

import heapq
import logging
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ...errors import ConfigError

#: Endings of image files, in lower case: torchvision's, so that ImageFolder's images all have rows
#: (listed here because importing torchvision costs a driver or worker 200 MB).
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_RUN = 1 << 15

_log = logging.getLogger(__name__)


def scan(root: Path) -> Iterator[bytes]:
    """Keys of all images under `root`, sorted by their UTF-8 bytes.

    Holds the names of one folder at a time, and those of the folders above it.

    Follows symbolic links, but not back into a folder it is in. What counts as an image is its
    ending, as for torchvision's ImageFolder, in upper or lower case.
    """
    yield from _scan(os.fspath(root), b"", [])


def _scan(folder: str, prefix: bytes, above: list[tuple[int, int]]) -> Iterator[bytes]:
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            _log.warning("%s links back to a folder above it: left out", folder)
            return
        with os.scandir(folder) as entries:
            # A folder sorts as its name plus "/", which makes the walk's order the keys' order.
            names = _sorted(
                encode_name(entry.name, folder) + (b"/" if is_folder(entry) else b"")
                for entry in entries
                if is_folder(entry) or entry.name.lower().endswith(EXTENSIONS)
            )
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} cannot be listed: {error.strerror}. Remedy: give this user "
            "permission to read it, or move it out of the split"
        ) from error
    for name in names:
        if name.endswith(b"/"):
            child = os.path.join(folder, name[:-1].decode())
            yield from _scan(child, prefix + name, [*above, here])
        else:
            yield prefix + name


def _sorted(names: Iterator[bytes]) -> Iterator[bytes]:
    """The names of a folder in order; of millions, without an object for each.

    Merges sorted runs, each one string with NUL, which no name can hold, between its names.
    """
    runs = []
    while run := sorted(islice(names, _RUN)):
        runs.append(b"\0".join(run))
    return heapq.merge(*map(_split, runs))


def _split(run: bytes) -> Iterator[bytes]:
    return (found[0] for found in re.finditer(rb"[^\0]+", run))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def encode_name(name: str, folder: str | Path) -> bytes:
    """A file name in UTF-8; raises ConfigError where it is not."""
    try:
        return name.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"keys are UTF-8, but a file name in {folder} is not: {os.fsencode(name)!r}. "
            "Remedy: rename it (for example with convmv)"
        ) from None
