"""One shard: the score maps of consecutive images in one HDF5 file. The spec is docs/format.md.

All names and dtypes of the format stand here, and both the writer and the reader use them.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import h5py
import numpy as np

from tokenlabel.dataset.chunks import (
    STRATEGIES,
    ChunkFile,
    encode_chunk,
)
from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.files import (
    check_identity,
    create_h5,
    encode_texts,
    open_h5,
    replacing,
    set_text,
    set_texts,
    system_error,
)

FORMAT = "tokenlabel-shard"
VERSION = 1
#: Class ids are uint16 up to this many classes, uint32 above.
UINT16_CLASSES = 65536
SCORE_DTYPES = ("float16", "uint8")
VIEWS = ("identity", "hflip")
#: Datasets that hold a chunk an image, and those that hold a value (or two) an image.
MAPS = ("scores", "classes", "rest")
ROWS = ("key", "label", "size", "digest", "error")
#: Present only in uint8 shards, and only where maps do not cover the whole picture.
OPTIONAL_ROWS = ("score_range", "extent")
#: Root attributes without which a file is no shard.
HEADER = (
    "num_classes",
    "k",
    "views",
    "extent",
    "shard",
    "shards",
    "first_row",
    "errors",
    "sha256",
    "fingerprint",
)
_KINDS = {
    **dict.fromkeys(("num_classes", "k", "shard", "shards", "first_row", "errors"), int),
    **dict.fromkeys(("views", "extent"), list),
    **dict.fromkeys(("sha256", "fingerprint"), str),
}
_GZIP = 4
_NAME = re.compile(r"shard-(\d{5,})-of-(\d{5,})\.h5")
_REMEDY = "Remedy: delete the file and run `annotate` again; it remakes just what is missing"


def shard_name(shard: int, shards: int) -> str:
    """File name of shard `shard` (from 0) of `shards`."""
    return f"shard-{shard:05d}-of-{shards:05d}.h5"


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """(shard, shards) of a shard's file name; None for any other file."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


class ShardLayout(NamedTuple):
    """Shapes and dtypes of a shard, fixed before the first row."""

    views: tuple[str, ...]
    grid: tuple[int, int]
    k: int
    num_classes: int
    score_dtype: str = "float16"

    @property
    def class_dtype(self) -> np.dtype:
        """Dtype of the class ids."""
        return np.dtype("<u2" if self.num_classes <= UINT16_CLASSES else "<u4")

    @property
    def map_shape(self) -> tuple[int, int, int, int]:
        """[V, H, W, K] of one image."""
        return (len(self.views), *self.grid, self.k)


def quantise(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n, ...] as uint8 and each image's float32 (low, high); NaN maps give 0 and NaN."""
    wide = scores.astype(np.float32)
    flat = wide.reshape(len(wide), -1)
    low, high = flat.min(1), flat.max(1)
    step = np.where(high > low, high - low, 1) / 255
    shape = (-1,) + (1,) * (wide.ndim - 1)
    codes = np.rint((wide - low.reshape(shape)) / step.reshape(shape))
    return np.nan_to_num(codes).astype(np.uint8), np.stack([low, high], 1).astype("<f4")


def dequantise(codes: np.ndarray, score_range: np.ndarray) -> np.ndarray:
    """One image's float16 scores from its uint8 codes and (low, high)."""
    low, high = np.float32(score_range[0]), np.float32(score_range[1])
    with np.errstate(over="ignore", invalid="ignore"):  # of a range that no writer writes
        return (low + codes.astype(np.float32) * ((high - low) / 255)).astype(np.float16)


