"""Made-up label maps and shards for tests of the format; nothing here stands in for our code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tokenlabel.annotate.classes import number_folders
from tokenlabel.annotate.teacher.encode import encode
from tokenlabel.dataset.format.manifest import (
    Manifest,
    Numbered,
    open_manifest,
    write_manifest,
)
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.format.shard import shard_name, write_shard
from tokenlabel.dataset.sources.folder import FolderSource
from tokenlabel.dataset.sources.image_source import Entry
from tokenlabel.dataset.sources.scan import manifest_blocks, scan_all

FLOOR = 0.003


def entries(keys: Sequence[str]) -> list[Entry]:
    """Images of a folder, as a scan gives them."""
    return [Entry(key) for key in keys]


class Rows(NamedTuple):
    """Columns of some rows, as ShardWriter.append takes them."""

    maps: dict[str, np.ndarray]
    sizes: np.ndarray
    digests: np.ndarray
    thumbprints: np.ndarray
    orientations: np.ndarray
    errors: list[str]


def random_maps(layout: MapLayout, count: int, seed: int | list[int] = 0) -> dict[str, np.ndarray]:
    """Planes [count, V, ...] as a teacher would give: confident in some cells, torn in others."""
    rng = np.random.default_rng(seed)
    shape = (count, *layout.grid, layout.num_classes)
    views = []
    for _ in layout.views:
        logits = rng.normal(3, 2, shape) * rng.uniform(0.5, 2.5, (*shape[:-1], 1))
        views.append(encode(torch.tensor(logits, dtype=torch.float32), layout, FLOOR))
    return {name: np.stack([view[name].numpy() for view in views], 1) for name in layout.planes()}


def random_rows(layout: MapLayout, count: int, seed: int = 0) -> Rows:
    """Rows of random maps."""
    rng = np.random.default_rng([seed, 1])
    return Rows(
        random_maps(layout, count, seed),
        rng.integers(1, 4000, (count, 2)),
        rng.integers(0, 2**64, count, dtype="u8", endpoint=False),
        rng.integers(0, 256, (count, 64), dtype="u1"),
        rng.integers(0, 9, count, dtype="u1"),
        [""] * count,
    )


def attrs(shard: int, shards: int, first_row: int, **more: Any) -> dict[str, Any]:
    """Root attributes of a shard of a made-up run."""
    return {
        "teacher": "made up",
        "weights_digest": "0" * 64,
        "fingerprint": "f" * 64,
        "floor": FLOOR,
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


def manifest_of(
    images: Path, path: Path, names: Sequence[str] | None = None, num_classes: int = 0
) -> Manifest:
    """The manifest of a folder of images, as a job of such a teacher builds it.

    Folders are numbered in order where no names are given.
    """
    source, classes = FolderSource(images), dict[str, int]()

    def number() -> Numbered:
        found = number_folders(sorted(classes), names, num_classes, "auto" if names else "folders")
        ids = {name: found.classes[name] for name in classes}
        return Numbered(found.label_space, names, ids, found.rule)

    blocks = manifest_blocks(scan_all(source), source, classes)
    write_manifest(path, blocks, number, str(source), source.parts())
    return open_manifest(path)
