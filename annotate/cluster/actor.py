"""The teacher actor as Ray sees it. Light to import: the driver needs neither torch nor timm."""

from typing import Any, NamedTuple

import ray

from ...dataset.sources.image_source import ImageSource
from ..config import AnnotateConfig
from ..plan import Identity, Plan

#: Shards an actor works on: one runs through the teacher while the next is decoded.
SHARDS_AT_ONCE = 2


class Progress(NamedTuple):
    """What an actor has done since it started: images, error rows, and seconds of its teacher.

    `busy` is the time the teacher computed; `since` and `until` are when its first batch began and
    its last one ended, and `now` is when it was asked, by the monotonic clock of its machine.
    """

    images: int
    errors: int
    busy: float
    since: float
    until: float
    now: float = 0.0


class TeacherActor:
    """Passes the driver's calls to a `Worker`."""

    def __init__(self, config: AnnotateConfig, source: ImageSource, threads: int) -> None:
        from .worker import Worker

        self._worker = Worker(config, source, threads)

    @ray.method(concurrency_group="control")
    def ready(self) -> Identity:
        """Build the teacher. Not in `__init__`, whose errors Ray wraps beyond recognition."""
        return self._worker.ready()

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        """What the actor has done so far."""
        return self._worker.progress()

    @ray.method(concurrency_group="shards")
    def annotate(self, plan: Plan, shard: int) -> int:
        """Make one shard; returns its number of rows."""
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
