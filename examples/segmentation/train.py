"""Fine-tune UperNet on a backbone of your own, on any folder of images and masks.

    python examples/segmentation/train.py --data DATA --out OUT --num-classes 150 \
        --reduce-zero-label --weights lvvit_s-26M-224-83.3.pth.tar

DATA holds {train,val}/images/* and, of the same names, {train,val}/masks/*.png of class ids.
OUT gets checkpoint.pt, from which the same command resumes; it ends as an undisturbed run does.
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from scenes import NORMALISE, Scenes, train_transform
from segmenter import IGNORED, LVVIT, Segmenter, backbone_of, predict
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import tokenlabel as tl

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import refuse_other_run, save

#: Published settings that differ from those of LV-ViT-S.
OFFICIAL = {"lvvit_m": {"drop_path": 0.2}, "lvvit_l": {"drop_path": 0.5, "width": 512}}
#: Options that do not decide the result, and those that decide what a checkpoint fits.
FREE = ("out", "data", "workers", "eval_only")
SHAPES = ("num_classes", "model", "model_kwargs", "layers", "size", "width")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with {train,val}/{images,masks}")
    add("--out", type=Path, required=True, help="folder for checkpoint.pt")
    add("--num-classes", type=int, default=150)
    add("--reduce-zero-label", action="store_true", help="id 0 is no class, as in ADE20K")
    add("--model", help=f"{', '.join(LVVIT)}, or a timm model; else as --weights is named")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE")
    add("--weights", type=Path, help="checkpoint: published, of timm, or of a training script")
    add("--layers", type=int, nargs=4, help="four layers, from 0; else the last, 3 apart")
    add("--size", type=int, default=512, help="side of crops and windows in pixels")
    add("--width", type=int, default=256, help="channels of the decoder")
    add("--drop-path", type=float, default=0.1)
    add("--steps", type=int, default=160_000)
    add("--warmup", type=int, default=1500, help="steps")
    add("--batch-size", type=int, default=16)
    add("--lr", type=float, default=6e-5)
    add("--weight-decay", type=float, default=0.01)
    add("--scales", type=float, nargs="+", default=[0.5, 0.75, 1.0, 1.25, 1.5, 1.75])
    add("--save-every", type=int, default=4000, help="steps")
    add("--eval-only", action="store_true", help="score OUT/checkpoint.pt, at other --scales say")
    add("--workers", type=int, default=8)
    add("--seed", type=int, default=0)
    first = parser.parse_args(argv)
    named = re.match("lvvit_[tsml](?![a-z])", first.weights.name if first.weights else "")
    parser.set_defaults(model=first.model or (named[0] if named else "lvvit_s"))
    parser.set_defaults(**OFFICIAL.get(parser.get_default("model"), {}))
    args = parser.parse_args(argv)
    if args.model not in LVVIT and not timm.is_model(args.model):
        parser.error(f"--model must be one of {', '.join(LVVIT)} or timm's, got {args.model!r}")
    if args.weights and not args.weights.exists():
        parser.error(f"--weights must be a checkpoint; there is no {args.weights}")
    if args.batch_size < 2:
        parser.error("--batch-size must be at least 2, for the decoder's batch normalisation")
    for name in ("num_classes", "size", "width", "steps", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if min(args.scales) <= 0:
        parser.error(f"--scales must be above 0, got {args.scales}")
    return args


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Of a step, from 0: linear to 0 at the last, after a linear warmup, as mmcv's `poly`."""
    warm = min(1.0, 1e-6 + (1 - 1e-6) * step / args.warmup) if args.warmup else 1.0
    rate: float = args.lr * warm * (1 - step / args.steps)
    return rate


def mean_iou(confusion: Tensor) -> float:
    """Of counts [C, C], true class by predicted one: the mean over classes that are in either."""
    both, either = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return float((both[either > 0] / either[either > 0]).mean())


