# mypy: allow-subclassing-any
"""`TokenLabelMap`: a teacher's score map that follows its picture through any v2 transform."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch.utils._pytree import tree_leaves
from torchvision import tv_tensors

from tokenlabel.dataset import native
from tokenlabel.dataset.path import UNIT_BOX, Box, PixelPath

ArrayLike = Tensor | np.ndarray
Size = tuple[int, int]
#: Scores, classes and rest of all views, as they are stored.
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
_Tensor = TypeVar("_Tensor", bound=Tensor)
_UNUSABLE = (
    "scores and rest must be logits without NaN or +inf, and finite in at least one place of each "
    "cell. Remedy: leave out images that could not be annotated"
)
_METADATA = ("classes", "rest", "label", "extent", "canvas_size", "source_size", "path")


class TokenLabelMap(tv_tensors.Mask):
    """A score map of one picture, and the path from the current picture back to it.

    The tensor itself is the scores, and no transform ever changes or resamples it: geometric
    transforms only compose `path`, and `ToTokenTargets` reads the map through it at the end. It is
    a Mask so that transforms which cannot move it (stock RandAugment, MixUp, FiveCrop) raise.
    Photometric transforms and erasing leave it alone: an erased patch keeps its label, as in token
    labeling, where the student is to infer it from its surroundings.

    Slicing, stacking and arithmetic give plain tensors without the metadata; stacking raises.

    Args:
        scores: logits, float [V, H, W, K]; the second of two views is of the mirrored picture.
        classes: their class ids, integer [V, H, W, K].
        rest: log-sum-exp of all other logits, float [V, H, W]; -inf where there are none.
        canvas_size: (h, w) of the picture in pixels.
        extent: box (x0, y0, x1, y1) of the picture, normalised, x along the width, that the map
            covers. A mirrored view covers the mirror image of the same box.
        label: ground-truth class of the image, or -1.

    Raises:
        ValueError: shapes that do not fit, a NaN or +inf, a cell without any finite logit, or an
            empty extent or canvas.

    Attributes:
        classes: int32 [V, H, W, K].
        rest: float32 [V, H, W].
        label: as given.
        extent: as given.
        canvas_size: (h, w) in pixels of the picture as it is now.
        source_size: (h, w) in pixels of the picture before any transform.
        path: from points of the current picture, in pixels, to the normalised source picture.
    """

    label: int
    extent: Box
    canvas_size: Size
    source_size: Size
    path: PixelPath
    #: What a store gave; the scores share the tensor's memory. Absent after `wrap`.
    _stored: Arrays

    def __new__(
        cls,
        scores: ArrayLike,
        *,
        classes: ArrayLike,
        rest: ArrayLike,
        canvas_size: Sequence[int],
        extent: Sequence[float] = UNIT_BOX,
        label: int = -1,
    ) -> Self:
        """A map as described on the class."""
        data, ids, others = _tensor(scores), _tensor(classes), _tensor(rest)
        data = data.float() if data.dtype == torch.bfloat16 else data  # NumPy does not know it
        _check(data, ids, others)
        height, width = (int(side) for side in canvas_size)
        x0, y0, x1, y1 = (float(value) for value in extent)
        if height < 1 or width < 1:
            raise ValueError(f"canvas_size must be (h, w) in pixels, got {tuple(canvas_size)}")
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(
                "extent must be a box (x0, y0, x1, y1) of the normalised picture, "
                f"0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1; got {tuple(extent)}"
            )
        size = (height, width)
        return _attach(
            data.as_subclass(cls),
            classes=ids.to(torch.int32),
            rest=others.to(torch.float32),
            label=int(label),
            extent=(x0, y0, x1, y1),
            canvas_size=size,
            source_size=size,
            path=PixelPath.of(size),
        )

    @classmethod
    def from_scores(
        cls,
        scores: ArrayLike,
        classes: ArrayLike,
        rest: ArrayLike,
        *,
        canvas_size: Sequence[int],
        extent: Sequence[float] = UNIT_BOX,
        label: int = -1,
        mirrored: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    ) -> Self:
        """Map of one view of a picture, or of two.

        Args:
            scores: logits, float [H, W, K].
            classes: their class ids, integer [H, W, K].
            rest: log-sum-exp of all other logits, float [H, W]; -inf where there are none.
            canvas_size: (h, w) of the picture in pixels.
            extent: box (x0, y0, x1, y1) of the picture, normalised, that the map covers.
            label: ground-truth class of the image, or -1.
            mirrored: (scores, classes, rest) of the mirrored picture, in its own coordinates; they
                are used wherever a transform has mirrored the picture.

        Raises:
            ValueError: as the class.
        """
        views = [(scores, classes, rest), *([] if mirrored is None else [mirrored])]
        parts = [[_tensor(array) for array in part] for part in zip(*views, strict=True)]
        for part in parts:
            if part[0].shape != part[-1].shape:
                raise ValueError(
                    f"both views must have the same shape, got {tuple(part[0].shape)} "
                    f"and {tuple(part[-1].shape)}"
                )
        data, ids, others = (torch.stack(p) if len(p) > 1 else p[0][None] for p in parts)
        return cls(
            data, classes=ids, rest=others, canvas_size=canvas_size, extent=extent, label=label
        )

    @classmethod
    def stored(
        cls,
        scores: np.ndarray,
        classes: np.ndarray,
        rest: np.ndarray,
        *,
        canvas_size: Size,
        extent: Box,
        label: int,
    ) -> Self:
        """Map of what a `LabelStore` gave, whose shapes, dtypes and extent need no check.

        Raises:
            ValueError: a NaN or +inf, or a cell without any finite logit.
        """
        own = np.ascontiguousarray(scores, np.float16)
        own = own if own.flags.writeable else own.copy()
        ids = np.ascontiguousarray(classes, np.uint16 if classes.itemsize == 2 else np.int32)
        others = np.ascontiguousarray(rest, np.float16)
        if not _usable(own, others):
            raise ValueError(_UNUSABLE)
        data = _sharing(own, cls)
        data.__dict__.update(
            _stored=(own, ids, others),
            label=label,
            extent=extent,
            canvas_size=canvas_size,
            source_size=canvas_size,
            path=PixelPath.of(canvas_size),
        )
        return data

    # Of a map from a store, made when somebody asks: in a data set, nobody does.
    @cached_property
    def classes(self) -> Tensor:
        """Class ids, int32 [V, H, W, K]."""
        return torch.from_numpy(self._stored[1].astype(np.int32))

    @cached_property
    def rest(self) -> Tensor:
        """Log-sum-exp of all other logits, float32 [V, H, W]."""
        return torch.from_numpy(self._stored[2].astype(np.float32))

    @property
    def view(self) -> int:
        """Which view matches the current picture: 1, the mirrored one, if there and needed."""
        stored = self.__dict__.get("_stored")
        views = len(self.rest) if stored is None else len(stored[2])
        return int(views > 1 and self.path.is_mirrored)

    def arrays(self) -> Arrays:
        """Contiguous scores, classes and rest of all views: the tensors' memory where possible.

        Returns:
            float16 or float32 [V, H, W, K], integer of 16 or 32 bits [V, H, W, K], and float16 or
            float32 [V, H, W].
        """
        stored: Arrays | None = self.__dict__.get("_stored")
        if stored is not None:
            return stored
        with DisableTorchFunctionSubclass():  # its detour costs more than all else here
            scores, ids, rest = (_array(part) for part in (self, self.classes, self.rest))
        return scores if scores.dtype == np.float16 else scores.astype(np.float32), ids, rest

    def moved(self, path: PixelPath, canvas_size: Size) -> Self:
        """The same map on a new picture of `canvas_size` (h, w), reached by `path`."""
        stored = self.__dict__.get("_stored")
        if stored is not None:
            moved = _sharing(stored[0], type(self))
        else:
            with DisableTorchFunctionSubclass():  # the detour through Mask's costs more
                moved = self.as_subclass(type(self))
        moved.__dict__.update(self.__dict__, path=path, canvas_size=canvas_size)
        return moved

    @classmethod
    def wrap(cls, tensor: Tensor, like: tv_tensors.TVTensor, **kwargs: Any) -> Self:
        """`tensor` as a map with the metadata of `like`, or with what `kwargs` replaces.

        Raises:
            TypeError: `tensor` has another shape, so it is not that map.
        """
        metadata = {**_metadata(like), **kwargs}
        classes, rest = metadata["classes"], metadata["rest"]
        if tensor.shape != classes.shape:
            raise TypeError(
                f"a TokenLabelMap keeps its shape, {list(classes.shape)}, through every transform, "
                f"got {list(tensor.shape)}. Remedy: leave the map out of the transform that "
                "indexes or resamples it"
            )
        if tensor.device != classes.device:
            metadata |= {"classes": classes.to(tensor.device), "rest": rest.to(tensor.device)}
        return _attach(tensor.as_subclass(cls), **metadata)

    @classmethod
    def _wrap_output(
        cls, output: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if isinstance(output, (tuple, list)):
            return type(output)(cls._wrap_output(part, args, kwargs) for part in output)
        like = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, cls))
        if isinstance(output, Tensor) and output.shape == like.classes.shape:
            return cls.wrap(output, like)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Without what is stored, whose scores would no longer share the tensor's memory.
        plain = self.as_subclass(Tensor).as_subclass(type(self))
        return super(TokenLabelMap, _attach(plain, **_metadata(self))).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        # default_collate stacks; a stack of scores without its classes would train silently.
        if func is torch.stack:
            raise TypeError(
                "TokenLabelMaps cannot be stacked into a batch: their classes and paths would be "
                "lost. Remedy: end the transform with ToTokenTargets, whose output collates"
            )
        return super().__torch_function__(func, types, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        views, height, width, k = self.shape
        return (
            f"TokenLabelMap({height}x{width} cells, {k} scores a cell, {views} view(s), "
            f"canvas_size={self.canvas_size}, source_size={self.source_size}, "
            f"extent={self.extent}, label={self.label})"
        )


def _sharing(array: np.ndarray, kind: type[_Tensor]) -> _Tensor:
    """A tensor of this kind on the array's memory."""
    tensor: Any = torch.from_numpy(array)
    # As torch does with lazy parameters. A second view, as as_subclass makes one, costs more than
    # the first.
    tensor.__class__ = kind
    return tensor  # type: ignore[no-any-return]


