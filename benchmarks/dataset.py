"""What label maps cost a training loader, one read, and opening a huge split.

    python benchmarks/dataset.py load           # CPU time with maps against without
    python benchmarks/dataset.py instructions   # the same counted by valgrind's callgrind
    python benchmarks/dataset.py read           # one map against torch.load of a published tensor
    python benchmarks/dataset.py open           # 1,281,167 rows

Ratios are medians over rounds in which the two ways take turns in this process. Label maps are real
ones: `--labels OUT/SPLIT` of a split that was annotated before; without it the images of `--data`
(default: the embedded sample) are annotated first, at 576 px. What is made goes to `--work` and is
used again when it is there.
"""

import argparse
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    IMAGENET_ROWS,
    PUBLISHED_K,
    WORK,
    Ways,
    as_published,
    imagenet_keys,
    images_and_labels,
    ratio,
    take_turns,
    write_split,
)
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from tokenlabel.dataset import LabelStore, TokenLabelDataset
from tokenlabel.dataset.format import chunks
from tokenlabel.dataset.transforms.recipe import IMAGENET_MEAN, IMAGENET_STD

BATCH = 48
WORKERS = 2


# --- a training loader --------------------------------------------------------------------------


def _decoded(path: str) -> torch.Tensor:
    return tv_tensors.Image(decode_jpeg(read_file(path), mode=ImageReadMode.RGB))


#: The loader of an image and the end of the pipeline.
PIPELINES: dict[str, tuple[Any, list[Any]]] = {
    "PIL, float": (
        None,
        [v2.ToImage(), v2.ToDtype(torch.float32, True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)],
    ),
    "decode_jpeg, uint8": (_decoded, [v2.Identity()]),
}


def data_sets(pipeline: str, store: LabelStore, split: Path) -> tuple[Any, Any]:
    """The same images without maps and with them."""
    loader, end = PIPELINES[pipeline]
    start = [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()]
    transform = v2.Compose([*start, *end])
    options = {} if loader is None else {"loader": loader}
    images = ImageFolder(split, **options)
    with_maps = TokenLabelDataset(images, store, transform=transform, label_source="maps")
    return ImageFolder(split, transform, **options), with_maps


def batches(data: Any, count: int, workers: int = 0) -> Iterator[Any]:
    """`count` batches, the same crops each time."""
    order = [index % len(data) for index in range(count * BATCH)]
    torch.default_generator.manual_seed(0)
    yield from DataLoader(data, BATCH, sampler=order, num_workers=workers)


