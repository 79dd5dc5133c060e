"""One job at a time on a folder: real processes, a killed holder, a file system without flock."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenlabel.dataset.format.lock import NAME, folder_lock, holder
from tokenlabel.errors import LockedError, OutputError

HOLD = (
    "import sys, time; from pathlib import Path\n"
    "from tokenlabel.dataset.format.lock import folder_lock\n"
    "with folder_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def hold(folder: Path) -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout and child.stdout.readline() == "held\n"
    return child


def test_the_second_job_is_told_host_and_pid(tmp_path: Path) -> None:
    child = hold(tmp_path / "new" / "folder")
    try:
        with pytest.raises(LockedError, match=f"host {socket.gethostname()}, pid {child.pid}"):
            with folder_lock(tmp_path / "new" / "folder"):
                pass
    finally:
        child.kill()
        child.communicate()


def a_link(path: Path) -> None:
    path.symlink_to(path.with_name("precious"))


@pytest.mark.parametrize("make", [a_link, os.mkfifo, Path.mkdir])
def test_a_lock_that_is_no_file_is_refused_and_left(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("what a link leads to")
    make(tmp_path / NAME)
    with pytest.raises(OutputError, match=r"must be a regular file.* Remedy: look who"):
        with folder_lock(tmp_path):
            pass
    assert precious.read_text() == "what a link leads to"
    assert os.path.lexists(tmp_path / NAME)


def test_a_killed_holder_leaves_no_obstacle(tmp_path: Path) -> None:
    child = hold(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert (tmp_path / NAME).exists()
    with folder_lock(tmp_path) as run:
        assert holder(tmp_path) == run
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / NAME).exists()
    assert holder(tmp_path) is None


def test_an_exception_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), folder_lock(tmp_path):
        raise RuntimeError
    with folder_lock(tmp_path):
        pass


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, as some parallel ones are: only the kernel call is replaced."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_flock")
def test_without_kernel_locks_the_text_decides(tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(LockedError, match=f"pid {os.getpid()}"):
        with folder_lock(tmp_path):
            pass
    child = hold(tmp_path)  # a process that is alive, on this host
    with pytest.raises(LockedError, match=f"pid {child.pid}"), folder_lock(tmp_path):
        pass
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with folder_lock(tmp_path) as run:
        assert holder(tmp_path) == run
    owner = {"host": "elsewhere", "pid": 1, "started": 0.0, "run": "r"}
    (tmp_path / NAME).write_text(json.dumps(owner))
    with pytest.raises(LockedError, match=r"host elsewhere, pid 1\. .* delete "):
        with folder_lock(tmp_path):
            pass
    owner |= {"host": socket.gethostname(), "pid": os.getpid()}
    (tmp_path / NAME).write_text(json.dumps(owner))
    with folder_lock(tmp_path):
        pass  # this pid was another process's when the file was written


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write to .* Remedy: choose another"):
        with folder_lock(tmp_path / "file" / "labels"):
            pass
    with pytest.raises(OutputError, match="cannot write to the output folder"):
        with folder_lock(Path("/proc/labels")):
            pass
