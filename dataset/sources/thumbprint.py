"""A thumbprint of an image's pixels: 64 bytes that say whether another image is the same one.

A file's digest changes with every byte; the thumbprint stays when the image is encoded again,
resized, or decoded by another library, and changes when the image is mirrored, turned, cropped or
another one. No torch: the room needs NumPy and Pillow only.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

#: Cells of a side. The bytes of a thumbprint are in files: what they mean never changes.
SIDE = 8
#: Weights of an image's channels, 4 in all: the same for RGB and BGR; alpha does not count.
_WEIGHTS = {1: [4], 2: [4, 0], 3: [1, 2, 1], 4: [1, 2, 1, 0]}
#: What two thumbprints of one image may differ by: grey levels, of which rounding takes up to 1;
#: and cells that the image may have moved by, as decoders do that scale or pad.
_GREY_LEVELS, _CELLS = 1.0, 0.1
#: What a candidate may be, and how to make the annotated image's cells of the candidate's.
_MIRRORED_OR_TURNED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mirrored left to right": lambda cells: cells[:, ::-1],
    "mirrored top to bottom": lambda cells: cells[::-1],
    "turned by 180 degrees": lambda cells: cells[::-1, ::-1],
    "turned by 90 degrees clockwise": lambda cells: np.rot90(cells),
    "turned by 90 degrees counter-clockwise": lambda cells: np.rot90(cells, -1),
    "mirrored, then turned by 90 degrees clockwise": lambda cells: cells[::-1, ::-1].T,
    "mirrored, then turned by 90 degrees counter-clockwise": lambda cells: cells.T,
}


def thumbprint(image: Any) -> np.ndarray:
    """The thumbprint of an image, uint8 [64].

    Byte 8 r + c is the mean grey value of cell (r, c) of an 8 x 8 grid over the whole image,
    rounded, halves upwards. Cell (r, c) covers x from c W/8 to (c+1) W/8 and y from r H/8 to
    (r+1) H/8 of an image of W x H pixels, of which pixel (x, y) covers [x, x+1] x [y, y+1]: a pixel
    on the border of cells counts for each by the area inside. The grey value of a pixel is
    (R + 2 G + B) / 4. In integers, byte 8 r + c is

        S = sum over x, y of o(c, x, W) o(r, y, H) (R + 2 G + B)
        o(i, p, n) = max(0, min((i+1) n, 8 (p+1)) - max(i n, 8 p))
        byte = floor((S + 2 W H) / (4 W H))

    so that no decoder's or library's way to resize has a say in it.

    Args:
        image: a Pillow image; an array [H, W, C] or [H, W]; or a tensor [C, H, W]. RGB, BGR or
            greyscale, with or without alpha: integers of 0 to 255, or floats of 0 to 1.

    Raises:
        ValueError: it has another shape.
    """
    cells = _grey_cells(image).clip(0, 255).ravel()
    return (cells + 0.5).astype(np.uint8)


def difference(stored: np.ndarray, image: Any) -> str | None:
    """What an image is, compared with the one that a thumbprint was computed from.

        wrong = difference(thumbprint(image), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        assert wrong == "mirrored left to right"

    Brightness and contrast do not count: the numbers may be of any scale, or normalised. What the
    thumbprint cannot tell is no difference: the mirror image of a symmetric image, or any image in
    place of one that is all of one colour.

    Args:
        stored: the annotated image's thumbprint, uint8 [64].
        image: as in `thumbprint`, but of any scale.

    Returns:
        None where they are the same image; otherwise words that complete "the image is …".

    Raises:
        ValueError: the image has another shape.
    """
    expected = stored.reshape(SIDE, SIDE) - np.mean(stored)
    contrast = np.sqrt(np.mean(expected**2))
    # A shift, a crop or a flip changes a smooth image less than one with much detail.
    steps = [np.mean(np.diff(expected, axis=axis) ** 2) for axis in (0, 1)]
    allowed = _GREY_LEVELS + _CELLS * np.sqrt(np.mean(steps))

    cells = _grey_cells(image)
    cells -= cells.mean()
    cells *= contrast / max(np.sqrt(np.mean(cells**2)), 1e-6)

    def distance(candidate: np.ndarray) -> float:
        return float(np.sqrt(np.mean((expected - candidate) ** 2)))

    if distance(cells) <= allowed:
        return None
    found = {name: distance(undo(cells)) for name, undo in _MIRRORED_OR_TURNED.items()}
    name = min(found, key=lambda name: found[name])
    return name if found[name] <= allowed else "another image, or a crop of it"


def _grey_cells(image: Any) -> np.ndarray:
    """Mean grey values of the cells, float64 [8, 8], not rounded."""
    if is_tensor := hasattr(image, "detach"):
        pixels = np.asarray(image.detach().cpu())
    else:
        if isinstance(image, Image.Image) and image.mode != "RGB":
            image = image.convert("RGB")
        pixels = np.atleast_3d(np.asarray(image))
    axis = 0 if is_tensor else -1
    if pixels.ndim != 3 or not pixels.size or (channels := pixels.shape[axis]) not in _WEIGHTS:
        form = "a tensor [C, H, W]" if is_tensor else "an array [H, W, C]"
        raise ValueError(f"expected {form} of 1 to 4 channels, got {list(pixels.shape)}")
    height, width = pixels.shape[1:] if is_tensor else pixels.shape[:2]
    planes = pixels if is_tensor else pixels.reshape(1, height, -1)

    # Down, a row of cells at a time, so that large images need little memory. The sums of integers
    # stay below 2^24, where float32 is exact, unless there are more rows than a JPEG can have.
    kind = np.float32 if height < 1 << 16 else np.float64
    rows = []
    for i, weights in enumerate(_overlaps(height).astype(kind)):
        inside = slice(i * height // SIDE, -((i + 1) * -height // SIDE))
        rows.append(weights[inside] @ planes[:, inside].astype(kind))
    sums = np.stack(rows)
    if not is_tensor:  # [8, 1, W C] -> [8, C, W]
        sums = sums.reshape(SIDE, width, channels).swapaxes(1, 2)

    grey = np.array(_WEIGHTS[channels], float) @ sums
    cells: np.ndarray = grey @ _overlaps(width).T / (4 * height * width)
    return cells * 255 if pixels.dtype.kind == "f" else cells


def _overlaps(pixels: int) -> np.ndarray:
    """o(i, p, n): how much of pixel p cell i covers, in 1/8 pixel, float64 [8, n]."""
    cell, pixel = np.arange(SIDE)[:, None] * pixels, np.arange(pixels) * SIDE
    inside: np.ndarray = np.minimum(cell + pixels, pixel + SIDE) - np.maximum(cell, pixel)
    return inside.clip(0).astype(float)
