"""Time to target: label maps to the targets of 14x14 patches, against the published dense path.

    python benchmarks/targets.py --labels OUT/SPLIT

Both ways make the targets of the same 64 random crops, flipped or not, in rounds that take turns in
this process, with one thread, as in a DataLoader's worker. The published path (TokenLabeling,
LV-ViT) scatters the stored scores of the batch to dense [B, 1000, H, W] logits, averages them by
RoIAlign over each patch and over the crop, and takes softmax of both. Ours goes map by map. The
labels must be real ones, for how fast they merge depends on how alike neighbours are; without
`--labels` the embedded sample is annotated first, into `--work`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import v2

from tokenlabel.annotate import AnnotateConfig, annotate
from tokenlabel.dataset import LabelStore, TokenLabelMap, ToTokenTargets
from tokenlabel.dataset.path import transform_box

PUBLISHED_K = 5
GRID = 14
Views = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def real_views(store: LabelStore, k: int) -> Views:
    """(scores, classes, rest) of up to 64 images, cut to the best k classes of each cell."""
    views = []
    for row in np.flatnonzero(~store.failed)[:64].tolist():
        entry = store[row]
        scores, classes, rest = entry.scores[0], entry.classes[0], entry.rest[0]
        others = np.concatenate([scores[..., k:], rest[..., None]], -1).astype(np.float32)
        views.append(
            (scores[..., :k], classes[..., :k], np.logaddexp.reduce(others, -1).astype(np.float16))
        )
    return views


def crops(views: Views, count: int) -> list[TokenLabelMap]:
    """Maps after RandomResizedCrop and flip, the same each time."""
    torch.manual_seed(0)
    transform = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])
    maps = [
        TokenLabelMap.from_scores(*views[i % len(views)], canvas_size=(375, 500))
        for i in range(count)
    ]
    return [transform(score_map) for score_map in maps]


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


def take_turns(
    ways: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labels", type=Path, help="OUT/SPLIT, with at least 5 scores a patch")
    parser.add_argument("--work", type=Path, default=Path("/tmp/tokenlabel-benchmarks"))
    parser.add_argument("--input-size", type=int, default=576, help="of the teacher")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="wall-clock, not CPU time")
    options = parser.parse_args()
    labels = options.labels
    if labels is None:
        out = options.work / f"labels-sample-{options.input_size}"
        labels = out / "train"
        annotate(
            AnnotateConfig(
                data="sample",
                out=str(out),
                model="tf_efficientnet_lite0",
                weights="sample",
                input_size=options.input_size,
                batch_size=16,
            )
        )
    torch.set_num_threads(options.threads)
    store = LabelStore(labels)
    five = real_views(store, PUBLISHED_K)
    ours = {f"ours, k={k}": crops(real_views(store, k), options.batch) for k in {5, store.k}}
    boxes = torch.tensor(
        [transform_box(m.path.matrix, (0, 0, 224, 224)) for m in ours["ours, k=5"]]
    )
    files = [
        torch.from_numpy(np.stack([scores, classes.astype(np.float16)]).transpose(0, 3, 1, 2))
        for scores, classes, _ in five
    ]
    stored = torch.stack([files[i % len(files)] for i in range(options.batch)])

    def make(maps: list[TokenLabelMap], to_targets: ToTokenTargets) -> Callable[[], object]:
        return lambda: [to_targets(score_map) for score_map in maps]

    ways: dict[str, Callable[[], object]] = {
        "published": lambda: published(stored, boxes, store.num_classes)
    }
    for name, maps in ours.items():
        ways[name] = make(maps, ToTokenTargets(GRID, maps[0].shape[-1]))
    turned = [v2.functional.rotate(score_map, 20) for score_map in ours["ours, k=5"]]
    ways["ours, k=5, rotated too"] = make(turned, ToTokenTargets(GRID, 5))
    views, to_targets = iter(range(1 << 30)), ToTokenTargets(GRID, 5)
    whole = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), to_targets])

    def from_scores() -> None:
        for _ in range(options.batch):
            view = five[next(views) % len(five)]
            whole(TokenLabelMap.from_scores(*view, canvas_size=(375, 500)))

    ways["ours, k=5, from the arrays on: map, crop, flip, target"] = from_scores
    clock = time.perf_counter if options.wall else time.process_time
    seconds = take_turns(ways, options.rounds, clock)
    print(f"{store.grid} maps, {options.batch} crops, {options.threads} thread(s), ", end="")
    print("wall-clock" if options.wall else "CPU time")
    for name, spent in seconds.items():
        each = statistics.median(spent) / options.batch * 1e3
        ratios = [a / b for a, b in zip(seconds["published"], spent, strict=True)]
        print(f"{each:.3f} ms a map, {statistics.median(ratios):5.1f} times: {name}")


if __name__ == "__main__":
    main()
