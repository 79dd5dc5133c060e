"""Train a student, with token labels or without. One process, or several under torchrun.

    python examples/train_student.py --data DATA --out OUT                          # without
    python examples/train_student.py --data DATA --out OUT --labels LABELS/train    # with
    torchrun --nproc-per-node 8 examples/train_student.py --data DATA --out OUT ...
    ... --labels LABELS/train --recipe lvvit_s                                      # as published

DATA holds train/CLASS/* and val/CLASS/*; OUT gets log.csv and checkpoint.pt, from which the same
command resumes. `--labels` is all that differs: the images, their order and their augmentation, the
backbone's first weights, its weight decay and the schedule are the same with and without it.

Everything random in an epoch follows from the seed, the epoch, the rank and the number of workers.
So a run that was killed resumes after its last finished epoch and ends with the weights of an
undisturbed one, to the bit where the hardware's arithmetic repeats.
"""

import argparse
import csv
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import tokenlabel as tl
from tokenlabel.dataset.sources.folder import FolderSource

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import refuse_other_run, save
from options import LVVIT, arguments


class Classes(ImageFolder):
    """An ImageFolder whose classes have given numbers, whatever folders there are.

    Hidden and empty folders are left out, as in annotation.
    """

    def __init__(self, root: Path, numbers: dict[str, int], transform: Any) -> None:
        self.numbers = numbers
        super().__init__(str(root), transform)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Folders, and the number of each."""
        folders = FolderSource(Path(directory)).classes()
        unknown = [folder for folder in folders if self.numbers.get(folder, -1) < 0]
        if unknown:
            raise ValueError(
                f"the folders of {directory} must be classes of the training data or its labels; "
                f"{', '.join(unknown[:5])} are not. Remedy: check --data and --labels"
            )
        return folders, {folder: self.numbers[folder] for folder in folders}


def class_numbers(args: argparse.Namespace, store: tl.LabelStore | None) -> dict[str, int]:
    """The class id of each folder: that of the labels where they have one, else by order."""
    if store and store.attrs["label_space"] == "teacher":
        names = store.classes or []
        return {name: number for number, name in enumerate(names)} | store.folders
    folders = FolderSource(args.data / "train").classes()
    if store and store.num_classes != len(folders):
        raise ValueError(
            f"the labels' teacher has {store.num_classes} classes and DATA/train has "
            f"{len(folders)} folders, and no names say which is which. Remedy: annotate with "
            "--class-names"
        )
    return {folder: number for number, folder in enumerate(folders)}


def make_student(
    args: argparse.Namespace, num_classes: int, store: tl.LabelStore | None
) -> nn.Module:
    """The model, with the weights that it starts from, and with a patch head if there are labels.

    Without labels LV-ViT has no use for its own: it votes with the class token alone.
    """
    options = dict(args.model_kwargs, num_classes=num_classes)
    if args.drop_path is not None:
        options["drop_path_rate"] = args.drop_path
    if args.model not in LVVIT:
        model = timm.create_model(args.model, **options)
    elif store:
        model = getattr(tl, args.model)(image_size=args.size, **options)
    else:
        model = getattr(tl, args.model)(image_size=args.size, **options, patch_vote=0)
        model.aux_head.requires_grad_(False)  # DistributedDataParallel would wait for its gradient
    if args.weights:  # averaged ones as the published code takes them, where it averages itself
        tl.load_published(model, args.weights, ema=args.ema > 0)
    if args.model in LVVIT or not store:
        return model
    return tl.TokenStudent(model, image_size=args.size)


def make_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates: int
) -> tuple[Scheduler, int]:
    """The schedule of the learning rate, for so many updates an epoch, and how many epochs."""
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        args.sched,
        args.epochs,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        cooldown_epochs=args.cooldown_epochs,
        updates_per_epoch=updates,
        step_on_epochs=args.sched_step == "epoch",
    )
    return scheduler, epochs


def make_loader(
    dataset: Dataset[Any], args: argparse.Namespace, rank: int, world: int
) -> DataLoader[Any]:
    """Batches of this process's part of the training data, as many as those of any other."""
    sampler = DistributedSampler(dataset, world, rank, shuffle=True, seed=args.seed, drop_last=True)
    loader = DataLoader(
        dataset,
        args.batch_size,
        sampler=sampler,
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )
    if not len(loader):
        raise ValueError(
            f"an epoch needs a batch for each process; {len(dataset)} images are fewer than "
            f"{world} x {args.batch_size}. Remedy: a smaller --batch-size"
        )
    return loader


