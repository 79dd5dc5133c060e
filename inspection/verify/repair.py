"""`--repair`: delete what is damaged, so that the next `annotate` makes just that again."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...dataset.format.files import sync_folder
from ...dataset.format.index import NAME as INDEX
from ...dataset.format.lock import folder_lock
from ...errors import OutputError
from .verify import SplitCheck

_log = logging.getLogger(__name__)


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Keep jobs off a split, from the check of its files to their deletion.

    Raises LockedError while a job is writing to it.
    """
    with folder_lock(root):
        yield


def remove_bad_files(root: Path, check: SplitCheck) -> list[Path]:
    """Delete the files that `check` found bad, and the index, which is of the shards as they were.

    To be called under `held`. The shards that stay are not touched; `annotate` with the options
    that made them makes the others again, byte for byte, and a new index.

    Raises:
        OutputError: a file cannot be deleted.
    """
    removed = []
    for name in (*check.bad_files, INDEX) if check.bad_files else ():
        path = root / name
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            what = "remove it by hand" if path.is_dir() else "fix the folder's permissions"
            raise OutputError(f"cannot delete {path}: {error.strerror}. Remedy: {what}") from error
        _log.info("deleted %s", path)
        removed.append(path)
    sync_folder(root)
    return removed
