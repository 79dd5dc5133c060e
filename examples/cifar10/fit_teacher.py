"""Step 2: a teacher for CIFAR-10's classes, from a network that knows ImageNet's.

    python examples/cifar10/fit_teacher.py --data DATA --out WORK

The trunk of an EfficientNet-Lite0 (ImageNet weights of the extra `sample`; nothing is downloaded)
stays frozen, so a random crop of each image passes it once and its features are kept in WORK. The
last stage and a new classifier are then trained on these features, on DATA/train alone, and saved
as WORK/teacher.pth: a plain timm checkpoint, which `cli.py annotate` takes by `--weights`.

A killed run resumes with the crops that are done. For another network, change MODEL and where
`trunk` ends; for classes and images of your own, change nothing.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from tokenlabel.annotate.teacher.timm_teacher import build_model

MODEL = "tf_efficientnet_lite0"
MEAN = STD = [0.5, 0.5, 0.5]  # the model's own, which the annotation will use
BICUBIC = v2.InterpolationMode.BICUBIC


class ToPatches(nn.Module):
    """A linear layer at each location: features [B, C, H, W] to logits [B, classes, H, W]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, features: Tensor) -> Tensor:
        """Classify each location."""
        return self.linear(features.movedim(1, -1)).movedim(-1, 1)


def features(trunk: nn.Module, folder: Path, view: int, size: int, path: Path) -> Tensor:
    """Features of one random crop of each image, float16 [n, C, H, W]; made once, kept in `path`.

    Args:
        trunk: the frozen layers; normalised images [B, 3, size, size] to features.
        folder: of the images, read as an ImageFolder.
        view: number of the crop: its seed.
        size: side of the trunk's input in pixels.
        path: a .npy file.
    """
    if not path.exists():
        transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, (0.4, 1.0), interpolation=BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        torch.manual_seed(view)
        device = next(trunk.parameters()).device
        rows = []
        with torch.inference_mode():
            for images, _ in DataLoader(ImageFolder(folder, transform), batch_size=50):
                images = images.to(device, memory_format=torch.channels_last)
                rows.append(trunk(images).half().cpu().contiguous().numpy())
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.save(file, np.concatenate(rows))
        os.replace(path.with_suffix(".tmp"), path)
    return torch.from_numpy(np.load(path, allow_pickle=False))


def fit(
    tail: nn.Module, views: list[Tensor], labels: Tensor, args: argparse.Namespace
) -> nn.Module:
    """Train the last stage and the classifier; an epoch takes one of the crops of each image.

    Half of the loss is that of the image's logits, half that of the logits of each patch by
    itself. Without the latter, patches are sure of a class that the image as a whole outvotes.

    Args:
        tail: features to the logits of each patch [B, classes, H, W].
        views: features of each crop, [n, C, H, W].
        labels: classes [n].
        args: the command line.
    """
    device = next(tail.parameters()).device
    # Batch norm keeps ImageNet's statistics: training and annotating then see the same network.
    tail.eval()
    optimizer = create_optimizer_v2(tail, opt="adamw", lr=args.lr, weight_decay=0.05)
    steps = -(-len(labels) // args.batch_size)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", args.epochs, updates_per_epoch=steps, step_on_epochs=False
    )
    torch.manual_seed(0)
    for epoch in range(args.epochs):
        order = torch.randperm(len(labels))
        choice = torch.randint(len(views), (len(labels),)).tolist()
        total = 0.0
        for step in range(steps):
            rows = order[step * args.batch_size : (step + 1) * args.batch_size]
            batch = torch.stack([views[choice[row]][row] for row in rows.tolist()])
            classes = labels[rows].to(device)
            patches = tail(batch.to(device).float())
            each = classes[:, None, None].expand(-1, *patches.shape[2:])
            loss = cross_entropy(patches.mean((2, 3)), classes) + cross_entropy(patches, each)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(epoch * steps + step + 1)
            total += loss.item()
        print(f"epoch {epoch + 1}/{args.epochs}: loss {total / steps:.3f}", flush=True)
    return tail


@torch.inference_mode()
def accuracy(tail: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Top-1 on one crop of each image."""
    device = next(tail.parameters()).device
    found = [
        tail(part.to(device).float()).mean((2, 3)).argmax(1).cpu() for part in inputs.split(200)
    ]
    return (torch.cat(found) == labels).float().mean().item()


def main() -> None:
    """Parse the command line, fit, save."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train/CLASS/*")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--size", type=int, default=256, help="side of the teacher's input in pixels")
    add("--views", type=int, default=1, help="crops of each image")
    add("--epochs", type=int, default=4)
    add("--batch-size", type=int, default=100)
    add("--lr", type=float, default=1e-3)
    add("--compile", action="store_true", help="torch.compile the trunk: slow start, then faster")
    add(
        "--held-out",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="test on this fraction of train, left out, to choose settings; saves no teacher",
    )
    args = parser.parse_args()
    if not (args.data / "train").is_dir():
        parser.error(
            f"--data must hold a folder train with a folder a class; no {args.data / 'train'}"
        )
    if min(args.views, args.epochs, args.batch_size) < 1 or not 0 <= args.held_out < 1:
        parser.error(
            "--views, --epochs and --batch-size start at 1; --held-out is a fraction below 1"
        )
    teacher = args.out / "teacher.pth"
    if teacher.exists() and not args.held_out:
        print(f"{teacher} is there already; to refit it, delete it")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)

    folder = args.data / "train"
    images = ImageFolder(folder)
    labels = torch.tensor(images.targets)
    model: Any = build_model(MODEL, "sample").eval()
    torch.manual_seed(0)
    model.reset_classifier(len(images.classes))
    model.to(device, memory_format=torch.channels_last)
    trunk = nn.Sequential(model.conv_stem, model.bn1, *model.blocks[:-1])
    # The classifier at each location: averaged over them, it is the network's answer.
    classifier = ToPatches(model.classifier)
    tail = nn.Sequential(model.blocks[-1], model.conv_head, model.bn2, classifier)
    if args.compile:
        trunk.compile()
    views = []
    for view in range(1, args.views + 1):
        path = args.out / f"features-{args.size}-{view}.npy"
        views.append(features(trunk, folder, view, args.size, path))
        if len(views[-1]) != len(labels):
            sys.exit(f"{path} is of {len(views[-1])} images, {folder} has {len(labels)}: delete it")
        print(f"crop {view}/{args.views} of {len(labels)} images", flush=True)

    if args.held_out:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
        rest, kept = order.tensor_split([int(len(order) * args.held_out)])
        fit(tail, [view[kept] for view in views], labels[kept], args)
        print(
            f"top-1 on the fitted part {accuracy(tail, views[0][kept], labels[kept]):.4f}, "
            f"on the one held out {accuracy(tail, views[0][rest], labels[rest]):.4f}"
        )
        return
    fit(tail, views, labels, args)
    (args.out / "classes.txt").write_text("".join(f"{name}\n" for name in images.classes))
    torch.save(model.state_dict(), teacher.with_suffix(".tmp"))
    teacher.with_suffix(".tmp").replace(teacher)
    print(f"saved {teacher} and {args.out / 'classes.txt'}")


if __name__ == "__main__":
    main()
