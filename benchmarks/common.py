"""What several benchmarks need: turns, ratios, the sample's labels, and splits of any size."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor

from tokenlabel.annotate import AnnotateConfig
from tokenlabel.annotate.sample import sample_folder
from tokenlabel.dataset import LabelStore
from tokenlabel.dataset.format.index import build_index
from tokenlabel.dataset.format.shard import shard_name, write_shard

SHARD = 4096
PUBLISHED_K = 5
IMAGENET_ROWS = 1_281_167
WORK = Path("/tmp/tokenlabel-benchmarks")
Ways = dict[str, Callable[[], object]]


def take_turns(
    ways: Ways, rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each way, round by round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = clock()
            way()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def ratio(over: Iterable[float], under: Iterable[float]) -> str:
    """Median and range of a ratio, from runs that took turns."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def images_and_labels(options: argparse.Namespace) -> tuple[Path, Path]:
    """The folder of a split's images, and its labels: those named, or made at 576 px."""
    options.work.mkdir(parents=True, exist_ok=True)
    data = getattr(options, "data", None) or sample_folder(options.work)
    if options.labels:
        return data / "train", options.labels
    from tokenlabel.annotate import annotate  # imports ray, which not every machine here needs

    out = options.work / f"labels-{data.resolve().name}"
    annotate(sample_config(data, out=str(out), input_size=576, batch_size=16))
    return data / "train", out / "train"


def sample_config(data: Path | str, **options: object) -> AnnotateConfig:
    """The embedded sample's teacher on a folder of images."""
    given = {"data": str(data), "model": "tf_efficientnet_lite0", "weights": "sample"}
    return AnnotateConfig.model_validate(given | options)


def imagenet_keys(count: int) -> list[str]:
    """Keys as ImageNet's training split has them, sorted."""
    names = sorted(ImageNetInfo("imagenet-1k").label_names())
    many = -(-count // len(names))
    return [f"{name}/{name}_{10000 + n}.JPEG" for name in names for n in range(many)][:count]


def as_published(store: LabelStore, row: int) -> Tensor:
    """The best scores of a map and their class ids as published files have them, [2, K, H, W]."""
    classes, logits = store[row].logits()
    both = np.stack([logits, classes])[..., :PUBLISHED_K].astype(np.float16)
    return torch.from_numpy(both.transpose(0, 3, 1, 2).copy())


def write_split(
    root: Path, store: LabelStore, keys: Sequence[str], k: int | None = None, step: int = 1
) -> None:
    """A split whose rows repeat those of `store`: k classes, every `step`-th row and column."""
    root.mkdir(parents=True)
    maps = [store[row] for row in np.flatnonzero(~store.failed).tolist()]
    grid = (len(range(0, store.grid[0], step)), len(range(0, store.grid[1], step)))
    layout = store.layout._replace(views=("identity",), grid=grid, k=k or store.k)
    planes = {name: np.stack([getattr(m, name)[:1] for m in maps]) for name in layout.planes()}
    for name, plane in planes.items():
        if not name.startswith("residual"):
            planes[name] = plane[..., ::step, ::step]
    for name in ("codes", "classes"):
        planes[name] = planes[name][:, :, : layout.k]
    sizes, labels = np.array([m.size for m in maps]), np.array([m.label for m in maps])
    names = ("teacher", "weights_digest", "label_space", "floor", "libraries", "preprocessing")
    shards = -(-len(keys) // SHARD)
    for number in range(shards):
        part = keys[number * SHARD : (number + 1) * SHARD]
        rows = np.arange(number * SHARD, number * SHARD + len(part)) % len(maps)
        attrs = {
            **{name: store.attrs[name] for name in names},
            "fingerprint": "f" * 64,
            "extent": [0.0, 0.0, 1.0, 1.0],
            "shards": shards,
            "shard": number,
            "first_row": number * SHARD,
            **{"labelled": len(rows), "top1": len(rows) // 2, "top5": len(rows), "mass": 0.5},
        }
        path = root / shard_name(number, shards)
        with write_shard(path, layout, part, labels[rows], attrs) as writer:
            some = {name: plane[rows] for name, plane in planes.items()}
            size, unknown = len(part), np.zeros(len(part), np.uint8)
            prints = np.zeros((size, 64), np.uint8)
            writer.append(some, sizes[rows], rows.astype(np.uint64), prints, unknown, [""] * size)
    build_index(root)
