"""Step 4: the same small student, supervised in four ways. Prints the table.

    python examples/cifar10/compare.py --data DATA --work WORK

For each seed, the students of all arms start from the same weights and are trained side by side,
on the same crops in the same order. Results are lines of WORK/results.jsonl; a table that was
killed resumes with the arms and seeds that are not there, from their last finished epoch. DATA/val
is used once, at the end. To choose settings, take `--held-out`: it tests on a part of train.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as F

import tokenlabel as tl

SIZE, PATCH = 32, 4
NORMALISE = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)])
ARMS = {
    "a": "labels only",
    "b": "+ soft whole-crop target",
    "c": "+ token labels",
    "d": "+ token labels, boxes transposed",
}
#: What decides a result, beside the arm and the seed.
SETTINGS = ("epochs", "batch_size", "lr", "width", "depth", "min_scale", "dense_weight", "held_out")


def loss_of(arm: str, dense_weight: float) -> tl.TokenLabelLoss:
    """The loss of an arm. With a dense weight of 1, any soft target weighs as much as the label."""
    if arm in "cd":
        return tl.TokenLabelLoss(dense_weight=dense_weight)
    return tl.TokenLabelLoss(dense_weight=0, cls_target="both" if arm == "b" else "label")


class InMemory(Dataset[tuple[Tensor, int]]):
    """An ImageFolder decoded once, and the row of each file's map in a label set, if given."""

    def __init__(self, folder: Path, store: tl.LabelStore | None = None) -> None:
        files = ImageFolder(str(folder))
        self.images = [F.pil_to_tensor(image) for image, _ in files]
        self.classes = files.targets
        keys = [Path(path).relative_to(folder).as_posix() for path, _ in files.samples]
        self.rows = [store.row(key) for key in keys] if store else []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.classes[index]


class Crops(Dataset[tuple[Tensor, int, Tensor, bool]]):
    """Random crops of some images, and where they come from.

    A sample is the crop, uint8 [3, SIZE, SIZE]; the row of the image's map; the crop's box
    (x0, y0, x1, y1), normalised to the whole image; and whether the crop was mirrored after that.
    """

    def __init__(self, source: InMemory, indices: Sequence[int], min_scale: float) -> None:
        self.source, self.indices, self.scale = source, indices, (min_scale, 1.0)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor, bool]:
        number = self.indices[index]
        image = self.source.images[number]
        top, left, h, w = RandomResizedCrop.get_params(image, list(self.scale), [3 / 4, 4 / 3])
        crop = F.resized_crop(image, top, left, h, w, [SIZE, SIZE], antialias=True)
        mirrored = bool(torch.rand(()) < 0.5)
        height, width = image.shape[-2:]
        box = torch.tensor([left / width, top / height, (left + w) / width, (top + h) / height])
        return crop.flip(-1) if mirrored else crop, self.source.rows[number], box, mirrored


