# mypy: allow-subclassing-any
"""`TokenLabelMap`: the leaf that follows an image through any v2 transform."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchvision import tv_tensors

from ..format.chunks import shuffle
from ..format.score_map import MapLayout
from .path import UNIT_BOX, Box, Elastic, PixelPath, scaling

ArrayLike = Tensor | np.ndarray
Size = tuple[int, int]
_NOTHING = torch.empty(0)
#: Of matrices: a determinant that is none, and the error of a number that should be whole.
SINGULAR, _EXACT = 1e-12, 1e-9


class TokenLabelMap(tv_tensors.Mask):
    """A score map of one image, and the path from the current image back to it.

        leaf = LabelStore("labels/train").leaf(0, canvas_size=(image.height, image.width))
        transform = v2.Compose([v2.RandomResizedCrop(224), v2.RandomRotation(10)])
        image, leaf = transform(image, leaf)  # the map follows its image
        labels = TokenLabels.of(leaf)  # a record, for batches

    The tensor itself is empty: the map's stored planes travel beside it, and geometric transforms
    only compose `path`. It is a Mask so that transforms that cannot move it (stock RandAugment,
    MixUp) raise. Photometric transforms and erasing leave it alone: an erased patch keeps its
    label, as in token labeling, where the student is to infer it from its surroundings.

    Args:
        planes: the planes of the map in the order of `layout.planes()`, end to end, each as stored:
            bytes shuffled where items have more than one.
        layout: their shapes and dtypes.
        canvas_size: (h, w) of the image in pixels.
        extent: box (x0, y0, x1, y1) of the image, normalised, x along the width, that the map
            covers. A mirrored view covers the mirror image of the same box.
        label: ground-truth class of the image, or -1.

    Attributes:
        planes, extent, label: as given.
        map_layout: the layout (`layout` is torch's word for how a tensor lies in memory).
        canvas_size: (h, w) in pixels of the image as it is now.
        source_size: (h, w) in pixels of the image before any transform.
        path: from points of the current image, in pixels, to the normalised source image.
    """

    planes: bytes
    map_layout: MapLayout
    label: int
    extent: Box
    canvas_size: Size
    source_size: Size
    path: PixelPath

    def __new__(
        cls,
        planes: bytes,
        layout: MapLayout,
        *,
        canvas_size: Size,
        extent: Box = UNIT_BOX,
        label: int = -1,
    ) -> Self:
        """A map of `canvas_size`, untouched."""
        leaf: Self = Tensor._make_subclass(cls, _NOTHING)
        leaf.__dict__.update(
            planes=planes,
            map_layout=layout,
            label=label,
            extent=extent,
            canvas_size=canvas_size,
            source_size=canvas_size,
            path=PixelPath.of(canvas_size),
        )
        return leaf

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
        num_classes: int | None = None,
        mirrored: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    ) -> Self:
        """A map of logits of your own, for one view of an image or two.

        Args:
            scores: logits, float [H, W, K], in any order; -inf where there is no class.
            classes: their class ids, integer [H, W, K].
            rest: log-sum-exp of all other logits, float [H, W]; -inf where there are none.
            canvas_size: (h, w) of the image in pixels.
            extent: box (x0, y0, x1, y1) of the image, normalised, that the map covers.
            label: ground-truth class of the image, or -1.
            num_classes: C; None: as many as the largest id says, and those of the rest one more.
            mirrored: (scores, classes, rest) of the mirrored image, in its own coordinates; they
                are used wherever a transform has mirrored the image.

        Raises:
            ValueError: shapes that do not fit, a NaN or +inf, a cell without any finite logit, a
                class id out of range or twice in a cell, or an empty extent or canvas.
        """
        views = [(scores, classes, rest), *([] if mirrored is None else [mirrored])]
        parts = [[_array(array) for array in view] for view in views]
        height, width = (int(side) for side in canvas_size)
        x0, y0, x1, y1 = (float(value) for value in extent)
        if height < 1 or width < 1:
            raise ValueError(f"canvas_size must be (h, w) in pixels, got {tuple(canvas_size)}")
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(
                "extent must be a box (x0, y0, x1, y1) of the normalised image, "
                f"0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1; got {tuple(extent)}"
            )
        layout, planes = _encoded(parts, num_classes)
        box = (x0, y0, x1, y1)
        return cls(planes, layout, canvas_size=(height, width), extent=box, label=int(label))

    @property
    def is_mirrored(self) -> bool:
        """Whether the second of two views is the one that matches the current image."""
        return len(self.map_layout.views) > 1 and self.path.is_mirrored

    def with_path(self, path: PixelPath, canvas_size: Size) -> Self:
        """The same map on a new image of `canvas_size` (h, w), reached by `path`."""
        leaf: Self = Tensor._make_subclass(type(self), _NOTHING)
        leaf.__dict__.update(self.__dict__)
        leaf.__dict__.update(path=path, canvas_size=canvas_size)
        return leaf

    def follow(
        self,
        source: ArrayLike,
        canvas_size: Size | None = None,
        box: Sequence[float] | None = None,
    ) -> Self:
        """The map after a geometric change that another library or your own code made.

            turn = [[0, 1, 0], [-1, 0, image.height], [0, 0, 1]]  # by 90 degrees, clockwise
            turned = leaf.follow(np.array(turn), canvas_size=(image.width, image.height))

        Points are (x, y) in pixels, and pixel i covers [i, i + 1]. (A matrix M of pixel centres, as
        OpenCV's, is T M T^-1 here, where T moves by half a pixel in x and y.)

        Args:
            source: where the new image's points lie on the current one: a matrix [3, 3] for columns
                (x, y, 1); or points [h, w, 2], at the centres of h x w equal parts of the new
                image, between which it is linear. What lies outside the current image shows fill,
                which has no label: its patches' weight is 0.
            canvas_size: (h, w) of the new image in pixels; None: as before.
            box: (x0, y0, x1, y1) of the current image in pixels that the new one may show, where it
                was cropped on the way; None: all of it.

        Raises:
            ValueError: another shape, a number that is not finite, or a singular matrix.
        """
        height, width = self.canvas_size
        size = canvas_size or self.canvas_size
        given = np.asarray(_array(source), np.float64)
        is_matrix = given.shape == (3, 3)
        if not is_matrix and (given.ndim != 3 or given.shape[2] != 2):
            raise ValueError(
                f"source must be a matrix [3, 3] or points [h, w, 2], got {list(given.shape)}"
            )
        if not np.isfinite(given).all() or (is_matrix and not abs(np.linalg.det(given)) > SINGULAR):
            raise ValueError(
                "source must be finite, and a matrix must not be singular. Remedy: give the way "
                "from the new image's points to the old ones"
            )
        path = self.path.guarded((height, width))
        path = path if box is None else path.within((box[0], box[1], box[2], box[3]))
        if is_matrix:
            given = given / given[2, 2] if given[2, 2] else given
            # A product of floats must be upright where it is meant to be.
            near = np.rint(given)
            a, b, c, d, e, f, g, h, i = (
                np.where(abs(given - near) < _EXACT, near, given).ravel().tolist()
            )
            return self.with_path(path.after((a, b, c, d, e, f, g, h, i)), size)
        rows, columns = given.shape[:2]
        if _is_mirrored(given):
            # Which view of the map is shown, the matrices say: the field is that of the mirror.
            path = path.after((-1.0, 0.0, float(width), 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
            given = np.stack([width - given[..., 0], given[..., 1]], -1)
        # As a displacement of an image of one pixel a point.
        at = np.stack(np.meshgrid(np.arange(columns) + 0.5, np.arange(rows) + 0.5), -1)
        steps = 2 * given / (width, height) - 2 * at / (columns, rows)
        path = path.after(scaling(width / columns, height / rows))
        path = path.warped(Elastic(torch.from_numpy(steps)[None]))
        return self.with_path(path.after(scaling(columns / size[1], rows / size[0])), size)

    @classmethod
    def wrap(cls, tensor: Tensor, like: tv_tensors.TVTensor, **kwargs: Any) -> Self:
        """`tensor` as a map with the metadata of `like`, or with what `kwargs` replaces.

        Raises:
            TypeError: `tensor` is not empty, so it is no map.
        """
        if tensor.numel():
            raise TypeError(
                f"a TokenLabelMap is an empty tensor with a path, got shape {list(tensor.shape)}. "
                "Remedy: leave the map out of the transform that indexes or resamples it"
            )
        leaf: Self = tensor.as_subclass(cls)
        leaf.__dict__.update(like.__dict__)
        leaf.__dict__.update(kwargs)
        return leaf

    @classmethod
    def _wrap_output(
        cls, output: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if isinstance(output, (tuple, list)):
            return type(output)(cls._wrap_output(part, args, kwargs) for part in output)
        if isinstance(output, Tensor):
            return cls.wrap(output, next(x for x in tree_leaves((args, kwargs)) if type(x) is cls))
        return output

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        # default_collate stacks; a stack of empty tensors would train silently.
        if func is torch.stack:
            raise TypeError(
                "TokenLabelMaps cannot be stacked into a batch: their planes and paths would be "
                "lost. Remedy: end the transform with ToTokenLabels, whose output collates"
            )
        return super().__torch_function__(func, types, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        (height, width), k = self.map_layout.grid, self.map_layout.k
        return (
            f"TokenLabelMap({height}x{width} cells of {k} classes, label={self.label}, "
            f"canvas_size={self.canvas_size}, source_size={self.source_size})"
        )


def _is_mirrored(points: np.ndarray) -> bool:
    """Whether a field of points [h, w, 2] mostly turns the other way round."""
    if min(points.shape[:2]) < 2:
        return False
    across, down = np.diff(points, axis=1)[:-1], np.diff(points, axis=0)[:, :-1]
    turns = across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0]
    return bool(np.median(turns[turns != 0]) < 0) if turns.any() else False


def _array(array: ArrayLike) -> np.ndarray:
    if not isinstance(array, Tensor):
        return np.asarray(array)
    array = array.detach().cpu()
    return (array.float() if array.dtype == torch.bfloat16 else array).numpy()  # NumPy has none


def _encoded(
    views: Sequence[Sequence[np.ndarray]], num_classes: int | None
) -> tuple[MapLayout, bytes]:
    """Layout with float16 codes and the planes of (scores, classes, rest) of each view."""
    shapes = [[list(array.shape) for array in view] for view in views]
    cells = shapes[0][0]
    if any(shape != [cells, cells, cells[:2]] for shape in shapes) or len(cells) != 3 or 0 in cells:
        raise ValueError(
            "a map is scores and classes [H, W, K] and rest [H, W], of equal shape in all views; "
            f"got {shapes}"
        )
    scores, classes, rest = (np.stack(part) for part in zip(*views, strict=True))
    if scores.dtype.kind != "f" or rest.dtype.kind != "f":
        raise ValueError(f"scores and rest must be floats, got {scores.dtype} and {rest.dtype}")
    if classes.dtype.kind not in "iu":
        raise ValueError(f"classes must be integers, got {classes.dtype}")
    wide = np.concatenate([scores, rest[..., None]], -1).astype(np.float64)
    # The maximum propagates NaN and +inf, and is -inf where there is nothing else.
    if not np.isfinite(wide.max(-1)).all():
        raise ValueError(
            "scores and rest must be logits without NaN or +inf, and at least one of each cell "
            "finite. Remedy: leave out images that could not be annotated"
        )
    level = np.logaddexp.reduce(wide, -1)
    open_ended = bool(np.isfinite(rest).any())
    total = int(classes.max()) + 1 + open_ended if num_classes is None else num_classes
    if classes.min() < 0 or classes.max() >= total:
        wrong = classes.min() if classes.min() < 0 else classes.max()
        raise ValueError(f"class ids must be in [0, {total - 1}], got {wrong}")
    ids = np.where(np.isneginf(scores), -1 - np.arange(scores.shape[-1]), classes.astype(np.int64))
    if not np.diff(np.sort(ids, -1)).all():
        raise ValueError("the classes of a cell must differ, but for those with a score of -inf")
    count, height, width, k = scores.shape
    views_of = ("identity", "hflip")[:count]
    layout = MapLayout(views_of, (height, width), k, total, residual=0, step=0.0)
    # In float16 a whole cell can round below 0, where it would count as more than all.
    codes = np.maximum(level[..., None] - scores.astype(np.float64), 0)
    arrays = (codes.transpose(0, 3, 1, 2), classes.transpose(0, 3, 1, 2), level)
    with np.errstate(over="ignore"):  # beyond float16 is no class
        types = (dtype for dtype, _ in layout.planes().values())
        planes = [array.astype(dtype) for array, dtype in zip(arrays, types, strict=True)]
    return layout, b"".join(map(shuffle, planes))
