"""One job at a time on an output folder.

filelock's lock on `.lock` decides: the kernel frees it when its process ends, however it ends. The
empty file stays: removing it could free a folder that somebody else has just locked.

A folder in a store is locked by the object `.lock.json`, stored on the condition that it is new, or
unchanged since it was looked at, so that of two jobs one wins. Its job renews it; without that, it
is taken over.
"""

import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from ...errors import LockedError, OutputError, StoreError
from ..storage.remote_path import AnyPath, RemotePath
from .files import TEMPORARY, replacing

NAME = ".lock"
#: Decides where the file system has no kernel locks (Lustre mounted without `flock`, say). It is
#: there while a job runs; that of a killed job is taken over by the next one on the same host.
SOFT = ".lock.soft"
#: Beside the lock: host, process and run that hold it.
HOLDER = ".lock.json"
#: Seconds after which an object that locks is renewed, and after which it is taken over.
RENEWED, STALE = 30.0, 120.0
_NO_KERNEL_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)

_log = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: AnyPath) -> Iterator[str]:
    """Create `folder`, hold its lock during the `with` block, and yield the run's id.

    Raises:
        LockedError: another job holds it; names that job's host and pid.
        OutputError: the folder cannot be created or written.
        StoreError: the store of the folder refuses.
    """
    if isinstance(folder, RemotePath):
        with _object_lock(folder) as run:
            yield run
        return
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


@contextmanager
def _object_lock(folder: RemotePath) -> Iterator[str]:
    run, path, ended = uuid.uuid4().hex, folder / HOLDER, threading.Event()
    owner: dict[str, Any]
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": run}

    def store(number: int, etag: str | None) -> str:
        """Store the object in place of the one with this etag; FileExistsError if it is another's.

        The number makes each renewal another object, with an etag of its own.
        """
        owner["renewals"] = number
        try:
            return path.put(json.dumps(owner).encode(), create=etag is None, match=etag)
        except FileExistsError:
            # A request whose answer was lost may have been stored, now or by the time of the next.
            if (found := _read(folder)).get("run") != run:
                raise LockedError(_locked(folder, found, None)) from None
            return str(path.facts()["e_tag"])

    def renew(etag: str) -> None:
        number = 0
        while not ended.wait(RENEWED):
            number += 1
            try:
                etag = store(number, etag)
            except LockedError as error:
                _log.error("the lock is lost, no shard is written any more: %s", error)
                return
            except (OSError, StoreError) as error:
                _log.warning("the lock cannot be renewed: %s", error)

    try:
        etag = store(0, None)
    except LockedError:
        etag = store(0, _stale(folder))
    thread = threading.Thread(target=renew, args=(etag,), daemon=True)
    thread.start()
    try:
        yield run
    except StoreError:
        ended.set()  # each further request would fail as slowly; the lock goes stale
        raise
    except BaseException:
        _free(folder, run, ended, thread)
        raise
    _free(folder, run, ended, thread)


def _free(folder: RemotePath, run: str, ended: threading.Event, thread: threading.Thread) -> None:
    ended.set()
    thread.join()
    with suppress(OSError, StoreError):
        if holder(folder) == run:
            (folder / HOLDER).unlink()


def _stale(folder: RemotePath) -> str | None:
    """Etag of the object that locks, which may be taken over; None where it has gone meanwhile.

    Raises LockedError while its job may live.
    """
    path = folder / HOLDER
    try:
        facts = path.facts()
    except FileNotFoundError:
        return None
    other = _read(folder)
    if other.get("host") == socket.gethostname() and _has_ended(other.get("pid")):
        return str(facts["e_tag"])
    # By the store's own clock: those of two machines may differ by minutes.
    clock = folder / f".clock-{uuid.uuid4().hex}{TEMPORARY}"
    clock.put(b"now")
    age = (clock.facts()["last_modified"] - facts["last_modified"]).total_seconds()
    clock.unlink()
    if age < STALE:
        raise LockedError(_locked(folder, other, age))
    return str(facts["e_tag"])


def _has_ended(pid: object) -> bool:
    """Whether no process of this machine has this number."""
    if not isinstance(pid, int) or not hasattr(os, "getuid"):  # Windows would end the process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _locked(folder: RemotePath, other: dict[str, Any], age: float | None) -> str:
    when = "just now" if age is None else f"{max(age, 0):.0f} seconds ago"
    left = max(STALE - (age or 0), 0)
    return (
        f"another job is writing to {folder}: host {other.get('host', 'unknown')}, "
        f"pid {other.get('pid', 'unknown')}, which renewed its lock {when}. Remedy: wait for it, "
        f"or choose another folder with `out`; if it has ended, its lock may be taken over in "
        f"{left:.0f} seconds"
    )


def check_holder(folder: AnyPath, run: str) -> None:
    """Raise LockedError unless a run still holds the lock of its folder."""
    if (found := holder(folder)) != run:
        what = "belongs to another job now" if found else "was deleted"
        raise LockedError(
            f"a job must hold the lock of its folder: the one in {folder} {what}. "
            "Finished shards are kept. Remedy: see that no other job writes there, and run "
            "the same command again"
        )


def holder(folder: AnyPath) -> str | None:
    """Id of the run that holds the folder's lock, by the file beside it; None without one.

    Raises OSError when the file cannot be read.
    """
    run = _read(folder).get("run")
    return run if isinstance(run, str) else None


def _read(folder: AnyPath) -> dict[str, Any]:
    try:
        owner = json.loads((folder / HOLDER).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}
