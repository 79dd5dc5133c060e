"""`load_backbone`: what a training script saved of a student, back into the bare model."""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Where training scripts keep the weights in what they save: averaged ones, and those of the step.
_EMA = ("state_dict_ema", "model_ema")
_STEP = ("state_dict", "model", "module")
#: What only a student has.
_HEADS = ("patch_head", "cls_head")
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
    saved = checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    keys = (*_EMA, *_STEP) if ema else _STEP
    while inner := next((saved[key] for key in keys if isinstance(saved.get(key), Mapping)), None):
        saved = inner
    state = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
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
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": extra,
        "of another shape": shapes,
    }
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
    model.load_state_dict(found)
    return model


def _prefix(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What stands before the model's names in a checkpoint: the one that fits the most of them."""
    last = [*wanted][-1]
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
