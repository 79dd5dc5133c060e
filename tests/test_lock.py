"""One job at a time on a folder: real processes, a killed holder, a file system without flock."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenlabel.dataset.format.lock import HOLDER, NAME, SOFT, folder_lock, holder
from tokenlabel.errors import LockedError, OutputError

HOLD = """
import sys, time; from pathlib import Path
from tokenlabel.dataset.format.lock import folder_lock
with folder_lock(Path(sys.argv[1])): print("held", flush=True); time.sleep(900)
"""
#: A file system without locks, as Lustre mounted without `flock`: the kernel's call is replaced.
NO_FLOCK = """
import errno, fcntl
def refuse(*_): raise OSError(errno.{0}, "{0}")
fcntl.flock = refuse
"""
REFUSALS = ["ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK"]


def hold(folder: Path, before: str = "") -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", before + HOLD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
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


@pytest.mark.parametrize("make", [a_link, Path.mkdir])
def test_a_lock_that_is_no_file_is_refused_and_left(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("what a link leads to")
    make(tmp_path / NAME)
    with pytest.raises(OutputError, match=rf"cannot write to .*/{NAME}'\. Remedy: "):
        with folder_lock(tmp_path):
            pass
    assert precious.read_text() == "what a link leads to"
    assert os.path.lexists(tmp_path / NAME)


@pytest.mark.parametrize("refusal", ["", *REFUSALS])
def test_a_killed_holder_leaves_no_obstacle(
    tmp_path: Path, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # put back when the test ends
    without = NO_FLOCK.format(refusal) if refusal else ""
    exec(without, {})
    (tmp_path / NAME).touch()  # as a job on another file system has left it
    child = hold(tmp_path, without)
    # Only a lock that is a file can outlive its job.
    end = f"delete {tmp_path / SOFT}$" if refusal else "with `out`$"
    with pytest.raises(LockedError, match=f"pid {child.pid}.* {end}"):
        with folder_lock(tmp_path):
            pass
    child.kill()
    child.communicate()
    assert holder(tmp_path), "it had no time to tidy up"
    with folder_lock(tmp_path) as run:
        assert holder(tmp_path) == run
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_an_exception_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), folder_lock(tmp_path):
        raise RuntimeError
    with folder_lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write to .* Remedy: choose another"):
        with folder_lock(tmp_path / "file" / "labels"):
            pass
