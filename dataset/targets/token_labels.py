# mypy: allow-subclassing-any
"""`TokenLabels`: one uint8 record a sample that goes from disk to device untouched.

A record is a header that says its layout, the path of the image's augmentation, and the planes of
the score map as they are stored. Nothing is computed before the batch is on its device: `targets`
reads the maps there, all at once.

The header is 32 little-endian words of four bytes, `WORDS`; the path is up to `SEGMENTS` segments
of 16 float32 each (matrix, box, fold); the planes follow, and, for a path that no segments
describe, a lattice of uint16 points.
"""

import functools
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

from ..format.score_map import MapLayout
from ..label_map.label_map import TokenLabelMap
from ..label_map.path import Elastic, Fold, PixelPath, product

if TYPE_CHECKING:
    from .windows import TokenTargets, TokenWindows

Grid = tuple[int, int]

#: Of a record; a reader refuses others.
MAGIC = 0x324C4B54  # "TKL2"
#: Words of the header. Those before "label" are equal in all records of a batch.
WORDS = (
    *("magic", "views", "k", "height", "width", "residual", "num_classes"),
    *("level", "step", "grid_h", "grid_w"),
    *("label", "state", "segments", "lattice", "canvas_h", "canvas_w", "shrink"),
    *("x0", "y0", "x1", "y1", "reach_xx", "reach_xy", "reach_yx", "reach_yy"),
)
_FORMATS = "8i f 2i 4i 3f 8f 24x".replace(" ", "")
_HEADER = struct.Struct(f"<{_FORMATS}")
_WORD = {name: index for index, name in enumerate(WORDS)}
#: Bits of the word "state".
HAS_MAP, MIRRORED, TILTED = 1, 2, 4
#: Segments of a path that a record has room for: six tilting operations and more.
SEGMENTS = 8
_SEGMENT = struct.Struct("<16f")
_UNUSED = _SEGMENT.pack(1, 0, 0, 0, 1, 0, 0, 0, 1, -np.inf, -np.inf, np.inf, np.inf, 0, 0, 0)
FOLDS = ("", "edge", "reflect", "symmetric")
#: Bytes before the planes.
HEAD = _HEADER.size + SEGMENTS * _SEGMENT.size
#: Points along each side of a lattice, and the value that stands for "outside".
LATTICE = 112
OUTSIDE = 65535
_ALIGNED = 8


class RecordLayout(NamedTuple):
    """What a batch's records have in common, as Python numbers: no device is asked for them.

    Attributes:
        maps: layout of the maps.
        grid: (h, w) of the student's patches, None where the records do not say.
        tilted: whether any path is not upright.
        segments: the most segments of a path.
        lattice: whether any path is a lattice.
        shrink: whether any target is drawn towards its image's mean.
        reach: cells of the map that the whole image spans: (x, y) along its width, (x, y) along its
            height; the largest of the batch.
    """

    maps: MapLayout
    grid: Grid | None
    tilted: bool
    segments: int
    lattice: bool
    shrink: bool
    reach: tuple[float, float, float, float]


