"""A killer at work: one SIGKILL after another, until what it killed has written the same bytes."""

import os
import random
import signal
import time
from pathlib import Path

import psutil

from tests.faults.processes import (
    ACTOR,
    DECODER,
    IMAGES,
    OPTIONS,
    PRIVATE,
    Cluster,
    Job,
    assert_gone,
    leftovers,
)
from tests.faults.table import Observed, Rounds
from tests.jobs import digests
from tokenlabel.dataset.format.manifest import open_manifest
from tokenlabel.dataset.format.shard import Shard

KINDS = ("driver", "teacher actor", "decode worker", "raylet")
#: The killer strikes far more often than the default of `retries` allows for.
RETRIES = 100


class Campaign:
    """One job after another on a cluster: each is run again when its driver was killed.

    Args:
        cluster: where they run.
        data, undisturbed: the data set, and the digests of what an undisturbed job makes of it.
        root: folder for the jobs' folders.
        chance: decides whom to kill, and when.
    """

    def __init__(
        self,
        cluster: Cluster,
        data: Path,
        undisturbed: dict[str, str],
        root: Path,
        chance: random.Random,
    ) -> None:
        self._cluster, self._data, self._undisturbed = cluster, data, undisturbed
        self._root, self._chance = root, chance
        self.complete = self.jobs = self.kept = 0
        self.agents: list[psutil.Process] = []  # Ray's, of dead raylets: they try for 60 seconds
        self.gone = 0.0  # seconds until the last worker of a dead driver or raylet had ended
        self._start()

    def strike(self, kind: str) -> None:
        """Kill one of its kind while a job runs, however many jobs that takes."""
        while not self._strike(kind):
            if self._job.running:
                continue  # the victim had ended by itself
            self.finish()
            self._start()

    def finish(self) -> None:
        """Let the job end, and look at what it has written."""
        folder = self._job.folder
        assert self._job.wait() == 0, self._job.output
        assert digests(folder) == self._undisturbed
        assert not leftovers(folder)
        keys: list[str] = []
        for path in self._job.shards():
            with Shard(path) as shard:
                keys += shard.texts("key")
        assert keys == list(open_manifest(folder / "manifest").keys)
        assert len(set(keys)) == IMAGES
        assert_gone(self._cluster.workers())
        self.complete += 1

    def stop(self) -> None:
        """Kill the last job, which has ended unless a test failed."""
        self._job.__exit__()

    def _start(self) -> None:
        self.jobs += 1
        self._job = Job(
            self._data,
            self._root / f"labels-{self.complete}",
            PRIVATE,
            **OPTIONS,
            ray_address=self._cluster.address,
            retries=RETRIES,
        )

    def _strike(self, kind: str) -> bool:
        if kind == "driver" and self._chance.random() < 0.3:
            time.sleep(self._chance.uniform(0, 8))  # while it starts, for example
        else:
            self._job.wait_for_shard()
            time.sleep(self._chance.uniform(0, 1.5))
        victim = self._find(kind)
        if victim is None:
            return False
        (raylet,) = self._cluster.nodes
        workers = self._cluster.workers(raylet if kind == "raylet" else None)
        agents = raylet.children()
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            return False
        print(f"{kind} {victim.pid} killed after {len(self._job.shards())} shards")
        if kind == "driver":
            if self._job.wait() != -signal.SIGKILL:
                return False
            self.gone = max(self.gone, assert_gone(workers))
            self.kept += len(self._job.shards())
            self._start()
        elif kind == "raylet":
            self.agents += agents
            self._cluster.add(victim)
            self.gone = max(self.gone, assert_gone(workers))
        else:
            assert_gone([victim])
        return True

    def _find(self, kind: str) -> psutil.Process | None:
        """One of its kind; None when the job has ended."""
        if not self._job.running:
            return None
        if kind == "driver":
            return psutil.Process(self._job.process.pid)
        if kind == "raylet":
            return self._cluster.nodes[0]
        name = ACTOR if kind == "teacher actor" else DECODER
        found = self._job.find(name, self._cluster.workers)
        return self._chance.choice(found) if found else None


def test_a_killer_at_work(
    many_images: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    soak: bool,
    rounds: Rounds,
    observed: Observed,
) -> None:
    seed = int(os.environ.get("FAULT_SEED", time.time_ns() % 2**32))
    print(f"FAULT_SEED={seed}")
    chance = random.Random(seed)
    # In random order, but each as often as the others.
    kinds = [kind for _ in range(rounds(1, 5)) for kind in chance.sample(KINDS, len(KINDS))]
    with Cluster() as cluster:
        campaign = Campaign(cluster, many_images, undisturbed, tmp_path, chance)
        try:
            for kind in kinds:
                campaign.strike(kind)
            campaign.finish()
        finally:
            campaign.stop()
        if soak:
            assert_gone(campaign.agents)
    observed(
        f"SIGKILL of the {', '.join(KINDS[:-1])} or second node's raylet, at random",
        len(kinds),
        "killed jobs run again, others go on; the bytes of an undisturbed job, no temporary file, "
        "no lock, no orphan",
        f"runs: {campaign.jobs}, of which killed with their driver: {kinds.count('driver')}; "
        f"shards kept by these: {campaign.kept}; finished folders of {IMAGES} images, with the "
        f"same bytes and each image once: {campaign.complete}; workers of what was killed gone "
        f"after at most {campaign.gone:.1f} s",
    )