def evaluate(model: nn.Module, args: argparse.Namespace, scales: list[float], flip: bool) -> float:
    """Mean IoU on the images of val, at their own resolution."""
    data = Scenes(args.data, "val", args.num_classes, args.reduce_zero_label, v2.Compose(NORMALISE))
    model.eval()
    device = next(model.parameters()).device
    confusion = torch.zeros(args.num_classes**2, dtype=torch.float64)
    for image, mask in DataLoader(data, None, num_workers=args.workers):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = predict(model, image.to(device), args.size, scales, flip).argmax(0).cpu()
        pairs = (mask * args.num_classes + found)[mask != IGNORED]
        confusion += pairs.bincount(minlength=len(confusion))
    return mean_iou(confusion.view(args.num_classes, -1))


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """What decides the result of a run, as far as the command line does."""
    return {name: str(value) for name, value in vars(args).items() if name not in FREE}


def resumed(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a run of these settings has saved; nothing before it has."""
    if not path.exists():
        if args.eval_only:
            raise FileNotFoundError(
                f"--eval-only must find a checkpoint, got no {path}. Remedy: train first"
            )
        return {}
    state: dict[str, Any] = torch.load(path, "cpu", weights_only=True)
    asked = settings_of(args)
    if args.eval_only:
        asked = {name: value for name, value in asked.items() if name in SHAPES}
    refuse_other_run(path, state["settings"], asked)
    return state


def run(args: argparse.Namespace) -> dict[str, float]:
    """Fine-tune to the end; return mIoU before, after at one scale, and at several with flips."""
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "checkpoint.pt"
    state = resumed(path, args)
    torch.manual_seed(args.seed)
    options = {"drop_path_rate": args.drop_path, **args.model_kwargs}
    backbone = backbone_of(args.model, args.size, None if state else args.weights, **options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Segmenter(backbone, args.num_classes, layers=args.layers, width=args.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    data = Scenes(
        args.data, "train", args.num_classes, args.reduce_zero_label, train_transform(args.size)
    )
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        print(f"resuming after step {state['step']} of {path}", flush=True)
    else:
        before = evaluate(model, args, [1.0], False)
        state = {"settings": settings_of(args), "step": 0, "miou": {"before": before}}
    if args.eval_only:
        state["step"] = args.steps
        state["miou"] = {"before": state["miou"]["before"]}
    while state["step"] < args.steps:
        first, last = state["step"], min(state["step"] + args.save_every, args.steps)
        start, total = time.monotonic(), torch.zeros((), device=device)
        # All random state there is, but for the order: a resumed run repeats this part.
        torch.manual_seed((args.seed * 1_000_003 + first) % 2**63)
        loader = DataLoader(
            data, args.batch_size, sampler=order(len(data), first, last, args),
            num_workers=args.workers, pin_memory=device.type == "cuda",
        )  # fmt: skip
        model.train()
        for step, (images, masks) in enumerate(loader, first):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            images, masks = images.to(device), masks.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(images, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        mean = total.item() / (last - first)
        if not math.isfinite(mean):
            raise ValueError(f"the loss must be a number, got {mean}. Remedy: a lower --lr")
        seconds = time.monotonic() - start
        print(f"step {last}/{args.steps}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
        state |= {"step": last, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save(path, state)
    scores: dict[str, float] = state["miou"]
    if "several" not in scores:
        scores["one"] = evaluate(model, args, [1.0], False)
        scores["several"] = evaluate(model, args, args.scales, True)
        if not args.eval_only:
            save(path, state)
    return scores


def order(count: int, first: int, last: int, args: argparse.Namespace) -> list[int]:
    """Numbers of the images of steps `first` to `last`: shuffled epochs one after the other."""
    start, stop = first * args.batch_size, last * args.batch_size
    epochs = range(start // count, -(-stop // count))
    seeds = (args.seed * 1_000_003 + epoch for epoch in epochs)
    shuffled = [torch.randperm(count, generator=torch.Generator().manual_seed(s)) for s in seeds]
    skipped = epochs[0] * count
    indices: list[int] = torch.cat(shuffled)[start - skipped : stop - skipped].tolist()
    return indices


def main() -> None:
    """Train, and print the scores as a line of JSON."""
    args = arguments()
    try:
        print(json.dumps({name: round(100 * score, 2) for name, score in run(args).items()}))
    except (OSError, ValueError, tl.TokenLabelError) as error:
        sys.exit(f"train.py: error: {error}")


if __name__ == "__main__":
    main()
