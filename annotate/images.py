"""Decode images as torchvision's ImageFolder shows them to the student, then squash them.

Runs in decode workers, so it needs Pillow and NumPy only.
"""

import errno
import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import ImageError, StorageError

#: What an image may be inside, whatever its name says. The list keeps out formats that start
#: other programs (EPS) or that no image folder holds.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "PPM", "TIFF")
#: Larger files become error rows instead of exhausting a worker's memory.
MAX_FILE_BYTES = 512 << 20
_MAX_ERROR_CHARS = 200
#: Why a file that is there cannot be opened, today as tomorrow: permission, and links that lead
#: nowhere or to what is no file. Everything else is the storage's fault.
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


class DecodedBatch(NamedTuple):
    """A batch ready for the teacher.

    Attributes:
        images: uint8 [B, h, w, 3] RGB of each pass, whole images squashed to the teacher's input;
            black where the image could not be read.
        sizes: int32 [B, 2], (width, height) of the image in its file, 0 where unknown.
        digests: uint64 [B], the first 8 bytes of the BLAKE2b-64 of the file, little-endian.
        errors: B texts, empty where the image was read.
    """

    images: tuple[np.ndarray, ...]
    sizes: np.ndarray
    digests: np.ndarray
    errors: list[str]


def decode_batch(
    root: str, keys: Sequence[str], sizes: Sequence[tuple[int, int]], interpolation: str
) -> DecodedBatch:
    """Read the images `root`/key and squash each to all `sizes`, (height, width) each.

    The images are those that `torchvision.datasets.ImageFolder` gives: RGB by Pillow's own
    conversion, EXIF orientation not applied. A bad image never raises; its row says why.

    A row without a map is for ever, so it must not stand for a disk that fails, or a folder that
    is unmounted, while the job runs.

    Raises:
        FileNotFoundError: `root` itself is not there, as on a node without the file system.
        StorageError: an image cannot be read for a reason that is not its own.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"the image folder {root} is not there on this node. "
            "Remedy: mount it on every node under the same path"
        )
    batch = failed_batch(keys, sizes, "")
    resample = Image.Resampling[interpolation.upper()]
    for row, key in enumerate(keys):
        try:
            data = _read(os.path.join(root, key))
            batch.digests[row] = file_digest(data)
            batch.sizes[row], squashed = _squash(data, sizes, resample)
            for images, image in zip(batch.images, squashed, strict=True):
                images[row] = image
        except ImageError as error:
            batch.errors[row] = str(error)
    return batch


def failed_batch(keys: Sequence[str], sizes: Sequence[tuple[int, int]], error: str) -> DecodedBatch:
    """A batch of images that could not even be tried, all with the same `error`."""
    count = len(keys)
    return DecodedBatch(
        tuple(np.zeros((count, *size, 3), np.uint8) for size in sizes),
        np.zeros((count, 2), np.int32),
        np.zeros(count, np.uint64),
        [error] * count,
    )


def join_batches(parts: Sequence[DecodedBatch]) -> DecodedBatch:
    """Several batches as one."""
    return DecodedBatch(
        tuple(np.concatenate(images) for images in zip(*(p.images for p in parts), strict=True)),
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.digests for part in parts]),
        [error for part in parts for error in part.errors],
    )


def file_digest(data: bytes) -> int:
    """The 64-bit digest of a file's bytes that shards hold."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _read(path: str) -> bytes:
    try:
        # Non-blocking, so that a named pipe called cat.jpg cannot hang the job.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a regular file")
            if status.st_size == 0:
                raise ImageError("the file is empty")
            if status.st_size > MAX_FILE_BYTES:
                raise ImageError(f"the file has {status.st_size} bytes (limit {MAX_FILE_BYTES})")
            return file.read()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if error.errno in _OWN_FAULTS and _is_listed(path):
            raise ImageError(f"cannot be read: {reason}") from error
        raise StorageError(
            f"the image {path} cannot be read: {reason}. That is the storage's fault, so it gets "
            "no row without a map. Remedy: mend the disk or the mount and run the same command "
            "again; if the image is lost, put an empty file in its place"
        ) from error


def _is_listed(path: str) -> bool:
    """Whether the folder still has the file, which it had when the manifest was made."""
    try:
        os.lstat(path)
    except OSError:
        return False
    return True


def _squash(
    data: bytes, sizes: Sequence[tuple[int, int]], resample: Image.Resampling
) -> tuple[tuple[int, int], list[np.ndarray]]:
    """(width, height) of an image, and the whole of it at each of `sizes`, (height, width)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images and odd EXIF are no news here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                rgb = image.convert("RGB")
            return rgb.size, [np.asarray(rgb.resize((w, h), resample)) for h, w in sizes]
    except UnidentifiedImageError as error:  # its text holds a memory address
        raise ImageError("not an image, or its header is damaged") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from error
    except Exception as error:  # decoders raise nearly anything on damaged input
        text = re.sub(r"<[^<>]*0x[0-9a-f]+>", "data", str(error)) or type(error).__name__
        raise ImageError(f"cannot be decoded: {text}"[:_MAX_ERROR_CHARS]) from error
