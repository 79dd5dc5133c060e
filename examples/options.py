"""Options of train_student.py: the command line, and recipes, which are YAML files of defaults."""

import argparse
import sys
from pathlib import Path

import timm
import yaml
from timm.utils import ParseKwargs

#: Models of tokenlabel itself.
LVVIT = ("lvvit_t", "lvvit_s", "lvvit_m", "lvvit_l")
RECIPES = Path(__file__).parent / "recipes"


def make_parser(description: str) -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train/CLASS/* and val/CLASS/*")
    add("--out", type=Path, required=True, help="folder for log.csv and checkpoint.pt")
    add("--labels", type=Path, help="token labels of DATA/train; leave out to train without")
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    add("--recipe", help=f"defaults of the options: {names}, or a YAML file of your own")
    add("--model", default="deit_small_patch16_224", help=f"a timm model, or {', '.join(LVVIT)}")
    add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="NAME=VALUE",
        help="for its constructor, such as img_size=32 patch_size=4 (LV-ViT gets --size)",
    )
    add("--drop-path", type=float, help="stochastic depth's rate; left out: the model's own")
    add("--weights", type=Path, help="checkpoint to start from, published or of this script")
    add("--size", type=int, default=224, help="side of the student's input in pixels")
    add("--epochs", type=int, default=300, help="of the schedule, warm-up included")
    add("--batch-size", type=int, default=128, help="of each process")
    add("--opt", default="adamw", help="a timm optimizer")
    add("--lr", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--sched", default="cosine", help="a timm schedule")
    add("--sched-step", default="update", choices=["update", "epoch"], help="when it moves")
    add("--min-lr", type=float, default=0.0, help="where the schedule ends")
    add("--warmup-lr", type=float, default=1e-5, help="where the warm-up starts")
    add("--warmup-epochs", type=int, default=5)
    add("--cooldown-epochs", type=int, default=0, help="after the schedule, at --min-lr")
    add("--cls-weight", type=float, default=1.0, help="weight of the class token's loss")
    add("--dense-weight", type=float, default=0.5, help="beta: weight of the patches' loss")
    add("--cls-target", default="label", choices=["label", "crop", "both", "corrected"])
    add("--label-smoothing", type=float, default=0.0)
    add("--map-smoothing", type=float, default=0.0, help="the same of crops' and patches' targets")
    add("--auto-augment", default="rand-m9-mstd0.5-inc1", help="as timm spells it, or none")
    add("--color-jitter", type=float, default=0.4, help="strength, where --auto-augment is none")
    add("--crop", default="first", choices=["first", "last"], help="before the flip, or at the end")
    add("--min-scale", type=float, default=0.08, help="smallest crop, as a fraction of the image")
    add("--crop-pct", type=float, default=0.875, help="of the validation images, as timm has it")
    add("--erase-prob", type=float, default=0.25)
    add("--mix", type=float, default=0.0, metavar="P", help="fraction of MixUp or CutMix batches")
    add("--mix-token", type=float, default=0.0, metavar="P", help="of batches with LV-ViT's boxes")
    add("--ema", type=float, default=0.0, metavar="DECAY", help="validate averaged weights too")
    add("--precision", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--workers", type=int, default=4, help="data loader processes, for each process")
    add("--seed", type=int, default=0)
    return parser


def arguments(description: str) -> argparse.Namespace:
    """The command line, over the recipe that it names."""
    parser = make_parser(description)
    args = parser.parse_args()
    if args.recipe:
        known = {name.replace("_", "-") for name in vars(args)} - {"recipe"}
        try:
            given = recipe_arguments(args.recipe, known)
        except (ValueError, OSError, yaml.YAMLError) as error:
            parser.error(f"--recipe: {error}")
        args = parser.parse_args([*given, *sys.argv[1:]])
    for split in ("train", "val"):
        if not (args.data / split).is_dir():
            parser.error(
                f"--data must hold a folder train and a folder val; no {args.data / split}"
            )
    for name in ("size", "epochs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.model not in LVVIT and not timm.is_model(args.model):
        parser.error(
            f"--model must be a timm model or one of {', '.join(LVVIT)}; there is no {args.model!r}"
        )
    for name in ("mix", "mix_token"):
        if not 0 <= getattr(args, name) <= 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} is a probability, 0 to 1; got {getattr(args, name)}")
    if args.mix_token and args.mix:
        parser.error("--mix and --mix-token both mix a batch. Remedy: set one of them to 0")
    if args.mix_token and not args.labels:
        parser.error("--mix-token mixes token labels. Remedy: --labels, or --mix-token 0")
    if not 0 <= args.ema < 1:
        parser.error(f"--ema is a decay below 1, such as 0.9999; 0 is off; got {args.ema}")
    return args


def recipe_arguments(recipe: str, known: set[str]) -> list[str]:
    """A recipe as a command line, to stand before the user's, whose options win.

    Args:
        recipe: name of a file in recipes/, or a path.
        known: names of the options.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: it is no mapping, or names options that there are not.
    """
    named = RECIPES / f"{recipe}.yaml"
    path = named if named.is_file() else Path(recipe)
    if not path.is_file():
        names = ", ".join(sorted(one.stem for one in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"a recipe must be a file or one of {names}; there is no {recipe}")
    options = yaml.safe_load(path.read_text())
    if not isinstance(options, dict):
        raise ValueError(f"{path} must map names of options to values")
    if unknown := sorted(map(str, set(options) - known)):
        raise ValueError(
            f"{path} must name options of this script; {', '.join(unknown)} are none. "
            "Remedy: write them as --help does, without the leading --"
        )
    given = []
    for name, value in options.items():
        if isinstance(value, list):
            given += [f"--{name}", *map(str, value)]
        else:
            given.append(f"--{name}={value}")
    return given