class TokenLabels(Tensor):
    """Labels of a batch: one uint8 tensor [B, bytes], or [bytes] for one sample.

    A DataLoader over `TokenLabelDataset` gives it beside the images. It moves like any tensor
    (`labels.to(device, non_blocking=True)`, `pin_memory`, pickling, shared memory), has the length
    of the batch and is indexed by image. What keeps whole records stays `TokenLabels`; anything
    else, such as arithmetic on the last dimension, gives a plain tensor.

        for images, labels in loader:
            loss = TokenLabelLoss()(*student(images), labels)
    """

    #: Read where records are batched, on the CPU, and handed on from there.
    _layout: RecordLayout | None = None

    @classmethod
    def of(cls, leaf: TokenLabelMap, grid: Grid | None = None, shrink: float = 0.0) -> Self:
        """The record of one sample, from the leaf that followed its image.

        Args:
            leaf: the map and its path.
            grid: (h, w) of the student's patches, for whoever asks for targets without one.
            shrink: factor by which targets of small crops are drawn towards the image's mean, as
                `TokenLabelDataset` describes it.
        """
        record: Self = cls.collate([leaf], grid, shrink)[0]  # type: ignore[assignment]
        return record

    @classmethod
    def collate(
        cls, leaves: Sequence[TokenLabelMap], grid: Grid | None = None, shrink: float = 0.0
    ) -> Self:
        """The records of a batch, [B, bytes], from the leaves that followed its images."""
        heads = [_head(leaf, grid, shrink) for leaf in leaves]
        nothing = bytes(planes_size(leaves[0].map_layout))
        pieces = []
        longest = max(len(head) + len(nothing) + len(tail) for head, tail in heads)
        longest += -longest % _ALIGNED
        for (head, tail), leaf in zip(heads, leaves, strict=True):
            padding = bytes(longest - len(head) - len(nothing) - len(tail))
            pieces += [head, leaf.planes or nothing, tail, padding]
        data = torch.frombuffer(bytearray().join(pieces), dtype=torch.uint8)
        labels = data.view(len(heads), longest).as_subclass(cls)
        labels._layout = _layout(labels)
        return labels

    def __len__(self) -> int:
        if self.ndim != 2:
            raise TypeError("these are the labels of one image, which have no length")
        return self.shape[0]

    @property
    def record_layout(self) -> RecordLayout:
        """What the records have in common. Read from them, once, where it was lost on the way."""
        if self._layout is None:
            self._layout = _layout(self)
        return self._layout

    @property
    def num_classes(self) -> int:
        """C."""
        return self.record_layout.maps.num_classes

    @property
    def grid(self) -> Grid | None:
        """(h, w) of the student's patches, None where the records do not say."""
        return self.record_layout.grid

    @property
    def label(self) -> Tensor:
        """Ground-truth classes, int64 [B], -1 where unknown."""
        return self.word("label").long()

    @property
    def has_map(self) -> Tensor:
        """Whether the images have maps, bool [B]."""
        return self.has(HAS_MAP)

    def has(self, bit: int) -> Tensor:
        """Which records have a bit of the word "state", bool [B]."""
        return (self.word("state") & bit) > 0

    def hard_label(self) -> Tensor:
        """One class an image, int64 [B]: the ground truth; -1 where unknown."""
        return self.label

    def targets(self, grid: int | Grid | None = None) -> "TokenWindows":
        """Each patch's soft target, on the records' device, as windows on the maps' cells.

        Args:
            grid: the student's patches, (h, w), or one number for a square; None: as the data set
                was told.

        Raises:
            ValueError: no grid is known.
        """
        from .windows import windows

        return windows(self, self._grid(grid))

    def sparse(
        self, grid: int | Grid | None = None, k: int = 10, *, rule: str = "exact"
    ) -> "TokenTargets":
        """The same merged and cut to the k most probable classes, for looking or another loss.

        Args:
            grid: as for `targets`.
            k: classes kept for each patch; the mass of the others goes to `rest`.
            rule: "exact", or "published": the target of TokenLabeling (Jiang et al., 2021) and
                LV-ViT, for comparison: *logits* averaged over the patch (RoIAlign of the crop's
                box), every class that is not stored at logit 0, then softmax. The published code
                exchanges x and y of its boxes; here they are the right way round. Only for crops,
                flips and resizes, and maps stored with `level`.

        Raises:
            ValueError: a bad option, or no grid is known; by the rule "published", another path or
                no `level`.
        """
        from .published import published_targets
        from .windows import sparse_targets

        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if rule not in ("exact", "published"):
            raise ValueError(f"rule must be 'exact' or 'published', got {rule!r}")
        make = sparse_targets if rule == "exact" else published_targets
        return make(self, self._grid(grid), k)

    def crop(self, pool: str = "logits") -> Tensor:
        """The whole crop's soft target, float32 [B, C]; 0 where the image has no map.

        `shrink` draws the targets of patches only, not this one.

        Args:
            pool: "logits": softmax of the area mean of the logits, what the teacher itself would
                answer; "probs": area mean of the probabilities, ReLabel's localized label (Yun et
                al., 2021), which the many patches that show nothing known dilute.
        """
        from .windows import crop_targets

        if pool not in ("logits", "probs"):
            raise ValueError(f"pool must be 'logits' or 'probs', got {pool!r}")
        return crop_targets(self, pool)

    def word(self, name: str) -> Tensor:
        """A word of the header, int32 or float32 [B]."""
        index = _WORD[name]
        kind = torch.float32 if index == 8 or index >= _WORD["canvas_h"] else torch.int32
        return self.part(0, _HEADER.size).view(kind)[..., index]

    def paths(self) -> Tensor:
        """The segments of the paths, float32 [B, S, 16], S the most of the batch."""
        used = _SEGMENT.size * self.record_layout.segments
        segments: Tensor = self.part(_HEADER.size, used).view(torch.float32).unflatten(1, (-1, 16))
        return segments

    def part(self, start: int, size: int) -> Tensor:
        """Some bytes of each record, a plain tensor [..., size]."""
        with DisableTorchFunctionSubclass():
            return self[..., start : start + size].contiguous()

    def plane(self, name: str) -> Tensor:
        """The stored bytes of a plane, uint8 [B, I, *shape], I the bytes of an item."""
        start = HEAD
        for plane, (dtype, shape) in self.record_layout.maps.planes().items():
            count = int(np.prod(shape))
            if plane == name:
                data = self.part(start, count * dtype.itemsize)
                items: Tensor = data.unflatten(1, (dtype.itemsize, *shape))
                return items
            start += count * dtype.itemsize
        raise KeyError(name)

    def lattices(self) -> Tensor:
        """Source points of the lattices, float32 [B, LATTICE, LATTICE, 2]; NaN outside."""
        start = HEAD + planes_size(self.record_layout.maps)
        data = self.part(start, LATTICE * LATTICE * 4).int().unflatten(1, (LATTICE, LATTICE, 2, 2))
        points = data[..., 0] | (data[..., 1] << 8)
        outside = points == OUTSIDE
        return torch.where(outside, torch.nan, points / (OUTSIDE - 1.0)).float()

    def _grid(self, grid: int | Grid | None) -> Grid:
        if self.ndim != 2:
            raise ValueError(
                f"targets are those of a batch, [B, bytes], got {list(self.shape)}. Remedy: "
                "labels[None] for one image, or a DataLoader"
            )
        if grid is None:
            grid = self.grid
            if grid is None:
                raise ValueError(
                    "targets need the student's grid, and these records do not say it. Remedy: "
                    "TokenLabelDataset(..., grid=14), or labels.targets(14)"
                )
        return student_grid(grid)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        given = []
        for argument in (*args, *(kwargs or {}).values()):
            parts = argument if isinstance(argument, (tuple, list)) else (argument,)
            given += [part for part in parts if isinstance(part, TokenLabels)]
        if func is Tensor.__setitem__ and given:
            given[0]._layout = None
        return _kept(result, given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied: Self = self.clone()  # type: ignore[assignment]
        memo[id(self)] = copied
        return copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.ndim not in (1, 2) or self.shape[-1] < HEAD:
            return f"TokenLabels({list(self.shape)})"
        maps = self.record_layout.maps
        return (
            f"TokenLabels({list(self.shape)}, {maps.grid[0]}x{maps.grid[1]} cells of {maps.k} of "
            f"{maps.num_classes} classes, grid={self.grid}, device={self.device})"
        )


def student_grid(grid: int | Grid) -> Grid:
    """(h, w) of a student's patches, from that or from one number for a square."""
    height, width = (grid, grid) if isinstance(grid, int) else grid
    if height < 1 or width < 1:
        raise ValueError(f"grid must be patches (h, w), at least 1 each way, got {grid}")
    return height, width


def planes_size(layout: MapLayout) -> int:
    """Bytes of a map's planes."""
    return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in layout.planes().values())


