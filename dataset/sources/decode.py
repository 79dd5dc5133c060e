"""Decode an image file: what the teacher is shown, and the student of an image folder."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from ...errors import ImageError

#: What an image may be inside, whatever its name says: what Pillow decodes by itself. That keeps
#: out formats that start other programs (EPS, WMF) and those that need a plug-in (HDF5, GRIB). TGA
#: is last, for it has no signature: nearly any bytes may be one.
FORMATS = (
    "JPEG PNG WEBP BMP DIB GIF PPM TIFF AVIF JPEG2000 ICO ICNS PCX PSD QOI SGI SUN DDS TGA"
).split()
_MAX_ERROR_CHARS = 200


def decode_image(data: bytes) -> Image.Image:
    """The image that `torchvision.datasets.ImageFolder` gives for a file of these bytes, in RGB.

    By Pillow's own conversion, EXIF orientation not applied. One difference: of greyscale with 16
    bits, Pillow makes white of all but the darkest 256 levels; here it keeps the upper 8 bits.

    Raises:
        ImageError: it cannot be decoded. The same bytes give the same text: shards store it.
    """
    with opened_image(data) as image:
        return _to_rgb(image)


@contextmanager
def opened_image(data: bytes) -> Iterator[Image.Image]:
    """The image of a file of these bytes, of which only the header was read.

    Raises:
        ImageError: it cannot be opened, or what the `with` block asks of it cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images and odd EXIF are no news here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                yield image
    except UnidentifiedImageError as error:  # its text holds a memory address
        raise ImageError("not an image, or its header is damaged") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from error
    except Exception as error:  # decoders raise nearly anything on damaged input
        text = re.sub(r"<[^<>]*0x[0-9a-f]+>", "data", str(error)) or type(error).__name__
        raise ImageError(f"cannot be decoded: {text}"[:_MAX_ERROR_CHARS]) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    levels = np.asarray(image)
    if levels.size and levels.max() > 255:  # else 8 bits in a wider mode
        levels = levels.clip(0, 65535) >> 8
    grey = Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    grey.info = image.info
    return grey
