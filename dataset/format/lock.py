"""One job at a time on an output folder.

filelock's lock on `.lock` decides: the kernel frees it when its process ends, however it ends. The
empty file stays: removing it could free a folder that somebody else has just locked.
"""

import errno
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from ...errors import LockedError, OutputError
from .files import replacing

NAME = ".lock"
#: Decides where the file system has no kernel locks (Lustre mounted without `flock`, say). It is
#: there while a job runs; that of a killed job is taken over by the next one on the same host.
SOFT = ".lock.soft"
#: Beside the lock: host, process and run that hold it.
HOLDER = ".lock.json"
_NO_KERNEL_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def folder_lock(folder: Path) -> Iterator[str]:
    """Create `folder`, hold its lock during the `with` block, and yield the run's id.

    Raises:
        LockedError: another job holds it; names that job's host and pid.
        OutputError: the folder cannot be created or written.
    """
    run = uuid.uuid4().hex
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": run}
    path = folder / NAME
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                # filelock's own fallback would take an empty file for the lock of another job.
                stack.enter_context(FileLock(path, timeout=0, fallback_to_soft=False))
            except OSError as error:
                if error.errno not in _NO_KERNEL_LOCKS:
                    raise
                path = folder / SOFT
                stack.enter_context(SoftFileLock(path, timeout=0))
            with replacing(folder / HOLDER) as temporary:
                temporary.write_text(json.dumps(owner))
        except Timeout:
            for _ in range(20):  # the other job may have locked it and not written its name yet
                if other := _read(folder):
                    break
                time.sleep(0.05)
            # The kernel frees its lock when the job ends; a file may stay.
            gone = f"; if that job is certainly gone, delete {path}" if path.name == SOFT else ""
            raise LockedError(
                f"another job is writing to {folder}: host {other.get('host', 'unknown')}, "
                f"pid {other.get('pid', 'unknown')}. Remedy: wait for it, or choose another folder "
                f"with `out`{gone}"
            ) from None
        except OSError as error:
            raise OutputError(
                f"cannot write to the output folder {folder}: {error}. "
                "Remedy: choose another one with `out`, or fix its permissions or free space"
            ) from error
        try:
            yield run
        finally:
            # Must not hide why the folder cannot be written any more.
            with suppress(OSError):
                if holder(folder) == run:
                    (folder / HOLDER).unlink()


def holder(folder: Path) -> str | None:
    """Id of the run that holds the folder's lock, by the file beside it; None without one.

    Raises OSError when the file cannot be read.
    """
    run = _read(folder).get("run")
    return run if isinstance(run, str) else None


def _read(folder: Path) -> dict[str, Any]:
    try:
        owner = json.loads((folder / HOLDER).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}