def _kept(result: Any, given: Sequence[TokenLabels]) -> Any:
    """Whole records keep the class and what is known of them; anything else is a plain tensor."""
    if isinstance(result, (tuple, list)):
        return type(result)([_kept(part, given) for part in result])
    if not isinstance(result, TokenLabels):
        return result
    with DisableTorchFunctionSubclass():
        if not given or result.dtype != torch.uint8 or result.shape[-1:] != given[0].shape[-1:]:
            return result.as_subclass(Tensor)
    # A part of a batch reaches no further than the whole. Of several batches, nothing is known.
    layout = given[0]._layout
    result._layout = layout if all(other._layout == layout for other in given[1:]) else None
    return result


def _collate(batch: Sequence[Tensor], *, collate_fn_map: Any = None) -> Tensor:
    """Stack records; those with a lattice are longer, and the others are padded to them."""
    rows = [record.as_subclass(Tensor) for record in batch]
    longest = max(map(len, rows))
    if any(len(row) != longest for row in rows):
        rows = [torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows]
    stacked: Tensor = collate_tensor_fn(rows, collate_fn_map=collate_fn_map)
    labels = stacked.as_subclass(TokenLabels)
    labels._layout = _layout(labels)
    return labels


default_collate_fn_map[TokenLabels] = _collate


