"""Decoding ahead of a teacher: a bounded, ordered window of Ray tasks."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.exceptions as rx

from ...errors import StorageError
from ..images import DecodedBatch, failed_batch, join_batches

_log = logging.getLogger(__name__)


class DecodeWindow:
    """Iterates over the decoded batches of a shard, in order, with `depth` of them under way.

    Args:
        decode: keys to a Ray task whose result is their `DecodedBatch`.
        batches: the keys of each batch.
        sizes: (height, width) of the teacher's input in each pass.
        depth: batches being decoded or waiting; the object store holds no more of them.
    """

    def __init__(
        self,
        decode: Callable[[list[str]], Any],
        batches: Sequence[list[str]],
        sizes: Sequence[tuple[int, int]],
        depth: int,
    ) -> None:
        self._decode, self._sizes = decode, sizes
        self._waiting = deque(batches)
        self._tasks: deque[tuple[list[str], Any]] = deque()
        for _ in range(depth):
            self._submit_next()

    def _submit_next(self) -> None:
        if self._waiting:
            keys = self._waiting.popleft()
            self._tasks.append((keys, self._decode(keys)))

    def __iter__(self) -> Iterator[DecodedBatch]:
        while self._tasks:
            keys, task = self._tasks.popleft()
            batch = self._get(keys, task)
            del task  # frees the batch in the object store before the next one is decoded
            self._submit_next()
            yield batch

    def _get(self, keys: list[str], task: Any, retry: bool = True) -> DecodedBatch:
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
                return failed_batch(1, self._sizes, "the decoder crashed or ran out of memory")
            else:
                raise
        single = [([key], self._decode([key])) for key in keys]
        return join_batches([self._get(*one, retry=False) for one in single])
