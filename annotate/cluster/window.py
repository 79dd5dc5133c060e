"""Decoding ahead of a teacher: a bounded, ordered window of Ray tasks."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.exceptions as rx

from ...dataset.sources.image_source import ImageSource
from ...errors import StorageError
from ..images import DecodedBatch, failed_batch, join_batches

_log = logging.getLogger(__name__)


class DecodeWindow:
    """Iterates over the decoded batches of a shard, in order, with `depth` of them under way.

    Args:
        decode: the remote `decode_batch`.
        source: of the split's images.
        batches: the keys of each batch.
        sizes: (height, width) of the teacher's input in each pass.
        interpolation: how to resize.
        depth: batches under way or waiting; the object store holds at most these.
    """

    def __init__(
        self,
        decode: Any,
        source: ImageSource,
        batches: Sequence[list[str]],
        sizes: Sequence[tuple[int, int]],
        interpolation: str,
        depth: int,
    ) -> None:
        self._decode, self._source, self._sizes = decode, source, sizes
        self._interpolation = interpolation
        self._waiting = deque(batches)
        self._under_way: deque[tuple[list[str], Any]] = deque()
        for _ in range(depth):
            self._submit_next()

    def _submit(self, keys: list[str]) -> Any:
        return self._decode.remote(self._source, keys, self._sizes, self._interpolation)

    def _submit_next(self) -> None:
        if self._waiting:
            keys = self._waiting.popleft()
            self._under_way.append((keys, self._submit(keys)))

    def __iter__(self) -> Iterator[DecodedBatch]:
        while self._under_way:
            keys, task = self._under_way.popleft()
            batch = self._get(keys, task)
            del task  # frees the batch in the object store before the next one is decoded
            self._submit_next()
            yield batch

    def _get(self, keys: list[str], task: Any) -> DecodedBatch:
        try:
            batch: DecodedBatch = ray.get(task)
            return batch
        except rx.RayTaskError as error:  # Python code raised: no other try would help
            own = isinstance(error.cause, OSError | StorageError)
            raise (error.cause if own else error) from None
        except rx.RayError as error:
            _log.warning("decoding %d images again, one by one: %s", len(keys), type(error))
        parts = [(key, self._submit([key])) for key in keys]
        return join_batches([self._get_single(key, task) for key, task in parts])

    def _get_single(self, key: str, task: Any) -> DecodedBatch:
        try:
            batch: DecodedBatch = ray.get(task)
            return batch
        except (rx.WorkerCrashedError, rx.OutOfMemoryError) as error:
            _log.warning("%s: the decoder died on it: %s", key, error)
            return failed_batch([key], self._sizes, "the decoder crashed or ran out of memory")
