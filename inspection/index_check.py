"""Is `index.h5` what the shards give?"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.files import open_h5
from tokenlabel.dataset.index import NAME
from tokenlabel.dataset.index_writer import write_index

_COMPARED = 1 << 20  # values compared at a time


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


def _equal(one: h5py.Dataset, two: h5py.Dataset) -> bool:
    if one.dtype != two.dtype or one.shape != two.shape or one.chunks:
        return False
    step = max(_COMPARED // max(int(np.prod(two.shape[1:])), 1), 1)
    return all(
        one[start : start + step].tobytes() == two[start : start + step].tobytes()
        for start in range(0, len(two), step)
    )
