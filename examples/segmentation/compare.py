"""Token labels against labels alone, as pretraining for segmentation. Prints the table.

    python examples/segmentation/compare.py --out OUT

For each seed, two small LV-ViTs start from the same weights and learn to classify crops of the same
scenes in the same order: one from the class of the largest object alone, one with token labels
beside it. Each is then the backbone that `train.py` fine-tunes, on other scenes. The token labels
are the scenes' own masks, pooled to patches: a flawless annotator. All is made in OUT, and a run
that was killed resumes there.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train
from scenes import NORMALISE, TOY_CLASSES, make_toy, paint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import tokenlabel as tl

SIZE, PATCH = 64, 8
STUDENT = {
    **{"num_classes": len(TOY_CLASSES), "patch_size": PATCH, "stem_width": 16},
    **{"width": 64, "depth": 4, "heads": 2},
}
#: Weight of the patches' loss.
ARMS = {"labels only": 0.0, "+ token labels": 0.5}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the scenes and all checkpoints")
    add("--seeds", type=int, default=3)
    add("--images", type=int, default=800, help="scenes to pretrain on")
    add("--epochs", type=int, default=15, help="of pretraining")
    add("--steps", type=int, default=300, help="of fine-tuning")
    add("--threads", type=int, help="of torch; else as many as it takes")
    args = parser.parse_args()
    if min(args.seeds, args.epochs, args.steps) < 1 or args.images < 64:
        parser.error("--seeds, --epochs and --steps must be at least 1, and --images 64")
    return args


class Labelled(Dataset[tuple[Tensor, tl.TokenLabels]]):
    """Crops of scenes with their labels: the class of the largest object, and a map of the mask."""

    def __init__(self, count: int, seed: int = 1) -> None:
        random = np.random.default_rng(seed)  # other scenes than the toy set's
        self.scenes = [paint(random) for _ in range(count)]
        crop = v2.RandomResizedCrop(SIZE, scale=(0.35, 1), antialias=True)
        ends = (tl.ToTokenLabels(SIZE // PATCH), *NORMALISE)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *ends])

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, tl.TokenLabels]:
        pixels, mask = self.scenes[index]
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
        sample: tuple[Tensor, tl.TokenLabels] = self.transform(image, label_map(mask))
        return sample


def label_map(mask: np.ndarray, cell: int = PATCH) -> tl.TokenLabelMap:
    """A mask [H, W] as a map: the probability of a class is its fraction of the cell's pixels."""
    height, width = mask.shape
    cells = mask.reshape(height // cell, cell, width // cell, cell)
    shown = np.stack([(cells == number).mean((1, 3)) for number in range(len(TOY_CLASSES))], -1)
    with np.errstate(divide="ignore"):
        scores = np.log(shown)
    return tl.TokenLabelMap.from_scores(
        scores,
        np.broadcast_to(np.arange(len(TOY_CLASSES)), scores.shape),
        np.full(scores.shape[:2], -np.inf),
        canvas_size=mask.shape,
        label=1 + int(np.bincount(mask[mask > 0], minlength=len(TOY_CLASSES))[1:].argmax()),
        num_classes=len(TOY_CLASSES),
    )


def pretrain(seed: int, args: argparse.Namespace) -> None:
    """Train the students of both arms side by side; write OUT/seed-N/ARM/lvvit.pth."""
    paths = {arm: folder(args, seed, arm) / "lvvit.pth" for arm in ARMS}
    if all(path.exists() for path in paths.values()):
        return
    data, start = Labelled(args.images), time.monotonic()
    students, losses, optimizers = {}, {}, {}
    for arm, weight in ARMS.items():
        torch.manual_seed(seed)
        students[arm] = tl.lvvit_t(image_size=SIZE, **STUDENT)
        losses[arm] = tl.TokenLabelLoss(dense_weight=weight)
        optimizers[arm] = torch.optim.AdamW(students[arm].parameters(), 1e-3, weight_decay=0.05)
    loader = DataLoader(data, 32, shuffle=True, drop_last=True, num_workers=1)
    steps = args.epochs * len(loader)
    for epoch in range(args.epochs):
        totals = dict.fromkeys(ARMS, 0.0)
        for step, (images, labels) in enumerate(loader, epoch * len(loader)):
            for arm, student in students.items():
                for group in optimizers[arm].param_groups:
                    group["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
                loss = losses[arm](student(images), labels)
                optimizers[arm].zero_grad()
                loss.backward()
                optimizers[arm].step()
                totals[arm] += loss.item() / len(loader)
        said = ", ".join(f"{arm} {total:.3f}" for arm, total in totals.items())
        print(f"seed {seed}, epoch {epoch + 1}/{args.epochs}: loss {said}", flush=True)
    print(f"seed {seed}: pretrained in {time.monotonic() - start:.0f} s", flush=True)
    for arm, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        train.save(path, {"state_dict": students[arm].state_dict()})


def folder(args: argparse.Namespace, seed: int, arm: str) -> Path:
    """Where an arm of a seed keeps its checkpoints."""
    path: Path = args.out / f"seed-{seed}" / arm.strip("+ ").replace(" ", "-")
    return path


def finetune(seed: int, arm: str, args: argparse.Namespace) -> dict[str, float]:
    """Fine-tune the backbone of an arm by `train.py`; return its mIoU before and after."""
    kwargs = [f"{name}={value}" for name, value in STUDENT.items()]
    out = folder(args, seed, arm)
    command: list[Any] = [
        *("--data", args.out / "toy", "--out", out, "--num-classes", len(TOY_CLASSES)),
        *("--model", "lvvit_t", "--model-kwargs", *kwargs, "--weights", out / "lvvit.pth"),
        *("--size", 96, "--width", 32, "--drop-path", 0, "--batch-size", 8, "--lr", 1e-3),
        *("--steps", args.steps, "--warmup", 20, "--save-every", 100, "--workers", 1),
        *("--scales", 0.75, 1, 1.25, "--seed", seed),
    ]
    print(f"seed {seed}, {arm}:", flush=True)
    return train.run(train.arguments([str(word) for word in command]))


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: of each arm the mean over seeds in percent, and the spread at one scale."""
    lines = ["| pretrained with | before | one scale | spread (std) | several, flips | each seed |"]
    lines.append("|---|---|---|---|---|---|")
    for arm, rows in results.items():
        scores = {key: [100 * row[key] for row in rows] for key in ("before", "one", "several")}
        before, one, several = (f"{statistics.mean(values):.2f}" for values in scores.values())
        spread = f"{statistics.stdev(scores['one']):.2f}" if len(rows) > 1 else ""
        each = ", ".join(f"{value:.2f}" for value in scores["one"])
        lines.append(f"| {arm} | {before} | {one} | {spread} | {several} | {each} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing of the table, and print it."""
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        make_toy(args.out / "toy")
        results: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for seed in range(args.seeds):
            pretrain(seed, args)
            for arm in ARMS:
                results[arm].append(finetune(seed, arm, args))
        print(table(results))
    except (OSError, ValueError, tl.TokenLabelError) as error:
        sys.exit(f"compare.py: error: {error}")


if __name__ == "__main__":
    main()
