"""Time and memory of targets: label maps to the targets of 14x14 patches, on one CPU thread.

    python benchmarks/targets.py --labels OUT/SPLIT

All ways make the targets of the same 64 random crops, flipped or not, in rounds that take turns in
this process. The published path (TokenLabeling, LV-ViT) scatters the stored scores of the batch to
dense [B, 1000, H, W] logits, averages them by RoIAlign over each patch and over the crop, and takes
softmax of both. Ours makes windows of the records, and the crops' targets where the loss asks for
them. The labels must be real ones, since the crop's targets are sparse; without `--labels` the
embedded sample is annotated first, into `--work`.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from common import WORK, Ways, as_published, images_and_labels, take_turns
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tokenlabel.dataset import LabelStore, TokenLabelMap, TokenLabels
from tokenlabel.dataset.label_map.path import PixelPath, transform_box

GRID = 14
SIZE = (375, 500)


def crops(store: LabelStore, count: int) -> tuple[list[int], list[TokenLabelMap]]:
    """Rows, and their maps after RandomResizedCrop and flip, the same each time."""
    torch.manual_seed(0)
    transform = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])
    there = np.flatnonzero(~store.failed).tolist()
    rows = [there[number % len(there)] for number in range(count)]
    leaves = [store.leaf(row).with_path(PixelPath.of(SIZE), SIZE) for row in rows]
    return rows, [transform(leaf) for leaf in leaves]


def published(stored: Tensor, boxes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Dense targets of each patch [B, C, 14, 14] and of each crop [B, C, 1, 1].

    Args:
        stored: float16 [B, 2, K, H, W], scores and class ids, as the published files have them.
        boxes: [B, 4], (x0, y0, x1, y1) in normalised coordinates.
        num_classes: number of classes C.
    """
    count, _, _, height, width = stored.shape
    maps = torch.zeros(count, num_classes, height, width)
    maps.scatter_(1, stored[:, 1].long(), stored[:, 0].float())
    corners = boxes * torch.tensor([width, height, width, height]) - 0.5
    regions = torch.cat([torch.arange(count)[:, None].float(), corners], 1)
    patches = roi_align(maps, regions, (GRID, GRID)).softmax(1)
    return patches, roi_align(maps, regions, (1, 1)).softmax(1)


def peak_memory(way: Callable[[], object]) -> float:
    """Megabytes beyond those of before, at most, in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def measure() -> None:
        before = psutil.Process().memory_info().rss
        way()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        sender.send((most - before) / 1e6)

    process = context.Process(target=measure)
    process.start()
    most: float = receiver.recv()
    process.join()
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labels", type=Path, help="OUT/SPLIT, stored with level")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="wall-clock, not CPU time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    store = LabelStore(images_and_labels(options)[1])
    rows, leaves = crops(store, options.batch)
    records = TokenLabels.collate(leaves)
    turned = TokenLabels.collate([F.rotate(leaf, 20) for leaf in leaves])
    boxes = torch.tensor([transform_box(leaf.path.matrix, (0, 0, 224, 224)) for leaf in leaves])
    stored = torch.stack([as_published(store, row) for row in rows])
    ways: Ways = {
        "published": lambda: published(stored, boxes, store.num_classes),
        "ours": lambda: records.targets(GRID),
        "ours, and the crops'": lambda: (records.targets(GRID), records.crop()),
        "ours, rotated": lambda: turned.targets(GRID),
        "ours, merged and cut to 10": lambda: records.sparse(GRID, 10),
    }
    memory = {name: peak_memory(way) for name, way in ways.items()}
    clock = time.perf_counter if options.wall else time.process_time
    seconds = take_turns(ways, options.rounds, clock)
    print(f"{store.layout}, {options.batch} crops, {options.threads} thread(s), ", end="")
    print("wall-clock" if options.wall else "CPU time")
    for name, spent in seconds.items():
        each = statistics.median(spent) / options.batch * 1e3
        ratios = [a / b for a, b in zip(seconds["published"], spent, strict=True)]
        print(
            f"{each:.3f} ms a map, {statistics.median(ratios):5.1f} times as fast, "
            f"{memory[name]:5.0f} MB at most: {name}"
        )


if __name__ == "__main__":
    main()
