"""Millions of image keys in a file, looked up through the page cache instead of Python objects.

A key table is two contiguous HDF5 datasets, `key_bytes` (the UTF-8 keys, end to end) and
`key_offsets` (where each starts, and the end). Contiguous and uncompressed, so both are mapped
into memory: opening costs nothing, data-loader workers share the pages, and a look-up is a binary
search. Keys are sorted by their UTF-8 bytes.
"""

import mmap
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, overload

import h5py
import numpy as np

from tokenlabel.dataset.errors import FormatError

_BLOCK = 1 << 22  # bytes copied at a time from a spool file


class MappedFile:
    """Contiguous datasets of an HDF5 file as read-only memory views, without reading them."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self._file = file
        with open(path, "rb") as handle:
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """Dataset `name` as an array; raises FormatError unless it has this dtype and shape."""
        dataset = self._file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise FormatError(f"{self._file.filename}: the dataset {name!r} is missing")
        if dataset.dtype != np.dtype(dtype) or dataset.shape != shape or dataset.chunks:
            raise FormatError(
                f"{self._file.filename}: {name!r} must be contiguous {dtype} {shape}, "
                f"got {dataset.dtype.str} {dataset.shape}"
            )
        count = int(np.prod(shape))
        if count == 0:
            return np.empty(shape, dtype)
        offset = dataset.id.get_offset()
        if offset is None or offset + count * dataset.dtype.itemsize > len(self._map):
            raise FormatError(f"{self._file.filename}: {name!r} lies outside the file (truncated?)")
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)


class KeyTable(Sequence[str]):
    """Sorted keys as a sequence of str, with `find`; 8 bytes and the key's own length an image."""

    def __init__(self, key_bytes: np.ndarray, key_offsets: np.ndarray) -> None:
        self._bytes = np.ascontiguousarray(key_bytes).data
        self._offsets = key_offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} is outside 0..{len(self) - 1}")
        return self._raw(row).decode()

    def raw(self, start: int, stop: int) -> bytes:
        """The UTF-8 of the keys from row `start` up to `stop`, end to end."""
        return bytes(self._bytes[int(self._offsets[start]) : int(self._offsets[stop])])

    def _raw(self, row: int) -> bytes:
        return bytes(self._bytes[int(self._offsets[row]) : int(self._offsets[row + 1])])

    def find(self, key: str) -> int:
        """Row of `key`, or -1."""
        wanted = key.encode(errors="surrogateescape")
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._raw(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self._raw(low) == wanted else -1

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.find(key) >= 0

    def index(self, value: str, start: int = 0, stop: int | None = None) -> int:
        """Row of `value`; raises ValueError when absent."""
        row = self.find(value)
        if row < start or (stop is not None and row >= stop):
            raise ValueError(f"{value!r} is not among the keys")
        return row

    @classmethod
    def from_keys(cls, keys: Iterable[str]) -> "KeyTable":
        """A table in memory, of keys that are sorted already."""
        blob, offsets = bytearray(), array("Q", [0])
        for key in keys:
            blob += key.encode()
            offsets.append(len(blob))
        return cls(np.frombuffer(bytes(blob), "u1"), np.frombuffer(offsets, "<u8"))

    @classmethod
    def mapped(cls, file: MappedFile, rows: int, size: int) -> "KeyTable":
        """The table that `KeySpool.write` stored: `rows` keys in `size` bytes."""
        offsets = file.array("key_offsets", "<u8", (rows + 1,))
        if int(offsets[0]) != 0 or int(offsets[-1]) != size:
            raise FormatError("the key offsets do not span the key bytes: the file is damaged")
        return cls(file.array("key_bytes", "|u1", (size,)), offsets)


class Spool:
    """A column of unknown length, kept in an unnamed temporary file until its length is known."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)
        self._dtype = np.dtype(dtype)
        self.nbytes = 0

    def append(self, data: bytes) -> None:
        """Add the raw little-endian bytes of some values."""
        self._file.write(data)
        self.nbytes += len(data)

    def blocks(self) -> Iterator[np.ndarray]:
        """The values from the start, some megabytes at a time."""
        self._file.seek(0)
        while block := self._file.read(_BLOCK):
            yield np.frombuffer(block, self._dtype)

    def write(self, file: h5py.File, name: str, columns: int = 1) -> None:
        """Store everything as the contiguous dataset `name`, [n] or [n, columns]."""
        count = self.nbytes // self._dtype.itemsize
        shape = (count,) if columns == 1 else (count // columns, columns)
        dataset = file.create_dataset(name, shape, self._dtype)
        row = 0
        for block in self.blocks():
            block = block if columns == 1 else block.reshape(-1, columns)
            dataset[row : row + len(block)] = block
            row += len(block)

    def close(self) -> None:
        """Drop the temporary file."""
        self._file.close()


class KeySpool:
    """Collects sorted keys in constant memory, to become a key table on disk."""

    def __init__(self, folder: Path) -> None:
        self._bytes, self._offsets = Spool(folder, "|u1"), Spool(folder, "<u8")
        self._offsets.append(array("Q", [0]).tobytes())
        self._last: bytes | None = None
        self.rows = 0

    def append(self, keys: Iterable[bytes]) -> None:
        """Add UTF-8 keys; raises FormatError unless each sorts after the one before it."""
        ends, blob = array("Q"), bytearray()
        start = self._bytes.nbytes
        for key in keys:
            if self._last is not None and key <= self._last:
                raise FormatError(
                    "keys must be unique and sorted by their UTF-8 bytes: "
                    f"{key.decode(errors='replace')!r} comes after "
                    f"{self._last.decode(errors='replace')!r}"
                )
            self._last = key
            blob += key
            ends.append(start + len(blob))
        self._bytes.append(bytes(blob))
        self._offsets.append(ends.tobytes())
        self.rows += len(ends)

    def write(self, file: h5py.File) -> None:
        """Store the table in `file` and say its size in the root attributes."""
        self._bytes.write(file, "key_bytes")
        self._offsets.write(file, "key_offsets")
        file.attrs["rows"] = np.uint64(self.rows)
        file.attrs["key_size"] = np.uint64(self._bytes.nbytes)

    def blocks(self) -> Iterator[np.ndarray]:
        """The raw content, for a digest."""
        yield from self._bytes.blocks()
        yield from self._offsets.blocks()

    def close(self) -> None:
        """Drop the temporary files."""
        self._bytes.close()
        self._offsets.close()
