"""How far a target of k stored classes is from the truth, on real pictures and a real teacher.

    python benchmarks/fidelity.py --data ../shared/imagenet/val

The truth is the teacher's softmax over all classes, averaged over what each patch of a random
resized crop (and flip) shows. Printed is the mean over patches of KL(truth || target) in nats:

- ours: the best k classes, and the mass of the others spread evenly over them;
- published: the target of TokenLabeling, with its boxes the right way round;
- transposed: the same with x and y of the box exchanged, as the published code passes them.
"""

import argparse
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import v2

from tokenlabel.annotate.images import decode_batch
from tokenlabel.annotate.manifest import scan
from tokenlabel.annotate.sample import sample_folder
from tokenlabel.annotate.teacher import Teacher
from tokenlabel.dataset import TokenLabelMap, TokenTargets, ToTokenTargets

KS = (5, 10, 20)
RULES = ("ours", "published", "transposed")


def full_maps(
    split: Path, teacher: Teacher, images: int
) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
    """Logits of all classes, descending, [H, W, C], their classes, and the picture's (h, w)."""
    keys = [key.decode() for key in islice(scan(split), images)]
    for key in keys:
        batch = decode_batch(str(split), [key], teacher.input_size, teacher.interpolation)
        if batch.errors[0]:
            continue
        scores, classes, _ = teacher(batch.images)
        width, height = batch.sizes[0].tolist()
        yield scores[0, 0].float(), classes[0, 0], (height, width)


def kept(scores: Tensor, classes: Tensor, k: int, size: tuple[int, int]) -> TokenLabelMap:
    """The map that a shard with k scores a patch would hold: all in float16."""
    rest = scores[..., k:].logsumexp(-1)  # -inf for none
    return TokenLabelMap.from_scores(
        scores[..., :k].half(), classes[..., :k], rest.half(), canvas_size=size
    )


def densified(targets: TokenTargets, num_classes: int) -> Tensor:
    """Probabilities [N, C], the rest spread evenly over the classes that are not listed."""
    listed = targets.probs > 0
    shape = (len(targets.probs), num_classes)
    dense = torch.zeros(shape).scatter_add(1, targets.classes.long(), targets.probs)
    absent = num_classes - listed.sum(1)
    share = (targets.rest / absent.clamp(min=1))[:, None]
    return torch.where(dense > 0, dense, share)


def transposed(
    score_map: TokenLabelMap, source: TokenLabelMap, grid: int, num_classes: int
) -> Tensor:
    """The published target with the box as the published code hands it to RoIAlign, as (y, x).

    Args:
        score_map: the map after crop and flip.
        source: the same map before.
        grid: the student's patches a side.
        num_classes: number of classes.
    """
    (height, width), (rows, columns) = score_map.canvas_size, source.classes.shape[1:3]
    x, y, _ = score_map.path(np.array([0.0, width]), np.array([0.0, height]))
    box = np.array([y.min(), x.min(), y.max(), x.max()]) * [columns, rows, columns, rows] - 0.5
    logits = torch.zeros(rows, columns, num_classes)
    logits.scatter_(2, source.classes[0].long(), source.as_subclass(Tensor)[0].float())
    region = torch.tensor([[0.0, *box.tolist()]])
    patches = roi_align(logits.permute(2, 0, 1)[None], region, grid)[0]
    if x[0] > x[1]:
        patches = patches.flip(2)
    return patches.flatten(1).T.softmax(1)


def divergence(truth: Tensor, target: Tensor) -> float:
    """Mean over patches of KL(truth || target)."""
    logs = target.clamp(min=1e-30).log()
    return float((torch.special.xlogy(truth, truth) - truth * logs).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of class folders (default: the sample)")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--crops", type=int, default=1, help="of each image")
    parser.add_argument("--grid", type=int, default=14)
    parser.add_argument("--input-size", type=int, default=576, help="of the teacher")
    options = parser.parse_args()
    grid = options.grid
    found: dict[tuple[str, int], list[float]] = {(rule, k): [] for rule in RULES for k in KS}
    with tempfile.TemporaryDirectory() as name:
        split = options.data or sample_folder(Path(name)) / "train"

        teacher = Teacher(
            "tf_efficientnet_lite0", weights="sample", input_size=options.input_size, k=1000
        )
        classes_of_all = teacher.num_classes
        augment = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])
        whole = ToTokenTargets(grid, k=classes_of_all)
        published = ToTokenTargets(
            grid, k=classes_of_all, rule="published", num_classes=classes_of_all
        )
        images = 0
        for scores, classes, size in full_maps(split, teacher, options.images):
            images += 1
            sources = {k: kept(scores, classes, k, size) for k in (*KS, classes_of_all)}
            for crop in range(options.crops):
                # One call for all maps: torchvision draws one crop for everything in a sample.
                torch.manual_seed(images * options.crops + crop)
                moved = augment(sources)
                truth = densified(whole(moved[classes_of_all]), classes_of_all)
                for k in KS:
                    targets = {
                        "ours": densified(ToTokenTargets(grid, k)(moved[k]), classes_of_all),
                        "published": densified(published(moved[k]), classes_of_all),
                        "transposed": transposed(moved[k], sources[k], grid, classes_of_all),
                    }
                    for rule, target in targets.items():
                        found[rule, k].append(divergence(truth, target))
    print(f"{images} images, {options.crops} crop(s) each, {teacher.grid} maps, {grid}x{grid}\n")
    print("| k | ours | published, boxes right | published, transposed |\n|---|---|---|---|")
    for k in KS:
        print(f"| {k} | " + " | ".join(f"{np.mean(found[rule, k]):.3f}" for rule in RULES) + " |")


if __name__ == "__main__":
    main()
