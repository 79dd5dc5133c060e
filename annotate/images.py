"""Decode images as torchvision's ImageFolder shows them to the student, then squash them.

Runs in decode workers, so it needs Pillow and NumPy only.
"""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from ..dataset.format.keys import digest64
from ..dataset.sources.decode import decode_image
from ..dataset.sources.image_source import Entry, ImageSource
from ..dataset.sources.thumbprint import SIDE, thumbprint
from ..errors import ImageError


class DecodedBatch(NamedTuple):
    """A batch ready for the teacher.

    Attributes:
        images: uint8 [B, h, w, 3] RGB of each pass, whole images squashed to the teacher's input;
            black where the image could not be read.
        sizes: int32 [B, 2], (width, height) of the image in its file, 0 where unknown.
        digests: uint64 [B], `digest64` of each file.
        thumbprints: uint8 [B, 64], `thumbprint` of the decoded image, 0 where there is none.
        orientations: uint8 [B], `exif_orientation` of the decoded image.
        errors: B texts, empty where the image was read.
    """

    images: tuple[np.ndarray, ...]
    sizes: np.ndarray
    digests: np.ndarray
    thumbprints: np.ndarray
    orientations: np.ndarray
    errors: list[str]


def decode_batch(
    source: ImageSource,
    entries: Sequence[Entry],
    sizes: Sequence[tuple[int, int]],
    interpolation: str,
    *fetched: Sequence[bytes | ImageError],
) -> DecodedBatch:
    """Read images of a split and squash each to all `sizes`, (height, width) each.

    A bad image never raises; its row says why. A row without a map is final, so a disk that fails,
    or a folder that is unmounted while the job runs, must not make one.

    Args:
        source: of the images.
        entries: the images.
        sizes: of each pass.
        interpolation: name of Pillow's filter.
        fetched: what `fetch_block` read of them, in order; nothing: they are read here.

    Raises:
        StorageError: an image cannot be read for a reason that is not its own.
    """
    batch = failed_batch(len(entries), sizes, "")
    resample = Image.Resampling[interpolation.upper()]
    for row, data in enumerate(chain(*fetched) if fetched else source.read(entries)):
        try:
            if isinstance(data, ImageError):
                raise data
            batch.digests[row] = digest64(data)
            image = decode_image(data)
            batch.sizes[row] = image.size
            batch.thumbprints[row] = thumbprint(image)
            batch.orientations[row] = exif_orientation(image)
            for images, (h, w) in zip(batch.images, sizes, strict=True):
                images[row] = np.asarray(image.resize((w, h), resample))
        except ImageError as error:
            batch.errors[row] = str(error)
    return batch


def fetch_block(source: ImageSource, entries: Sequence[Entry], counts: Sequence[int]) -> list[Any]:
    """Read images that can only be fetched together, as parts of so many images each.

    Raises as `decode_batch`.
    """
    data = source.read(entries)
    parts = [list(islice(data, count)) for count in counts]
    return parts if len(parts) > 1 else parts[0]  # as Ray takes the results of a task


def failed_batch(count: int, sizes: Sequence[tuple[int, int]], error: str) -> DecodedBatch:
    """A batch of images that could not even be tried, all with the same `error`."""
    return DecodedBatch(
        tuple(np.zeros((count, *size, 3), np.uint8) for size in sizes),
        np.zeros((count, 2), np.int32),
        np.zeros(count, np.uint64),
        np.zeros((count, SIDE * SIDE), np.uint8),
        np.zeros(count, np.uint8),
        [error] * count,
    )


def join_batches(parts: Sequence[DecodedBatch]) -> DecodedBatch:
    """Several batches as one."""
    return DecodedBatch(
        tuple(np.concatenate(images) for images in zip(*(p.images for p in parts), strict=True)),
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.digests for part in parts]),
        np.concatenate([part.thumbprints for part in parts]),
        np.concatenate([part.orientations for part in parts]),
        [error for part in parts for error in part.errors],
    )


def exif_orientation(image: Image.Image) -> int:
    """What other loaders may turn or mirror this image by: EXIF's 1 to 8; 0 if it does not say.

    Pillow turns a TIFF itself, so that its images say nothing.
    """
    # Damaged EXIF can make Pillow raise nearly anything.
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        found = int(image.getexif()[ExifTags.Base.Orientation])
        return found if found in range(1, 9) else 0
    return 0
