"""Label sets of pictures that the tests paint themselves, with maps that say what is painted."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.maps import attrs
from tokenlabel.annotate.images import file_digest
from tokenlabel.dataset import LabelStore
from tokenlabel.dataset.shard import ShardLayout, shard_name, write_shard

#: Class ids of the four quadrants, row by row, and their colours in the picture.
QUADRANTS = (7, 3, 40, 21)
PAINT = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30))
#: (H, W); not square, and twice as fine as what is painted.
GRID = (4, 6)


def painted(size: tuple[int, int] = (180, 100)) -> bytes:
    """A PNG of `size` = (width, height) with four quadrants of one colour each."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    for number, colour in enumerate(PAINT):
        top, left = number // 2 * height // 2, number % 2 * width // 2
        pixels[top : top + height // 2, left : left + width // 2] = colour
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def painted_map() -> np.ndarray:
    """Class of each patch, [H, W]."""
    rows = np.repeat(np.array(QUADRANTS).reshape(2, 2), GRID[0] // 2, axis=0)
    return rows.repeat(GRID[1] // 2, axis=1)


def write_store(
    root: Path,
    images: Path,
    pictures: Mapping[str, bytes],
    label: int = 7,
    logit: float = np.log(0.7),
    **more: Any,
) -> LabelStore:
    """Write pictures below `images` and their label set to `root`; all maps are `painted_map`.

    The top class of each patch has probability 0.7, the second 0.2; the other 48 share the rest.
    `logit` replaces the top class's in the first patch of the first picture.
    """
    layout = ShardLayout(("identity",), GRID, 2, 50)
    keys = sorted(pictures)
    count = len(keys)
    best = np.broadcast_to(painted_map(), (count, 1, *GRID))
    classes = np.stack([best, (best + 1) % 50], -1)
    scores = np.broadcast_to(np.log([0.7, 0.2]), classes.shape).astype("f2")
    scores[0, 0, 0, 0, 0] = logit
    sizes = []
    for key in keys:
        path = images / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[key])
        with Image.open(path) as picture:
            sizes.append(picture.size)
    root.mkdir(parents=True, exist_ok=True)
    header = attrs(0, 1, 0, **{"label_space": "teacher", **more})
    with write_shard(root / shard_name(0, 1), layout, keys, [label] * count, header) as writer:
        writer.append(
            scores,
            classes,
            np.full(best.shape, np.log(0.1), "f2"),
            np.array(sizes),
            np.array([file_digest(pictures[key]) for key in keys], "u8"),
            [""] * count,
        )
    return LabelStore(root)