def _array(tensor: Tensor) -> np.ndarray:
    # What `force` does costs even where there is nothing to do.
    plain = tensor.is_cpu and not tensor.requires_grad
    return np.ascontiguousarray(tensor.numpy() if plain else tensor.numpy(force=True))


def _metadata(like: Any) -> dict[str, Any]:
    return {name: getattr(like, name) for name in _METADATA}


def _attach(tensor: _Tensor, **metadata: Any) -> _Tensor:
    for name, value in metadata.items():
        setattr(tensor, name, value)
    return tensor


def _tensor(array: ArrayLike) -> Tensor:
    if isinstance(array, np.ndarray):
        # torch warns about read-only arrays and refuses foreign byte orders.
        native = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
        return torch.from_numpy(native)
    return torch.as_tensor(array).detach()


def _check(scores: Tensor, classes: Tensor, rest: Tensor) -> None:
    shape = tuple(scores.shape)
    good = len(shape) == 4 and 1 <= shape[0] <= 2 and min(shape) > 0
    if not good or classes.shape != scores.shape or rest.shape != scores.shape[:3]:
        raise ValueError(
            "a map is scores and classes [H, W, K] and rest [H, W], for one view or two; got "
            f"{list(shape)}, {list(classes.shape)} and {list(rest.shape)} with the views in front"
        )
    if not scores.is_floating_point() or not rest.is_floating_point():
        raise ValueError(f"scores and rest must be floats, got {scores.dtype} and {rest.dtype}")
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(f"classes must be integers, got {classes.dtype}")
    if not _usable(scores.numpy(force=True), rest.float().numpy(force=True)):
        raise ValueError(_UNUSABLE)


def _usable(scores: np.ndarray, rest: np.ndarray) -> bool:
    """Whether each cell has a finite logit, and none NaN or +inf."""
    if native.compiled is not None and scores.dtype in (np.float16, np.float32):
        scores, rest = np.ascontiguousarray(scores), np.ascontiguousarray(rest)
        return bool(native.compiled.usable(scores, rest, scores.shape[-1]))
    # The maximum hands on NaN and +inf, and is -inf where there is nothing else.
    return bool(np.isfinite(np.maximum(scores.max(-1), rest)).all())


# Last, for it needs the class: no map may exist without its kernels, or torchvision would flip it
# as the Mask that it also is.
import_module("tokenlabel.dataset.kernels")
