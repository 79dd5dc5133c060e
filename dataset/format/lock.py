"""One job at a time on an output folder.

filelock's lock on `.lock` decides. The kernel frees it when its process ends, however it ends. On a
file system without kernel locks (Lustre mounted without `flock`, say) filelock creates the file
exclusively instead, and takes it over from a process of the same host that has died. The empty
file stays when a job ends: removing it could free a folder that somebody else has just locked.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...errors import LockedError, OutputError
from .files import replacing

NAME = ".lock"
#: Beside the lock: host, process and run that hold it.
HOLDER = ".lock.json"


@contextmanager
def folder_lock(folder: Path) -> Iterator[str]:
    """Create `folder`, hold its lock during the `with` block, and yield the run's id.

    Raises:
        LockedError: another job holds it; names that job's host and pid.
        OutputError: the folder cannot be created or written.
    """
    run = uuid.uuid4().hex
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": run}
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / NAME, timeout=0))
            with replacing(folder / HOLDER) as temporary:
                temporary.write_text(json.dumps(owner))
        except Timeout:
            for _ in range(20):  # the other job may have locked it and not written its name yet
                if other := _read(folder):
                    break
                time.sleep(0.05)
            raise LockedError(
                f"another job is writing to {folder}: host {other.get('host', 'unknown')}, "
                f"pid {other.get('pid', 'unknown')}. Remedy: wait for it, or choose another folder "
                f"with `out`; if that job is certainly gone, delete {folder / NAME}"
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
