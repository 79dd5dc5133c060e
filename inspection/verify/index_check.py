"""Is the index what the shards give?"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...dataset.format.directory import StoredFile
from ...dataset.format.index import FORMAT, NAME, VERSION, write_index

_REMEDY = "delete it; it is rebuilt"


def index_difference(path: Path, shards: Sequence[Path]) -> str | None:
    """What differs, by content, from an index made of the shards now; None for nothing.

    Raises:
        FormatError: the index is damaged, or the shards do not belong together.
        OSError: the new index cannot be written to the temporary folder.
    """
    with (
        tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder,
        StoredFile(path, FORMAT, VERSION, _REMEDY) as old,
    ):
        old.check_bytes()
        fresh = Path(folder) / NAME
        write_index(fresh, list(shards))
        with StoredFile(fresh, FORMAT, VERSION, _REMEDY) as new:
            if old.attrs != new.attrs:
                return "its attributes are not what the shards give"
            # CRCs do: both files were just read, and have the bytes that theirs are of.
            for name, column in new.columns.items():
                found = old.columns.get(name)
                if found is None or found._replace(offset=0) != column._replace(offset=0):
                    return f"its {name} is not what the shards give"
    return None