def new_student(args: argparse.Namespace, num_classes: int) -> tl.TokenStudent:
    """A small ViT of 8 x 8 patches, its stem convolutional as LV-ViT's, and shorter."""
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=args.width,
        depth=args.depth,
        num_heads=args.width // 32,
        num_classes=num_classes,
    )
    half = args.width // 2
    vit.patch_embed.proj = nn.Sequential(
        *(nn.Conv2d(3, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU()),
        *(nn.Conv2d(half, half, 3, 1, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU()),
        nn.Conv2d(half, args.width, 2, 2),
    )
    return tl.TokenStudent(vit, image_size=SIZE)


class Arm:
    """A student with its loss, optimizer and schedule."""

    def __init__(self, name: str, seed: int, steps: int, num_classes: int, args: Any) -> None:
        torch.manual_seed(seed)
        self.student = new_student(args, num_classes)
        self.loss = loss_of(name, args.dense_weight)
        self.optimizer = create_optimizer_v2(self.student, "adamw", args.lr, weight_decay=0.05)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            "cosine",
            args.epochs,
            warmup_epochs=min(1, args.epochs - 1),
            updates_per_epoch=steps,
            step_on_epochs=False,
        )

    def train(self, images: Tensor, labels: tl.TokenLabels, step: int) -> float:
        """Take one step and return the loss."""
        loss = self.loss(self.student(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step_update(step)
        return loss.item()


def run(
    names: Sequence[str],
    seed: int,
    train: Crops,
    test: Dataset[Any],
    store: tl.LabelStore,
    args: Any,
) -> dict[str, float]:
    """Train a student for each arm, side by side, and return their top-1 on `test`."""
    order = torch.Generator()
    loader = DataLoader(
        train, args.batch_size, shuffle=True, drop_last=True, num_workers=1, generator=order
    )
    arms = {name: Arm(name, seed, len(loader), store.num_classes, args) for name in names}
    settings = {**settings_of(args), "arms": "".join(names)}
    path, first = args.work / f"seed-{seed}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["settings"] == settings:
            first = state["epoch"]
            for name, arm in arms.items():
                arm.student.load_state_dict(state[name]["student"])
                arm.optimizer.load_state_dict(state[name]["optimizer"])
    for epoch in range(first, args.epochs):
        start, totals = time.monotonic(), dict.fromkeys(names, 0.0)
        order.manual_seed(1000 * seed + epoch)  # of the order and, through the worker, of the crops
        for step, (crops, rows, boxes, mirrored) in enumerate(loader, epoch * len(loader) + 1):
            images, labels = NORMALISE(crops), store.labels(rows, boxes, mirrored)
            # What the published code does: the box is read as (y0, x0, y1, x1), so the target is
            # that of another part of the image than the crop shows.
            transposed = store.labels(rows, boxes[:, [1, 0, 3, 2]], mirrored)
            for name, arm in arms.items():
                own = transposed if name == "d" else labels
                totals[name] += arm.train(images, own, step) / len(loader)
        print(
            f"seed {seed}, epoch {epoch + 1}/{args.epochs}, {time.monotonic() - start:.0f} s: loss",
            ", ".join(f"({name}) {total:.3f}" for name, total in totals.items()),
            flush=True,
        )
        state = {"settings": settings, "epoch": epoch + 1}
        for name, arm in arms.items():
            parts = {"student": arm.student, "optimizer": arm.optimizer}
            state[name] = {part: value.state_dict() for part, value in parts.items()}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return {name: accuracy(arm.student, test) for name, arm in arms.items()}


@torch.inference_mode()
def accuracy(student: nn.Module, test: Dataset[Any]) -> float:
    """Top-1 on untouched images."""
    student.eval()
    batches = DataLoader(test, 200)
    right = [student(NORMALISE(images)).argmax(1) == classes for images, classes in batches]
    return torch.cat(right).float().mean().item()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides results, as far as the command line does."""
    return {name: getattr(args, name) for name in SETTINGS}


def read_results(path: Path, settings: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Results of earlier runs with these settings, by arm and seed."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # empty, or the last line of a run that was killed writing it
            continue
        if row["settings"] == settings:
            found[row["arm"], row["seed"]] = row["top1"]
    return found


def table(results: dict[tuple[str, int], float], args: argparse.Namespace) -> str:
    """The table in Markdown: mean and spread of each arm, and the annotator's own accuracy."""
    lines = ["| supervision | top-1, mean | spread (std) | each seed |", "|---|---|---|---|"]
    for arm, name in ARMS.items():
        scores = [100 * results[arm, seed] for seed in range(args.seeds) if (arm, seed) in results]
        if scores:
            spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            each = ", ".join(f"{score:.2f}" for score in scores)
            lines.append(f"| ({arm}) {name} | {statistics.mean(scores):.2f} | {spread} | {each} |")
    report = args.work / "labels" / "val" / "report.json"
    if report.exists() and not args.held_out:
        top1 = 100 * json.loads(report.read_text())["top1"]
        lines.append(f"| the annotator itself | {top1:.2f} | | |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train/CLASS/* and val/CLASS/*")
    add("--work", type=Path, required=True, help="folder with labels/train; results go there")
    add("--arms", default="abcd", help="which of them to run")
    add("--seeds", type=int, default=3, help="students of each arm")
    add("--only-seed", type=int, help="run this seed alone, for several processes to share a table")
    add("--epochs", type=int, default=12)
    add("--batch-size", type=int, default=32)
    add("--lr", type=float, default=1e-3)
    add("--width", type=int, default=64, help="of the student, in multiples of 32")
    add("--depth", type=int, default=4, help="layers of the student")
    add("--min-scale", type=float, default=0.2, help="smallest crop, as a fraction of the image")
    add("--dense-weight", type=float, default=1.0, help="beta, the weight of the patches' loss")
    add("--threads", type=int, default=1, help="CPU threads of the students")
    add(
        "--held-out",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="test on this fraction of train, left out of training, instead of val",
    )
    args = parser.parse_args()
    if not args.arms or set(args.arms) - set(ARMS):
        parser.error(f"--arms must be some of {''.join(ARMS)}, got {args.arms!r}")
    for name in ("seeds", "epochs", "batch_size", "depth", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.width < 32 or args.width % 32:
        parser.error(f"--width must be a multiple of 32, got {args.width}")
    if not 0 <= args.held_out < 1:
        parser.error(f"--held-out is a fraction below 1, got {args.held_out}")
    return args


def main() -> None:
    """Run what is missing of the table, and print it."""
    args = arguments()
    torch.set_num_threads(args.threads)
    settings = settings_of(args)
    path = args.work / "results.jsonl"
    store = tl.LabelStore(args.work / "labels" / "train")
    source = InMemory(args.data / "train", store)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(1)).tolist()
    count = round(args.held_out * len(order))
    train = Crops(source, order[count:], args.min_scale)
    test = Subset(source, order[:count]) if count else InMemory(args.data / "val")
    for seed in range(args.seeds) if args.only_seed is None else [args.only_seed]:
        done = read_results(path, settings)
        missing = [arm for arm in dict.fromkeys(args.arms) if (arm, seed) not in done]
        found = run(missing, seed, train, test, store, args) if missing else {}
        for arm, top1 in found.items():
            row = {"arm": arm, "seed": seed, "top1": top1, "settings": settings}
            with open(path, "a") as file:
                file.write("\n" + json.dumps(row))  # after what a killed run left of a line
    print(table(read_results(path, settings), args))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, tl.TokenLabelError) as error:
        sys.exit(f"compare.py: error: {error}")
