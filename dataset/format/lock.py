"""One job at a time on an output folder.

The kernel's lock on the file decides, so the lock of a dead process is free at once; the file's
text tells a second job who holds it. Where the file system has no such locks, the text decides.
"""

import errno
import fcntl
import json
import os
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from ...errors import LockedError, OutputError

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def folder_lock(folder: Path) -> Iterator[str]:
    """Create `folder`, hold its lock during the `with` block, and yield the run's id.

    Raises:
        LockedError: another job holds it; names that job's host and pid.
        OutputError: the folder cannot be created or written.
    """
    path, run = folder / NAME, uuid.uuid4().hex
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        try:
            _sign(handle, run)
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield run
    finally:
        # Must not hide why the folder cannot be written any more; the kernel's lock goes anyway.
        with suppress(OSError):
            if _same_file(handle, path):
                path.unlink()
        with suppress(OSError):
            os.close(handle)


def holder(folder: Path) -> str | None:
    """Id of the run that holds the folder's lock, as its file says; None without one.

    Raises OSError when the file cannot be read.
    """
    return _owner(folder / NAME).get("run")


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write to the output folder {folder}: {error.strerror}. "
        "Remedy: choose another one with `out`, or mend its permissions or free space"
    )


def _sign(handle: int, run: str) -> None:
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "run": run,
    }
    os.ftruncate(handle, 0)
    text, place = json.dumps(owner).encode(), 0
    while place < len(text):
        place += os.pwrite(handle, text[place:], place)
    os.fsync(handle)


def _acquire(path: Path) -> int:
    while True:
        handle = _open(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise _refusal(path, _patient_owner(path)) from None
            if error.errno not in _UNSUPPORTED:
                raise
            return _acquire_by_text(path)
        if _same_file(handle, path):  # else its holder has just left and removed it
            return handle
        os.close(handle)


def _open(path: Path) -> int:
    """Open or create the lock's file: never what a link leads to, which would be overwritten."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_file(path) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _no_file(path)
    return handle


def _no_file(path: Path) -> OutputError:
    return OutputError(
        f"the lock {path} must be a regular file; it is a link, a folder or a device. "
        "Remedy: look who put it there, and remove it"
    )


def _acquire_by_text(path: Path) -> int:
    owner = _owner(path)
    if owner and not _is_dead(owner):
        raise _refusal(path, owner)
    # Opened anew: whoever replaces the file next no longer finds this run's id in it.
    temporary = path.with_name(f"{path.name}-{uuid.uuid4().hex[:8]}.tmp")
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    os.replace(temporary, path)
    return handle


def _same_file(handle: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _patient_owner(path: Path) -> dict[str, Any]:
    for _ in range(20):  # it may have taken the lock and not written its name yet
        if owner := _owner(path):
            return owner
        time.sleep(0.05)
    return {}


def _started(pid: int) -> float:
    """When a process began, in seconds since the system did: clocks of the wall are set at times.

    Raises psutil.NoSuchProcess without such a process.
    """
    boot = psutil.boot_time()  # first, for psutil before 7 adds the last answer of this
    return psutil.Process(pid).create_time() - boot


def _is_dead(owner: dict[str, Any]) -> bool:
    if owner.get("host") != socket.gethostname():
        return False
    try:
        started = _started(int(owner["pid"]))
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return True
    return abs(started - float(owner.get("started", started))) > 1  # the pid was used again


def _refusal(path: Path, owner: dict[str, Any]) -> LockedError:
    return LockedError(
        f"another job is writing to {path.parent}: host {owner.get('host', 'unknown')}, "
        f"pid {owner.get('pid', 'unknown')}. Remedy: wait for it, or choose another folder with "
        f"`out`; if that job is certainly gone, delete {path}"
    )
