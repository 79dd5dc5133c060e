"""Is `index.h5` what the shards give?"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.files import open_h5
from tokenlabel.dataset.hdf5_dataset import StoredDataset
from tokenlabel.dataset.index import NAME
from tokenlabel.dataset.index_writer import FORMAT, VERSION, write_index

_COMPARED = 1 << 20  # values compared at a time


def other_version(path: Path) -> int | None:
    """Version of an index that another release wrote; None for one of this release, or no index."""
    try:
        with open_h5(path) as file:
            name, version = (file.attrs.get(key) for key in ("format", "version"))
    except (FormatError, OSError, UnicodeDecodeError):
        return None
    known = name != FORMAT or not isinstance(version, int) or version in (VERSION, 0)
    return None if known else version


def index_difference(path: Path, shards: Sequence[Path]) -> str | None:
    """What differs, by content, from an index made anew of the shards; None for nothing.

    Raises:
        FormatError: the shards do not belong together.
        OSError: the new index cannot be written to the temporary folder.
    """
    with tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder:
        fresh = Path(folder) / NAME
        write_index(fresh, list(shards))
        return _difference(path, fresh)


def _difference(path: Path, fresh: Path) -> str | None:
    try:
        with open_h5(path) as old, open_h5(fresh) as new:
            if (names := sorted(old)) != sorted(new):
                return f"it holds {', '.join(names)}, the shards give {', '.join(sorted(new))}"
            for name, value in new.attrs.items():
                if name not in old.attrs or not np.array_equal(old.attrs[name], value):
                    return f"its attribute {name} is not what the shards give"
            for name in names:
                if not _equal(old[name], new[name]):
                    return f"its {name} is not what the shards give"
    except (
        AttributeError,
        KeyError,
        FormatError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return f"it cannot be read: {error}"
    return None


def _equal(one: StoredDataset, two: StoredDataset) -> bool:
    if one.dtype != two.dtype or one.shape != two.shape or one.chunks:
        return False
    step = max(_COMPARED // max(int(np.prod(two.shape[1:])), 1), 1)
    return all(
        one.read(start, start + step).tobytes() == two.read(start, start + step).tobytes()
        for start in range(0, two.shape[0], step)
    )
