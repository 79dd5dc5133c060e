"""Decoding ahead of a teacher: a bounded, ordered window of Ray tasks."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import ray
import ray.exceptions as rx

from ...errors import StorageError
from ..images import DecodedBatch, failed_batch, join_batches

_log = logging.getLogger(__name__)


def decode_ahead(
    decode: Callable[[list[str]], Any],
    batches: Iterable[list[str]],
    sizes: Sequence[tuple[int, int]],
    depth: int,
) -> Iterator[DecodedBatch]:
    """The decoded batches of a shard, in order; `depth` of them are under way, from this call on.

    Args:
        decode: keys to a Ray task whose result is their `DecodedBatch`.
        batches: the keys of each batch.
        sizes: (height, width) of the teacher's input in each pass.
        depth: batches being decoded or waiting; the object store holds no more of them.
    """
    waiting = iter(batches)
    tasks = deque((keys, decode(keys)) for keys in islice(waiting, depth))

    def get(keys: list[str], task: Any, retry: bool = True) -> DecodedBatch:
        try:
            batch: DecodedBatch = ray.get(task)
            return batch
        except rx.RayTaskError as error:  # Python code raised: a retry would meet it again
            own = isinstance(error.cause, OSError | StorageError)
            raise (error.cause if own else error) from None
        except rx.RayError as error:
            if retry:
                # One image may have crashed the decoder of the whole batch: find out which.
                _log.warning("decoding %d images again, one by one: %s", len(keys), type(error))
            elif isinstance(error, rx.WorkerCrashedError | rx.OutOfMemoryError):
                _log.warning("%s: the decoder crashed on it: %s", keys[0], error)
                return failed_batch(1, sizes, "the decoder crashed or ran out of memory")
            else:
                raise
        single = [([key], decode([key])) for key in keys]
        return join_batches([get(*one, retry=False) for one in single])

    def results() -> Iterator[DecodedBatch]:
        while tasks:
            # The call's arguments alone hold the task: when it returns, its batch leaves the object
            # store, before the next one is decoded.
            batch = get(*tasks.popleft())
            tasks.extend((keys, decode(keys)) for keys in islice(waiting, 1))
            yield batch

    return results()