def cpu_seconds() -> float:
    """Of this process and of the workers that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def measure_load(options: argparse.Namespace, store: LabelStore, split: Path) -> None:
    torch.set_num_threads(1)  # as in a worker
    print(f"{len(store)} images of {split}; maps: {store.layout}")
    for pipeline in PIPELINES:
        for workers, take in ((0, take_pairs), (WORKERS, take_epochs)):
            plain, mine = take(data_sets(pipeline, store, split), options)
            extra = statistics.median(a - b for a, b in zip(mine, plain, strict=True)) * 1e6
            print(
                f"{pipeline}, {workers} workers: CPU time with / without {ratio(mine, plain)}; "
                f"{statistics.median(plain) * 1e6:.0f} us a sample without, {extra:+.0f} with",
                flush=True,
            )


def take_pairs(
    data: tuple[Any, Any], options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """CPU seconds a sample, batches taking turns: what else the machine does counts least."""
    spent: tuple[list[float], list[float]] = ([], [])
    for turn in range(options.rounds + 1):
        totals = [0.0, 0.0]
        for number in range(options.batches):
            for way in ((0, 1), (1, 0))[number % 2]:
                first, rows = number * BATCH, len(data[way])
                sampler = [index % rows for index in range(first, first + BATCH)]
                loader = iter(DataLoader(data[way], BATCH, sampler=sampler))
                torch.default_generator.manual_seed(number)
                start = time.process_time()
                next(loader)
                totals[way] += time.process_time() - start
        for way, total in enumerate(totals):
            if turn:
                spent[way].append(total / options.batches / BATCH)
    return spent


def take_epochs(
    data: tuple[Any, Any], options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """The same with workers: epochs taking turns, the start of the workers included."""
    spent: tuple[list[float], list[float]] = ([], [])
    count = 4 * options.batches
    for turn in range(options.rounds + 1):
        for way in ((0, 1), (1, 0))[turn % 2]:
            gc.collect()
            start = cpu_seconds()
            for _ in batches(data[way], count, WORKERS):
                pass
            if turn:
                spent[way].append((cpu_seconds() - start) / count / BATCH)
    return spent


def count_instructions(options: argparse.Namespace, labels: Path, split: Path) -> None:
    """Instructions a sample, from runs of one batch and of three, each in a process."""
    for pipeline in PIPELINES:
        totals = {}
        for way in (0, 1):
            for count in (1, 3):
                command = [sys.executable, __file__, "run", pipeline, str(way), str(count)]
                command += [str(labels), str(split)]
                out = options.work / "callgrind.out"
                done = subprocess.run(
                    ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", *command],
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found = re.search(r"Collected : (\d+)", done.stderr)
                if found is None:
                    raise SystemExit(f"valgrind says no count: {done.stderr}")
                totals[way, count] = int(found[1])
        plain, mine = ((totals[way, 3] - totals[way, 1]) / 2 / BATCH for way in (0, 1))
        print(
            f"{pipeline}: instructions with maps / without {mine / plain:.4f}; "
            f"{plain / 1e6:.2f} million a sample without, {mine - plain:+.0f} with",
            flush=True,
        )


def run_counted(pipeline: str, way: str, count: str, labels: str, split: str) -> None:
    torch.set_num_threads(1)
    for _ in batches(data_sets(pipeline, LabelStore(labels), Path(split))[int(way)], int(count)):
        pass


# --- one read -----------------------------------------------------------------------------------


def save_as_published(folder: Path, store: LabelStore, keys: Sequence[str]) -> list[str]:
    """A pickle an image, as published."""
    maps = [as_published(store, row) for row in np.flatnonzero(~store.failed).tolist()]
    paths = [folder / f"{key}.pt" for key in keys]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(maps[number % len(maps)], path)
    return [str(path) for path in paths]


def measure_read(options: argparse.Namespace, store: LabelStore, work: Path) -> None:
    keys = imagenet_keys(options.rows)
    for k in (PUBLISHED_K, store.k):  # as many as the published files hold, and all
        with tempfile.TemporaryDirectory(dir=work) as name:
            folder = Path(name)
            write_split(folder / "shards", store, keys, k, 1)
            paths = save_as_published(folder / "published", store, keys)
            time_reads(options, LabelStore(folder / "shards"), keys, paths)


def time_reads(
    options: argparse.Namespace, ours: LabelStore, keys: Sequence[str], paths: Sequence[str]
) -> None:
    rng = np.random.default_rng(0)
    rows: list[int] = []
    libdeflate = chunks._fast

    def timed(read: Callable[[int], Any], fast: bool = False) -> Callable[[], None]:
        def way() -> None:
            chunks._fast = libdeflate if fast else None
            for row in rows:
                read(row)

        return way

    theirs: Ways = {
        "torch.load": timed(lambda row: torch.load(paths[row])),
        "torch.load, any pickle": timed(lambda row: torch.load(paths[row], weights_only=False)),
    }
    mine: Ways = {}
    for fast in (False, True) if libdeflate else (False,):  # extra `fast`
        inflater = "deflate" if fast else "zlib"
        mine[f"store.leaf(row), {inflater}"] = timed(ours.leaf, fast)
        mine[f"store[row], {inflater}"] = timed(ours.__getitem__, fast)
        mine[f"store[key], {inflater}"] = timed(lambda row: ours[keys[row]], fast)
    rows[:] = range(len(keys))
    take_turns(theirs | mine, 0)
    rows[:] = rng.integers(0, len(keys), 200).tolist()
    seconds = take_turns(theirs | mine, options.rounds, time.perf_counter)
    chunks._fast = libdeflate
    size = sum(path.stat().st_size for path in ours.shards) / len(ours)
    print(f"{len(keys)} rows, {ours.layout}: {size:.0f} bytes an image in shards")
    for way, spent in seconds.items():
        against = "; ".join(
            f"{other} takes {ratio(seconds[other], spent)} times as long"
            for other in (theirs if way in mine else ())
        )
        print(f"{way}: {statistics.median(spent) / len(rows) * 1e6:.1f} us; {against}")


# --- opening a huge split -----------------------------------------------------------------------

_OPEN = """
import json, sys, time
import psutil, numpy as np
from tokenlabel.dataset import LabelStore
process = psutil.Process()
used = lambda: process.memory_full_info().uss / 1e6  # mapped pages of the index included
before, start = used(), time.perf_counter()
store = LabelStore(sys.argv[1])
rows = len(store)
store[sys.argv[2]]
seconds, first = time.perf_counter() - start, used()
chosen = np.random.default_rng(0).integers(0, rows, 20_000).tolist()
start = time.perf_counter()
for row in chosen:
    store[row]
