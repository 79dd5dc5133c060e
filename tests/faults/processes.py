"""Jobs and clusters as processes of their own, for tests that kill them and look who is left."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from tests.jobs import arguments, environment

#: Many small shards, so that a kill falls between and within shards.
OPTIONS = {"shard_size": 16, "input_size": 96}
IMAGES = 300
#: Loopback only and without token, for a cluster that just one test uses.
PRIVATE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}
ACTOR, DECODER = "ray::TeacherActor", "ray::decode_batch"
#: Seconds: long enough for a machine that does many other things.
PATIENCE = 240


class Job:
    """A job, as a process in a session of its own; its output goes to a file.

    Args:
        data: the data set.
        out: the job's `out`.
        variables: set in its environment.
        options: of the command line, beside those of tests/jobs.py.
    """

    def __init__(
        self,
        data: Path | str,
        out: Path | str,
        variables: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.folder = Path(out) / "train"
        beside = Path(tempfile.mkdtemp()) if "://" in str(out) else self.folder.parent.parent
        self._log = beside / f"{self.folder.parent.name}-{time.monotonic_ns()}.log"
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                arguments(data, out, **options),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment() | (variables or {}),
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill it, unless it has ended."""
        self.process.kill()
        self.process.wait()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def shards(self) -> list[Path]:
        """The folder's finished shards."""
        return sorted(self.folder.glob("shard-*.h5"))

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(PATIENCE)

    def wait_for_shard(self) -> None:
        """Until one shard more is there than now, or the job has ended."""
        before, deadline = len(self.shards()), time.monotonic() + PATIENCE
        while self.running and len(self.shards()) == before:
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def family(self) -> list[psutil.Process]:
        """Its process and all those below it: Ray's servers, the actor, the decode workers."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def find(
        self, name: str, among: Callable[[], list[psutil.Process]] | None = None
    ) -> list[psutil.Process]:
        """Those of its family (or `among`) with this name; none only when the job has ended."""
        deadline = time.monotonic() + PATIENCE
        while self.running:
            if found := named((among or self.family)(), name):
                return found
            assert time.monotonic() < deadline, self.output
        return []


class Cluster:
    """Nodes of one Ray cluster, in processes of their own: see tests/faults/cluster.py.

    Attributes:
        address: of the head node.
        nodes: the raylets of the other nodes; a raylet stands for its node.
    """

    def __init__(self, nodes: int = 1, gpus: int = 0) -> None:
        self._count, self._gpus = nodes, gpus

    def __enter__(self) -> Self:
        self._host = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.cluster", str(self._gpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment() | PRIVATE,
        )
        self.address: str = self._answer()
        self.nodes: list[psutil.Process] = []
        for _ in range(self._count):
            self.add()
        return self

    def __exit__(self, *_: object) -> None:
        left = self._family()
        assert self._host.stdin and self._host.stdout
        self._host.stdin.close()
        self._host.wait(PATIENCE)
        self._host.stdout.close()
        for process in psutil.wait_procs(left, timeout=10)[1]:
            process.kill()

    def add(self, dead: psutil.Process | None = None) -> psutil.Process:
        """Start a node more, or in place of one whose raylet was killed."""
        assert self._host.stdin
        self._host.stdin.write(f"{dead.pid if dead else 0}\n")
        self._host.stdin.flush()
        self.nodes.append(psutil.Process(self._answer()))
        if dead:
            self.nodes.remove(dead)
        return self.nodes[-1]

    def lose(self, node: psutil.Process) -> None:
        """Kill everything on a node at once, as a power failure does."""
        for process in [node, *node.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def workers(self, below: psutil.Process | None = None) -> list[psutil.Process]:
        """Processes that run code of jobs, of all nodes or of one.

        A node has idle ones ready from its start, which stay until a job wants them.
        """
        processes = below.children(recursive=True) if below else self._family()
        mine = (title(process) for process in processes)
        return [
            process
            for process, name in zip(processes, mine, strict=True)
            if "ray::" in name and "Agent" not in name and "ray::IDLE" not in name
        ]

    def _family(self) -> list[psutil.Process]:
        return psutil.Process(self._host.pid).children(recursive=True)

    def _answer(self) -> Any:
        assert self._host.stdout
        return json.loads(self._host.stdout.readline())


def leftovers(folder: Path) -> list[str]:
    """Hidden files, which a job must not leave behind; the lock's own file is none of them."""
    return [path.name for path in folder.glob(".*") if path.name != ".lock"]


def title(process: psutil.Process) -> str:
    """Its command line, which Ray sets to what a worker does; empty when it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def named(processes: Iterable[psutil.Process], name: str) -> list[psutil.Process]:
    """Those whose title holds `name`."""
    return [process for process in processes if name in title(process)]


def assert_gone(processes: Sequence[psutil.Process], seconds: float = PATIENCE) -> float:
    """Wait until all have ended; after how many seconds they had."""
    begin = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive, f"no orphans: {[(process, title(process)) for process in alive]}"
    return time.monotonic() - begin
