"""Made-up maps and shards for tests of the format; nothing here stands in for our code."""

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenlabel.dataset.directory import HEAD, MAGIC
from tokenlabel.dataset.score_map import MapLayout
from tokenlabel.dataset.shard import shard_name, write_shard


class Rows(NamedTuple):
    """Some rows, as ShardWriter.append takes them."""

    maps: dict[str, np.ndarray]
    sizes: np.ndarray
    digests: np.ndarray
    errors: list[str]


def random_rows(layout: MapLayout, count: int, seed: int = 0) -> Rows:
    """Rows as a teacher would give: descending probabilities, different classes in a cell."""
    rng = np.random.default_rng(seed)
    planes = layout.planes()
    shape = (count, *planes["codes"][1])
    nats = np.sort(rng.exponential(4, shape), 2)
    cells = (count, len(layout.views), *layout.grid)
    classes = np.argsort(rng.random((*cells, layout.num_classes)), -1)[..., : layout.k]
    maps = {
        "codes": np.minimum(nats / layout.step, 255) if layout.step else nats,
        "classes": np.moveaxis(classes, -1, 2),
    }
    if layout.residual:
        residual = (count, len(layout.views), layout.residual)
        order = np.argsort(rng.random((*residual[:2], layout.num_classes)), -1)
        maps["residual_classes"] = np.sort(order[..., : layout.residual], -1)
        maps["residual_codes"] = rng.integers(16, 256, residual)
    if layout.level:
        maps["level"] = rng.normal(9, 3, cells)
    return Rows(
        {name: maps[name].astype(dtype) for name, (dtype, _) in planes.items()},
        rng.integers(1, 4000, (count, 2)),
        rng.integers(0, 2**64, count, dtype="u8", endpoint=False),
        [""] * count,
    )


def attrs(shard: int, shards: int, first_row: int, **more: Any) -> dict[str, Any]:
    """Attributes of a shard of a made-up run."""
    return {
        "teacher": "made up",
        "weights_digest": "0" * 64,
        "fingerprint": "f" * 64,
        "extent": [0.0, 0.0, 1.0, 1.0],
        "shard": shard,
        "shards": shards,
        "first_row": first_row,
        **more,
    }


def write_split(
    folder: Path,
    keys: Sequence[str],
    layout: MapLayout,
    shard_size: int = 4,
    seed: int = 0,
    errors: dict[str, str] | None = None,
    **more: Any,
) -> list[Rows]:
    """Write a whole split of random maps; returns the rows of each shard."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-len(keys) // shard_size)
    written = []
    for number in range(shards):
        part = list(keys[number * shard_size : (number + 1) * shard_size])
        rows = random_rows(layout, len(part), seed + number)
        rows.errors[:] = [(errors or {}).get(key, "") for key in part]
        path = folder / shard_name(number, shards)
        labels = [index % layout.num_classes for index in range(len(part))]
        header = attrs(number, shards, number * shard_size, **more)
        with write_shard(path, layout, part, labels, header) as writer:
            writer.append(*rows)
        written.append(rows)
    return written


def edit_directory(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a file's directory says, with the right checksum; the rest stays as it is."""
    data = path.read_bytes()
    _, size, _ = HEAD.unpack(data[: HEAD.size])
    found = json.loads(data[HEAD.size : HEAD.size + size])
    change(found)
    text = json.dumps(found).encode()
    new = HEAD.pack(MAGIC, len(text), zlib.crc32(text)) + text
    path.write_bytes(new + data[len(new) :])
