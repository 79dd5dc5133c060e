"""Several nodes with made-up GPUs: work spreads, a node that joins is used, one that dies is not.

Ray believes the number of GPUs that a node is started with. Without CUDA the teachers compute on
the CPU, so the labels must be those of a job on one machine without GPUs, to the byte.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.jobs import config, digests, environment, repeat_images
from tokenlabel.annotate import annotate
from tokenlabel.annotate.cluster import actor
from tokenlabel.annotate.cluster.session import loopback_only, plan_resources, teacher_slots
from tokenlabel.annotate.plan import Identity, Plan
from tokenlabel.annotate.report import Progress
from tokenlabel.errors import ConfigError, JobError

HERE = Path(__file__).parent
#: For the drivers of clusters that are bound to the loopback interface.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
DEADLINE = 300
#: Two batches a shard, and seconds that a slow teacher waits before each.
TINY_SHARDS = {"batch_size": 2, "shard_size": 4}
PAUSE = "1.5"
_UNFINISHED = re.compile(r"\.(shard-\d+-of-\d+\.h5)\..*-(\d+)-[0-9a-f]+\.tmp")


class Nodes:
    """A cluster of nodes with a made-up GPU each; kills whole nodes as a power failure does."""

    def __init__(self, count: int, gpus: int) -> None:
        self._gpus = gpus
        self._cluster = Cluster()
        for _ in range(count):
            self.add()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> int:
        """Start a node; pid of its raylet, which stands for the node here."""
        with loopback_only():
            node = self._cluster.add_node(
                num_cpus=1,
                num_gpus=self._gpus,
                object_store_memory=80 << 20,
                include_dashboard=False,
            )
        return raylet(node)

    def all(self) -> list[int]:
        """The living nodes, the head node first."""
        return [raylet(node) for node in self._cluster.list_all_nodes()]

    def kill(self, pid: int) -> None:
        """SIGKILL everything on the node at once."""
        node = next(n for n in self._cluster.worker_nodes if raylet(n) == pid)
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        for node in [*self._cluster.worker_nodes, self._cluster.head_node]:
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], Nodes]]:
    """`nodes(count, gpus)`: a cluster that ends with the test."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    started: list[Nodes] = []

    def start(count: int, gpus: int) -> Nodes:
        started.append(Nodes(count, gpus))
        return started[-1]

    yield start
    for cluster in started:
        cluster.stop()


class Job:
    """A job in a process of its own, and which node's teacher made which shard."""

    def __init__(self, folder: Path, address: str, data: Path) -> None:
        self.out = folder / "out" / "train"
        self.slow = folder / "slow"
        self.slow.touch()
        self.log = folder / "log"
        options = config(data, folder / "out", **TINY_SHARDS, ray_address=address)
        given = json.dumps(options.model_dump(exclude_defaults=True))
        command = [sys.executable, str(HERE / "slow_job.py"), str(self.slow), PAUSE, given]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment() | LOOPBACK, cwd=HERE.parents[1]
            )
        self._owners: dict[int, int] = {}  # raylets of the teachers, by pid
        self.under_way: dict[str, int] = {}  # the node of each shard's last temporary file
        self.made: dict[str, int] = {}  # of those that are finished
        self.teachers: set[int] = set()  # their processes

    def look(self) -> None:
        """Note who has temporary files now, and whose shards have been finished."""
        names = os.listdir(self.out) if self.out.is_dir() else []
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

    def wait(self, until: Callable[[], bool], what: str) -> None:
        """Look until something is so; fails when the job ends before."""
        deadline = time.monotonic() + DEADLINE
        while self.look() or not until():
            assert self.process.poll() is None, f"ended before {what}: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"not seen: {what}: {self.log.read_text()}"
            time.sleep(0.02)

    def finish(self) -> dict[str, Any]:
        """Let it run at full speed to its end; its report."""
        self.slow.unlink()
        with suppress(AssertionError):
            self.wait(lambda: False, "its end")
        assert self.process.wait(DEADLINE) == 0, self.log.read_text()
        report: dict[str, Any] = json.loads((self.out / "report.json").read_text())
        return report


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[[str, Path], Job]]:
    """`job(address, data)`: a job that ends with the test."""
    started: list[Job] = []

    def start(address: str, data: Path) -> Job:
        started.append(Job(tmp_path, address, data))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGTERM)
            one.process.wait(60)