class ContentDigest:
    """The sha256 of a shard's decoded arrays, fed block by block."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[str, Any]] = {}
        self._rows: dict[str, int] = {}

    def update(self, name: str, block: np.ndarray) -> None:
        """Add the next rows of dataset `name`."""
        little = np.ascontiguousarray(block, block.dtype.newbyteorder("<"))
        if name not in self._parts:
            self._parts[name] = (f"{little.dtype.str} {block.shape[1:]}", hashlib.sha256())
        self._parts[name][1].update(little.data)
        self._rows[name] = self._rows.get(name, 0) + len(block)

    def hexdigest(self) -> str:
        """Digest over name, dtype, row shape, row count and content, in order of the names."""
        total = hashlib.sha256()
        for name in sorted(self._parts):
            kind, content = self._parts[name]
            total.update(f"{name} {kind} {self._rows[name]}\n".encode() + content.digest())
        return total.hexdigest()


class ShardWriter:
    """Fills an open HDF5 file with one shard, rows in order. Made by `write_shard`.

    Attributes:
        attrs: further root attributes (str, list of str, int or float); may be added to until
            the `with` block ends.
    """

    def __init__(
        self,
        file: h5py.File,
        layout: ShardLayout,
        keys: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        attrs: dict[str, Any],
        extents: np.ndarray | None,
    ) -> None:
        rows, shape = len(keys), layout.map_shape
        if rows == 0 or len(labels) != rows:
            raise ValueError(f"a shard needs rows, and a label for each; got {rows}, {len(labels)}")
        self.attrs = dict(attrs)
        self._file, self._layout, self._keys = file, layout, list(keys)
        self._errors: list[str] = []
        self._digest = ContentDigest()
        self._rows: dict[str, np.ndarray] = {
            "label": np.asarray(labels, "<i4"),
            "size": np.zeros((rows, 2), "<i4"),
            "digest": np.zeros(rows, "<u8"),
        }
        if layout.score_dtype == "uint8":
            self._rows["score_range"] = np.full((rows, 2), np.nan, "<f4")
        if extents is not None:
            self._rows["extent"] = np.asarray(extents, "<f4").reshape(rows, 4)
        score_dtype = "|u1" if layout.score_dtype == "uint8" else "<f2"
        for name, dtype, tail in (
            ("scores", score_dtype, shape),
            ("classes", layout.class_dtype, shape),
            ("rest", "<f2", shape[:3]),
        ):
            file.create_dataset(
                name,
                (rows, *tail),
                dtype,
                chunks=(1, *tail),
                compression="gzip",
                compression_opts=_GZIP,
                shuffle=True,
            )
        self._maps = {name: file[name].id for name in MAPS}

    def append(
        self,
        scores: np.ndarray,
        classes: np.ndarray,
        rest: np.ndarray,
        sizes: np.ndarray,
        digests: np.ndarray,
        errors: Sequence[str],
    ) -> None:
        """Write the next rows.

        Args:
            scores: float16 [b, V, H, W, K] logits, descending along K.
            classes: integer [b, V, H, W, K] class ids.
            rest: float16 [b, V, H, W], log-sum-exp of the logits that are not in the top k.
            sizes: int [b, 2], pictures' (width, height) in pixels.
            digests: uint64 [b] of the image files.
            errors: b texts, empty where the image has a map. The maps of the others are stored
                as NaN, so that nobody takes them for labels.
        """
        start = len(self._errors)
        stop = start + len(errors)
        bad = np.array([bool(error) for error in errors])
        # Copies: what comes from the teacher or the object store may be read-only.
        scores, rest = scores.astype("<f2"), rest.astype("<f2")
        classes = classes.astype(self._layout.class_dtype)
        scores[bad], classes[bad], rest[bad] = np.nan, 0, np.nan
        if self._layout.score_dtype == "uint8":
            scores, self._rows["score_range"][start:stop] = quantise(scores)
        self._rows["size"][start:stop] = sizes
        self._rows["digest"][start:stop] = digests
        blocks = {"scores": scores, "classes": classes, "rest": rest}
        # Row by row, so that what is read together lies together.
        for row in range(len(errors)):
            for name, block in blocks.items():
                chunk = encode_chunk(block[row], STRATEGIES[name])
                self._maps[name].write_direct_chunk((start + row,) + (0,) * (block.ndim - 1), chunk)
        for name, block in blocks.items():
            self._digest.update(name, block)
        self._errors += errors

    def finish(self) -> None:
        """Write the per-row columns and the header."""
        if len(self._errors) != len(self._keys):
            raise ValueError(f"{len(self._keys)} rows were promised, {len(self._errors)} written")
        columns = {
            "key": encode_texts(self._keys),
            "error": encode_texts(self._errors),
            **self._rows,
        }
        for name, column in columns.items():
            self._file.create_dataset(
                name, data=column, chunks=column.shape, compression="gzip", compression_opts=_GZIP
            )
            self._digest.update(name, column)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "num_classes": self._layout.num_classes,
            "k": self._layout.k,
            "views": list(self._layout.views),
            **self.attrs,
            "errors": sum(map(bool, self._errors)),
            "sha256": self._digest.hexdigest(),
        }
        for name, value in header.items():
            if isinstance(value, str):
                set_text(self._file.attrs, name, value)
            elif isinstance(value, list) and value and isinstance(value[0], str):
                set_texts(self._file.attrs, name, value)
            else:
                self._file.attrs[name] = value
        self._file.flush()


@contextmanager
def write_shard(
    path: Path,
    layout: ShardLayout,
    keys: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    attrs: dict[str, Any],
    extents: np.ndarray | None = None,
) -> Iterator[ShardWriter]:
    """Write one shard in a `with` block; it appears at `path`, whole, when the block ends well.

    Any exception out of the block, or a row too few, discards it.

    Args:
        path: final path of the shard.
        layout: shapes and dtypes.
        keys: the keys of all its rows, in order, sorted by their UTF-8 bytes.
        labels: their ground-truth classes, -1 where unknown.
        attrs: root attributes that docs/format.md asks of the writer.
        extents: [n, 4] boxes (x0, y0, x1, y1), normalised to the picture, that the maps cover;
            None when every map covers its whole picture.
    """
    with replacing(path) as temporary, create_h5(temporary) as file:
        writer = ShardWriter(file, layout, keys, labels, attrs, extents)
        yield writer
        writer.finish()


def unreadable(path: Path, row: int, reason: Exception) -> FormatError | OSError:
    """The error for a map that cannot be read; `row` counts within the shard.

    FormatError where the stored bytes are damaged, OSError where the system does not give them.
    """
    return system_error(reason, path) or FormatError(
        f"{path}: the map of row {row} cannot be read: {reason}. {_REMEDY}"
    )


class Shard:
    """One shard open for reading; checks its identity and shapes before anything is read.

    Attributes:
        attrs: the root attributes as str, int, float and lists.
        layout: shapes and dtypes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_h5(path)
        try:
            check_identity(self._file, FORMAT, VERSION, _REMEDY)
            self._check()
        except (KeyError, OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            self._file.close()
            raise system_error(error, path) or FormatError(
                f"{path}: damaged shard: {error}. {_REMEDY}"
            ) from error
        except FormatError:
            self._file.close()
            raise

    def _check(self) -> None:
        self.attrs: dict[str, Any] = self._file.attrs
        if missing := [name for name in HEADER if self.attrs.get(name) is None]:
            raise ValueError(f"the header lacks {', '.join(missing)}")
        for name, kind in _KINDS.items():
            if not isinstance(self.attrs[name], kind):
                raise ValueError(f"{name} must be {kind.__name__}, got {self.attrs[name]!r}")
        if tuple(self.attrs["views"]) not in (VIEWS[:1], VIEWS):
            raise ValueError(f"views must be {VIEWS[:1]} or {VIEWS}, got {self.attrs['views']}")
        if len(self.attrs["extent"]) != 4:
            raise ValueError(f"extent must be a box of 4 numbers, got {self.attrs['extent']}")
        # Bound once: looking a dataset up by name costs as much as reading a map.
        self._data = {name: self._file[name] for name in (*MAPS, *ROWS)}
        self._data |= {name: self._file[name] for name in OPTIONAL_ROWS if name in self._file}
        scores = self._data["scores"]
        if len(scores.shape) != 5:
            raise ValueError(f"scores must be [n, V, H, W, K], got {scores.shape}")
        self.rows: int = scores.shape[0]
        views = tuple(self.attrs["views"])
        self.layout = ShardLayout(
            views,
            (scores.shape[2], scores.shape[3]),
            scores.shape[4],
            int(self.attrs["num_classes"]),
            "uint8" if scores.dtype == np.uint8 else "float16",
        )
        shape = (self.rows, *self.layout.map_shape)
        text = np.dtype("S1").kind
        expected: dict[str, tuple[tuple[int, ...], Any]] = {
            "scores": (shape, "|u1" if self.layout.score_dtype == "uint8" else "<f2"),
            "classes": (shape, self.layout.class_dtype),
            "rest": (shape[:4], "<f2"),
            "key": ((self.rows,), text),
            "label": ((self.rows,), "<i4"),
            "size": ((self.rows, 2), "<i4"),
            "digest": ((self.rows,), "<u8"),
            "error": ((self.rows,), text),
            "score_range": ((self.rows, 2), "<f4"),
            "extent": ((self.rows, 4), "<f4"),
        }
        if (self.layout.score_dtype == "uint8") != ("score_range" in self._data):
            raise ValueError("score_range must be there with uint8 scores, and only then")
        for name, dataset in self._data.items():
            want, dtype = expected[name]
            fits = dataset.dtype.kind == dtype if dtype == text else dataset.dtype == dtype
            if dataset.shape != want or not fits:
                raise ValueError(
                    f"{name} must be {dtype} {want}, got {dataset.dtype} {dataset.shape}"
                )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of a dataset, decoded as stored (texts as bytes).

        Raises FormatError where the stored bytes do not decode, OSError where the system does not
        give them.
        """
        try:
            return self._data[name].read(start, stop)
        except (OSError, ValueError) as error:
            raise system_error(error, self.path) or FormatError(
                f"{self.path}: {name} cannot be read: {error}. {_REMEDY}"
            ) from error

    def __contains__(self, name: str) -> bool:
        """Whether the shard has this dataset."""
        return name in self._data

    def chunk_places(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Offset, uint64 [n], and stored size, uint32 [n], of each row's chunk in the file.

        Size 0 stands for a row whose map is not one chunk of gzip, alone or after shuffle.
        """
        data = self._data[name]
        sizes = np.zeros(self.rows, "<u4")
        if data.codec is None:
            return np.zeros(self.rows, "<u8"), sizes
        offsets, stored, masks = data.places
        plain = (masks == 0) & (stored < 1 << 32)
        sizes[plain] = stored[plain]
        return np.where(plain, offsets, 0).astype("<u8"), sizes

    def chunk_file(self) -> ChunkFile | None:
        """The maps of this file, to be read without HDF5; None where that cannot be done.

        It outlives this object, and reads the file that was checked even if its name is given to
        another one.
        """
        codecs = [self._data[name].codec for name in MAPS]
        known = [codec for codec in codecs if codec]
        if len(known) < len(MAPS) or not hasattr(os, "pread"):  # Windows
            return None
        return ChunkFile(os.dup(self._file.fileno()), known)

    def texts(self, name: str) -> list[str]:
        """The `key` or `error` column."""
        return [value.decode() for value in self.read(name)]

    def map(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(float16 [V, H, W, K], class ids [V, H, W, K], float16 [V, H, W]) of one row."""
        data = self._data
        try:
            scores, classes, rest = (data[name].read(row, row + 1)[0] for name in MAPS)
            if "score_range" in data:
                scores = dequantise(scores, data["score_range"].read(row, row + 1)[0])
        except (OSError, ValueError) as error:
            raise unreadable(self.path, row, error) from error
        return scores, classes, rest

    def extent(self, row: int) -> tuple[float, float, float, float]:
        """Box (x0, y0, x1, y1), normalised to the picture, that the row's map covers."""
        box = self.read("extent", row, row + 1)[0] if "extent" in self else self.attrs["extent"]
        x0, y0, x1, y1 = map(float, box)
        return x0, y0, x1, y1

    def content_digest(self, block: int = 256) -> str:
        """The sha256 of the decoded arrays as they are now; `attrs["sha256"]` is what it was."""
        digest = ContentDigest()
        for name, dataset in self._data.items():
            step = block if name in MAPS else self.rows
            for start in range(0, self.rows, step):
                digest.update(name, self.read(name, start, start + step))
            assert dataset.shape[0] == self.rows
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
