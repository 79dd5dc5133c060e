"""Scan the parts of a source side by side: one Ray task each, merged in the order of the parts."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import ray
import ray.exceptions as rx

from ...dataset.sources.image_source import ImageSource
from ...dataset.sources.scan import ScanBlock, scan_all, scan_part, waits_for_store

#: Blocks of a part that wait at most, of 8192 images each.
_WAITING = 2


def scan(source: ImageSource) -> Iterator[ScanBlock]:
    """The images of a source in order; raises as `ImageSource.scan`.

    As many parts at a time as the cluster has CPUs, of parts in a store four times as many; no more
    than some blocks of each are in memory.
    """
    parts = source.parts()
    if len(parts) == 1:  # not worth a task, which might find a full machine
        yield from scan_all(source)
        return
    cpus = 0.25 if waits_for_store(parts) else 1.0
    task = ray.remote(num_cpus=cpus, max_retries=2)(scan_part).options(
        num_returns="streaming", _generator_backpressure_num_objects=_WAITING
    )
    shared, waiting = ray.put(source), iter(range(len(parts)))
    most = int(ray.cluster_resources().get("CPU", 1) / cpus)
    running = deque[Any](task.remote(shared, part) for part in islice(waiting, most))
    while running:
        try:
            for block in running.popleft():
                yield ray.get(block)
        except rx.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        running.extend(task.remote(shared, part) for part in islice(waiting, 1))
