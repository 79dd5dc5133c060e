"""Atomic file replacement: written under another name, flushed, then renamed."""

import errno
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Suffix of unfinished files. A job removes those that it finds when it starts.
TEMPORARY = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` unless the block raises.

    The file and its folder are fsynced, so that after a power failure `path` is the old file or
    the new one. On any exception the temporary file is removed and `path` is left as it was.

    Raises OSError, naming the file, when the system refuses.
    """
    temporary = path.with_name(
        f".{path.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{TEMPORARY}"
    )
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # fsync, write and close name none
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # must not hide an earlier error
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system can (Windows cannot open folders)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without it
            raise
    finally:
        os.close(handle)
