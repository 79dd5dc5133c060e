"""What tests of the format do with shards besides writing and reading them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.attacks import parsed, with_directory
from tokenlabel.dataset.format.score_map import ScoreMap
from tokenlabel.dataset.format.shard import COLUMNS, ContentDigest, Shard


def digest(entry: ScoreMap) -> str:
    """Digest of everything that a map holds."""
    total = hashlib.sha256()
    for part in entry:
        total.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return total.hexdigest()


def content_digest(shard: Shard, block: int = 256) -> str:
    """The sha256 of a shard's arrays as they are now; its attribute is what it was."""
    total, planes = ContentDigest(), shard.layout.planes()
    for name in (*planes, *(name for name in COLUMNS if name in shard)):
        step = block if name in planes else shard.rows
        for start in range(0, shard.rows, step):
            total.update(name, shard.read(name, start, start + step))
    return total.hexdigest()


def edit_directory(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a file's directory says, with the right checksum; the rest stays as it is."""
    data = path.read_bytes()
    found = parsed(data)
    change(found)
    path.write_bytes(with_directory(data, found))
