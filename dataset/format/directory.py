"""The container of shards, index and manifest: an HDF5 file with our own directory in front.

HDF5 skips its user block; there the directory says what the file holds, and where (docs/format.md).
A damaged file can crash libhdf5, so nothing here reads HDF5, and each number of the directory is
compared with the size of the file before it is used.
"""

import json
import math
import mmap
import os
import re
import stat
import struct
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from ...errors import FormatError, NewerVersionError
from ..storage.cache import CachedPath
from ..storage.remote_path import AnyPath, RemotePath
from .chunks import inflate

MAGIC = b"\x89TOKENLABEL\r\n\x1a\n\0"
#: Before the directory: the magic, its size in bytes and its CRC-32.
HEAD = struct.Struct(f"<{len(MAGIC)}sII")
#: A deflate stream is at most so many times smaller than its content, plus so many bytes. Checked
#: before memory is allocated, so that a small hostile file cannot ask for all of it.
MOST_TIMES, SLACK = 1032, 64
_HDF5 = b"\x89HDF\r\n\x1a\n"
_LARGEST = 1 << 20
BLOCK = 1 << 20  # bytes in memory at once, where all of a file is read
_FIRST = 4096  # bytes read at first: most directories are smaller
_FIRST_OF_OBJECT = 64 << 10  # likewise, where a request costs more than bytes
#: Maps of an object that are so near to one another are one request.
_NEAR = 16 << 10
_DTYPE = re.compile(r"\|u1|\|S[1-9]\d{0,8}|<[iu][248]|<f[248]")
# What wrong types and numbers in a directory raise when they are used.
_WRONG = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