@torch.inference_mode()
def top1(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> float:
    """Fraction of the validation images that the model gets right, over all processes."""
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # right, all
    for images, classes in loader:
        right = model(images.to(device)).argmax(1) == classes.to(device)
        counts += torch.stack([right.sum(), torch.tensor(len(classes), device=device)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    return (counts[0] / counts[1]).item()


def write_log(args: argparse.Namespace, history: list[dict[str, float]]) -> None:
    """Rewrite log.csv, so that a resumed run has no row twice."""
    temporary = args.out / "log.tmp"
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    temporary.replace(args.out / "log.csv")


def settings(args: argparse.Namespace, world: int) -> dict[str, str]:
    """What decides the result of a run, as far as the command line does."""
    free = ("out", "data", "workers", "recipe")
    decisive = {name: str(value) for name, value in vars(args).items() if name not in free}
    return {**decisive, "processes": str(world)}


def train(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
    """Train from the last checkpoint, or the beginning, to the end."""
    store = tl.LabelStore(args.labels) if args.labels else None
    numbers = class_numbers(args, store)
    num_classes = store.num_classes if store else len(numbers)

    torch.manual_seed(args.seed)
    bare = make_student(args, num_classes, store).to(device)
    ema = ModelEmaV3(bare, decay=args.ema) if args.ema else None

    augment = tl.train_transform(
        args.size,
        scale=(args.min_scale, 1.0),
        auto_augment=None if args.auto_augment == "none" else args.auto_augment,
        color_jitter=args.color_jitter,
        erase_prob=args.erase_prob,
        crop_last=args.crop == "last",
    )
    dataset: Dataset[Any]
    if store:
        dataset = tl.TokenLabelDataset(
            Classes(args.data / "train", numbers, None), store, transform=augment, grid=bare.grid
        )
        criterion = tl.TokenLabelLoss(
            cls_weight=args.cls_weight,
            dense_weight=args.dense_weight,
            cls_target=args.cls_target,
            label_smoothing=args.label_smoothing,
            map_smoothing=args.map_smoothing,
        )
        mixes = [tl.MixUp(0.8), tl.CutMix(1.0)]
    else:
        dataset = Classes(args.data / "train", numbers, augment)
        mixes = [
            v2.MixUp(alpha=0.8, num_classes=num_classes),
            v2.CutMix(alpha=1.0, num_classes=num_classes),
        ]
    mix = v2.RandomChoice(mixes)  # by torchvision's draws in either case
    mix_token = tl.MixToken(prob=args.mix_token, published=True)
    loader = make_loader(dataset, args, rank, world)
    validation = Classes(
        args.data / "val", numbers, tl.eval_transform(args.size, crop_pct=args.crop_pct)
    )
    part = Subset(validation, range(rank, len(validation), world))
    val_loader = DataLoader(part, args.batch_size, num_workers=args.workers)

    optimizer = create_optimizer_v2(bare, args.opt, args.lr, args.weight_decay)
    scheduler, epochs = make_scheduler(args, optimizer, len(loader))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "float16")
    precision = getattr(torch, args.precision)
    student = DistributedDataParallel(bare) if world > 1 else bare

    first, history = 0, []
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        refuse_other_run(checkpoint, state["settings"], settings(args, world))
        bare.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if ema:
            ema.module.load_state_dict(state["model_ema"])
        first, history = state["epoch"], state["history"]
        if rank == 0:
            print(f"resuming after epoch {first} of {checkpoint}", flush=True)

    for epoch in range(first, epochs):
        # All random state there is: nothing of it need be in the checkpoint.
        random_seed(((args.seed * 100_003 + epoch) * 10_007 + rank) % 2**32, 0)
        loader.sampler.set_epoch(epoch)
        student.train()
        start, total = time.monotonic(), torch.zeros((), device=device)
        for step, (images, labels) in enumerate(loader, epoch * len(loader) + 1):
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)  # targets are made there, by the loss
            if torch.rand(()) < args.mix:
                images, labels = mix(images, labels)
            box = mix_token.sample(bare.grid) if args.mix_token else None
            if box is not None:
                labels = box.mix_labels(labels)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                output = student(images) if box is None else student(images, box)
            if store:
                loss = criterion(*output, labels)
            else:
                output = output[0] if isinstance(output, tuple) else output
                loss = cross_entropy(output.float(), labels, label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step_update(step)
            if ema:
                ema.update(bare, step)
            total += loss.detach()
        if world > 1:
            dist.all_reduce(total)
        row = {
            "epoch": epoch + 1,
            "lr": optimizer.param_groups[0]["lr"],
            "loss": total.item() / len(loader) / world,
            "top1": top1(bare, val_loader, device),
            **({"ema_top1": top1(ema.module, val_loader, device)} if ema else {}),
            "seconds": round(time.monotonic() - start, 1),
        }
        history.append(row)
        scheduler.step(epoch + 1)  # does nothing if the schedule moves with the updates
        if not math.isfinite(row["loss"]):
            raise ValueError(
                f"the loss of epoch {epoch + 1} is {row['loss']}. Remedy: a lower --lr"
            )
        if rank == 0:
            print(", ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
            write_log(args, history)
            save(
                checkpoint,
                {
                    "settings": settings(args, world),
                    "epoch": epoch + 1,
                    "history": history,
                    "model": bare.state_dict(),
                    "model_ema": ema.module.state_dict() if ema else None,
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                },
            )


def main() -> None:
    """Join the other processes, if any, and train."""
    args = arguments((__doc__ or "").partition("\n")[0])
    cuda = torch.cuda.is_available()
    rank, world = 0, 1
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("nccl" if cuda else "gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        train(args, rank, world, device)
    except (ValueError, OSError, tl.TokenLabelError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
