"""A dataset of an HDF5 file, read without HDF5.

HDF5 takes a chunk that inflates to less than it must for a whole one, and reads what lies behind it
in memory. So chunks are decoded here, where a chunk has its size or is refused.
"""

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import numpy as np

from tokenlabel.dataset.chunks import ChunkCodec
from tokenlabel.dataset.hdf5_bytes import UNDEFINED, Bytes
from tokenlabel.dataset.hdf5_messages import (
    DEFLATE,
    FIXED_ARRAY,
    FLETCHER32,
    IMPLICIT,
    SHUFFLE,
    SINGLE,
    Storage,
)

#: How many times smaller than its content a deflate stream can be, and bytes it has besides.
MOST_TIMES, SLACK = 1032, 64

At = Callable[[int, int], Bytes]


class Places(NamedTuple):
    """Where chunks are, each array [chunks] in C order of the grid of chunks.

    Attributes:
        offsets: uint64, in the file.
        sizes: uint64, stored bytes.
        masks: uint32, bit i set where filter i was left out.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    masks: np.ndarray


class StoredDataset:
    """A dataset whose declared shape the file can hold, with all its values there.

    Args:
        at: gives bytes of the file by offset and size; ValueError outside of it.
        end: size of the file.
        shape: as declared, of one dimension or more.
        dtype: little-endian numbers, or bytes of fixed length.
        filters: numbers of the filters, in the order in which they were applied.
        storage: where the values are.

    Raises ValueError where that is more than the file can hold, or not all there.

    Attributes:
        shape, dtype, filters: as given.
        chunks: shape of a chunk; None where all values lie in one piece, which begins at `offset`.
        places: of the chunks.
    """

    def __init__(
        self,
        at: At,
        end: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        filters: tuple[int, ...],
        storage: Storage,
    ) -> None:
        self._at = at
        self.shape, self.dtype, self.filters = shape, dtype, filters
        self.chunks = storage.chunks
        self.offset = storage.address
        self.nbytes = math.prod(shape) * dtype.itemsize
        if storage.chunks is None:
            if filters:
                raise ValueError("what lies in one piece has no filters")
            if storage.size != self.nbytes and storage.address != UNDEFINED:
                raise ValueError(f"it must have {self.nbytes} bytes, it has {storage.size}")
            if self.nbytes:
                at(storage.address + self.nbytes, 0)
            return
        self._whole = math.prod(storage.chunks) * dtype.itemsize
        count = math.prod(-(-a // b) for a, b in zip(shape, storage.chunks, strict=True))
        if count == 0:
            raise ValueError(f"it must have values, its shape is {shape}")
        # Before anything as long as the number of chunks is made.
        if count > end or self._whole * count > (end + SLACK * count) * MOST_TIMES:
            raise ValueError(f"{dtype} {shape} is more than a file of {end} bytes can hold")
        self.places = _places(at, storage, count, self._whole, filters)
        self._check_places(end)

    def _check_places(self, end: int) -> None:
        offsets, sizes, masks = self.places
        total = sum(sizes.tolist())  # in Python's numbers, which do not overflow
        if total > end or (sizes > end).any() or (offsets > end - sizes).any():
            raise ValueError(f"its chunks, of {total} bytes, do not all lie in the file")
        if (masks >> len(self.filters)).any():
            raise ValueError("a chunk left out a filter that is not there")
        deflated = np.full(len(masks), DEFLATE in self.filters)
        if DEFLATE in self.filters:
            deflated &= masks >> self.filters.index(DEFLATE) & 1 == 0
        # As it is, or with a checksum of 4 bytes; which of them is seen when it is read.
        plain = sizes[~deflated]
        if ((plain < self._whole) | (plain > self._whole + 4)).any():
            raise ValueError(f"a chunk that is not compressed must have {self._whole} bytes")
        if ((sizes[deflated] + SLACK) * MOST_TIMES < self._whole).any():
            raise ValueError(f"a chunk has not enough bytes to inflate to {self._whole}")

    @property
    def codec(self) -> ChunkCodec | None:
        """How chunks of one row each are decoded; None where they are not of gzip or of a row."""
        row = self.shape[1:]
        if self.chunks != (1, *row) or self.filters not in ((DEFLATE,), (SHUFFLE, DEFLATE)):
            return None
        shuffle = SHUFFLE in self.filters and self.dtype.itemsize > 1
        return ChunkCodec(row, self.dtype, self._whole, shuffle)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop`, as by slicing. Raises OSError, or ValueError on damage."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        count, tail = max(stop - start, 0), self.shape[1:]
        if self.chunks is None:
            row = math.prod(tail) * self.dtype.itemsize
            data = self._at(self.offset + start * row, count * row).data if count * row else b""
            return np.ndarray((count, *tail), self.dtype, bytearray(data))
        found = np.empty((count, *tail), self.dtype)
        grid = [-(-a // b) for a, b in zip(self.shape, self.chunks, strict=True)]
        first, last = start // self.chunks[0], -(-stop // self.chunks[0])
        if count == 0:
            return found
        for place in product(range(first, last), *map(range, grid[1:])):
            chunk = self._chunk(int(np.ravel_multi_index(place, grid)))
            # Where the chunk lies in what is asked for, and which part of it.
            low = [i * side for i, side in zip(place, self.chunks, strict=True)]
            low[0] -= start
            ends = [
                min(a + side, n) for a, side, n in zip(low, self.chunks, found.shape, strict=True)
            ]
            begins = [max(a, 0) for a in low]
            target = tuple(map(slice, begins, ends))
            source = tuple(slice(b - a, e - a) for a, b, e in zip(low, begins, ends, strict=True))
            found[target] = chunk[source]
        return found

    def _chunk(self, number: int) -> np.ndarray:
        """One chunk, decoded."""
        assert self.chunks is not None
        offset, size, mask = (int(column[number]) for column in self.places)
        data = self._at(offset, size).data
        used = [each for bit, each in enumerate(self.filters) if not mask >> bit & 1]
        if FLETCHER32 in used:
            data, check = data[:-4], data[-4:]
            if _fletcher32(data) != int.from_bytes(check, "little"):
                raise ValueError("a chunk has a wrong checksum")
        shuffle = SHUFFLE in used and self.dtype.itemsize > 1
        if DEFLATE in used:
            return ChunkCodec(self.chunks, self.dtype, self._whole, shuffle).decode(data)
        if len(data) != self._whole:
            raise ValueError(f"a chunk must have {self._whole} bytes, it has {len(data)}")
        if shuffle:
            data = np.frombuffer(data, "u1").reshape(self.dtype.itemsize, -1).T.tobytes()
        return np.ndarray(self.chunks, self.dtype, bytearray(data))


def _fletcher32(data: bytes) -> int:
    """Fletcher's checksum over big-endian words of 2 bytes, as HDF5 has it."""
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").astype("u8")
    places = np.arange(len(words), 0, -1, dtype="u8") % 65535
    one, two = int(words.sum()), int((words * places).sum())
    # HDF5 folds: a sum that is a multiple of 65535, but not 0, stays 65535.
    low, high = (number % 65535 or (65535 if number else 0) for number in (one, two))
    return high << 16 | low


