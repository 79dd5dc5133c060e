"""Scan the parts of a source side by side: one Ray task each, merged in the order of the parts."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import ray
import ray.exceptions as rx

from ...dataset.sources.image_source import ImageSource
from ...dataset.sources.scan import ScanBlock, scan_all, scan_part

#: Blocks of a part that wait at most, of 8192 images each.
_WAITING = 2


def scan(source: ImageSource) -> Iterator[ScanBlock]:
    """The images of a source in order; raises as `ImageSource.scan`.

    As many parts at a time as the cluster has CPUs; no more than some blocks of each are in memory.
    """
    numbers = range(len(source.parts()))
    if len(numbers) == 1:  # not worth a task, which might find a full machine
        yield from scan_all(source)
        return
    task = ray.remote(num_cpus=1, max_retries=2)(scan_part).options(
        num_returns="streaming", _generator_backpressure_num_objects=_WAITING
    )
    shared, waiting = ray.put(source), iter(numbers)
    most = int(ray.cluster_resources().get("CPU", 1))
    running = deque[Any](task.remote(shared, part) for part in islice(waiting, most))
    while running:
        try:
            for block in running.popleft():
                yield ray.get(block)
        except rx.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        running.extend(task.remote(shared, part) for part in islice(waiting, 1))
