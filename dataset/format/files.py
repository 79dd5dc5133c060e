"""Atomic file replacement: written under another name, flushed, then renamed.

Of an object in a store: written to a local file, then stored by one request.
"""

import errno
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import OutputError
from ..storage.cache import CachedPath
from ..storage.remote_path import AnyPath, RemotePath

#: Suffix of unfinished files. A job removes those that it finds when it starts.
TEMPORARY = ".tmp"


@contextmanager
def replacing(path: AnyPath, create: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` unless the block raises.

    The file and its folder are fsynced, so that after a power failure `path` is the old file or
    the new one. On any exception the temporary file is removed and `path` is left as it was.

    Args:
        path: of the file, or an object, which appears whole or not at all; of a `CachedPath`, the
            local copy alone is replaced.
        create: of an object, that it must be new, or have the same bytes already.

    Raises:
        OSError: the system refuses; names the file.
        StoreError: the store refuses.
        OutputError: the object is there with other bytes.
    """
    if isinstance(path, CachedPath):
        if path.cache is None:
            raise PermissionError(errno.EACCES, "labels in a store are not changed", str(path))
        path = path.place()
        path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder:
            yield (local := Path(folder) / path.name)
            try:
                path.put(local, create=create)
            except FileExistsError as error:
                if path.read_bytes() != local.read_bytes():
                    raise OutputError(
                        f"{path} is there already, with other bytes than this job makes. Remedy: "
                        "see that no other job writes there; delete the object, and run the same "
                        "command again"
                    ) from error
        return
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