each = (time.perf_counter() - start) / len(chosen)
by_row = used()
for row in chosen:
    store[store.keys[row]]
mapped = sum(m.rss for m in process.memory_maps() if m.path.endswith("/index")) / 1e6
print(json.dumps([seconds, first - before, by_row - before, used() - before, mapped, each * 1e6]))
"""


def measure_open(options: argparse.Namespace, store: LabelStore, work: Path) -> None:
    root, keys = work / f"rows-{options.open_rows}", imagenet_keys(options.open_rows)
    if not root.exists():
        start = time.perf_counter()
        unfinished = Path(tempfile.mkdtemp(dir=work)) / "split"
        write_split(unfinished, store, keys, PUBLISHED_K, 9)
        unfinished.rename(root)
        print(f"wrote {len(keys)} rows in {time.perf_counter() - start:.0f} s", flush=True)
    command = [sys.executable, "-c", _OPEN, str(root), keys[len(keys) // 2]]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(options.rounds)
    ]
    seconds, first, by_row, by_key, mapped, each = map(statistics.median, zip(*runs, strict=True))
    print(f"{len(keys)} rows in {-(-len(keys) // 4096)} shards, medians of {len(runs)} processes:")
    print(f"open and first read: {seconds:.3f} s, {first:.1f} MB")
    print(f"after 20,000 random reads, all shards open: {by_row:.1f} MB, {each:.0f} us a read")
    print(f"after 20,000 more by key: {by_key:.1f} MB; of these, {mapped:.1f} MB are pages of the")
    print("index that all processes share and the system may drop")


def main() -> None:
    if sys.argv[1:2] == ["run"]:  # under valgrind
        return run_counted(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("load", "instructions", "read", "open", "all"))
    parser.add_argument("--data", type=Path, help="folder with train/ (default: the sample)")
    parser.add_argument("--labels", type=Path, help="OUT/train of --data, annotated before")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batches", type=int, default=2, help="of a round of `load`")
    parser.add_argument("--rows", type=int, default=3000, help="of `read`")
    parser.add_argument("--open-rows", type=int, default=IMAGENET_ROWS, help="of `open`")
    options = parser.parse_args()
    split, labels = images_and_labels(options)
    store, work = LabelStore(labels), options.work
    if options.what in ("load", "all"):
        measure_load(options, store, split)
    if options.what in ("instructions", "all"):
        count_instructions(options, labels, split)
    if options.what in ("read", "all"):
        measure_read(options, store, work)
    if options.what in ("open", "all"):
        measure_open(options, store, work)


if __name__ == "__main__":
    main()
