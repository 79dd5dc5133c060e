"""The record: what one sample's labels are between the disk and the device, as bytes.

A record is a header that describes its layout, the path of the image's augmentation, and the planes
of the score map exactly as they are stored. The header has 32 little-endian words of four bytes,
`WORDS`; the path up to `SEGMENTS` segments of 16 float32 each (matrix, box, fold); the planes
follow; then, for a path that no segments describe, a lattice of uint16 points.
"""

import functools
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..format.score_map import MapLayout
from ..label_map.label_map import TokenLabelMap
from ..label_map.path import Elastic, Fold, PixelPath, product

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
_CODES = "iiiiiiiifiiiiiifffffffffff"  # int32 or float32, word by word
HEADER = struct.Struct(f"<{_CODES}24x")
WORD = {name: index for index, name in enumerate(WORDS)}
#: Bits of the word "state".
HAS_MAP, MIRRORED, TILTED = 1, 2, 4
#: Segments of a path that a record has room for: six tilting operations and more.
SEGMENTS = 8
_SEGMENT = struct.Struct("<16f")
_UNUSED = _SEGMENT.pack(1, 0, 0, 0, 1, 0, 0, 0, 1, -np.inf, -np.inf, np.inf, np.inf, 0, 0, 0)
#: Modes of a fold by number; 0 is none.
FOLDS = ("", "edge", "reflect", "symmetric")
#: Bytes before the planes.
HEAD = HEADER.size + SEGMENTS * _SEGMENT.size
#: Points along each side of a lattice. 112 is a multiple of 7, 14, 16, 28 and 56, so that each
#: patch of the usual grids gets equally many.
LATTICE = 112
OUTSIDE = 65535  # a lattice's point that shows nothing of the image
_ALIGNED = 8
SAMPLES = 17  # points along each side by which the zoom of a curved path is measured


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


# --- written, in the loader ----------------------------------------------------------------------


def pack(leaves: Sequence[TokenLabelMap], grid: Grid | None, shrink: float) -> Tensor:
    """The records of a batch, uint8 [B, bytes], from the maps that followed its images."""
    heads = [_head(leaf, grid, shrink) for leaf in leaves]
    blank = bytes(leaves[0].map_layout.nbytes)
    longest = max(len(head) + len(blank) + len(lattice) for head, lattice in heads)
    # Words are read in place: each record must begin where its words are aligned.
    longest += -longest % _ALIGNED
    pieces = []
    for (head, lattice), leaf in zip(heads, leaves, strict=True):
        padding = bytes(longest - len(head) - len(blank) - len(lattice))
        pieces += [head, leaf.planes or blank, lattice, padding]
    data = torch.frombuffer(bytearray().join(pieces), dtype=torch.uint8)
    return data.view(len(heads), longest)


