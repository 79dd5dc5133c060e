"""Made-up label maps and shards for tests of the format; nothing here stands in for our code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenlabel.dataset.shard import ShardLayout, shard_name, write_shard


class Rows(NamedTuple):
    """Columns of some rows, as ShardWriter.append takes them."""

    scores: np.ndarray
    classes: np.ndarray
    rest: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    errors: list[str]


def random_rows(layout: ShardLayout, count: int, seed: int = 0) -> Rows:
    """Rows as a teacher would give: descending logits, different classes in a patch."""
    rng = np.random.default_rng(seed)
    shape = (count, *layout.map_shape)
    scores = -np.sort(-rng.normal(3, 4, shape).astype("f2"), -1)
    patches = int(np.prod(shape[:-1]))
    classes = np.stack([rng.permutation(layout.num_classes)[: layout.k] for _ in range(patches)])
    return Rows(
        scores,
        classes.reshape(shape),
        rng.normal(0, 1, shape[:-1]).astype("f2"),
        rng.integers(1, 4000, (count, 2)),
        rng.integers(0, 2**64, count, dtype="u8", endpoint=False),
        [""] * count,
    )


def attrs(shard: int, shards: int, first_row: int, **more: Any) -> dict[str, Any]:
    """Root attributes of a shard of a made-up run."""
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
    layout: ShardLayout,
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