def _head(leaf: TokenLabelMap, grid: Grid | None, shrink: float) -> tuple[bytes, bytes]:
    """Header and path of a record, and its lattice."""
    layout, path, (height, width) = leaf.map_layout, leaf.path, leaf.canvas_size
    upright = path.is_single
    segments = list(path.segments())
    drawn = any(isinstance(part.warp, Elastic) for part in segments) or len(segments) > SEGMENTS
    tail = _lattice(path, (height, width)) if drawn else b""
    if drawn:
        segments = []
    state = HAS_MAP * bool(leaf.planes) + MIRRORED * leaf.is_mirrored + TILTED * (not upright)
    rows, columns = grid or (0, 0)
    head = _HEADER.pack(
        MAGIC,
        len(layout.views),
        layout.k,
        *layout.grid,
        layout.residual,
        layout.num_classes,
        layout.level,
        layout.step,
        rows,
        columns,
        leaf.label,
        state,
        len(segments),
        bool(tail),
        height,
        width,
        _shrink(path, (height, width), shrink) if shrink else 0.0,
        *leaf.extent,
        *_reach(leaf),
    )
    parts = [head, *map(_packed, segments), *[_UNUSED] * (SEGMENTS - len(segments))]
    return b"".join(parts), tail


def _packed(segment: PixelPath) -> bytes:
    fold: tuple[float, ...] = (0.0, 0.0, 0.0)
    if isinstance(segment.warp, Fold):
        fold = (float(FOLDS.index(segment.warp.mode)), *map(float, segment.warp.size))
    return _SEGMENT.pack(*segment.matrix, *segment.box, *fold)


