"""One shard: the maps of consecutive images in one file. The spec is docs/format.md.

All names and dtypes of the format stand here and in `score_map`; writer and reader use them.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import FormatError
from ..storage.remote_path import AnyPath
from .chunks import STRATEGIES, encode_chunk, inflate, unshuffle
from .directory import MOST_TIMES, SLACK, StoredFile
from .score_map import DROPPED, MapLayout, ScoreMap

if TYPE_CHECKING:
    from .new_file import NewFile

FORMAT = "tokenlabel-shard"
VERSION = 2
VIEWS = ("identity", "hflip")
#: Attributes without which a file is no shard, and their types.
HEADER: dict[str, type] = {
    **dict.fromkeys(("num_classes", "k", "residual"), int),
    **dict.fromkeys(("shard", "shards", "first_row", "errors"), int),
    **dict.fromkeys(("step", "floor"), float),
    **dict.fromkeys(("views", "extent"), list),
    **dict.fromkeys(("sha256", "fingerprint"), str),
}
#: Columns: dtype ("S": texts) and what follows the row in their shape. The last one may be absent.
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "key": ("S", ()),
    "label": ("<i4", ()),
    "size": ("<i4", (2,)),
    "digest": ("<u8", ()),
    "thumbprint": ("|u1", (64,)),
    "orientation": ("|u1", ()),
    "error": ("S", ()),
    "extent": ("<f4", (4,)),
}
_NAME = re.compile(r"shard-(\d{5,})-of-(\d{5,})\.h5")
_MOST_CLASSES = 1 << 24  # targets are vectors of that length
_REMEDY = "delete the file and run `annotate` again; it remakes just what is missing"
#: What the planes of an image without a map hold, so that no reader takes them for labels.
_BLANK: dict[str, float] = {"codes": DROPPED, "residual_codes": DROPPED, "level": np.nan}


def shard_name(shard: int, shards: int) -> str:
    """File name of shard `shard` (from 0) of `shards`."""
    return f"shard-{shard:05d}-of-{shards:05d}.h5"


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """(shard, shards) of a shard's file name; None for any other file."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


