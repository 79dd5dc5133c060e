"""Annotates whole shards on one device and writes them. Lives in a teacher actor."""

import dataclasses
import json
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from logging.handlers import BufferingHandler
from typing import Any

import numpy as np
import ray
import torch

from ...dataset.format.lock import holder
from ...dataset.format.manifest import NAME as MANIFEST
from ...dataset.format.manifest import open_manifest, shard_rows
from ...dataset.format.score_map import MapLayout, decode, nats
from ...dataset.format.shard import shard_name, write_shard
from ...dataset.format.sums import file_sha256
from ...dataset.sources.image_source import ImageSource
from ...errors import JobError, LockedError
from ..config import AnnotateConfig
from ..images import DecodedBatch, decode_batch
from ..plan import Identity, Plan
from ..report import Progress
from ..teacher.annotator import Annotator, TeacherOutput
from ..teacher.identity import build_teacher, identify
from .window import DecodeWindow


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
        self._decode = ray.remote(num_cpus=1, max_retries=2)(decode_batch)
        self._done = Progress(0, 0, 0.0, 0.0, 0.0)

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

    def progress(self) -> Progress:
        """What was done so far."""
        return self._done._replace(now=time.monotonic())

    def annotate(self, plan: Plan, shard: int) -> str:
        """Write one shard; returns its sha256.

        Raises:
            LockedError: the run has lost its lock on the folder to another one.
            OSError: the shard cannot be written.
        """
        rows = shard_rows(plan.rows, plan.shard_size, shard)
        manifest = open_manifest(plan.folder / MANIFEST)
        keys = manifest.keys[rows.start : rows.stop]
        labels = manifest.labels[rows.start : rows.stop]
        sizes, interpolation = self._teacher.input_sizes, self._teacher.interpolation
        size = self._config.batch_size
        window = DecodeWindow(
            lambda keys: self._decode.remote(self._source, keys, sizes, interpolation),
            [keys[start : start + size] for start in range(0, len(keys), size)],
            sizes,
            self._config.window,
        )
        # The plan has the libraries of the first teacher that was ready, perhaps on another node.
        own = {"libraries": self._libraries, "shard": shard, "first_row": rows.start}
        path = plan.folder / shard_name(shard, plan.shards)
        with write_shard(path, plan.layout, keys, labels, {**plan.attrs, **own}) as writer:
            stats = ShardStats(
                labels if plan.label_space == "teacher" else np.full_like(labels, -1), plan.layout
            )
            with self._device:
                for batch, output in self._annotated(window, plan.layout):
                    planes = {name: plane.numpy() for name, plane in output.planes.items()}
                    writer.append(planes, batch.sizes, batch.digests, batch.errors)
                    stats.add(batch, output)
            writer.attrs |= stats.attrs
            if (run := holder(plan.folder)) != plan.run:
                what = "belongs to another job now" if run else "was deleted"
                raise LockedError(
                    f"a job must hold the lock of its folder: the one in {plan.folder} {what}. "
                    "Finished shards are kept. Remedy: see that no other job writes there, and run "
                    "the same command again"
                )
        return file_sha256(path)  # just written, so still in the page cache

    def _annotated(
        self, window: DecodeWindow, layout: MapLayout
    ) -> Iterator[tuple[DecodedBatch, TeacherOutput]]:
        """Batches with their results; a GPU computes the next batch while one is written."""
        ahead = 1 if self._teacher.device.type == "cuda" else 0
        pending: deque[_Pending] = deque()
        for batch in window:
            pending.append(_Pending(batch, self._teacher, layout, self._config))
            if len(pending) > ahead:
                yield self._finish(pending.popleft())
        while pending:
            yield self._finish(pending.popleft())

    def _finish(self, pending: "_Pending") -> tuple[DecodedBatch, TeacherOutput]:
        output = pending.result()
        done, now = self._done, time.monotonic()
        self._done = Progress(
            done.images + len(pending.batch.errors),
            done.errors + sum(map(bool, pending.batch.errors)),
            done.busy + now - max(pending.since, done.until),
            done.since or pending.since,
            now,
        )
        return pending.batch, output


class _Pending:
    """A batch on its way through the device and back."""

    def __init__(
        self, batch: DecodedBatch, teacher: Annotator, layout: MapLayout, config: AnnotateConfig
    ) -> None:
        self.batch, self.since = batch, time.monotonic()
        images, count = batch.images, len(batch.errors)
        if count < config.batch_size:
            # Always the same shape: threads would divide the work of another shape differently,
            # which changes the last bits, and a compiled teacher would need another graph.
            missing = ((0, config.batch_size - count), (0, 0), (0, 0), (0, 0))
            images = tuple(np.pad(part, missing) for part in images)
        planes, top5 = teacher.annotate(images, layout, config.floor)
        # Copied in stream order, before the next batch is queued; non_blocking pins the memory.
        self._output = TeacherOutput(
            {name: plane[:count].to("cpu", non_blocking=True) for name, plane in planes.items()},
            top5[:count].to("cpu", non_blocking=True),
        )
        self._event = None
        if teacher.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def result(self) -> TeacherOutput:
        if self._event is not None:
            self._event.synchronize()
        return self._output


class ShardStats:
    """Counts of a shard that its header keeps, so that a report need not read the maps.

    Attributes:
        attrs: root attributes of the shard, of the rows that were added.
    """

    def __init__(self, labels: np.ndarray, layout: MapLayout) -> None:
        self._labels, self._layout, self._row = labels, layout, 0
        self.attrs: dict[str, Any] = {"labelled": 0, "top1": 0, "top5": 0, "mass": 0.0}

    def add(self, batch: DecodedBatch, output: TeacherOutput) -> None:
        """Count the next rows, but for those with an error."""
        good = np.array([not error for error in batch.errors])
        labels = self._labels[self._row : self._row + len(good)]
        self._row += len(good)
        hits = output.top5.numpy() == labels[:, None]
        codes = output.planes["codes"].numpy()[good]
        if not np.isfinite(nats(codes[:, :, 0], self._layout)).all():
            raise JobError(
                "logits must be finite; the teacher's are not for an image of this shard. "
                "Remedy: precision bfloat16 or float32"
            )
        _, rest = decode(codes, self._layout)
        known = good & (labels >= 0)
        self.attrs["labelled"] += int(known.sum())
        self.attrs["top1"] += int(hits[known, 0].sum())
        self.attrs["top5"] += int(hits[known].any(1).sum())
        self.attrs["mass"] += float((1 - rest).mean((1, 2, 3)).sum(dtype=np.float64))
