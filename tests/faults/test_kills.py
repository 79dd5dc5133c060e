"""Real SIGKILLs of real processes: driver, teacher actor and decode worker, then a re-run."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.jobs import arguments, digests, environment, repeat_images, run

#: Many small shards, so that a kill falls between and within shards.
OPTIONS = {"shard_size": 16, "input_size": 96}
IMAGES = 160


@pytest.fixture(scope="module")
def data(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repeat_images(sample, tmp_path_factory.mktemp("many"), IMAGES)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed")
    done = run(*arguments(data, out, **OPTIONS))
    assert done.returncode == 0, done.stderr
    return digests(out / "train")


def started(data: Path, out: Path) -> "subprocess.Popen[str]":
    """A job in a session of its own, with a shard or two finished."""
    job = subprocess.Popen(
        arguments(data, out, **OPTIONS),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list((out / "train").glob("shard-*.h5")):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return job


def family(job: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The job's process and all those below it: Ray's servers, the actor, the decode workers."""
    parent = psutil.Process(job.pid)
    return [parent, *parent.children(recursive=True)]


def named(processes: list[psutil.Process], name: str) -> Iterator[psutil.Process]:
    for process in processes:
        try:
            if name in " ".join(process.cmdline()):
                yield process
        except psutil.NoSuchProcess:
            continue


def kill_driver(job: "subprocess.Popen[str]") -> None:
    os.kill(job.pid, signal.SIGKILL)


def killer_of(name: str) -> Callable[["subprocess.Popen[str]"], None]:
    def kill(job: "subprocess.Popen[str]") -> None:
        deadline = time.monotonic() + 60
        while not (found := list(named(family(job), name))):
            assert time.monotonic() < deadline and job.poll() is None, f"no {name} to kill"
        found[0].kill()

    return kill


@pytest.mark.parametrize(
    ("kill", "survives"),
    [
        pytest.param(kill_driver, False, id="driver"),
        pytest.param(killer_of("ray::TeacherActor"), True, id="actor"),
        pytest.param(killer_of("ray::decode_batch"), True, id="decode-worker"),
    ],
)
def test_killed_and_run_again_gives_the_same_bytes(
    data: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    kill: Callable[["subprocess.Popen[str]"], None],
    survives: bool,
) -> None:
    job = started(data, tmp_path)
    processes = family(job)
    # When its server is killed with the driver, Ray's two agents try to tell it so for 60 seconds.
    rays_agents = {process.pid for process in named(processes, "Agent")}
    kill(job)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == (0 if survives else -signal.SIGKILL), output
    ours = [process for process in processes if process.pid not in rays_agents]
    _, alive = psutil.wait_procs(ours, timeout=15)
    assert not alive, "no orphans"
    if survives:
        assert digests(tmp_path / "train") == undisturbed, "the job itself got over it"
    else:
        assert len(digests(tmp_path / "train")) < len(undisturbed), "it was not finished yet"
    again = run(*arguments(data, tmp_path, **OPTIONS))
    assert again.returncode == 0, again.stderr
    assert digests(tmp_path / "train") == undisturbed
    _, alive = psutil.wait_procs(processes, timeout=90)
    assert not alive, "no orphans"


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_job_says_so_and_leaves_no_half_shard(
    data: Path, undisturbed: dict[str, str], tmp_path: Path, which: signal.Signals
) -> None:
    job = started(data, tmp_path)
    processes = family(job)
    job.send_signal(which)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "Stopped. Finished shards are kept; run the same command again" in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive, "no orphans"
    names = {path.name for path in (tmp_path / "train").iterdir()}
    assert not [name for name in names if name.endswith(".tmp") or name == ".lock"]
    for name, digest in digests(tmp_path / "train").items():
        assert undisturbed[name] == digest


def test_a_full_disk_is_said_and_nothing_is_lost(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=130k", "tmpfs", str(out)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs a small file system: root and mount")
    try:
        job = run(*arguments(data, out, **OPTIONS))
        assert job.returncode == 1
        assert "the disk is full" in job.stderr
        assert "Remedy: make room" in job.stderr
        assert "Traceback" not in job.stderr
        kept = [path for path in (out / "train").iterdir() if path.suffix == ".h5"]
        assert any(path.name.startswith("shard-") for path in kept)
        assert not list((out / "train").glob(".*")), "no temporary file, no lock"
        subprocess.run(["mount", "-o", "remount,size=9m", str(out)], check=True)
        assert run(*arguments(data, out, **OPTIONS)).returncode == 0
    finally:
        subprocess.run(["umount", str(out)], check=True)
