"""Weights into a model: what a training script saved of a student, and what authors published."""

import argparse
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_logger = logging.getLogger(__name__)

#: Where training scripts keep the weights in what they save: averaged ones, and those of the step.
_EMA = ("state_dict_ema", "model_ema")
_STEP = ("state_dict", "model", "module")
#: What only a student has.
_HEADS = ("patch_head", "cls_head")
#: Classifiers of the published networks: of the image, and of its patches.
_PUBLISHED_HEADS = ("head", "aux_head")
#: What a Hugging Face Trainer writes into a folder.
_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


def load_backbone(
    model: nn.Module, checkpoint: str | os.PathLike[str] | Mapping[str, Any], *, ema: bool = True
) -> nn.Module:
    """Load the backbone's weights of a trained student into the bare model, strictly.

        student = TokenStudent(model)
        torch.save({"state_dict": student.state_dict(), "epoch": 3}, folder / "last.pth")
        load_backbone(model, folder / "last.pth")

    Takes what timm, DeiT, torchvision, Lightning, accelerate and Hugging Face's Trainer save: the
    whole student or its model, in DistributedDataParallel, under `torch.compile`, or averaged.
    Nothing in the file is run.

    Args:
        model: the network, with as many classes as in training.
        checkpoint: a file (.pth, .pt, .ckpt, .bin, .safetensors), a Trainer's folder, or what
            `torch.load` gives for such a file.
        ema: whether averaged weights are taken where there are some.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: the weights do not fit the model in each name and shape; or the file holds more
            than tensors, numbers and texts.
    """
    state = _tensors(checkpoint, ema)
    wanted = model.state_dict()
    prefix = _prefix(state, wanted)
    found = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name in {prefix + one for one in wanted}
    }
    extra = [
        name
        for name in state
        if name.removeprefix(prefix) not in found
        and not any(part in _HEADS for part in name.split("."))
        and name.rpartition(".")[2] != "n_averaged"  # of torch's and timm's averaging
    ]
    shapes = [
        f"{name} {list(found[name].shape)} for {list(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    missing = [name for name in wanted if name not in found]
    _check_fit(model, missing, extra, shapes)
    model.load_state_dict(found)
    return model


def load_published(
    model: nn.Module, checkpoint: str | os.PathLike[str] | Mapping[str, Any], *, ema: bool = False
) -> nn.Module:
    """Load weights as their authors published them, into a model of these sizes.

        model = LVViT(width=240, depth=12, heads=4, image_size=384, num_classes=10)
        torch.save({"state_dict": lvvit_t().state_dict()}, folder / "lvvit_t.pth.tar")
        load_published(model, folder / "lvvit_t.pth.tar")

    For LV-ViT (zihangJiang/TokenLabeling) and, by timm's `volo_d1` and others, VOLO (sail-sg/volo).
    Position embeddings of another resolution, both square, are resized once, as that code does it.
    The classifiers are left out where they are of another number of classes, which is logged; so is
    the patches' where the file has none. Nothing in the file is run.

    Args:
        model: the network, or a `TokenStudent` of it.
        checkpoint: a file, or what `torch.load` gives for it. Its weights may be in a
            `state_dict`, of DistributedDataParallel or not.
        ema: whether averaged weights are taken where there are some.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights do not fit in a name or shape beyond these; or the file holds more
            than tensors, numbers, texts and an `argparse.Namespace`.
    """
    state, inner = _tensors(checkpoint, ema), getattr(model, "model", model)
    wanted = inner.state_dict()
    prefix = _prefix(state, wanted)
    found = {name.removeprefix(prefix): value for name, value in state.items()}
    position = found.get("pos_embed")
    if position is not None and "pos_embed" in wanted:
        found["pos_embed"] = _resized(position, wanted["pos_embed"])
    left = [
        head
        for head in _PUBLISHED_HEADS
        if (bias := wanted.get(f"{head}.bias")) is not None
        and (f"{head}.bias" not in found or found[f"{head}.bias"].shape != bias.shape)
    ]
    if left:
        _logger.warning(
            "%s of %s keeps its own weights: the checkpoint has none of %d classes",
            " and ".join(left), type(inner).__name__, len(wanted[f"{left[0]}.bias"]),
        )  # fmt: skip
    own = {name: wanted[name] for name in wanted if name.partition(".")[0] in left}
    found = {name: value for name, value in found.items() if name.partition(".")[0] not in left}
    shapes = [
        f"{name} {list(found[name].shape)} for {list(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    extra = [name for name in found if name not in wanted and name.split(".")[0] not in _HEADS]
    found = {name: value for name, value in found.items() if name in wanted}
    _check_fit(inner, [name for name in wanted if name not in found | own], extra, shapes)
    inner.load_state_dict(found | own)
    return model


def _resized(position: Tensor, like: Tensor) -> Tensor:
    """Position embeddings [1, 1 + N, D], or [1, h, w, D] without a class token, of another grid."""
    if position.shape == like.shape or position.shape[-1] != like.shape[-1]:
        return position
    if position.ndim == like.ndim == 4:
        planes = position.permute(0, 3, 1, 2).float()
        planes = functional.interpolate(planes, like.shape[1:3], mode="bicubic")
        return planes.permute(0, 2, 3, 1).to(position)
    sides = [math.isqrt(tokens.shape[1] - 1) for tokens in (position, like)]
    if [1 + side * side for side in sides] != [position.shape[1], like.shape[1]]:
        return position  # not square, which the published ones are; named as one that does not fit
    planes = position[:, 1:].unflatten(1, (sides[0], -1)).permute(0, 3, 1, 2).float()
    planes = functional.interpolate(planes, (sides[1], sides[1]), mode="bicubic")
    return torch.cat([position[:, :1], planes.flatten(2).mT.to(position)], 1)


def _check_fit(model: nn.Module, missing: list[str], extra: list[str], shapes: list[str]) -> None:
    problems = {"missing": missing, "unexpected": extra, "of another shape": shapes}
    if any(problems.values()):
        text = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
            for kind, names in problems.items()
            if names
        )
        raise ValueError(
            f"the checkpoint must fit {type(model).__name__} in every name and shape: {text}. "
            "Remedy: build the model as in training, with its num_classes and image size"
        )


def _tensors(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any], ema: bool
) -> dict[str, Tensor]:
    """The weights in what a script saved, averaged ones if asked for."""
    saved = checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    keys = (*_EMA, *_STEP) if ema else _STEP
    while inner := next((saved[key] for key in keys if isinstance(saved.get(key), Mapping)), None):
        saved = inner
    return {name: value for name, value in saved.items() if isinstance(value, Tensor)}


def _prefix(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What stands before the model's names in a checkpoint: the one that fits the most of them."""
    # The last of the model's names that is there: a file may lack a head.
    ends = reversed([*wanted])
    last = next((one for one in ends if any(name.endswith(one) for name in state)), "")
    before = [name.removesuffix(last) for name in state if name.endswith(last)]
    whole = [prefix for prefix in before if not prefix or prefix.endswith(".")]
    return max(whole, key=lambda prefix: sum(prefix + name in state for name in wanted), default="")


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        file = next((path / name for name in _FILES if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"{path} must hold one of {', '.join(_FILES)}. Remedy: name the folder of a "
                "checkpoint, such as checkpoint-500"
            )
        path = file
    if path.name.endswith(".index.json"):
        names = {*json.loads(path.read_text())["weight_map"].values()}
        return {k: v for name in sorted(names) for k, v in _read(path.with_name(name)).items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"a checkpoint must hold tensors, numbers and texts and load without running code; "
            f"{path} does not ({reason}). Remedy: torch.save(student.state_dict(), path)"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"a checkpoint must hold named tensors, got {type(content).__name__} in {path}. "
            "Remedy: torch.save(student.state_dict(), path)"
        )
    return content