def _points(path: PixelPath, size: Grid, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source points at the centres of side x side equal parts of the image, and which are in it.

    Those on the horizon of a perspective, which have none, are 0.
    """
    at = (np.arange(side) + 0.5) / side
    x, y, inside = path(at * size[1], (at * size[0])[:, None])
    x, y = (np.where(np.isfinite(v), v, 0.0) for v in np.broadcast_arrays(x, y))
    return x, y, inside


def _lattice(path: PixelPath, size: Grid) -> bytes:
    x, y, inside = _points(path, size, LATTICE)
    inside = inside & (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    points = np.where(inside[..., None], np.stack([x, y], -1), 0)
    codes = np.where(inside[..., None], np.rint(points * (OUTSIDE - 1)), OUTSIDE)
    return codes.astype("<u2").tobytes()


def _reach(leaf: TokenLabelMap) -> tuple[float, float, float, float]:
    """Cells of the map that the image spans, as `RecordLayout.reach`."""
    path, (height, width) = leaf.path, leaf.canvas_size
    x0, y0, x1, y1 = leaf.extent
    across, down = leaf.map_layout.grid[1] / (x1 - x0), leaf.map_layout.grid[0] / (y1 - y0)
    segments = list(path.segments())
    if all(part.warp is None and part.matrix[6] == part.matrix[7] == 0 for part in segments):
        a, b, _, d, e = functools.reduce(product, (part.matrix for part in reversed(segments)))[:5]
        return (
            abs(a) * width * across,
            abs(d) * width * down,
            abs(b) * height * across,
            abs(e) * height * down,
        )
    # Elsewhere from differences, with some room for what happens between the points.
    side = 17
    x, y, inside = _points(path, (height, width), side)

    def steepest(values: np.ndarray, axis: int) -> float:
        both = np.diff(inside.astype(np.int8), axis=axis) == 0
        both &= np.delete(inside, -1, axis)
        steps = np.abs(np.diff(values, axis=axis), where=both, out=np.zeros(both.shape))
        return 1.1 * side * float(steps.max(initial=0.0))

    return (
        steepest(x, 1) * across,
        steepest(y, 1) * down,
        steepest(x, 0) * across,
        steepest(y, 0) * down,
    )


def _shrink(path: PixelPath, size: Grid, factor: float) -> float:
    """min(.5, factor * log2 of the linear zoom); of a path that is not upright, by its points."""
    if path.is_single:
        a, b, _, d, e = path.matrix[:5]
        area = abs(a * e - b * d) * size[0] * size[1]
    else:
        side = 17
        x, y, inside = _points(path, size, side)
        (x_down, x_across), (y_down, y_across) = np.gradient(x), np.gradient(y)
        steps = np.abs(x_across * y_down - x_down * y_across)[inside]
        area = float(np.median(steps)) * side**2 if len(steps) else 1.0
    zoom = -0.5 * float(np.log2(max(area, 1e-12)))
    return min(0.5, max(0.0, factor * zoom))


def _layout(labels: TokenLabels) -> RecordLayout:
    """Read the headers of a batch, or of one record."""
    size = labels.shape[-1]
    if labels.dtype != torch.uint8 or size < HEAD:
        raise ValueError(
            f"TokenLabels are uint8 records of {HEAD} bytes or more, got {labels.dtype} of {size}. "
            "Remedy: use what a DataLoader over TokenLabelDataset gives"
        )
    ints = labels.part(0, _HEADER.size).reshape(-1, _HEADER.size).cpu().numpy().view("<i4")
    floats = ints.view("<f4")
    first = {name: ints[0, index].item() for name, index in _WORD.items()} if len(ints) else {}
    shared = _WORD["label"]
    if first.get("magic") != MAGIC or (ints[:, :shared] != ints[0, :shared]).any():
        raise ValueError(
            "the records of a batch must be tokenlabel's, all of one layout. Remedy: make them "
            "with TokenLabelDataset or ToTokenLabels, and batch those of one label set"
        )

    def any_bit(name: str, bit: int = -1) -> bool:
        return bool((ints[:, _WORD[name]] & bit).any())

    maps = MapLayout(
        ("identity", "hflip")[: first["views"]],
        (first["height"], first["width"]),
        first["k"],
        first["num_classes"],
        first["residual"],
        floats[0, _WORD["step"]].item(),
        bool(first["level"]),
    )
    # In eighths of the map, so that a compiled step meets few different ones.
    steps = np.array([maps.grid[1], maps.grid[0]] * 2) / 8
    reach = floats[:, _WORD["reach_xx"] : _WORD["reach_yy"] + 1].max(0)
    reach = (np.ceil(reach / steps - 1e-4) * steps).tolist()
    return RecordLayout(
        maps,
        (first["grid_h"], first["grid_w"]) if first["grid_h"] else None,
        any_bit("state", TILTED),
        int(ints[:, _WORD["segments"]].max()),
        any_bit("lattice"),
        bool((floats[:, _WORD["shrink"]] > 0).any()),
        (reach[0], reach[1], reach[2], reach[3]),
    )