class Column(NamedTuple):
    """A dataset stored in one piece.

    Attributes:
        dtype, shape: of the values.
        offset, size: in the file, in bytes.
        crc: CRC-32 of these bytes.
        gzip: whether they are one zlib stream; else they are the values, little-endian.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    size: int
    crc: int
    gzip: bool


class Maps(NamedTuple):
    """The datasets with a chunk an image, stored end to end, image by image.

    Attributes:
        offset: in the file, of the first chunk.
        size: bytes of all chunks.
        planes: dtype and shape, without the row, of the datasets in order.
    """

    offset: int
    size: int
    planes: dict[str, tuple[np.dtype, tuple[int, ...]]]


class StoredFile:
    """A tokenlabel file open for reading; any number of threads may read at once.

    Args:
        path: of the file, or an object in a store, whose bytes are fetched as they are read; once a
            column is mapped, it is a local copy without a name.
        kind: what the attribute `format` must say.
        version: the only version that is read.
        remedy: what to do about a damaged file, a sentence of its own.

    Raises:
        OSError: from the system, naming the file.
        NewerVersionError: a later release wrote it.
        FormatError: it is no such file, of an older version, damaged or truncated.

    Attributes:
        attrs: the attributes: str, int, float and lists of them.
        columns: the datasets in one piece by name.
        maps: the datasets with a chunk an image; None where there are none.
        end: size of the file.
    """

    def __init__(self, path: AnyPath, kind: str, version: int, remedy: str) -> None:
        self.path, self._remedy = path, f"Remedy: {remedy}"
        self._lock = threading.Lock()
        #: Of an object: pieces that are here already, and maps that were fetched together.
        self._held: list[tuple[int, bytes]] = []
        self._together: dict[int, bytes] = {}
        self._handle = -1
        self.maps: Maps | None = None
        self._close: weakref.finalize[..., StoredFile]
        if isinstance(path, CachedPath) and path.cache:
            self._open(path.local())
        elif isinstance(path, RemotePath):
            start, self.end = path.start(_FIRST_OF_OBJECT)
            self._held.append((0, start))
            self._close = weakref.finalize(self, self._held.clear)
        else:
            self._open(path)
        try:
            self._parse(kind, version)
        except FormatError:
            self.close()
            raise
        except _WRONG as error:
            self.close()
            raise self.damaged(error) from error

    def _open(self, path: Path) -> None:
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        # Non-blocking, so that a named pipe cannot hang its reader.
        self._handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
        # Closed with its last user: dropping it from a cache never breaks a concurrent read.
        self._close = weakref.finalize(self, os.close, self._handle)
        self._close.atexit = False
        status = os.fstat(self._handle)
        self.end = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise self.damaged("it is not a regular file")

    def _parse(self, kind: str, version: int) -> None:
        start = self._some(_FIRST, 0)
        if start.startswith(_HDF5):
            raise FormatError(
                f"{self.path} is of format version 1, which no release reads. Remedy: delete the "
                "files of this split, or name another folder, and run `annotate` again"
            )
        magic, size, crc = HEAD.unpack(start[: HEAD.size].ljust(HEAD.size, b"\0"))
        if magic != MAGIC:
            raise ValueError(f"it must begin with {MAGIC!r}, not with {start[: len(MAGIC)]!r}")
        if size > min(self.end, _LARGEST):
            raise ValueError(f"its directory cannot have {size} bytes")
        text = start[HEAD.size : HEAD.size + size]
        text += self._some(size - len(text), HEAD.size + len(text))
        if zlib.crc32(text) != crc:
            raise ValueError("its directory has a wrong checksum")
        found = json.loads(text)
        self.attrs: dict[str, Any] = dict(found["attrs"])
        self._identify(kind, version)
        if found["size"] != self.end:
            raise ValueError(f"it must have {found['size']} bytes, it has {self.end}")
        self._rest, self._crc = found["block"], found["crc"]
        self._inside(self._rest, 0)
        self._used = HEAD.size + size
        self.columns = {name: self._column(**entry) for name, entry in found["columns"].items()}
        if maps := found.get("maps"):
            planes = {name: _array(dtype, shape) for name, dtype, shape in maps["planes"]}
            self._inside(maps["offset"], maps["size"])
            self.maps = Maps(maps["offset"], maps["size"], planes)

    def _identify(self, kind: str, version: int) -> None:
        name, number = self.attrs.get("format"), self.attrs.get("version")
        if name != kind:
            raise FormatError(
                f"{self.path}: expected format {kind!r}, found {name!r}. {self._remedy}"
            )
        if type(number) is not int or number < version:
            raise ValueError(f"no release reads version {number!r} of {kind}")
        if number > version:
            raise NewerVersionError(
                f"{self.path} is version {number} of {kind}; this release of tokenlabel reads up "
                f"to version {version}. Remedy: install a newer tokenlabel"
            )

    def _column(
        self, dtype: str, shape: list[int], offset: int, size: int, crc: int, **more: Any
    ) -> Column:
        column = Column(*_array(dtype, shape), offset, size, crc, bool(more.get("gzip")))
        self._inside(offset, size)
        nbytes = math.prod(column.shape) * column.dtype.itemsize
        if nbytes > (size + SLACK) * MOST_TIMES if column.gzip else nbytes != size:
            raise ValueError(f"{size} bytes cannot be {dtype} {column.shape}")
        return column

    def _inside(self, offset: int, size: int) -> None:
        if {type(offset), type(size)} != {int} or min(offset, size) < 0 or offset + size > self.end:
            raise ValueError(f"bytes {offset} to {offset} + {size} lie outside of it")

    def column(self, name: str, dtype: np.dtype | str, shape: tuple[int, ...]) -> Column:
        """A column of this dtype ("S": texts of any length) and shape, else FormatError."""
        if name not in self.columns:
            raise self.damaged(f"the dataset {name!r} is missing")
        column = self.columns[name]
        fits = column.dtype.kind == "S" if dtype == "S" else column.dtype == dtype
        if column.shape != shape or not fits:
            raise self.damaged(
                f"{name} must be {dtype} {shape}, got {column.dtype.str} {column.shape}"
            )
        return column

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of a column, as by slicing.

        Its CRC is compared where all of it is read: of all rows, and of any rows if it is gzip.
        """
        column = self.columns[name]
        start, stop, _ = slice(start, stop).indices(column.shape[0])
        count = max(stop - start, 0)
        row = math.prod(column.shape[1:]) * column.dtype.itemsize
        data: bytes | bytearray
        if not column.gzip and count < column.shape[0]:
            data = self.pread(row * count, column.offset + row * start)
        else:
            data = self.pread(column.size, column.offset)
            if zlib.crc32(data) != column.crc:
                raise self.damaged(f"{name} has a wrong checksum")
            if column.gzip:
                try:
                    data = inflate(data, row * column.shape[0])
                except ValueError as error:
                    raise self.damaged(f"{name}: {error}") from error
            data = data[row * start : row * stop]
        return np.frombuffer(bytearray(data), column.dtype).reshape(count, *column.shape[1:])

    def texts(self, name: str) -> list[str]:
        """A column of texts."""
        try:
            return [text.decode() for text in self.read(name).tolist()]
        except (AttributeError, UnicodeDecodeError) as error:
            raise self.damaged(f"{name}: {error}") from error

    def folders(self) -> dict[str, int]:
        """Class id of each top-level folder of a split, -1 where it has none; empty if not said."""
        if "folders" not in self.columns:
            return {}
        names = self.texts("folders")
        self.column("folder_class", "<i4", (len(names),))
        return dict(zip(names, self.read("folder_class").tolist(), strict=True))

    def _blocks(self, start: int, stop: int) -> Iterator[bytes]:
        for offset in range(start, stop, BLOCK):
            yield self.pread(min(BLOCK, stop - offset), offset)

    def check_column(self, name: str) -> None:
        """Read a column that may be larger than memory; FormatError unless its CRC is right."""
        column, crc = self.columns[name], 0
        for block in self._blocks(column.offset, column.offset + column.size):
            crc = zlib.crc32(block, crc)
        if crc != column.crc:
            raise self.damaged(f"{name} has a wrong checksum")

    def check_bytes(self) -> None:
        """Read the whole file; FormatError unless every byte is as it was written."""
        if any(map(any, self._blocks(self._used, self._rest))):
            raise self.damaged("bytes between the directory and HDF5's part are not 0")
        crc = 0
        for block in self._blocks(self._rest, self.end):
            crc = zlib.crc32(block, crc)
        if crc != self._crc:
            raise self.damaged("bytes of it were changed: they have a wrong checksum")

    def mapped(self, name: str, dtype: np.dtype | str, shape: tuple[int, ...]) -> np.ndarray:
        """A column that is not gzip as a read-only view of the file, nothing of which is read."""
        column = self.column(name, dtype, shape)
        if column.gzip:
            raise self.damaged(f"{name} must not be compressed")
        if not column.size:
            return np.empty(shape, dtype)
        return np.frombuffer(self._map, dtype, math.prod(shape), column.offset).reshape(shape)

    @cached_property
    def _map(self) -> mmap.mmap:
        if isinstance(self.path, RemotePath) and self._handle < 0:
            with tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder:
                self.path.download(local := Path(folder) / "copy")
                if local.stat().st_size != self.end:
                    raise self.damaged("it has changed while it was read")
                self._open(local)
        return mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)

    def pread(self, size: int, offset: int) -> bytes:
        """Bytes of the file, all of them; FormatError where it ends before, OSError as given."""
        # Checked before memory is allocated.
        data = b"" if offset + size > self.end else self._some(size, offset)
        if len(data) != size:
            raise self.damaged(f"it ends before byte {offset + size}: it was cut short")
        return data

    def _some(self, size: int, offset: int) -> bytes:
        """Bytes of the file, fewer where it ends."""
        if not self._close.alive:
            raise ValueError(f"{self.path} is closed")
        if self._handle < 0:
            return self._fetch(size, offset)
        data = b""
        try:
            while len(data) < size:  # systems may give fewer bytes than there are
                left, at = size - len(data), offset + len(data)
                if hasattr(os, "pread"):
                    more = os.pread(self._handle, left, at)
                else:  # Windows: one thread at a time moves the position and reads
                    with self._lock:
                        os.lseek(self._handle, at, os.SEEK_SET)
                        more = os.read(self._handle, left)
                if not more:
                    break
                data = data + more if data else more
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error
        return data

    def _fetch(self, size: int, offset: int) -> bytes:
        """The same of an object."""
        assert isinstance(self.path, RemotePath)
        size = min(size, self.end - offset)
        if len(fetched := self._together.get(offset, b"")) == size:
            return fetched
        for start, piece in self._held:
            if start <= offset and offset + size <= start + len(piece):
                return piece[offset - start : offset - start + size]
        try:
            if self.maps and offset >= (start := self.maps.offset + self.maps.size):
                # All columns at once: reading goes on to need most of them.
                self._held.append((start, self.path.ranges([start], [self.end - start])[0]))
                return self._fetch(size, offset)
            return self.path.ranges([offset], [size])[0] if size > 0 else b""
        except EOFError:
            return b""

    @property
    def is_remote(self) -> bool:
        """Whether reading asks a store."""
        return self._handle < 0 and self._close.alive

    def fetch_together(self, starts: Sequence[int], sizes: Sequence[int]) -> None:
        """Fetch pieces of an object at once, and hold them until the next call."""
        if isinstance(self.path, RemotePath):
            self._together = dict(zip(starts, self.path.ranges(starts, sizes, _NEAR), strict=True))

    def damaged(self, reason: object) -> FormatError:
        """The error for a file that does not hold what it must."""
        return FormatError(
            f"{self.path} is damaged, cut short or not of this format: {reason}. {self._remedy}"
        )

    def close(self) -> None:
        """Close the file; views of it stay."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _array(dtype: str, shape: list[int]) -> tuple[np.dtype, tuple[int, ...]]:
    if not _DTYPE.fullmatch(dtype):
        raise ValueError(f"{dtype!r} is no type of the format")
    if not 1 <= len(shape) <= 6 or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{shape} is no shape")
    return np.dtype(dtype), tuple(shape)
