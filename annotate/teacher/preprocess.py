"""What a checkpoint says of the images it was trained on."""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import TeacherError

#: What is read, and how the formats call it.
_NAMES = {
    "mean": ("mean",),
    "std": ("std",),
    "crop_pct": ("test_crop_pct", "crop_pct"),
    "input_size": ("test_input_size", "input_size", "img_size"),
    "interpolation": ("interpolation",),
}
_FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")


class Setting(NamedTuple):
    """A value, and where it comes from in words."""

    value: Any
    source: str


def recorded_settings(weights: Path) -> dict[str, Setting]:
    """The preprocessing that belongs to a checkpoint, as far as it says.

    Read from the `args` that training scripts of timm and DeiT save with the weights, and from a
    `config.json` of timm in the same folder.

    Args:
        weights: the checkpoint file. Nothing in it is run.

    Returns:
        By name: `mean` and `std`, three floats; `crop_pct`; `input_size`, (h, w) in pixels;
        `interpolation`, a filter of Pillow's in lower case. What is not said is left out.

    Raises:
        TeacherError: a value is malformed, or the two sources contradict each other.
    """
    found: dict[str, Setting] = {}
    for source, values in (
        (f"config.json beside {weights.name}", _config(weights.with_name("config.json"))),
        (f"args of {weights.name}", _args(weights)),
    ):
        for name, keys in _NAMES.items():
            value = next((values[key] for key in keys if values.get(key) not in (None, "")), None)
            if value is None or value == "random":  # which is for training alone
                continue
            setting = Setting(_checked(name, value, source), source)
            before = found.setdefault(name, setting)
            if before.value != setting.value:
                raise TeacherError(
                    f"{name} must be one value; the {before.source} says {before.value}, the "
                    f"{source} {setting.value}. Remedy: correct config.json, or remove it."
                )
            found[name] = setting
    return found


def _args(weights: Path) -> Mapping[str, Any]:
    if weights.suffix == ".safetensors":
        return {}
    # Of all classes in such a file, this one alone is built: its values are then looked at.
    with torch.serialization.safe_globals([argparse.Namespace]):
        for mmap in (True, False):  # files of older versions cannot be mapped
            try:
                content = torch.load(weights, "cpu", weights_only=True, mmap=mmap)
            except Exception:  # a damaged file can raise nearly anything; `load_weights` says so
                continue
            args = content.get("args") if isinstance(content, Mapping) else None
            args = vars(args) if isinstance(args, argparse.Namespace) else args
            return args if isinstance(args, Mapping) else {}
    return {}


def _config(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TeacherError(
            f"{path} must be JSON that can be read: {error}. Remedy: correct it, or remove it."
        ) from error
    content = content.get("pretrained_cfg", content) if isinstance(content, Mapping) else {}
    return content if isinstance(content, Mapping) else {}


def _checked(name: str, value: Any, source: str) -> Any:
    """A value in our own form."""
    try:
        if name in ("mean", "std"):
            channels = [float(one) for one in value]
            if len(channels) == 3 and all(
                math.isfinite(one) and one >= 0 and (one > 0 or name == "mean") for one in channels
            ):
                return channels
        elif name == "crop_pct":
            if 0 < float(value) < math.inf:
                return float(value)
        elif name == "interpolation":
            if str(value).lower() in _FILTERS:
                return str(value).lower()
        else:
            sides = [value, value] if isinstance(value, int) else list(value)[-2:]
            if len(sides) == 2 and all(type(side) is int and side > 0 for side in sides):
                return (sides[0], sides[1])
    except (TypeError, ValueError):
        pass
    rules = {
        "mean": "three numbers of 0 or more, fractions of white",
        "std": "three numbers above 0, fractions of white",
        "crop_pct": "a number above 0",
        "interpolation": f"one of {', '.join(_FILTERS)}",
        "input_size": "a side in pixels, or (channels, height, width)",
    }
    raise TeacherError(
        f"{name} must be {rules[name]}; the {source} says {value!r}. Remedy: correct it there."
    )
