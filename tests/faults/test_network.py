"""The default run needs no network, tries none, and writes where it should."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ALONE = Path(__file__).with_name("alone.py")
#: The first steps of the README, and an epoch of reading with two workers.
TRAINING = """
from torch.utils.data import DataLoader
from tokenlabel.dataset import TokenLabelDataset, train_transform

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

Observed = Callable[[str, int, str, str], None]


@pytest.fixture
def box() -> Iterator[Path]:
    """A home, a temporary and a working folder, and nothing else; a short path, for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="alone-", dir="/tmp"))
    for name in ("home", "tmp", "work"):
        (folder / name).mkdir()
    yield folder
    shutil.rmtree(folder)


def unshared(box: Path, world: str, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a network of its own; skips where this is not allowed."""
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("needs a network namespace: root, or user namespaces")
    if world == "nowhere" and not os.access("/dev/net/tun", os.W_OK):
        pytest.skip("needs /dev/net/tun")
    settings = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(box / "home"),
        "TMPDIR": str(box / "tmp"),
        "LANG": "C.UTF-8",
    }
    return subprocess.run(
        [*unshare, sys.executable, str(ALONE), str(box / "sent.json"), world, *command],
        cwd=box / "work",
        env=settings,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )


def traced(box: Path, *command: str) -> tuple[str, ...]:
    """The command under strace, which notes network calls and files written of all processes."""
    calls = ",".join((*TRIES, *WRITES))
    options = ["-f", "-qq", "-y", "-s", "256", "--seccomp-bpf", "-e", f"trace={calls}"]
    return ("strace", *options, "-o", str(box / "trace"), *command)


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


def files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def test_an_attempt_would_be_seen(box: Path) -> None:
    """A connection, a datagram and a look-up of a name, none of which gets through."""
    attempts = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "try: socket.create_connection(('203.0.113.1', 80), 0.2)\n"
        "except OSError: pass\n"
        "s.sendto(b'', ('203.0.113.2', 53))\n"
        "s.connect(('203.0.113.3', 53))\n"
        "open('/tmp/x' if 0 else 'here', 'w').close()\n"
    )
    command = (sys.executable, "-c", attempts)
    strace = shutil.which("strace") is not None
    done = unshared(box, "nowhere", *(traced(box, *command) if strace else command))
    assert done.returncode == 0, done.stderr
    assert set(json.loads((box / "sent.json").read_text())) == {"203.0.113.1", "203.0.113.2"}
    if strace:
        trace = (box / "trace").read_text()
        text = "\n".join(outside(trace))
        # The third sends no packet: connecting a datagram socket only looks a route up.
        assert all(f"203.0.113.{number}" in text for number in (1, 2, 3))
        assert str(box / "work" / "here") in written(trace, box / "work")


@pytest.mark.parametrize("world", ["loopback", "nowhere"])
def test_the_default_run_tries_no_network(
    box: Path, world: str, soak: bool, observed: Observed
) -> None:
    strace = shutil.which("strace") is not None
    if world == "nowhere" and strace and not soak:
        pytest.skip("the long form: strace sees more")
    (box / "work" / "training.py").write_text(TRAINING)
    command = ("sh", "-c", " && ".join(COMMANDS))
    strace = strace and world == "loopback"
    done = unshared(box, world, *(traced(box, *command) if strace else command))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16, 0 of them without a map" in done.stdout
    assert "torch.Size([8, 16])" in done.stdout
    assert json.loads((box / "sent.json").read_text()) == {}, "no packet left the machine"
    assert {path.name for path in (box / "work").iterdir()} == {"data", "labels", "training.py"}
    assert files(box / "home") == [".ray/auth_token"]
    kept = {path.name.partition("_")[0] for path in (box / "tmp").iterdir()}
    assert kept <= {"ray", "torchinductor"}
    seen = "done, no packet left"
    if strace:
        trace = (box / "trace").read_text()
        assert outside(trace) == []
        tries = sum(f" {call}(" in line for line in trace.splitlines() for call in TRIES)
        paths = written(trace, box / "work")
        allowed = re.compile(rf"{re.escape(str(box))}/|/dev/(null|shm/|tty$)|/proc/\d+/")
        assert [path for path in paths if not allowed.match(path)] == []
        seen = (
            f"done; {tries:,} connect, bind and send calls, all to this machine; "
            f"{len(paths):,} files written, outside data/, labels/ and temporary folders only "
            "~/.ray/auth_token"
        )
    worlds = {
        "loopback": "only a loopback interface",
        "nowhere": "a default route to nowhere, its packets counted",
    }
    observed(
        f"annotate, inspect-labels, a training read with {worlds[world]}",
        1,
        "all done, nothing tried",
        seen,
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