@pytest.mark.usefixtures("ray_here")
def test_nodes_join_and_die_under_a_job(
    sample: Path,
    tmp_path: Path,
    nodes: Callable[[int, int], Nodes],
    job: Callable[[str, Path], Job],
    rounds: Callable[[int, int], int],
    observed: Callable[[str, int, str, str], None],
) -> None:
    times = rounds(1, 4)
    data = repeat_images(sample, tmp_path / "many", 160 + 80 * times)
    annotate(config(data, tmp_path / "plain", **TINY_SHARDS))
    undisturbed = digests(tmp_path / "plain" / "train")

    cluster = nodes(3, 1)
    head, *others = cluster.all()
    running = job(cluster.address, data)
    running.wait(lambda: {head, *others} <= set(running.made.values()), "shards of all three nodes")
    choose = random.Random(6)
    redone = 0
    for _ in range(times):
        victim = choose.choice(others)
        running.wait(lambda v=victim: v in running.under_way.values(), "the victim at work")
        cluster.kill(victim)
        redone += len(running.forget(victim))
        others.remove(victim)
        others.append(new := cluster.add())
        running.wait(lambda n=new: n in running.made.values(), "a shard of the node that joined")
    report = running.finish()
    assert redone >= times, "nodes died over their work"
    assert (report["ok"], report["failed"]) == (True, {})
    assert report["lost_actors"] >= times
    assert digests(running.out) == undisturbed
    assert "torch finds none there" in running.log.read_text(), "a GPU that is none is no secret"
    observed(
        "a node of three dies with the shards it works on, another joins",
        times,
        "the others redo its shards, the new one works too; same bytes as on one node",
        f"{redone} shards redone, {times} of {times} new nodes used; {len(running.made)} shards "
        f"made by {len(set(running.made.values()))} nodes; same bytes",
    )


@pytest.mark.usefixtures("ray_here")
def test_a_node_without_gpus_joins(
    sample: Path,
    tmp_path: Path,
    nodes: Callable[[int, int], Nodes],
    job: Callable[[str, Path], Job],
    soak: bool,
    observed: Callable[[str, int, str, str], None],
) -> None:
    if not soak:
        pytest.skip("half a minute for what nodes with GPUs show too: `make soak` runs it")
    data = repeat_images(sample, tmp_path / "many", 160)
    cluster = nodes(1, 0)
    running = job(cluster.address, data)
    running.wait(lambda: bool(running.made), "a shard")
    cluster.add()
    # Not on which node: without GPUs the place is a wish, which Ray may not fulfil.
    running.wait(lambda: len(running.teachers) == 2, "shards in the hands of two teachers")
    report = running.finish()
    assert (report["images"], report["errors"], report["lost_actors"]) == (160, 0, 0)
    observed(
        "a node without GPUs joins",
        1,
        "a second teacher",
        f"{len(running.teachers)} teachers worked on {report['shards']} shards",
    )


def benchmark(*arguments: str) -> list[list[str]]:
    """The cells of the rows that benchmarks/scaling.py prints, without the head."""
    command = [sys.executable, str(HERE.parents[1] / "benchmarks" / "scaling.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=HERE.parents[1], check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_memory_of_the_driver_an_image(
    soak: bool, observed: Callable[[str, int, str, str], None]
) -> None:
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


def test_eight_teachers_do_the_work_of_eight(
    soak: bool, observed: Callable[[str, int, str, str], None]
) -> None:
    if not soak:
        pytest.skip("takes minutes and a quiet machine: `make soak` runs it")
    efficiency = {int(row[0]): float(row[2]) for row in benchmark("teachers")}
    assert efficiency[8] >= 0.95, efficiency
    observed(
        "1 to 8 sleeping teachers",
        len(efficiency),
        "efficiency of 8 at least 0.95",
        ", ".join(f"{number}: {value:.3f}" for number, value in efficiency.items()),
    )


def test_slots_for_teachers() -> None:
    def node(**resources: float) -> dict[str, Any]:
        return {"Resources": resources}

    assert teacher_slots([node(CPU=8.0), node(CPU=2.0)], 0.0) == 2
    assert teacher_slots([node(GPU=4.0), node(CPU=8.0), node(GPU=1.0)], 1.0) == 5
    assert teacher_slots([node(GPU=1.0)] * 3, 2.0) == 0, "a teacher's GPUs are those of one node"
    assert teacher_slots([node(GPU=1.0)], 0.1) == 10
    assert teacher_slots([node(GPU=2.0)], 0.5) == 4


class OddDevice(actor.TeacherActor):
    """Says of the second teacher and of those after it that they have another device."""

    folder: Path

    def __init__(self, *_: object) -> None:
        pass

    @ray.method(concurrency_group="control")
    def ready(self) -> Identity:
        with suppress(FileExistsError):
            (self.folder / "first").mkdir()
            return Identity("m", "0", {}, (2, 2), 9, None, "cuda", "rule", True, 0.0)
        return Identity(
            "m", "0", {}, (2, 2), 9, None, "cpu", "rule", True, 0.0, ("No CUDA there.",)
        )

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        return Progress(0, 0, 0.0, 0.0, 0.0)

    @ray.method(concurrency_group="shards")
    def annotate(self, plan: Plan, shard: int) -> str:
        time.sleep(600)  # until the other teacher has been refused, and this one killed
        return ""


@pytest.mark.usefixtures("ray_here")
def test_teachers_on_different_devices_are_refused(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OddDevice.folder = tmp_path
    monkeypatch.setattr(actor, "TeacherActor", OddDevice)
    # From a module that the workers do not have; its classes travel by value.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    message = "same device, .* one has cuda, one cpu. No CUDA there."
    with pytest.raises(JobError, match=message):
        annotate(config(sample, tmp_path / "out", teachers=2, **TINY_SHARDS))


@pytest.mark.usefixtures("ray_here")
def test_cuda_that_is_not_there_is_refused(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs 2 GPUs per teacher on one node, .* 0 at most"):
        plan_resources(config(sample, tmp_path, device="cuda", gpus_per_teacher=2.0))
