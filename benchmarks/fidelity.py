"""How near the targets of a label set are to the teacher itself, and what they cost in bytes.

    python benchmarks/fidelity.py --data /path/to/imagenet

Label sets are written by `annotate` for `--images` images, evenly spaced over all below `--data`.
Of each image the whole and two random crops of each range of area are shown to the teacher live,
at its first input size; their targets come from `store.labels`. Printed are, for each range,

- KL(teacher live on the crop || target), mean over patches, in nats;
- how often the mean target of the crop has the image's label on top: to say what the teacher says
  of an enlarged crop is not quality in itself, and the live teacher shows how little it can be
  worth;

and for each way to store a map, KL of its cells to the full softmax, and bytes an image of
a shard of the default size, 4,096 images, that holds these maps over and over.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SHARD, imagenet_keys, sample_config, write_split
from torch import Tensor

from tokenlabel.annotate import annotate
from tokenlabel.annotate.sample import sample_folder
from tokenlabel.annotate.teacher.rebuild import rebuild_teachers
from tokenlabel.dataset import LabelStore
from tokenlabel.inspection.agreement import SCALES, Score, look, mean, probabilities, random_box
from tokenlabel.inspection.agreement import score as score_of
from tokenlabel.inspection.pictures.image_files import ImageFiles

CROPS = 2  # of each range; the whole image once
#: As in TokenLabelDataset(shrink=).
SHRINK = 0.3
#: The options of `annotate` for each label set; all else are its defaults.
ONE_PASS = {"input_size": 320, "k": 10, "precise": True, "residual": 0}
PASSES = {"input_size": [320, 448]}
SETS: dict[str, dict[str, Any]] = {
    "320, k10 float16, uniform rest": ONE_PASS,
    "320": {"input_size": 320},
    "320+448": PASSES,
    "320+448, compact": {**PASSES, "compact": True},
    "576": {"input_size": 576},
    "576, compact": {"input_size": 576, "compact": True},
}
#: Rows of the first table: the label set and the shrink.
ROWS = [(name, shrink) for name in list(SETS)[:4] for shrink in (0.0, SHRINK)]
Scores = dict[tuple[str, tuple[float, float]], list[Score]]


def copy_images(source: Path, target: Path, count: int) -> None:
    """Copy `count` images, evenly spaced over all in the class folders of `source` by name."""
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda p: p.name)
    for at in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int):
        folder = target / files[at].parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[at], folder)


def top(probs: Tensor, k: int) -> Tensor:
    """The k most probable classes of each patch, the rest evenly over the others."""
    values, classes = probs.topk(k)
    rest = (1 - values.sum(-1, keepdim=True)) / (probs.shape[-1] - k)
    return rest.expand_as(probs).scatter(-1, classes, values)


def add_crops(stores: dict[str, LabelStore], images: Path, found: Scores) -> None:
    """Score all targets of all images' crops."""
    first = next(iter(stores.values()))
    teachers = rebuild_teachers(first.attrs)
    files, grid, rng = ImageFiles(first, images), teachers.judge.grid, np.random.default_rng(0)
    for row, key in enumerate(first.keys):
        image, label = files.read(key), first[row].label
        bins = [scale for scale in SCALES for _ in range(CROPS if scale != SCALES[0] else 1)]
        boxes = [random_box(image.size, scale, rng) for scale in bins]
        live = look(teachers.judge, teachers.other, image, boxes)
        targets = {
            "teacher live, mirrored": live.mirrored,
            "teacher live, at 448 px": live.other,
            "teacher live itself, top 10": top(live.direct, 10),
        }
        for name, shrink in ROWS:
            labels = stores[name].labels([row] * len(bins), boxes, shrink=shrink)
            targets[name + " + shrink" * bool(shrink)] = labels.targets(grid).dense()
        everywhere = torch.ones(live.direct.shape[1], dtype=torch.bool)
        for name, target in targets.items():
            for scale, truth, one in zip(bins, live.direct, target, strict=True):
                result = score_of(truth, one, everywhere, label)
                found.setdefault((name, scale), []).append(result)


def cost(store: LabelStore, images: Path, work: Path) -> tuple[float, float]:
    """KL of the cells to the softmax of the teacher as it annotated, and bytes an image."""
    annotator = rebuild_teachers(store.attrs).annotator
    files, found = ImageFiles(store, images), []
    for row, key in enumerate(store.keys):
        truth = probabilities(annotator, files.read(key), [store[row].extent])[0]
        stored = torch.from_numpy(store[row].dense()).flatten(0, 1)
        everywhere = torch.ones(len(stored), dtype=torch.bool)
        found.append(score_of(truth, stored, everywhere, -1).kl)
    write_split(work, store, imagenet_keys(SHARD))
    (shard,) = LabelStore(work).shards
    return float(np.mean(found)), shard.stat().st_size / SHARD


def print_table(title: str, metric: str, found: Scores) -> None:
    """One metric: a row for each kind of target, a column for each range of area."""
    print(f"\n| {title} | 8-20% | 20-40% | 40-70% | 70-100% | whole |\n|---|---|---|---|---|---|")
    for name in dict.fromkeys(name for name, _ in found):
        values = [mean(found[name, scale])[metric] for scale in reversed(SCALES)]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images (default: the sample)")
    parser.add_argument("--images", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = options.data or sample_folder(work / "sample")
        copy_images(data, work / "data" / "train", options.images)
        stores = {}
        for number, (title, given) in enumerate(SETS.items()):
            annotate(sample_config(work / "data", out=str(work / str(number)), **given))
            stores[title] = LabelStore(work / str(number) / "train")
        print(f"{len(stores['320'])} images, {CROPS} crops of each range")
        found: Scores = {}
        add_crops(stores, work / "data", found)
        print_table("KL, nats", "kl", found)
        print_table("label top-1", "label_top1", found)
        print("\n| stored | grid | KL of a cell | bytes an image |\n|---|---|---|---|")
        for title, store in stores.items():
            kl, size = cost(store, work / "data", store.root.with_name("full"))
            print(f"| {title} | {store.grid[0]} x {store.grid[1]} | {kl:.3f} | {size:,.0f} |")


if __name__ == "__main__":
    main()