class ContentDigest:
    """The sha256 of a shard's decoded arrays, fed block by block."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._contents: dict[str, Any] = {}
        self._kinds: dict[str, str] = {}

    def update(self, name: str, block: np.ndarray) -> None:
        """Add the next rows of dataset `name`."""
        little = np.ascontiguousarray(block, block.dtype.newbyteorder("<"))
        self._kinds[name] = f"{little.dtype.str} {block.shape[1:]}"
        self._contents.setdefault(name, hashlib.sha256()).update(little.data)
        self._rows[name] += len(block)

    def hexdigest(self) -> str:
        """Digest over name, dtype, row shape, row count and content, in order of the names."""
        total = hashlib.sha256()
        for name, content in sorted(self._contents.items()):
            head = f"{name} {self._kinds[name]} {self._rows[name]}\n"
            total.update(head.encode() + content.digest())
        return total.hexdigest()


class ShardWriter:
    """Fills a new file with one shard, rows in order. Made by `write_shard`.

    Attributes:
        attrs: further attributes, as those of `NewFile`.
        file_sha256: of the file's bytes, hex; once the block of `write_shard` has ended.
    """

    file_sha256: str

    def __init__(
        self,
        file: "NewFile",
        layout: MapLayout,
        keys: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        extents: np.ndarray | None,
        folders: Mapping[str, int],
    ) -> None:
        rows = len(keys)
        if rows == 0 or len(labels) != rows:
            raise ValueError(f"a shard needs rows, and a label for each; got {rows}, {len(labels)}")
        self.attrs = file.attrs
        self._file, self._keys, self._planes = file, list(keys), layout.planes()
        self._folders = folders
        self._errors: list[str] = []
        self._digest = ContentDigest()
        self._rows: dict[str, np.ndarray] = {
            "label": np.asarray(labels, "<i4"),
            "size": np.zeros((rows, 2), "<i4"),
            "digest": np.zeros(rows, "<u8"),
            "thumbprint": np.zeros((rows, 64), "u1"),
            "orientation": np.zeros(rows, "u1"),
        }
        if extents is not None:
            self._rows["extent"] = np.asarray(extents, "<f4").reshape(rows, 4)
        file.create_maps(rows, self._planes)

    def append(
        self,
        maps: Mapping[str, np.ndarray],
        sizes: np.ndarray,
        digests: np.ndarray,
        thumbprints: np.ndarray,
        orientations: np.ndarray,
        errors: Sequence[str],
    ) -> None:
        """Write the next rows.

        Args:
            maps: the planes of `layout.planes()` by name, [b, *shape] each, in the stored dtype.
            sizes: int [b, 2], images' (width, height) in pixels.
            digests: uint64 [b] of the image files.
            thumbprints: uint8 [b, 64] of the images.
            orientations: uint8 [b], the EXIF orientations.
            errors: b texts, empty where the image has a map. The planes of the others are blanked.
        """
        start, count = len(self._errors), len(errors)
        bad = np.array([bool(error) for error in errors])
        blocks = {}
        for name, (dtype, shape) in self._planes.items():
            block, shape = maps[name], (count, *shape)
            if block.dtype != dtype or block.shape != shape:
                raise ValueError(f"{name} must be {dtype} {shape}, got {block.dtype} {block.shape}")
            if bad.any():
                block = block.copy()  # arrays from Ray's object store are read-only
                no_class = dtype == np.float16 and name == "codes"
                block[bad] = np.inf if no_class else _BLANK.get(name, 0)
            blocks[name] = block
            self._digest.update(name, block)
        # Row by row: all planes of an image end to end, so that one read gets them.
        for row in range(count):
            self._file.append_map(
                [encode_chunk(block[row], STRATEGIES[name]) for name, block in blocks.items()]
            )
        rows = slice(start, start + count)
        self._rows["size"][rows] = sizes
        self._rows["digest"][rows] = digests
        self._rows["thumbprint"][rows] = thumbprints
        self._rows["orientation"][rows] = orientations
        self._errors += errors

    def finish(self) -> None:
        """Write the columns, and the attributes that depend on the content."""
        from .new_file import add_folders, encode_texts

        if len(self._errors) != len(self._keys):
            raise ValueError(f"{len(self._keys)} rows were promised, {len(self._errors)} written")
        texts = {"key": encode_texts(self._keys), "error": encode_texts(self._errors)}
        for name, column in (texts | self._rows).items():
            self._digest.update(name, column)
            self._file.add(name, column, gzip=name in texts)
        self._file.add("bounds", self._file.bounds)
        add_folders(self._file, self._folders)
        self.attrs["errors"] = sum(map(bool, self._errors))
        self.attrs["sha256"] = self._digest.hexdigest()


@contextmanager
def write_shard(
    path: AnyPath,
    layout: MapLayout,
    keys: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    attrs: dict[str, Any],
    extents: np.ndarray | None = None,
    folders: Mapping[str, int] = {},  # never changed
) -> Iterator[ShardWriter]:
    """Write one shard in a `with` block; it appears at `path`, whole, when the block ends well.

        layout = MapLayout(("identity",), grid=(14, 14), k=5, num_classes=1000)
        attrs = {"shard": 0, "shards": 1, "first_row": 0, "fingerprint": "", "extent": [0, 0, 1, 1]}
        path = folder / "shard-00000-of-00001.h5"
        with write_shard(path, layout, ["a/1.jpg", "a/2.jpg"], [0, 0], attrs) as writer:
            maps = {name: np.zeros((2, *s), d) for name, (d, s) in layout.planes().items()}
            sizes, digests = np.full((2, 2), 224), np.zeros(2, np.uint64)
            prints, turns = np.zeros((2, 64), np.uint8), np.zeros(2, np.uint8)
            writer.append(maps, sizes, digests, prints, turns, errors=["", ""])

    Any exception out of the block, or a row too few, discards it.

    Args:
        path: final path of the shard, a file or an object.
        layout: shapes and dtypes.
        keys: the keys of all its rows, in order, sorted by their UTF-8 bytes.
        labels: their ground-truth classes, -1 where unknown.
        attrs: attributes that docs/format.md asks of the writer.
        extents: [n, 4] boxes (x0, y0, x1, y1), normalised to the image, that the maps cover; None
            when every map covers its whole image.
        folders: class id of each top-level folder of the split, -1 where it has none.
    """
    # What only reads shards starts without h5py.
    from .files import replacing
    from .new_file import create
    from .sums import file_sha256

    shapes = {
        "num_classes": layout.num_classes,
        "k": layout.k,
        "views": list(layout.views),
        "residual": layout.residual,
        "step": float(layout.step),
    }
    with replacing(path, create=True) as temporary:
        with create(temporary, FORMAT, VERSION, {"floor": 0.0, **shapes, **attrs}) as file:
            writer = ShardWriter(file, layout, keys, labels, extents, folders)
            yield writer
            writer.finish()
        # Just written, so still in the page cache; an object would have to be fetched.
        writer.file_sha256 = file_sha256(temporary)


class Shard(StoredFile):
    """One shard open for reading; its header and shapes are checked before anything is read.

    Attributes:
        layout: shapes and dtypes.
        rows: number of images.
    """

    def __init__(self, path: AnyPath) -> None:
        super().__init__(path, FORMAT, VERSION, _REMEDY)
        try:
            self._check()
        except (OverflowError, TypeError, ValueError) as error:
            raise self.damaged(error) from error

    def _check(self) -> None:
        attrs = self.attrs
        if missing := [name for name in HEADER if name not in attrs]:
            raise ValueError(f"the header lacks {', '.join(missing)}")
        for name, kind in HEADER.items():
            if type(attrs[name]) is not kind:
                raise ValueError(f"{name} must be {kind.__name__}, got {attrs[name]!r}")
        if tuple(attrs["views"]) not in (VIEWS[:1], VIEWS):
            raise ValueError(f"views must be {VIEWS[:1]} or {VIEWS}, got {attrs['views']}")
        box = attrs["extent"]
        if len(box) != 4 or not all(type(side) in (int, float) for side in box):
            raise ValueError(f"extent must be a box of 4 numbers, got {box}")
        if not 0 <= attrs["step"] < math.inf:
            raise ValueError(f"step must be 0 or more nats, got {attrs['step']}")
        if not max(attrs["k"], attrs["residual"]) <= attrs["num_classes"] <= _MOST_CLASSES:
            raise ValueError(f"num_classes cannot be {attrs['num_classes']}")
        maps = self.maps
        if maps is None or "codes" not in maps.planes or "key" not in self.columns:
            raise ValueError("it has no codes or no key")
        _, _, height, width = maps.planes["codes"][1]  # ValueError for other ranks
        counts = attrs["k"], attrs["num_classes"], attrs["residual"], attrs["step"]
        level = "level" in maps.planes
        self.layout = MapLayout(tuple(attrs["views"]), (height, width), *counts, level)
        self._planes = self.layout.planes()
        if list(maps.planes.items()) != list(self._planes.items()):
            raise ValueError(f"its planes must be {self._planes}, got {maps.planes}")
        self._sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in self._planes.values()]
        self.rows: int = self.columns["key"].shape[0]
        for name, (dtype, tail) in COLUMNS.items():
            if name != "extent" or name in self:
                self.column(name, dtype, (self.rows, *tail))
        self._chunks, chunks = maps, self.rows * len(self._sizes)
        wide = "bounds" in self.columns and self.columns["bounds"].dtype == "<u8"
        self._bounds = self.column("bounds", "<u8" if wide else "<u4", (chunks + 1,))
        if self._bounds.gzip or 0 in (*self._sizes, self.rows):
            raise ValueError("it must have rows, planes with bytes, and bounds not compressed")
        if sum(self._sizes) * self.rows > (maps.size + SLACK * chunks) * MOST_TIMES:
            raise ValueError(f"{maps.size} bytes cannot be {self.rows} maps of {self._planes}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of a dataset, decoded as stored (texts as bytes).

        Raises FormatError where the stored bytes do not decode, OSError where the system cannot
        read them.
        """
        if name not in self._planes:
            return super().read(name, start, stop)
        dtype, shape = self._planes[name]
        number = list(self._planes).index(name)
        start, stop, _ = slice(start, stop).indices(self.rows)
        block = np.empty((max(stop - start, 0), *shape), dtype)
        for row in range(start, stop):
            block[row - start] = unshuffle(self._inflated(row, number, number + 1), dtype, shape)
        return block

    def __contains__(self, name: str) -> bool:
        """Whether the shard has this dataset."""
        return name in self._planes or (name in COLUMNS and name in self.columns)

    def prefetch(self, rows: Sequence[int]) -> None:
        """Fetch the maps of some rows of an object together; of a file, nothing is done."""
        if self.is_remote:
            bounds = self.read("bounds").astype(int)[:: len(self._sizes)]
            first = np.unique(rows)
            starts, sizes = bounds[first] + self._chunks.offset, bounds[first + 1] - bounds[first]
            self.fetch_together(starts.tolist(), sizes.tolist())

    def planes(self, row: int) -> bytes:
        """The planes of a row, inflated and otherwise as stored, end to end.

        Items of more than a byte are still shuffled. Raises as `read`.
        """
        return self._inflated(row, 0, len(self._sizes))

    def _inflated(self, row: int, first: int, last: int) -> bytes:
        """Planes `first` to `last` - 1 of a row."""
        width = self._bounds.dtype.itemsize
        start = self._bounds.offset + (row * len(self._sizes) + first) * width
        stored, sizes = self.pread((last - first + 1) * width, start), self._sizes[first:last]
        bounds = np.frombuffer(stored, self._bounds.dtype).tolist()
        # Deflate cannot do worse: a larger chunk is damage, and must not cost its memory.
        most = min(self._chunks.size, bounds[0] + sum(2 * size + 1024 for size in sizes))
        if bounds != sorted(bounds) or bounds[-1] > most:
            raise self._unreadable(row, f"its chunks cannot lie at {bounds}")
        begin = self._chunks.offset + bounds[0]
        data = memoryview(self.pread(bounds[-1] - bounds[0], begin))
        try:
            parts = [
                inflate(data[a - bounds[0] : b - bounds[0]], size)
                for a, b, size in zip(bounds, bounds[1:], sizes, strict=False)
            ]
        except ValueError as error:
            raise self._unreadable(row, error) from error
        return b"".join(parts)

    def _unreadable(self, row: int, reason: object) -> FormatError:
        return FormatError(
            f"{self.path}: the map of row {row} cannot be read: {reason}. Remedy: {_REMEDY}"
        )

    def map(self, row: int) -> ScoreMap:
        """What is stored of a row."""
        plain, start = memoryview(self.planes(row)), 0
        empty = (len(self.layout.views), 0)
        found: dict[str, Any] = {
            "residual_classes": np.empty(empty, self.layout.class_dtype),
            "residual_codes": np.empty(empty, np.uint8),
            "level": None,
        }
        for (name, (dtype, shape)), size in zip(self._planes.items(), self._sizes, strict=True):
            found[name] = unshuffle(plain[start : start + size], dtype, shape)
            start += size
        width, height = self.read("size", row, row + 1)[0].tolist()
        label, extent = self.read("label", row, row + 1).item(), self.extent(row)
        return ScoreMap(self.layout, label=label, size=(width, height), extent=extent, **found)

    def extent(self, row: int) -> tuple[float, float, float, float]:
        """Box (x0, y0, x1, y1), normalised to the image, that the row's map covers."""
        box = self.read("extent", row, row + 1)[0] if "extent" in self else self.attrs["extent"]
        x0, y0, x1, y1 = map(float, box)
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise self._unreadable(row, f"it cannot cover {(x0, y0, x1, y1)} of its image")
        return x0, y0, x1, y1
