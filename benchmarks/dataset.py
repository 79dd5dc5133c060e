"""What reading label maps costs: one read, a training loader with them, and opening a huge split.

    python benchmarks/dataset.py read                               # against torch.load
    python benchmarks/dataset.py load --data ../shared/imagenet     # against no maps at all
    python benchmarks/dataset.py open                               # 1,281,167 rows

Ratios are medians over rounds in which the two ways take turns in this process. Label maps are real
ones: `--labels OUT/SPLIT` of a split that was annotated before, with k of at least 5; without it
the pictures of `--data` (default: the embedded sample) are annotated first. What is made goes to
`--work` and is used again when it is there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from tokenlabel.annotate import AnnotateConfig, annotate
from tokenlabel.annotate.sample import sample_folder
from tokenlabel.dataset import LabelStore, TokenLabelDataset, chunks
from tokenlabel.dataset.index import build_index
from tokenlabel.dataset.recipe import IMAGENET_MEAN, IMAGENET_STD
from tokenlabel.dataset.shard import ShardLayout, shard_name, write_shard

K = 5
IMAGENET_ROWS = 1_281_167
Ways = dict[str, Callable[[], float]]


class Maps(NamedTuple):
    """Real maps of n pictures, cut to the best K classes of each patch."""

    scores: np.ndarray
    classes: np.ndarray
    rest: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def real_maps(store: LabelStore, step: int) -> Maps:
    """Maps of the identity view; every `step`-th row and column of the grid."""
    if store.k < K:
        raise SystemExit(f"--labels must hold at least {K} scores a patch, this one has {store.k}")
    entries = [store[row] for row in np.flatnonzero(~store.failed).tolist()]
    scores, classes, rest = (
        np.stack([getattr(entry, name)[:1, ::step, ::step] for entry in entries])
        for name in ("scores", "classes", "rest")
    )
    others = np.concatenate([scores[..., K:], rest[..., None]], -1).astype(np.float32)
    return Maps(
        scores[..., :K],
        classes[..., :K],
        np.logaddexp.reduce(others, -1).astype(np.float16),
        np.array([entry.size for entry in entries]),
        np.array([entry.label for entry in entries]),
    )


def imagenet_keys(count: int) -> list[str]:
    """Keys as ImageNet's training split has them, sorted."""
    from timm.data import ImageNetInfo

    names = sorted(ImageNetInfo("imagenet-1k").label_names())
    many = -(-count // len(names))
    return [f"{name}/{name}_{10000 + n}.JPEG" for name in names for n in range(many)][:count]


def write_split(root: Path, maps: Maps, keys: Sequence[str], shard_size: int) -> None:
    """A split whose rows repeat `maps`."""
    root.mkdir(parents=True)
    shards = -(-len(keys) // shard_size)
    layout = ShardLayout(("identity",), maps.scores.shape[2:4], K, 1000)
    for number in range(shards):
        part = keys[number * shard_size : (number + 1) * shard_size]
        first = number * shard_size
        rows = np.arange(first, first + len(part)) % len(maps.labels)
        attrs = {
            "teacher": "tf_efficientnet_lite0",
            "weights_digest": "0" * 64,
            "fingerprint": "f" * 64,
            "extent": [0.0, 0.0, 1.0, 1.0],
            "shard": number,
            "shards": shards,
            "first_row": first,
        }
        path = root / shard_name(number, shards)
        with write_shard(path, layout, part, maps.labels[rows], attrs) as writer:
            writer.append(
                maps.scores[rows],
                maps.classes[rows],
                maps.rest[rows],
                maps.sizes[rows],
                rows.astype(np.uint64),
                [""] * len(part),
            )
    build_index(root)


def take_turns(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round."""
    for way in ways.values():  # warm up: caches, open files, workers
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(way())
    return seconds


def ratio(over: Iterable[float], under: Iterable[float]) -> str:
    """Median and range of a ratio, from runs that took turns."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


# --- one read -----------------------------------------------------------------------------------


def save_as_published(folder: Path, maps: Maps, keys: Sequence[str]) -> list[str]:
    """A pickle an image: scores and class ids as one float16 [2, K, H, W]."""
    paths = []
    for number, key in enumerate(keys):
        row = number % len(maps.labels)
        both = np.stack([maps.scores[row, 0], maps.classes[row, 0].astype(np.float16)])
        path = folder / f"{key}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(both.transpose(0, 3, 1, 2).copy()), path)
        paths.append(str(path))
    return paths


def measure_read(options: argparse.Namespace, store: LabelStore, work: Path) -> None:
    maps, keys = real_maps(store, 1), imagenet_keys(options.rows)
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        write_split(folder / "shards", maps, keys, 1024)
        ours = LabelStore(folder / "shards")
        paths = save_as_published(folder / "published", maps, keys)
        rng = np.random.default_rng(0)
        rows: list[int] = []

        def timed(read: Callable[[int], Any], inflater: str = "zlib") -> Callable[[], float]:
            def way() -> float:
                chunks._inflate = import_module(inflater)
                start = time.perf_counter()
                for row in rows:
                    read(row)
                return time.perf_counter() - start

            return way

        ways: Ways = {
            "torch.load": timed(lambda row: torch.load(paths[row])),
            "torch.load, any pickle": timed(lambda row: torch.load(paths[row], weights_only=False)),
        }
        mine = []
        for inflater in ("zlib", "isal.isal_zlib"):  # the second: extra `fast`
            if find_spec(inflater.split(".")[0]):
                by_key, by_row = (f"store[{how}], {inflater}" for how in ("key", "row"))
                ways[by_key] = timed(lambda row: ours[keys[row]], inflater)
                ways[by_row] = timed(lambda row: ours[row], inflater)
                mine += [by_key, by_row]
        rows[:] = range(len(keys))
        take_turns(ways, 0)
        rows[:] = rng.integers(0, len(keys), 200).tolist()
        seconds = take_turns(ways, options.rounds)
        size = sum(path.stat().st_size for path in ours.shards) / len(ours)
        print(f"{len(keys)} rows, {ours.grid} maps, k={K}: {size:.0f} bytes an image in shards")
        for way, spent in seconds.items():
            print(f"{way}: {statistics.median(spent) / len(rows) * 1e6:.1f} us")
        for theirs in ("torch.load", "torch.load, any pickle"):
            for way in mine:
                print(f"{theirs} / {way}: {ratio(seconds[theirs], seconds[way])}")


# --- a training loader --------------------------------------------------------------------------


def pipeline() -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


class Seeded(Dataset[Any]):
    """Every item with a seed of its own, so that both ways crop the same boxes."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        torch.manual_seed(index)
        return self._dataset[index]


def epoch(loader: "DataLoader[Any]", clock: Callable[[], float]) -> Callable[[], float]:
    def way() -> float:
        start = clock()
        for _ in loader:
            pass
        return clock() - start

    return way


def turns_by_batch(
    with_maps: Dataset[Any], without: Dataset[Any], images: int, rounds: int
) -> tuple[list[float], list[float]]:
    """CPU seconds of batches of 16 that take turns: what else the machine does counts least."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        totals = [0.0, 0.0]
        loaders = [iter(DataLoader(data, batch_size=16)) for data in (with_maps, without)]
        for _ in range(images // 16):
            for way, loader in enumerate(loaders):
                start = time.process_time()
                next(loader)
                totals[way] += time.process_time() - start
        for way, total in enumerate(totals):
            spent[way].append(total)
    return spent


def measure_load(options: argparse.Namespace, store: LabelStore, split: Path) -> None:
    torch.set_num_threads(1)  # as in a worker
    with_maps = Seeded(TokenLabelDataset(split, store, transform=pipeline()))
    without = Seeded(ImageFolder(split, pipeline()))
    images = len(without)
    print(f"{images} images of {split}, {store.grid} maps, k={store.k}, 14x14 targets")
    mine, plain = turns_by_batch(with_maps, without, images, options.rounds)
    print(f"0 workers, CPU time, with maps / without: {ratio(mine, plain)}")
    for workers in (0, 2):
        ways: Ways = {}
        for name, data in (("with maps", with_maps), ("without", without)):
            loader = DataLoader(data, 16, num_workers=workers, persistent_workers=workers > 0)
            ways[name] = epoch(loader, time.perf_counter)
        seconds = take_turns(ways, options.rounds)
        for name, spent in seconds.items():
            print(f"{workers} workers, {name}: {images / statistics.median(spent):.1f} samples/s")
        # Seconds of the one over seconds of the other is samples/s the other way round.
        print(f"{workers} workers, samples/s with maps / without: ", end="")
        print(ratio(seconds["without"], seconds["with maps"]))


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
mapped = sum(m.rss for m in process.memory_maps() if m.path.endswith("index.h5")) / 1e6
print(json.dumps([seconds, first - before, by_row - before, used() - before, mapped, each * 1e6]))
"""


def measure_open(options: argparse.Namespace, store: LabelStore, work: Path) -> None:
    root, keys = work / f"rows-{options.open_rows}", imagenet_keys(options.open_rows)
    if not root.exists():
        start = time.perf_counter()
        unfinished = Path(tempfile.mkdtemp(dir=work)) / "split"
        write_split(unfinished, real_maps(store, 9), keys, 4096)
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("read", "load", "open", "all"))
    parser.add_argument("--data", type=Path, help="folder with train/ (default: the sample)")
    parser.add_argument("--labels", type=Path, help="OUT/train of --data, annotated before")
    parser.add_argument("--work", type=Path, default=Path("/tmp/tokenlabel-benchmarks"))
    parser.add_argument("--input-size", type=int, default=576, help="of the teacher")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=3000, help="of `read`")
    parser.add_argument("--open-rows", type=int, default=IMAGENET_ROWS, help="of `open`")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    data = options.data or sample_folder(work)
    labels = options.labels
    if labels is None:
        out = work / f"labels-{data.resolve().name}-{options.input_size}"
        labels = out / "train"
        annotate(
            AnnotateConfig(
                data=str(data),
                out=str(out),
                model="tf_efficientnet_lite0",
                weights="sample",
                input_size=options.input_size,
                batch_size=16,
            )
        )
    store = LabelStore(labels)
    if options.what in ("read", "all"):
        measure_read(options, store, work)
    if options.what in ("load", "all"):
        measure_load(options, store, data / "train")
    if options.what in ("open", "all"):
        measure_open(options, store, work)


if __name__ == "__main__":
    main()
