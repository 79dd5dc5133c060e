"""What the job costs beyond its teacher: time against two plain loops, and memory against size.

    python benchmarks/annotate.py --data /path/to/imagenet          # time
    python benchmarks/annotate.py --data /path/to/imagenet --memory

Times are medians of runs that take turns in this process, with the same threads: the bare teacher
on decoded batches, a plain DataLoader loop, and the job on Ray. All three count from
their first batch to their last, so that starting processes does not count. Memory is the unique set
size (USS) of each process, its highest value among samples taken twice a second.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import psutil
import ray
import torch
from common import ratio, sample_config
from torch.utils.data import DataLoader, Dataset

from tokenlabel.annotate import AnnotateConfig, annotate
from tokenlabel.annotate.cluster.session import ray_session
from tokenlabel.annotate.images import DecodedBatch, decode_batch
from tokenlabel.annotate.sample import sample_folder
from tokenlabel.annotate.teacher.annotator import Annotator, TeacherOutput
from tokenlabel.annotate.teacher.identity import build_teacher
from tokenlabel.dataset.sources.folder import FolderSource


def repeated(split: Path, count: int, folder: Path) -> Path:
    """A data set of `count` links to the images of `split`, over and over."""
    keys = [*FolderSource(split).scan()]
    for number, (key, *_) in enumerate(islice(cycle(keys), count)):
        link = folder / "train" / f"{number % 100:02d}" / f"{number:06d}{Path(key).suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((split / key).resolve())
    return folder


class Batches(Dataset[DecodedBatch]):
    """Batches decoded by the job's own function, for a plain DataLoader."""

    def __init__(self, root: Path, teacher: Annotator, size: int) -> None:
        self._source = FolderSource(root)
        keys = [*self._source.scan()]
        self._keys = [keys[start : start + size] for start in range(0, len(keys), size)]
        self._sizes, self._interpolation = teacher.input_sizes, teacher.interpolation

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> DecodedBatch:
        return decode_batch(self._source, self._keys[number], self._sizes, self._interpolation)


Annotate = Callable[[DecodedBatch], TeacherOutput]


def bare(annotate_batch: Annotate, batches: list[DecodedBatch], images: int) -> float:
    """Images a second of the teacher alone, at least `images` of them."""
    start, done = time.perf_counter(), 0
    while done < images:
        for batch in batches:
            annotate_batch(batch)
            done += len(batch.errors)
    return done / (time.perf_counter() - start)


def plain_loop(annotate_batch: Annotate, data: Batches, workers: int) -> float:
    """Images a second of a DataLoader loop that keeps its results."""
    loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=3)
    kept, start = [], 0.0
    for batch in loader:
        start = start or time.perf_counter()
        kept.append((annotate_batch(batch), len(batch.errors)))
    return sum(count for _, count in kept) / (time.perf_counter() - start)


def measure_time(options: argparse.Namespace, data: Path) -> None:
    config = job_config(options, data)
    teacher = build_teacher(config)
    batches = Batches(data / "train", teacher, config.batch_size)
    ready = [batches[number] for number in range(min(4, len(batches)))]
    layout = config.layout(teacher.grid, teacher.num_classes)

    def one(batch: DecodedBatch) -> TeacherOutput:
        output = teacher.annotate(batch.images, layout, config.floor)
        if teacher.device.type == "cuda":
            torch.cuda.synchronize()
        return output

    bare(one, ready, 2 * config.batch_size)  # warm up
    busy: list[float] = []

    def job() -> float:
        with tempfile.TemporaryDirectory() as out:
            report = annotate(config.model_copy(update={"out": out}))
        assert report.ok and report.images_per_second and report.busy
        busy.append(report.busy)
        return report.images_per_second

    ways: dict[str, Callable[[], float]] = {
        "bare teacher": lambda: bare(one, ready, options.images),
        "plain DataLoader loop": lambda: plain_loop(one, batches, options.threads),
        "job on Ray": job,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with ray_session(None):
        for number in range(options.rounds):
            for name, way in ways.items():
                rates[name].append(way())
                print(f"round {number + 1}: {name} {rates[name][-1]:.2f} images/s", flush=True)
    ours = rates.pop("job on Ray")
    print(f"share of time the teacher computes: {statistics.median(busy):.3f}")
    for name, others in rates.items():
        print(f"job / {name}: {ratio(ours, others)}")


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """The highest USS in MB of this process and of those below it, by name."""
    peaks: dict[str, float] = {}
    stop = threading.Event()

    def sample() -> None:
        me = psutil.Process()
        while not stop.wait(0.5):
            for process in [me, *me.children(recursive=True)]:
                try:
                    name = "driver" if process.pid == me.pid else process.name()
                    used = process.memory_full_info().uss / 1e6
                except psutil.Error:
                    continue
                peaks[name] = max(peaks.get(name, 0), used)

    thread = threading.Thread(target=sample)
    thread.start()
    yield peaks
    stop.set()
    thread.join()


def measure_memory(options: argparse.Namespace, split: Path, folder: Path) -> None:
    """Each size in a process of its own, as a user's job is."""
    for count in (500, 5000):
        child = os.fork()
        if child == 0:
            data = repeated(split, count, folder / str(count))
            with peak_memory() as peaks:
                annotate(job_config(options, data).model_copy(update={"out": f"{folder}/{count}o"}))
            kept = {name: mb for name, mb in peaks.items() if name == "driver" or "::" in name}
            parts = ", ".join(f"{name} {mb:.0f}" for name, mb in sorted(kept.items()))
            print(f"{count} images, peak USS in MB: {parts}", flush=True)
            os._exit(0)
        os.waitpid(child, 0)


def job_config(options: argparse.Namespace, data: Path) -> AnnotateConfig:
    return sample_config(
        data,
        input_size=options.input_size,
        batch_size=options.batch_size,
        shard_size=8 * options.batch_size,
        threads=options.threads,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with train/ (default: the sample)")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--input-size", type=int, nargs="+", default=[320, 448], help="passes")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory", action="store_true", help="memory at 500 and 5,000 images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split = (options.data or sample_folder(folder)) / "train"
        if options.memory:
            measure_memory(options, split, folder)
            return
        torch.set_num_threads(options.threads)
        measure_time(options, repeated(split, options.images, folder / "data"))


if __name__ == "__main__":
    assert not ray.is_initialized()
    main()
