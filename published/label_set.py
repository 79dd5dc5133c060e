"""A published label set: one file, many of them as planes of our format, all of a set."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dataset.format.score_map import MapLayout, decode
from ..errors import ConfigError, FormatError
from .archive import MOST_BYTES, LabelFiles, hash_stems

_FLOAT16_MAX = torch.finfo(torch.float16).max


def _parse(data: bytes) -> Tensor:
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


def _exact_classes(dtype: torch.dtype) -> int:
    """The number of classes whose ids a dtype holds exactly: 2,048 of float16."""
    return round(2 / torch.finfo(dtype).eps)


def _encode(
    labels: Sequence[Tensor], names: Sequence[str], layout: MapLayout, absent: float
) -> dict[str, Tensor]:
    """The planes of some label files.

    Args:
        labels: B tensors as `_parse` gives them, of one shape and dtype.
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
    wrong: dict[str, tuple[Tensor, Tensor]] = {
        "its scores must be finite": (scores, ~scores.isfinite()),
        f"its class ids must be whole numbers from 0 to {layout.num_classes - 1}": (ids, ~is_class),
        "the class ids of a cell must be different": (
            ordered[:, 1:],
            ordered[:, 1:] == ordered[:, :-1],
        ),
    }
    for rule, (values, broken) in wrong.items():
        if broken.any():
            row = int(broken.flatten(1).any(1).int().argmax())
            raise FormatError(
                f"{names[row]}: {rule}, one is {values[row][broken[row]][0].item():g}. Remedy: "
                f"correct --num-classes ({layout.num_classes}), or leave that file out"
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


class LabelSet:
    """The label files of a set, which are all of one kind, found by the keys of the images.

    Args:
        files: the set.
        num_classes: C of its teacher.
        rest: "zeros": the logits of the classes that a file leaves out are 0; "none": these have no
            probability.

    Attributes:
        files: the same.
        layout: of its maps as planes.
        described_rest: what `rest` means here, in words.

    Raises:
        ConfigError: the ids of so many classes are not exact in the type of the set, or a file has
            more.
        FormatError: the first file is no label.
    """

    def __init__(self, files: LabelFiles, num_classes: int, rest: str) -> None:
        self.files = files
        first = self._read(0, None)
        _, k, height, width = self._shape = first.shape
        self._dtype, limit = first.dtype, _exact_classes(first.dtype)
        if num_classes > limit:
            raise ConfigError(
                f"class ids must be exact: {files.path} stores them as {first.dtype}, which holds "
                f"whole numbers up to {limit} only, and the classes are {num_classes}. Remedy: "
                "another set, for this one has lost the ids above; or correct --num-classes"
            )
        if k > num_classes:
            raise ConfigError(
                f"num_classes must be at least the {k} classes of a patch that {files.path} has, "
                f"got {num_classes}. Remedy: correct --num-classes"
            )
        self.layout = MapLayout(("identity",), (height, width), k, num_classes, 0, 0.0)
        others = num_classes - k if rest == "zeros" else 0
        self._absent = math.log(others) if others else -math.inf
        self.described_rest = f"the {num_classes - k} classes that a patch leaves out have " + (
            f"logit 0 each, log-sum-exp {self._absent:.2f}" if others else "no probability"
        )

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Rows of these images' labels in the set, int64 [n]; -1: none."""
        return self.files.find(hash_stems(keys))

    def planes(self, rows: np.ndarray, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """The planes of labels by their rows in the set; zeros where the row is -1.

        Raises:
            FormatError: a file is damaged, or breaks a rule.
        """
        there = np.flatnonzero(rows >= 0).tolist()
        planes = {
            name: np.zeros((len(rows), *shape), dtype)
            for name, (dtype, shape) in self.layout.planes().items()
        }
        if there:
            names = [f"{self.files.path}: the label of {keys[i]}" for i in there]
            labels = [self._read(rows[i], name) for i, name in zip(there, names, strict=True)]
            for name, plane in _encode(labels, names, self.layout, self._absent).items():
                planes[name][there] = plane.numpy()
        return planes

    def top5(self, planes: dict[str, np.ndarray]) -> np.ndarray:
        """The classes with most probability over each whole map, int64 [B, 5 or fewer]."""
        probs, _ = decode(planes["codes"], self.layout)
        count, total = len(probs), self.layout.num_classes
        where = planes["classes"].reshape(count, -1) + np.arange(count)[:, None] * total
        mass = np.bincount(where.ravel(), probs.ravel(), count * total).reshape(count, total)
        return np.argsort(-mass, kind="stable")[:, :5]

    def top_classes(self, keys: Sequence[str]) -> list[int]:
        """The first of these for each image; -1 where it has no label."""
        rows = self.find(keys)
        top = self.top5(self.planes(rows, keys))[:, 0]
        answers: list[int] = np.where(rows >= 0, top, -1).tolist()
        return answers

    def _read(self, row: int, name: str | None) -> Tensor:
        try:
            label = _parse(self.files.read(row))
            if row and (label.shape, label.dtype) != (self._shape, self._dtype):
                raise ValueError(
                    f"it is {label.dtype} {list(label.shape)}, where the first label of the set, "
                    f"{self.files.name(0)}, is "
                    f"{self._dtype} {list(self._shape)}"
                )
            return label
        except ValueError as error:
            # Only now: an archive must be listed again for the name.
            name = name or f"{self.files.path}: its first file, {self.files.name(row)},"
            raise FormatError(
                f"{name} is damaged, or no label: {error}. Remedy: leave it out of the set, and "
                "its image gets a row with an error; or download the set again"
            ) from error
