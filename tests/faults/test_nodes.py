"""Nodes with simulated GPUs: work spreads, new nodes are used, shards of dead ones redone.

Ray believes the number of GPUs that a node is started with. Without CUDA the teachers compute on
the CPU, so the labels must be those of a job on one machine without GPUs, to the byte.
"""

import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.processes import PATIENCE, PRIVATE, Cluster, Job
from tests.faults.table import Observed, Rounds
from tests.jobs import arguments, config, digests, repeat_images, run
from tokenlabel.annotate import annotate
from tokenlabel.errors import JobError

HERE = Path(__file__).parent
_UNFINISHED = re.compile(r"\.(shard-\d+-of-\d+\.h5)\..*-(\d+)-[0-9a-f]+\.tmp")


class NodesJob(Job):
    """A job of slow teachers on a cluster, and which node's teacher made which shard."""

    def __init__(self, data: Path, out: Path, teacher: dict[str, Any], cluster: Cluster) -> None:
        self._slow = Path(teacher["model"].partition(":")[0]).with_name("slow")
        self._slow.touch()
        super().__init__(data, out, PRIVATE, **teacher, ray_address=cluster.address)
        self._owners: dict[int, int] = {}  # raylets of the teachers, by pid
        self.under_way: dict[str, int] = {}  # the node of each shard's last temporary file
        self.made: dict[str, int] = {}  # of those that are finished
        self.teachers: set[int] = set()  # their processes

    def look(self) -> None:
        """Note who has temporary files now, and whose shards have been finished."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        for name in names:
            if found := _UNFINISHED.fullmatch(name):
                shard, pid = found[1], int(found[2])
                with suppress(psutil.NoSuchProcess):
                    self._owners.setdefault(pid, psutil.Process(pid).ppid())
                    self.under_way[shard] = self._owners[pid]
                    self.teachers.add(pid)
        for name in set(names) & self.under_way.keys():
            self.made[name] = self.under_way.pop(name)

    def forget(self, node: int) -> set[str]:
        """The shards that a dead node has left unfinished."""
        self.look()
        lost = {shard for shard, maker in self.under_way.items() if maker == node}
        for shard in lost:
            del self.under_way[shard]
        return lost

    def watch(self, until: Callable[[], bool], what: str) -> None:
        """Look until something is so; fails when the job ends before."""
        deadline = time.monotonic() + PATIENCE
        while self.look() or not until():
            assert self.running, f"ended before {what}: {self.output}"
            assert time.monotonic() < deadline, f"not seen: {what}: {self.output}"
            time.sleep(0.02)

    def finish(self) -> dict[str, Any]:
        """Let it run at full speed to its end; its report."""
        self._slow.unlink()
        assert self.wait() == 0, self.output
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return report


@pytest.fixture
def teacher(tmp_path: Path) -> dict[str, Any]:
    """Options of a job with two batches a shard, whose teacher is a file of the test's own."""
    file = shutil.copy(HERE / "own_teacher.py", tmp_path)
    small = {"input_size": 32, "k": 5, "batch_size": 2, "shard_size": 4, "numbering": "folders"}
    return {"model": f"{file}:build", "weights": "pretrained", **small}


def test_nodes_join_and_die_under_a_job(
    sample: Path, tmp_path: Path, teacher: dict[str, Any], rounds: Rounds, observed: Observed
) -> None:
    times = rounds(1, 4)
    data = repeat_images(sample, tmp_path / "many", 160 + 80 * times)
    done = run(*arguments(data, tmp_path / "plain", **teacher))
    assert done.returncode == 0, done.stderr
    choose, redone = random.Random(6), 0
    with (
        Cluster(nodes=2, gpus=1) as cluster,
        NodesJob(data, tmp_path / "labels", teacher, cluster) as job,
    ):
        job.watch(lambda: len(set(job.made.values())) == 3, "shards of all three nodes")
        for _ in range(times):
            victim = choose.choice(cluster.nodes)
            job.watch(lambda v=victim.pid: v in job.under_way.values(), "the victim at work")
            cluster.lose(victim)
            redone += len(job.forget(victim.pid))
            new = cluster.add(victim)
            job.watch(lambda n=new.pid: n in job.made.values(), "a shard of the node that joined")
        report = job.finish()
    assert redone >= times, "nodes died over their work"
    assert (report["ok"], report["failed"]) == (True, {})
    assert report["lost_actors"] >= times
    assert digests(job.folder) == digests(tmp_path / "plain" / "train")
    assert "torch finds none there" in " ".join(job.output.split()), "no CUDA is no secret"
    observed(
        "a node of three dies with the shards it works on, another joins",
        times,
        "the others redo its shards, the new one works too; same bytes as on one node",
        f"{redone} shards redone, {times} of {times} new nodes used; {len(job.made)} shards "
        f"made by {len(set(job.made.values()))} nodes; same bytes",
    )


def test_a_node_without_gpus_joins(
    sample: Path, tmp_path: Path, teacher: dict[str, Any], soak: bool, observed: Observed
) -> None:
    if not soak:
        pytest.skip("half a minute for what nodes with GPUs show too: `make soak` runs it")
    data = repeat_images(sample, tmp_path / "many", 160)
    with Cluster(nodes=0) as cluster, NodesJob(data, tmp_path / "out", teacher, cluster) as job:
        job.watch(lambda: bool(job.made), "a shard")
        cluster.add()
        # Not on which node: without GPUs the node is a wish, which Ray may not fulfil.
        job.watch(lambda: len(job.teachers) == 2, "shards in the hands of two teachers")
        report = job.finish()
    assert (report["images"], report["errors"], report["lost_actors"]) == (160, 0, 0)
    observed(
        "a node without GPUs joins",
        1,
        "a second teacher",
        f"{len(job.teachers)} teachers worked on {report['shards']} shards",
    )


@pytest.mark.usefixtures("ray_here")
def test_teachers_with_different_weights_are_refused(
    sample: Path, tmp_path: Path, teacher: dict[str, Any]
) -> None:
    data = repeat_images(sample, tmp_path / "many", 160)
    teacher["model"] += "_another_each_time"
    (tmp_path / "slow").touch()  # so that the second teacher starts before the first has done all
    with pytest.raises(JobError, match=r"two teachers have different weights: .* Remedy: give"):
        annotate(config(data, tmp_path / "out", teachers=2, **teacher))


def benchmark(*options: str) -> list[list[str]]:
    """The cells of the rows that benchmarks/scaling.py prints, without the head."""
    done = run(sys.executable, str(HERE.parents[1] / "benchmarks" / "scaling.py"), *options)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_memory_of_the_driver_an_image(soak: bool, observed: Observed) -> None:
    """What does not grow with the images counts too, so the quick form is the harder one."""
    images = 1_000_000 if soak else 300_000
    parts = ("scan-single", "scan-classes", "check", "unfinished", "pool", "index", "store")
    chosen = parts if soak else ("scan-classes", "unfinished", "index", "store")
    rows = benchmark("memory", "--images", str(images), "--parts", *chosen)
    assert len(rows) == len(chosen)
    used = {row[1]: float(row[-1]) for row in rows}
    assert max(used.values()) <= 64, used
    worst = max(used, key=lambda part: used[part])
    observed(
        f"{images:,} images, listing simulated: memory of the driver and of a reader",
        len(rows),
        "at most 64 bytes an image in each part",
        f"at most {used[worst]:.0f} ({worst})",
    )
