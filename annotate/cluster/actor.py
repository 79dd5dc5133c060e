"""The teacher actor as Ray sees it. Light to import: the driver needs neither torch nor timm."""

from typing import Any

import ray

from ...dataset.sources.image_source import Entry, ImageSource
from ..config import AnnotateConfig
from ..plan import Identity, Plan
from ..report import Progress

#: Shards an actor works on: one runs through the teacher while the next is decoded.
SHARDS_AT_ONCE = 2


class TeacherActor:
    """Passes the driver's calls to a `Worker`."""

    def __init__(self, config: AnnotateConfig, source: ImageSource, threads: int) -> None:
        from .worker import Worker  # imports torch

        self._worker = Worker(config, source, threads)

    # The teacher is built here and not in `__init__`: Ray wraps an error of `__init__` so that its
    # type is lost.
    @ray.method(concurrency_group="control")
    def ready(self) -> Identity:
        """Build the teacher and describe it."""
        return self._worker.ready()

    @ray.method(concurrency_group="control")
    def answers(self, entries: list[Entry]) -> list[int]:
        """The teacher's top class of each image; -1 where it cannot be read."""
        return self._worker.answers(entries)

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        """What the actor has done so far."""
        return self._worker.progress()

    @ray.method(concurrency_group="shards")
    def annotate(self, plan: Plan, shard: int) -> str:
        """Write one shard; returns its sha256."""
        return self._worker.annotate(plan, shard)


def remote_actor(gpus: float) -> Any:
    """The class as a Ray actor: never restarted by Ray, with a slot for progress calls.

    It reserves no CPU: actors that hold every CPU would leave none to decode.
    """
    remote: Any = ray.remote  # its type hints leave out what actors take
    return remote(
        num_cpus=0,
        num_gpus=gpus,
        max_restarts=0,
        max_task_retries=0,
        concurrency_groups={"shards": SHARDS_AT_ONCE, "control": 1},
    )(TeacherActor)
