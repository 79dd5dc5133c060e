"""Annotates whole shards on one device and writes them. Lives in a teacher actor."""

import dataclasses
import json
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import repeat
from logging.handlers import BufferingHandler
from typing import Any

import numpy as np
import ray
import torch

from ...dataset.format.lock import check_holder
from ...dataset.format.manifest import NAME as MANIFEST
from ...dataset.format.manifest import open_manifest, shard_rows
from ...dataset.format.score_map import MapLayout, nats
from ...dataset.format.shard import shard_name, write_shard
from ...dataset.sources.image_source import Entry, ImageSource
from ...dataset.sources.scan import entries_of
from ...errors import JobError, StorageError
from ..config import AnnotateConfig
from ..images import DecodedBatch, decode_batch, fetch_block
from ..plan import Identity, Plan
from ..report import Progress, count_maps
from ..teacher.annotator import TeacherOutput
from ..teacher.identity import build_teacher, identify
from .window import decode_ahead, fetched

#: A batch on its way through the device and back, what shows that it is back, and when it left.
_Pending = tuple[DecodedBatch, TeacherOutput, torch.cuda.Event | None, float]


class Worker:
    """One teacher on one device, for shards from up to two threads.

    Of two shards, one runs through the teacher while the first batches of the other are decoded.
    """

    def __init__(self, config: AnnotateConfig, source: ImageSource, threads: int) -> None:
        torch.set_num_threads(threads)  # a reused worker keeps the number it had
        self._config, self._source = config, source
        self._device = threading.Lock()
        # Made here, so that each owner has a function of its own: a raylet leaks the leases of a
        # function whose owner was killed, and then runs that function's tasks one at a time.
        task = ray.remote(num_cpus=1, max_retries=2)
        self._decode, self._fetch = task(decode_batch), task(fetch_block)
        self._shared = ray.put(source)
        self._done = Progress(0, 0, 0.0, 0.0, 0.0)
        self._manifest = lru_cache(1)(open_manifest)  # of a store, it is downloaded

    def ready(self) -> Identity:
        """Build the teacher and describe it."""
        # An actor's log is far from the user: its warnings travel to the driver.
        handler = BufferingHandler(capacity=1000)
        handler.setLevel(logging.WARNING)
        logging.getLogger("tokenlabel").addHandler(handler)
        try:
            self._teacher = build_teacher(self._config)
        finally:
            logging.getLogger("tokenlabel").removeHandler(handler)
        notes = [record.getMessage() for record in handler.buffer]
        # A job that reserves no GPU says `device: cpu`.
        if self._config.device == "auto" and self._teacher.device.type == "cpu":
            notes.append(
                f"Ray gave the teacher a GPU on {socket.gethostname()}, but torch finds none "
                "there: it computes on the CPU, many times slower. Remedy: a driver and a torch "
                "with CUDA on every node with GPUs, or `device: cpu`"
            )
        identity = identify(self._teacher, self._source)
        self._libraries = json.dumps(identity.libraries, sort_keys=True)
        return dataclasses.replace(identity, notes=tuple(notes))

    def answers(self, entries: list[Entry]) -> list[int]:
        """The teacher's top class of each image; -1 where it cannot be read."""
        sizes, interpolation = self._teacher.input_sizes, self._teacher.interpolation
        found: list[int] = []
        for start in range(0, len(entries), self._config.batch_size):
            part = entries[start : start + self._config.batch_size]
            try:
                batch = decode_batch(self._source, part, sizes, interpolation)
            except StorageError:  # fails its own shard, later
                found += [-1] * len(part)
                continue
            top = self._teacher.top_classes(batch.images).tolist()
            found += [-1 if error else n for n, error in zip(top, batch.errors, strict=True)]
        return found

    def progress(self) -> Progress:
        """What was done so far."""
        return self._done._replace(now=time.monotonic())

    def annotate(self, plan: Plan, shard: int) -> str:
        """Write one shard; returns its sha256.

        Raises:
            LockedError: the run has lost its lock on the folder to another one.
            OSError, StoreError: the shard cannot be written.
        """
        rows = shard_rows(plan.rows, plan.shard_size, shard)
        manifest = self._manifest(plan.folder / MANIFEST)
        entries, labels = entries_of(manifest, rows), manifest.labels(slice(rows.start, rows.stop))
        keys = [entry.key for entry in entries]
        sizes, interpolation = self._teacher.input_sizes, self._teacher.interpolation
        size = self._config.batch_size
        batches = [entries[start : start + size] for start in range(0, len(entries), size)]
        decoded = decode_ahead(
            lambda part, *data: self._decode.remote(
                self._shared, part, sizes, interpolation, *data
            ),
            zip(batches, self._fetched(batches), strict=False),
            sizes,
            self._config.window,
        )
        # The plan has the libraries of the first teacher that was ready, perhaps on another node.
        own = {"libraries": self._libraries, "shard": shard, "first_row": rows.start}
        path = plan.folder / shard_name(shard, plan.shards)
        attrs, folders = {**plan.attrs, **own}, manifest.folders
        with write_shard(path, plan.layout, keys, labels, attrs, folders=folders) as writer:
            counts = {"labelled": 0, "top1": 0, "top5": 0, "mass": 0.0}
            truth = labels if plan.attrs["label_space"] == "teacher" else np.full_like(labels, -1)
            with self._device:
                for batch, output in self._annotated(decoded, plan.layout):
                    planes = {name: plane.numpy() for name, plane in output.planes.items()}
                    writer.append(planes, *batch[1:])
                    good = np.array([not error for error in batch.errors])
                    if not np.isfinite(nats(planes["codes"][good][:, :, 0], plan.layout)).all():
                        raise JobError(
                            "logits must be finite; the teacher's are not for an image of this "
                            "shard. Remedy: precision bfloat16 or float32"
                        )
                    known, truth = truth[: len(good)], truth[len(good) :]
                    top5 = output.top5.numpy()
                    count_maps(counts, known, good, planes["codes"], top5, plan.layout)
            writer.attrs |= counts
            check_holder(plan.folder, plan.run)
        return writer.file_sha256

    def _fetched(self, batches: list[list[Entry]]) -> Iterable[list[Any]]:
        """What was fetched of each batch; nothing where decode tasks read for themselves."""
        if not self._source.in_blocks:
            return repeat([])

        def fetch(entries: list[Entry], counts: list[int]) -> list[Any]:
            task = self._fetch.options(num_returns=len(counts))
            found: Any = task.remote(self._shared, entries, counts)
            return found if len(counts) > 1 else [found]

        return fetched(fetch, batches)

    def _annotated(
        self, decoded: Iterator[DecodedBatch], layout: MapLayout
    ) -> Iterator[tuple[DecodedBatch, TeacherOutput]]:
        """Batches with their results; a GPU computes the next batch while one is written."""
        ahead = 1 if self._teacher.device.type == "cuda" else 0
        pending: deque[_Pending] = deque()
        for batch in decoded:
            pending.append(self._start(batch, layout))
            if len(pending) > ahead:
                yield self._finish(*pending.popleft())
        while pending:
            yield self._finish(*pending.popleft())

    def _start(self, batch: DecodedBatch, layout: MapLayout) -> _Pending:
        since, images, count = time.monotonic(), batch.images, len(batch.errors)
        if count < self._config.batch_size:
            # Always the same shape: threads would divide the work of another shape differently,
            # which changes the last bits, and a compiled teacher would need another graph.
            missing = ((0, self._config.batch_size - count), (0, 0), (0, 0), (0, 0))
            images = tuple(np.pad(part, missing) for part in images)
        planes, top5 = self._teacher.annotate(images, layout, self._config.floor)
        # Copied in stream order, before the next batch is queued; non_blocking pins the memory.
        output = TeacherOutput(
            {name: plane[:count].to("cpu", non_blocking=True) for name, plane in planes.items()},
            top5[:count].to("cpu", non_blocking=True),
        )
        event = None
        if self._teacher.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return batch, output, event, since

    def _finish(
        self,
        batch: DecodedBatch,
        output: TeacherOutput,
        event: torch.cuda.Event | None,
        since: float,
    ) -> tuple[DecodedBatch, TeacherOutput]:
        if event is not None:
            event.synchronize()
        done, now = self._done, time.monotonic()
        self._done = Progress(
            done.images + len(batch.errors),
            done.errors + sum(map(bool, batch.errors)),
            done.busy + now - max(since, done.until),
            done.since or since,
            now,
        )
        return batch, output
