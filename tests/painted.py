"""Label sets of images that the tests paint themselves, and the commands that inspect them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from PIL import Image

from tests.maps import attrs
from tokenlabel.cli import main
from tokenlabel.dataset import LabelStore
from tokenlabel.dataset.format import manifest
from tokenlabel.dataset.format.keys import digest64
from tokenlabel.dataset.format.new_file import create, encode_texts
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.format.shard import shard_name, write_shard
from tokenlabel.dataset.sources.thumbprint import thumbprint

#: Class ids of the four quadrants, row by row, and their colours in the image.
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
    files: Mapping[str, bytes],
    label: int = 7,
    best: float = 0.7,
    **more: Any,
) -> LabelStore:
    """Write image files below `images` and their label set to `root`; all maps are `painted_map`.

    The top class of each patch has probability 0.7, the second 0.2; the other 48 share the rest.
    `best` replaces the top class's in the first patch of the first image.
    """
    layout = MapLayout(("identity",), GRID, 2, 50, residual=0, step=0, level=False)
    keys = sorted(files)
    count = len(keys)
    top = np.broadcast_to(painted_map(), (count, 1, *GRID))
    probs = np.broadcast_to(np.reshape([0.7, 0.2], (1, 1, 2, 1, 1)), (count, 1, 2, *GRID)).copy()
    probs[0, 0, 0, 0, 0] = best
    maps = {
        "codes": -np.log(probs).astype("f2"),
        "classes": np.stack([top, (top + 1) % 50], 2).astype("u2"),
    }
    sizes, prints = [], []
    for key in keys:
        path = images / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[key])
        with Image.open(path) as image:
            sizes.append(image.size)
            try:
                prints.append(thumbprint(image))
            except OSError:  # the test has cut the file
                prints.append(np.zeros(64, "u1"))
    root.mkdir(parents=True, exist_ok=True)
    header = attrs(0, 1, 0, **{"label_space": "teacher", **more})
    with write_shard(root / shard_name(0, 1), layout, keys, [label] * count, header) as writer:
        digests = np.array([digest64(files[key]) for key in keys], "u8")
        turns = np.zeros(count, "u1")
        writer.append(maps, np.array(sizes), digests, np.array(prints), turns, [""] * count)
    return LabelStore(root)


def write_class_names(root: Path, names: Sequence[str]) -> None:
    """Give a label set the names of its classes, where `annotate` puts them."""
    with create(root / manifest.NAME, manifest.FORMAT, manifest.VERSION, {}) as file:
        file.add("class_names", encode_texts(names))


def invoke(*command: object, code: int = 0, answer: str | None = None) -> str:
    """Output of a command of the CLI, which must end with this status and without traceback."""
    result = CliRunner().invoke(main, [str(word) for word in command], input=answer)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output
