"""Where Ray listens, and a job on a cluster that somebody else has started."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.jobs import arguments, config, digests, environment, run
from tokenlabel.annotate.cluster.session import plan_resources, teacher_slots
from tokenlabel.errors import ConfigError

#: Loopback only and without token, for a cluster that just this test uses.
PRIVATE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"}


@pytest.mark.usefixtures("ray_here")
def test_a_local_session_listens_on_the_loopback_interface_only() -> None:
    import ray

    addresses = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Ray ends idle workers at any time
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    addresses.add(connection.laddr.ip.removeprefix("::ffff:"))
    assert addresses == {"127.0.0.1"}
    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]


@pytest.fixture
def head_node(tmp_path: Path) -> Iterator[str]:
    """A cluster of one node, as an administrator starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--head", f"--port={port}", "--include-dashboard=false", "--disable-usage-stats"]
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    command = [*ray, "start", *options, "--num-cpus=2", "--block"]
    log = tmp_path / "head.log"
    with open(log, "w") as output:
        head = subprocess.Popen(command, stdout=output, stderr=output, env=environment() | PRIVATE)
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None, log.read_text()
        time.sleep(0.2)
    yield f"127.0.0.1:{port}"
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    head.terminate()
    head.wait(300)
    _, alive = psutil.wait_procs(family, timeout=300)
    for process in alive:
        process.kill()


def test_a_job_on_a_running_cluster(sample: Path, tmp_path: Path, head_node: str) -> None:
    """The package's code travels with the job; the cluster stays when the job has ended."""
    results = []
    for name in ("one", "two"):
        command = arguments(sample, tmp_path / name, **{"ray-address": head_node})
        done = run(*command, variables=PRIVATE)
        assert done.returncode == 0, done.stdout + done.stderr
        results.append(digests(tmp_path / name / "train"))
    assert len(results[0]) == 5, "two shards, manifest, index, SHA256SUMS"
    assert results[0] == results[1]


def test_no_cluster_at_the_address(sample: Path, tmp_path: Path) -> None:
    done = run(*arguments(sample, tmp_path, **{"ray-address": "127.0.0.1:1"}))
    assert done.returncode == 2
    assert "cannot reach a Ray cluster at 127.0.0.1:1" in done.stderr
    assert "Remedy: `ray_address` is host:port" in done.stderr
    assert "Traceback" not in done.stderr


def test_slots_for_teachers() -> None:
    def node(**resources: float) -> dict[str, Any]:
        return {"Resources": resources}

    assert teacher_slots([node(CPU=8.0), node(CPU=2.0)], 0.0) == 2
    assert teacher_slots([node(GPU=4.0), node(CPU=8.0), node(GPU=1.0)], 1.0) == 5
    assert teacher_slots([node(GPU=1.0)] * 3, 2.0) == 0, "a teacher's GPUs are those of one node"
    assert teacher_slots([node(GPU=1.0)], 0.1) == 10
    assert teacher_slots([node(GPU=2.0)], 0.5) == 4


@pytest.mark.usefixtures("ray_here")
def test_cuda_that_is_not_there_is_refused(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs 2 GPUs a teacher on one node, .* 0 at most"):
        plan_resources(config(sample, tmp_path, device="cuda", gpus_per_teacher=2.0))