def _head(leaf: TokenLabelMap, grid: Grid | None, shrink: float) -> tuple[bytes, bytes]:
    """Header and path of a record, and its lattice."""
    layout, path, size = leaf.map_layout, leaf.path, leaf.canvas_size
    segments, lattice = list(path.segments()), b""
    # A displacement field has no matrix, and there is room for so many only: their source points
    # are stored instead.
    if len(segments) > SEGMENTS or any(isinstance(part.warp, Elastic) for part in segments):
        segments = []
        x, y, inside = _points(path, size, LATTICE)
        inside &= (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
        points = np.rint(np.stack([x, y], -1) * (OUTSIDE - 1))
        lattice = np.where(inside[..., None], points, OUTSIDE).astype("<u2").tobytes()
    head = HEADER.pack(
        MAGIC,
        len(layout.views),
        layout.k,
        *layout.grid,
        layout.residual,
        layout.num_classes,
        layout.level,
        layout.step,
        *(grid or (0, 0)),
        leaf.label,
        HAS_MAP * bool(leaf.planes) + MIRRORED * leaf.is_mirrored + TILTED * (not path.is_single),
        len(segments),
        bool(lattice),
        *size,
        _shrink(path, size, shrink) if shrink else 0.0,
        *leaf.extent,
        *_reach(leaf),
    )
    parts = [head]
    for matrix, box, warp, _ in segments:
        fold = (FOLDS.index(warp.mode), *warp.size) if isinstance(warp, Fold) else (0, 0, 0)
        parts.append(_SEGMENT.pack(*matrix, *box, *fold))
    parts += [_UNUSED] * (SEGMENTS - len(segments))
    return b"".join(parts), lattice


def _points(path: PixelPath, size: Grid, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source points at the centres of side x side equal parts of the image, and which are in it.

    Those on the horizon of a perspective, which have none, are 0.
    """
    at = (np.arange(side) + 0.5) / side
    x, y, inside = path(at * size[1], (at * size[0])[:, None])
    x, y = (np.where(np.isfinite(v), v, 0.0) for v in np.broadcast_arrays(x, y))
    return x, y, inside


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
    x, y, inside = _points(path, (height, width), SAMPLES)

    def steepest(values: np.ndarray, axis: int) -> float:
        both = np.diff(inside.astype(np.int8), axis=axis) == 0
        both &= np.delete(inside, -1, axis)
        steps = np.abs(np.diff(values, axis=axis), where=both, out=np.zeros(both.shape))
        return 1.1 * SAMPLES * float(steps.max(initial=0.0))

    xx, xy, yx, yy = steepest(x, 1), steepest(y, 1), steepest(x, 0), steepest(y, 0)
    return (xx * across, xy * down, yx * across, yy * down)


def _shrink(path: PixelPath, size: Grid, factor: float) -> float:
    """min(.5, factor * log2 of the linear zoom); of a path that is not upright, by its points."""
    if path.is_single:
        a, b, _, d, e = path.matrix[:5]
        area = abs(a * e - b * d) * size[0] * size[1]
    else:
        x, y, inside = _points(path, size, SAMPLES)
        (x_down, x_across), (y_down, y_across) = np.gradient(x), np.gradient(y)
        steps = np.abs(x_across * y_down - x_down * y_across)[inside]
        area = float(np.median(steps)) * SAMPLES**2 if len(steps) else 1.0
    zoom = -0.5 * float(np.log2(max(area, 1e-12)))
    return min(0.5, max(0.0, factor * zoom))


# --- read, on the device --------------------------------------------------------------------------


def word(data: Tensor, name: str) -> Tensor:
    """A word of the header, int32 or float32 [B], of records [B, bytes]."""
    index = WORD[name]
    kind = torch.float32 if _CODES[index] == "f" else torch.int32
    return data[..., : HEADER.size].contiguous().view(kind)[..., index]


def read_layout(data: Tensor) -> RecordLayout:
    """What records, uint8 [B, bytes] or [bytes], have in common: read from their headers.

    Raises:
        ValueError: they are no records, or differ in what must be equal.
    """
    size = data.shape[-1]
    if data.dtype != torch.uint8 or size < HEAD:
        raise ValueError(
            f"TokenLabels are uint8 records of {HEAD} bytes or more, got {data.dtype} of {size}. "
            "Remedy: use what a DataLoader over TokenLabelDataset gives"
        )
    heads = data[..., : HEADER.size].contiguous().reshape(-1, HEADER.size)
    ints = heads.cpu().numpy().view("<i4")
    floats = ints.view("<f4")
    first = {name: ints[0, index].item() for name, index in WORD.items()} if len(ints) else {}
    shared = WORD["label"]
    if first.get("magic") != MAGIC or (ints[:, :shared] != ints[0, :shared]).any():
        raise ValueError(
            "the records of a batch must be tokenlabel's, all of one layout. Remedy: make them "
            "with TokenLabelDataset or ToTokenLabels, and batch those of one label set"
        )
    views, cells = ("identity", "hflip")[: first["views"]], (first["height"], first["width"])
    counts, step = (first["k"], first["num_classes"], first["residual"]), floats[0, WORD["step"]]
    maps = MapLayout(views, cells, *counts, step.item(), bool(first["level"]))
    # In eighths of the map, so that a compiled step meets few different ones.
    steps = np.array([maps.grid[1], maps.grid[0]] * 2) / 8
    reach = floats[:, WORD["reach_xx"] : WORD["reach_yy"] + 1].max(0)
    reach = (np.ceil(reach / steps - 1e-4) * steps).tolist()
    return RecordLayout(
        maps,
        (first["grid_h"], first["grid_w"]) if first["grid_h"] else None,
        bool((ints[:, WORD["state"]] & TILTED).any()),
        int(ints[:, WORD["segments"]].max()),
        bool(ints[:, WORD["lattice"]].any()),
        bool((floats[:, WORD["shrink"]] > 0).any()),
        (reach[0], reach[1], reach[2], reach[3]),
    )


class Records(NamedTuple):
    """The records of a batch, to compute with.

    Attributes:
        data: uint8 [B, bytes], a plain tensor.
        layout: what they have in common.
    """

    data: Tensor
    layout: RecordLayout

    def word(self, name: str) -> Tensor:
        """A word of the header, int32 or float32 [B]."""
        return word(self.data, name)

    def has(self, bit: int) -> Tensor:
        """Which records have a bit of the word "state", bool [B]."""
        return (self.word("state") & bit) > 0

    def paths(self) -> Tensor:
        """The segments of the paths, float32 [B, S, 16], S the most of the batch."""
        end = HEAD - (SEGMENTS - self.layout.segments) * _SEGMENT.size
        data = self.data[:, HEADER.size : end].contiguous().view(torch.float32)
        segments: Tensor = data.unflatten(1, (-1, 16))
        return segments

    def plane(self, name: str) -> Tensor:
        """A plane in the view that matches each image: int32 [B, ...], or float32 of float16."""
        end = HEAD
        for plane, (dtype, shape) in self.layout.maps.planes().items():
            start, end = end, end + dtype.itemsize * math.prod(shape)
            if plane == name:
                break
        data = self.data[:, start:end].contiguous().unflatten(1, (dtype.itemsize, *shape))
        data, *second = data.unbind(2)
        if second:
            mirrored = self.has(MIRRORED).view(-1, *[1] * (data.ndim - 1))
            data = torch.where(mirrored, second[0], data)
        if dtype.kind == "f":
            # Copied even where it is contiguous: bytes that lie at an odd offset are no float16.
            items: Tensor = data.movedim(1, -1).clone(memory_format=torch.contiguous_format)
            return items.view(torch.float16)[..., 0].float()
        # The bytes are shuffled: first the lowest ones of all items, then the next ones.
        number: Tensor = data[:, 0].int()
        for byte in range(1, dtype.itemsize):
            number = number | (data[:, byte].int() << (8 * byte))
        return number

    def lattices(self) -> Tensor:
        """Source points of the lattices, float32 [B, LATTICE, LATTICE, 2]; NaN outside."""
        start = HEAD + self.layout.maps.nbytes
        data = self.data[:, start : start + LATTICE * LATTICE * 4].contiguous().int()
        low, high = data.unflatten(1, (LATTICE, LATTICE, 2, 2)).unbind(-1)
        points = low | (high << 8)
        return torch.where(points == OUTSIDE, torch.nan, points / (OUTSIDE - 1.0)).float()
