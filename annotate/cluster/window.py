"""Decoding ahead of a teacher: a bounded, ordered window of Ray tasks."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

import ray
import ray.exceptions as rx

from ...dataset.sources.image_source import Entry
from ...errors import StorageError
from ..images import DecodedBatch, failed_batch, join_batches

_log = logging.getLogger(__name__)


def decode_ahead(
    decode: Callable[..., Any],
    batches: Iterable[tuple[list[Entry], Sequence[Any]]],
    sizes: Sequence[tuple[int, int]],
    depth: int,
) -> Iterator[DecodedBatch]:
    """The decoded batches of a shard, in order; `depth` of them are under way, from this call on.

    Args:
        decode: entries, and what was fetched of them, to a Ray task whose result is their
            `DecodedBatch`.
        batches: the entries of each batch, and what `fetched` gives for it.
        sizes: (height, width) of the teacher's input in each pass.
        depth: batches being decoded or waiting; the object store holds no more of them.
    """
    waiting = iter(batches)

    def started(count: int) -> Iterator[tuple[list[Entry], Any]]:
        for entries, parts in islice(waiting, count):
            yield entries, decode(entries, *parts)

    tasks = deque(started(depth))

    def get(entries: list[Entry], task: Any, retry: bool = True) -> DecodedBatch:
        try:
            batch: DecodedBatch = ray.get(task)
            return batch
        except rx.RayTaskError as error:  # Python code raised: a retry would meet it again
            own = isinstance(error.cause, OSError | StorageError)
            raise (error.cause if own else error) from None
        except rx.RayError as error:
            if retry:
                # One image may have crashed the decoder of the whole batch: find out which.
                _log.warning("decoding %d images again, one by one: %s", len(entries), type(error))
            elif isinstance(error, rx.WorkerCrashedError | rx.OutOfMemoryError):
                _log.warning("%s: the decoder crashed on it: %s", entries[0].key, error)
                return failed_batch(1, sizes, "the decoder crashed or ran out of memory")
            else:
                raise
        single = [([entry], decode([entry])) for entry in entries]
        return join_batches([get(*one, retry=False) for one in single])

    def results() -> Iterator[DecodedBatch]:
        while tasks:
            # The call's arguments alone hold the task: when it returns, its batch leaves the object
            # store, before the next one is decoded.
            batch = get(*tasks.popleft())
            tasks.extend(started(1))
            yield batch

    return results()


def fetched(
    fetch: Callable[[list[Entry], list[int]], list[Any]], batches: Sequence[list[Entry]]
) -> Iterator[list[Any]]:
    """What each batch consists of, where images can only be fetched in blocks: each block once.

    Args:
        fetch: entries of a block, and how many of them each batch has, to that many Ray objects.
        batches: the entries of each batch.
    """
    rows = [(entry, number) for number, batch in enumerate(batches) for entry in batch]
    blocks = groupby(rows, key=lambda row: (row[0].part, row[0].start))
    parts: list[list[Any]] = [[] for _ in batches]
    last = -1  # the last batch of which all blocks are on their way
    for number in range(len(batches)):
        while last <= number and (block := next(blocks, None)):
            entries, of = zip(*block[1], strict=True)
            counts = Counter(of)
            for batch, part in zip(counts, fetch(list(entries), [*counts.values()]), strict=True):
                parts[batch].append(part)
            last = of[-1]
        yield parts[number]
        parts[number] = []
