"""Where Ray listens, and a job on a cluster that somebody else has started."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.jobs import arguments, digests, environment, run

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
    address = "127.0.0.1:6397"
    options = ["--head", "--port=6397", "--include-dashboard=false", "--disable-usage-stats"]
    command = [Path(sys.executable).with_name("ray"), "start", *options, "--num-cpus=2", "--block"]
    log = tmp_path / "head.log"
    with open(log, "w") as output:
        head = subprocess.Popen(command, stdout=output, stderr=output, env=environment() | PRIVATE)
    deadline = time.monotonic() + 90
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    yield address
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    head.terminate()
    head.wait(60)
    _, alive = psutil.wait_procs(family, timeout=60)
    for process in alive:
        process.kill()


def test_a_job_on_a_running_cluster(sample: Path, tmp_path: Path, head_node: str) -> None:
    """The package's code travels with the job; the cluster stays when the job has ended."""
    results = []
    for name in ("one", "two"):
        command = arguments(sample, tmp_path / name, **{"ray-address": head_node})
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=200,
            env=environment() | PRIVATE,
            check=False,
        )
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