def _places(at: At, storage: Storage, count: int, whole: int, filters: tuple[int, ...]) -> Places:
    """Where the chunks are, by the kind of index; see III of the layout message, version 4."""
    if storage.kind == FIXED_ARRAY:
        return _fixed_array(at, storage, count, whole, filters)
    if storage.kind == SINGLE:
        if count != 1 or bool(filters) != bool(storage.size):
            raise ValueError("what says it is one chunk is none, or does not say its size")
        numbers = [storage.address], [storage.size or whole], [storage.mask]
    elif storage.kind == IMPLICIT and not filters:
        numbers = [storage.address + whole * n for n in range(count)], [whole] * count, [0] * count
    else:
        raise ValueError("chunks without an index have no filters")
    if storage.address >= 1 << 62:
        raise ValueError("its chunks were never written")
    return Places(
        *(np.array(column, t) for column, t in zip(numbers, ("u8", "u8", "u4"), strict=True))
    )


def _fixed_array(
    at: At, storage: Storage, count: int, whole: int, filters: tuple[int, ...]
) -> Places:
    """VII.C of the specification: the fixed array index."""
    head = at(storage.address, 28)
    head.expect(b"FAHD\0" + bytes([bool(filters)]), "an index of chunks")
    entry, page_bits = head.take(2)
    elements, block = head.number(8), head.number(8)
    head.check()
    # Offset, size in as many bytes as HDF5 takes for one of this size, mask.
    wanted = 8 + (min(1 + (whole.bit_length() + 7) // 8, 8) + 4 if filters else 0)
    if entry not in (wanted, 20 if filters else 8) or page_bits != storage.page_bits:
        raise ValueError(f"an index of chunks has entries of {entry} bytes, not {wanted}")
    if not 1 <= page_bits <= 32 or elements != count:
        raise ValueError(f"an index has {elements} chunks, the dataset {count}")
    where = (storage.address, block, elements, entry, page_bits)
    # In Python, the checksums of thousands of places take 25 ms. What they would show, the chunks'
    # own ones do too, unless a place is that of another chunk of the same stored size.
    checked = DEFLATE not in filters or elements <= 1 << page_bits
    parts = list(_pages(at, *where, bool(filters), checked))
    table = np.frombuffer(b"".join(parts), "u1").reshape(elements, entry)
    offsets = table[:, :8].copy().view("<u8")[:, 0]
    if not filters:
        return Places(offsets, np.full(elements, whole, "u8"), np.zeros(elements, "u4"))
    sizes = np.zeros((elements, 8), "u1")
    sizes[:, : entry - 12] = table[:, 8 : entry - 4]
    masks = table[:, entry - 4 :].copy().view("<u4")[:, 0]
    if masks.any():  # a wrong one could go unnoticed
        list(_pages(at, *where, True, True))
    return Places(offsets, sizes.view("<u8")[:, 0], masks)


def _pages(
    at: At,
    head: int,
    address: int,
    elements: int,
    entry: int,
    page_bits: int,
    filtered: bool,
    checked: bool,
) -> Iterator[bytes]:
    """The entries of a fixed array, a page at a time where it has pages.

    Their checksums are compared where `checked`.
    """
    page = 1 << page_bits
    paged = elements > page
    pages = -(-elements // page) if paged else 1
    prefix = b"FADB\0" + bytes([filtered]) + head.to_bytes(8, "little")
    bitmap = -(-pages // 8) if paged else 0
    size = len(prefix) + bitmap + elements * entry + 4 * (pages + paged)
    block = at(address, size)
    block.expect(prefix, "the list of an index of chunks")
    if paged:
        if not np.unpackbits(np.frombuffer(block.take(bitmap), "u1"))[:pages].all():
            raise ValueError("a chunk was never written")
        block.check()
    for number in range(pages):
        count = min(page, elements - number * page) if paged else elements
        start = block.place if paged else 0
        entries = block.take(count * entry)
        if checked:
            part = Bytes(block.data[start : block.place + 4])
            part.take(block.place - start)
            part.check()
        block.take(4)
        yield entries
