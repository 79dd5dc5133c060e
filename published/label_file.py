"""One label file, as the published code saves it, and a batch of them as planes of our format."""

import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dataset.format.score_map import MapLayout
from ..errors import FormatError
from .archive import MOST_BYTES

_FLOAT16_MAX = torch.finfo(torch.float16).max


def parse(data: bytes) -> Tensor:
    """The tensor of a label file, [2, K, H, W] of floats: scores, and the ids of their classes.

    It is read with `weights_only=True`: nothing that it says is run.

    Raises:
        ValueError: it is something else. Says what.
    """
    try:
        found: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles make torch raise nearly anything
        text = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"torch.load(weights_only=True) cannot read it: {text}") from error
    if not isinstance(found, Tensor) or not found.is_floating_point():
        what = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"it must hold one tensor of floats, it holds {what}")
    if found.layout != torch.strided or found.device.type != "cpu":
        kind = f"{found.layout} on {found.device}"
        raise ValueError(f"its tensor must be dense and hold values, it is {kind}")
    if found.ndim != 4 or len(found) != 2 or not 0 < found.numel() <= MOST_BYTES:
        raise ValueError(
            f"its tensor must be [2, K, H, W], of at most {MOST_BYTES} numbers, it is "
            f"{list(found.shape)}"
        )
    return found.detach()


def exact_classes(dtype: torch.dtype) -> int:
    """The number of classes whose ids a dtype holds exactly: 2,048 of float16."""
    return round(2 / torch.finfo(dtype).eps)


def encode_labels(
    labels: Sequence[Tensor], names: Sequence[str], layout: MapLayout, absent: float
) -> dict[str, Tensor]:
    """The planes of some label files.

    Args:
        labels: B tensors as `parse` gives them, of one shape and dtype.
        names: of the files, for errors.
        layout: of the planes, with float16 codes and no residual.
        absent: log of the sum of exp(logit) over the C - K classes that are not stored.

    Returns:
        codes and classes [B, 1, K, H, W], level [B, 1, H, W]: level - codes are the scores, up to
        the rounding of float16.

    Raises:
        FormatError: a score is not finite, or an id is no class or stands twice in a cell.
    """
    scores, ids = torch.stack(tuple(labels)).float().unbind(1)
    is_class = (ids == ids.round()) & (ids >= 0) & (ids < layout.num_classes)
    ordered = ids.sort(1).values
    rules: dict[str, Tensor] = {
        "its scores must be finite": scores.isfinite(),
        f"its class ids must be whole numbers from 0 to {layout.num_classes - 1}": is_class,
        "the class ids of a cell must be different": ordered[:, 1:] != ordered[:, :-1],
    }
    for rule, holds in rules.items():
        good = holds.flatten(1).all(1)
        if not good.all():
            row = int(good.int().argmin())
            values = ids if "ids" in rule else scores
            shown = values[row].flatten()[(~holds[row]).flatten().nonzero()[0, 0]].item()
            raise FormatError(
                f"{names[row]}: {rule}, one is {shown:g}. Remedy: correct --num-classes "
                f"({layout.num_classes}), or leave that file out"
            )
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    level = scores.logsumexp(1)
    if absent > -math.inf:
        level = level.logaddexp(torch.tensor(absent))
    return {
        "codes": (level[:, None] - scores).clamp(0, _FLOAT16_MAX).half()[:, None],
        "classes": ids.to(getattr(torch, layout.class_dtype.name))[:, None],
        "level": level.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half()[:, None],
    }
