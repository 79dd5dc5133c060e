"""Writes the container that `directory` reads: an HDF5 file, with a directory in its user block."""

import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

from .directory import HEAD, MAGIC, Column

_GZIP = 4
_ROOM = 2048  # bytes of the directory for columns, and for attributes added later
BLOCK = 1 << 20  # bytes in memory at once
#: The format of HDF5 1.10, whichever version writes, so that all later ones read it; no cache of
#: chunks, as they are written past it.
#: No file locks: nobody else knows the temporary file, and not every file system has them.
_OPEN: dict[str, Any] = {"libver": ("v110", "v110"), "rdcc_nbytes": 0, "locking": False}


class NewFile:
    """A tokenlabel file being written. Made by `create`.

    Attributes:
        attrs: str, int, float or lists of them; may be added to until the `with` block ends.
    """

    def __init__(self, path: Path, block: int, attrs: dict[str, Any]) -> None:
        self.attrs = attrs
        self._path, self._block = path, block
        self._file = h5py.File(path, "w", userblock_size=block, **_OPEN)
        self._columns: dict[str, Column] = {}
        self._planes: list[tuple[str, str, tuple[int, ...]]] = []
        self._sizes: list[int] = []
        self._crc = 0
        self._spools: dict[str, tuple[IO[bytes], np.dtype, tuple[int, ...]]] = {}
        self._temporary = ExitStack()

    def add(self, name: str, data: np.ndarray, gzip: bool = False) -> None:
        """Store a column of one value or more, little-endian; compressed if `gzip`."""
        if not gzip:
            self.stream(name, data.dtype, data.shape, [data])
            return
        stored = zlib.compress(np.ascontiguousarray(data).tobytes(), _GZIP)
        dataset = self._file.create_dataset(
            name, data.shape, data.dtype, chunks=data.shape, compression=_GZIP
        ).id
        dataset.write_direct_chunk((0,) * data.ndim, stored)
        offset = dataset.get_chunk_info(0).byte_offset
        crc = zlib.crc32(stored)
        self._columns[name] = Column(data.dtype, data.shape, offset, len(stored), crc, True)

    def stream(
        self, name: str, dtype: np.dtype, shape: tuple[int, ...], blocks: Iterable[np.ndarray]
    ) -> None:
        """Store a column that is not compressed, from blocks of rows in order."""
        dataset, row, crc = self._file.create_dataset(name, shape, dtype), 0, 0
        for block in blocks:
            dataset[row : row + len(block)] = block
            row, crc = row + len(block), zlib.crc32(np.ascontiguousarray(block).data.cast("B"), crc)
        offset, size = dataset.id.get_offset() or 0, dataset.size * dtype.itemsize
        self._columns[name] = Column(dtype, shape, offset, size, crc, False)

    def append(self, name: str, block: np.ndarray) -> None:
        """Add rows to a column of unknown length, which wait in an unnamed temporary file."""
        if name not in self._spools:
            self._spools[name] = (self.temporary_file(), block.dtype, block.shape[1:])
        self._spools[name][0].write(block.tobytes())

    def temporary_file(self, in_memory: int = 1) -> IO[bytes]:
        """A file without a name, closed with this one, in memory up to so many bytes."""
        file = tempfile.SpooledTemporaryFile(in_memory, dir=str(self._path.parent))
        return self._temporary.enter_context(file)

    def appended(self, name: str, start: int, size: int) -> bytes:
        """Bytes of what `append` was given for a column."""
        spool = self._spools[name][0]
        spool.seek(start)
        data = spool.read(size)
        spool.seek(0, os.SEEK_END)
        return data

    def drop(self, name: str) -> None:
        """Store nothing of what `append` was given for a column."""
        self._spools.pop(name)[0].close()

    def create_maps(self, rows: int, planes: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
        """Make the datasets with a chunk an image, of these dtypes and shapes a row."""
        for name, (dtype, shape) in planes.items():
            self._planes.append((name, dtype.str, shape))
            dataset = self._file.create_dataset(
                name,
                (rows, *shape),
                dtype,
                chunks=(1, *shape),
                compression=_GZIP,
                shuffle=dtype.itemsize > 1,
            )
            # HDF5 allocates its table of chunks with the first one: a byte, replaced later, so that
            # no table ends up between the maps.
            dataset.id.write_direct_chunk((0,) * dataset.ndim, b"\0")
        # HDF5 fills gaps that it remembers. Reopened it knows of none, and maps stay in order.
        self._file.close()
        self._file = h5py.File(self._path, "r+", **_OPEN)
        # Looking a dataset up by name costs more than writing a chunk.
        self._chunks = [self._file[name].id for name in planes]

    def append_map(self, chunks: Sequence[bytes]) -> None:
        """Write the next row: a chunk for each plane, in order."""
        row = len(self._sizes) // len(self._planes)
        for dataset, chunk in zip(self._chunks, chunks, strict=True):
            dataset.write_direct_chunk((row,) + (0,) * (dataset.rank - 1), chunk)
            self._sizes.append(len(chunk))
            self._crc = zlib.crc32(chunk, self._crc)

    @property
    def bounds(self) -> np.ndarray:
        """Where each chunk begins and the last one ends, counted from the first."""
        ends = np.cumsum([0, *self._sizes], dtype="<u8")
        return ends.astype("<u4") if ends[-1] < 1 << 32 else ends

    def finish(self) -> None:
        """Store the attributes for readers that use HDF5, and write the directory."""
        for name, (spool, dtype, tail) in self._spools.items():
            row = math.prod(tail) * dtype.itemsize
            shape = (spool.tell() // row, *tail)
            spool.seek(0)
            parts = iter(partial(spool.read, max(BLOCK // row, 1) * row), b"")
            blocks = (np.frombuffer(part, dtype).reshape(-1, *tail) for part in parts)
            self.stream(name, dtype, shape, blocks)
        for name, value in self.attrs.items():
            # Of fixed length: HDF5 stores variable-length strings in a heap without checksums.
            if isinstance(value, str):
                value = encode_texts([value])[0]
            elif isinstance(value, list) and value and isinstance(value[0], str):
                value = encode_texts(value)
            self._file.attrs[name] = value
        self._file.flush()
        first = self._chunks[0].get_chunk_info(0).byte_offset if self._planes else 0
        self._file.close()
        self._write_directory(first)

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()
        self._temporary.close()

    def _write_directory(self, first: int) -> None:
        block = self._block
        with open(self._path, "r+b") as file:
            columns = {
                name: {
                    "dtype": column.dtype.str,
                    "shape": column.shape,
                    "offset": find_bytes(file, block, *column[2:5]),
                    "size": column.size,
                    "crc": column.crc,
                    **({"gzip": True} if column.gzip else {}),
                }
                for name, column in self._columns.items()
            }
            found: dict[str, Any] = {"attrs": self.attrs, "columns": columns}
            if self._planes:
                size = sum(self._sizes)
                offset = find_bytes(file, block, first, size, self._crc)
                found["maps"] = {"offset": offset, "size": size, "planes": self._planes}
            size = file.seek(0, os.SEEK_END)
            found |= {"size": size, "block": block, "crc": _crc(file, block, size - block)}
            text = _json(found)
            if HEAD.size + len(text) > block:
                raise ValueError(
                    f"the directory needs {HEAD.size + len(text)} bytes, {block} were kept for it. "
                    "Remedy: give large attributes at the start"
                )
            file.seek(0)
            file.write(HEAD.pack(MAGIC, len(text), zlib.crc32(text)) + text)


def find_bytes(file: IO[bytes], block: int, reported: int, size: int, crc: int) -> int:
    """The offset of what was written: some versions of HDF5 count from the user block's end."""
    for offset in (reported, reported + block):
        if _crc(file, offset, size) == crc:
            return offset
    raise OSError(f"{file.name}: bytes that were written are not at offset {reported}")


def _crc(file: IO[bytes], offset: int, size: int) -> int:
    """CRC-32 of bytes of the file."""
    file.seek(offset)
    crc = 0
    while size and (data := file.read(min(size, BLOCK))):
        crc, size = zlib.crc32(data, crc), size - len(data)
    return crc


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), default=lambda number: number.item()
    ).encode()


def encode_texts(texts: Sequence[str]) -> np.ndarray:
    """Strings as an array of fixed-length, NUL-padded UTF-8."""
    data = [text.encode() for text in texts]
    width = max(map(len, data), default=0) or 1
    return np.array(data, dtype=h5py.string_dtype("utf-8", width))


def add_folders(file: NewFile, folders: Mapping[str, int]) -> None:
    """Store the class id of each folder, as `StoredFile.folders` reads it, in the same order."""
    if folders:
        file.add("folders", encode_texts([*folders]), gzip=True)
        file.add("folder_class", np.array([*folders.values()], "<i4"), gzip=True)


@contextmanager
def create(path: Path, kind: str, version: int, attrs: dict[str, Any]) -> Iterator[NewFile]:
    """A new file, readable by HDF5 1.10 and later; valid only once the block ends without error.

    Args:
        path: of the file.
        kind: its attribute `format`.
        version: its attribute `version`.
        attrs: further attributes.

    Raises OSError with the system's own number when a write fails, where h5py may raise
    RuntimeError with the number in its text (as it does when closing a file on a full disk).
    """
    attrs = {"format": kind, "version": version, **attrs}
    block = 512
    while block < len(_json(attrs)) + _ROOM:
        block *= 2
    try:
        with closing(NewFile(path, block, attrs)) as new:
            yield new
            new.finish()
    except (OSError, RuntimeError) as error:
        for cause in (error, error.__context__):  # that of closing the file hides the one before
            if number := re.search(r"errno = (\d+)", str(cause)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
