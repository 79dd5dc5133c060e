"""Real signals to the processes of a job that runs on this machine alone, then a re-run."""

import signal
from pathlib import Path

import pytest

from tests.faults.processes import ACTOR, DECODER, OPTIONS, Job, assert_gone, leftovers, named
from tests.jobs import arguments, digests, run
from tokenlabel.dataset.format.sums import file_sha256, read_sums


def test_killed_and_run_again_gives_the_same_bytes(
    many_images: Path, undisturbed: dict[str, str], tmp_path: Path, soak: bool
) -> None:
    """First its only teacher, then a decode worker, then the driver."""
    job = Job(many_images, tmp_path / "labels", **OPTIONS)
    for name in (ACTOR, DECODER):
        job.wait_for_shard()
        victim = job.find(name)[0]
        victim.kill()
        assert_gone([victim])
    job.wait_for_shard()
    assert job.running, job.output
    processes = job.family()
    # When its server is killed with the driver, Ray's two agents try to tell it so for 60 seconds.
    rays_agents = named(processes, "Agent")
    job.process.kill()
    assert job.wait() == -signal.SIGKILL, job.output
    assert_gone([process for process in processes if process not in rays_agents])
    assert len(digests(job.folder)) < len(undisturbed), "it was not finished yet"
    again = run(*arguments(many_images, tmp_path / "labels", **OPTIONS))
    assert again.returncode == 0, again.stderr
    assert digests(job.folder) == undisturbed
    if soak:
        assert_gone(rays_agents)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_job_says_so_and_leaves_no_half_shard(
    many_images: Path, undisturbed: dict[str, str], tmp_path: Path, which: signal.Signals
) -> None:
    job = Job(many_images, tmp_path / "labels", **OPTIONS)
    job.wait_for_shard()
    assert job.running, job.output
    processes = job.family()
    job.process.send_signal(which)
    assert job.wait() == 130
    assert "Stopped. Finished shards are kept; run the same command again" in job.output
    assert "Traceback" not in job.output
    assert_gone(processes)
    assert not leftovers(job.folder)
    assert read_sums(job.folder).items() <= undisturbed.items()
    for shard in job.shards():
        assert undisturbed[shard.name] == file_sha256(shard)
