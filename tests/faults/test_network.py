"""The default run needs no network, tries none, and writes where it should."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.table import Observed

#: Brings the loopback interface up (linux/sockios.h, linux/if.h), for there may be no `ip` to do
#: it, then runs the command in the arguments.
ALONE = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", b"lo", 1 | 64))
os.execvp(sys.argv[1], sys.argv[1:])
"""
#: The first steps of the README, and an epoch of reading with two workers.
TRAINING = """
from torch.utils.data import DataLoader
from tokenlabel import TokenLabelDataset, train_transform

if __name__ == "__main__":
    data = TokenLabelDataset("data/sample/train", "labels/train", transform=train_transform(64))
    for images, labels in DataLoader(data, batch_size=8, num_workers=2):
        print(len(images), labels.targets(4).weight.shape)
"""
PYTHON = shlex.quote(sys.executable)
COMMANDS = (
    f"{PYTHON} -m tokenlabel.cli annotate --config sample --split train",
    f"{PYTHON} -m tokenlabel.cli inspect-labels",
    f"{PYTHON} training.py",
)
TRIES = ("connect", "bind", "sendto", "sendmsg", "sendmmsg")
WRITES = ("open", "openat", "creat", "mkdir", "mkdirat", "rename", "renameat", "renameat2")


@pytest.fixture
def box() -> Iterator[Path]:
    """A home, a temporary and a working folder, and nothing else; a short path, for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="alone-", dir="/tmp"))
    for name in ("home", "tmp", "work"):
        (folder / name).mkdir()
    yield folder
    shutil.rmtree(folder)


def traced(box: Path, *command: str) -> "tuple[subprocess.CompletedProcess[str], str]":
    """Run a command where there is only a loopback interface; it, and its trace.

    The trace has the network calls and the files written of all its processes. Skips where this
    is not allowed.
    """
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("needs a network namespace: root, or user namespaces")
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    calls = ",".join((*TRIES, *WRITES))
    strace = ["strace", "-f", "-qq", "-y", "-s", "256", "--seccomp-bpf", "-e", f"trace={calls}"]
    settings = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(box / "home"),
        "TMPDIR": str(box / "tmp"),
        "LANG": "C.UTF-8",
    }
    done = subprocess.run(
        [*unshare, sys.executable, "-c", ALONE, *strace, "-o", str(box / "trace"), *command],
        cwd=box / "work",
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, (box / "trace").read_text()


def outside(trace: str) -> list[str]:
    """Calls that named an address that is not this machine's own."""
    address = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')
    own = re.compile(r"127\.|::1$|::ffff:127\.")
    return [
        line
        for line in trace.splitlines()
        for found in address.finditer(line)
        if not own.match(found[1] or found[2])
    ]


def written(trace: str, working: Path) -> set[str]:
    """Paths that were created or opened for writing, or tried to be, from `working` on."""
    found = set()
    for line in trace.splitlines():
        call = re.search(r" (\w+)\((?:AT_FDCWD<([^>]*)>, )?(\"[^\"]*\".*)", line)
        if call is None or call[1] not in WRITES:
            continue
        if call[1] in ("open", "openat") and not re.search("O_WRONLY|O_RDWR|O_CREAT", call[3]):
            continue
        paths = re.findall(r'"([^"]*)"', call[3])
        found |= {os.path.normpath(Path(call[2] or working, path)) for path in paths if path}
    return found


def test_an_attempt_would_be_seen(box: Path) -> None:
    """A connection, a datagram and a look-up of a name, none of which gets through."""
    attempts = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for attempt in (\n"
        "    lambda: socket.create_connection(('203.0.113.1', 80), 0.2),\n"
        "    lambda: s.sendto(b'', ('203.0.113.2', 53)),\n"
        "    lambda: s.connect(('203.0.113.3', 53)),\n"
        "):\n"
        "    try: attempt()\n"
        "    except OSError: pass\n"
        "open('here', 'w').close()\n"
    )
    done, trace = traced(box, sys.executable, "-c", attempts)
    assert done.returncode == 0, done.stderr
    text = "\n".join(outside(trace))
    assert all(f"203.0.113.{number}" in text for number in (1, 2, 3))
    assert str(box / "work" / "here") in written(trace, box / "work")


def test_the_default_run_tries_no_network(box: Path, observed: Observed) -> None:
    (box / "work" / "training.py").write_text(TRAINING)
    done, trace = traced(box, "sh", "-c", " && ".join(COMMANDS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16, 0 of them without a map" in done.stdout
    assert "torch.Size([8, 16])" in done.stdout
    assert {path.name for path in (box / "work").iterdir()} == {"data", "labels", "training.py"}
    home = [path.relative_to(box) for path in (box / "home").rglob("*") if path.is_file()]
    assert home == [Path("home/.ray/auth_token")]
    kept = {path.name.partition("_")[0] for path in (box / "tmp").iterdir()}
    assert kept <= {"ray", "torchinductor"}
    assert outside(trace) == []
    tries = sum(f" {call}(" in line for line in trace.splitlines() for call in TRIES)
    paths = written(trace, box / "work")
    allowed = re.compile(rf"{re.escape(str(box))}/|/dev/(null|shm/|tty$)|/proc/\d+/")
    assert [path for path in paths if not allowed.match(path)] == []
    observed(
        "annotate, inspect-labels, a training read with only a loopback interface",
        1,
        "all done, nothing tried",
        f"done; {tries:,} connect, bind and send calls, all to this machine; "
        f"{len(paths):,} files written, outside data/, labels/ and temporary folders only "
        "~/.ray/auth_token",
    )


@pytest.mark.usefixtures("ray_here")
def test_ray_runs_without_dashboard_and_statistics() -> None:
    """The process of Ray's dashboard asks the clouds which of them this is, statistics or not."""
    names = []
    for process in psutil.Process().children(recursive=True):
        command = " ".join(process.cmdline())
        if "gcs_server" in command or "raylet" in command:
            names.append(process.name())
            assert process.environ()["RAY_USAGE_STATS_ENABLED"] == "0"
        assert "dashboard.py" not in command
    assert {"gcs_server", "raylet"} <= {*names}
