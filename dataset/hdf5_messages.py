"""What HDF5 says of a dataset or an attribute, decoded here: types, shapes, values, storage.

Only what docs/format.md lets a writer use is understood; all else is a ValueError. The bytes are
those of the HDF5 File Format Specification, version 3, section IV.A.2.
"""

import math
import struct
from typing import Any, NamedTuple

import numpy as np

from tokenlabel.dataset.hdf5_bytes import Bytes

#: Numbers of the filters that are read.
DEFLATE, SHUFFLE, FLETCHER32 = 1, 2, 3
_MAX_RANK = 32
_MAX_ITEM = 1 << 20
#: Properties of floats, little-endian IEEE 754, by their size (table in IV.A.2.d).
_FLOATS = {
    2: (0x0F20, bytes.fromhex("000010000a05000a0f000000")),
    4: (0x1F20, bytes.fromhex("00002000170800177f000000")),
    8: (0x3F20, bytes.fromhex("00004000340b0034ff030000")),
}
#: Chunk indexes by what the specification calls them.
SINGLE, IMPLICIT, FIXED_ARRAY = 1, 2, 3


class Storage(NamedTuple):
    """Where a dataset's values are.

    Attributes:
        chunks: shape of a chunk; None where the values lie in one piece.
        kind: of the index that tells where chunks are.
        address: of the values, of the single chunk, or of the index.
        size: bytes there; 0 where the index tells.
        mask: of the filters that the single chunk left out.
        page_bits: of a fixed array's pages.
    """

    chunks: tuple[int, ...] | None
    kind: int
    address: int
    size: int
    mask: int
    page_bits: int


def shape_of(data: bytes) -> tuple[int, ...] | None:
    """The shape in a dataspace message; () of a scalar, None of one without a value."""
    cursor = Bytes(data)
    version, rank, flags, kind = cursor.take(4)
    if version == 1:  # no kind, and 4 bytes more
        cursor.take(4)
        kind = int(rank > 0)
    elif version != 2:
        raise ValueError(f"the version of a shape must be 1 or 2, it is {version}")
    if kind == 2:
        return None
    if kind not in (0, 1) or (kind == 0) != (rank == 0) or rank > _MAX_RANK or flags > 1:
        raise ValueError(f"no shape has kind {kind}, rank {rank} and flags {flags}")
    shape = struct.unpack(f"<{rank}Q", cursor.take(8 * rank))
    if flags & 1 and shape != struct.unpack(f"<{rank}Q", cursor.take(8 * rank)):
        raise ValueError("a dataset must have a fixed shape")
    if math.prod(shape) >= 1 << 62:
        raise ValueError(f"the shape {shape} is too large")
    return shape


def dtype_of(cursor: Bytes, depth: int = 0) -> np.dtype | None:
    """The type in a datatype message; None of one that the format does not use."""
    start = cursor.place
    head = cursor.number(4)
    size = cursor.number(4)
    version, kind, bits = head >> 4 & 15, head & 15, head >> 8
    if not 1 <= version <= 5 or not 1 <= size <= _MAX_ITEM:
        raise ValueError(f"no type has version {version} and {size} bytes")
    if kind == 0:
        offset, precision = cursor.number(2), cursor.number(2)
        if bits & ~8 or offset or precision != 8 * size or size not in (1, 2, 4, 8):
            return None
        return np.dtype(f"<{'i' if bits & 8 else 'u'}{size}")
    if kind == 1:
        found = (bits, cursor.take(12))
        return np.dtype(f"<f{size}") if _FLOATS.get(size) == found else None
    if kind == 3:
        return np.dtype(f"S{size}") if bits & 15 < 3 and bits >> 4 < 2 else None
    if kind == 6 and version >= 3 and depth == 0:
        return _compound(cursor, bits, size)
    if kind == 10 and version >= 3 and depth == 1:
        rank = cursor.number(1)
        shape = struct.unpack(f"<{rank}I", cursor.take(4 * rank))
        base = dtype_of(cursor, 2)
        if base is None or not 1 <= rank <= 4 or base.itemsize * math.prod(shape) != size:
            raise ValueError(f"an array type of {size} bytes has shape {shape} and type {base}")
        return np.dtype((base, shape))
    cursor.place = start
    return None


def _compound(cursor: Bytes, count: int, size: int) -> np.dtype:
    names, kinds, offsets = [], [], []
    width = (size.bit_length() + 7) // 8
    end = 0
    for _ in range(count):
        names.append(text(cursor))
        offsets.append(cursor.number(width))
        kind = dtype_of(cursor, 1)
        if kind is None or offsets[-1] != end:
            raise ValueError(f"the part {names[-1]!r} of a type is not as it must be")
        kinds.append(kind)
        end += kind.itemsize
    if end != size or not count or len(set(names)) < count:
        raise ValueError(f"a type of {size} bytes has parts of {end}")
    return np.dtype({"names": names, "formats": kinds, "offsets": offsets, "itemsize": size})


def text(cursor: Bytes) -> str:
    """The next text that ends in NUL."""
    end = cursor.data.find(b"\0", cursor.place)
    if end < 0:
        raise ValueError("a name has no end")
    found = cursor.take(end - cursor.place).decode()
    cursor.take(1)
    return found


def attribute_of(data: bytes) -> tuple[str, Any]:
    """Name and value of an attribute message: str, int, float or a list; None of another type."""
    cursor = Bytes(data)
    version, flags, name_size, type_size, shape_size = struct.unpack("<BBHHH", cursor.take(8))
    if not 1 <= version <= 3 or flags & ~3:
        raise ValueError(f"no attribute has version {version} and flags {flags}")
    if version == 3:
        cursor.take(1)  # the character set
    step = 8 if version == 1 else 1  # parts are padded to this

    def part(size: int) -> bytes:
        return cursor.take(-(-size // step) * step)[:size]

    name = part(name_size)
    if not name.endswith(b"\0") or b"\0" in name[:-1]:
        raise ValueError(f"{name!r} is no name of an attribute")
    kind, shape = part(type_size), part(shape_size)
    key = name[:-1].decode()
    if flags:  # a type or shape that is kept elsewhere
        return key, None
    dtype = dtype_of(Bytes(kind))
    found = shape_of(shape)
    if dtype is None or dtype.names or found is None:
        return key, None
    value = cursor.take(math.prod(found) * dtype.itemsize)
    array = np.frombuffer(value, dtype).reshape(found)
    if dtype.kind != "S":
        return key, array.tolist()
    return key, _texts(array.tolist())


def _texts(value: Any) -> Any:
    return [_texts(item) for item in value] if isinstance(value, list) else value.decode()


def filters_of(data: bytes, item: int) -> tuple[int, ...]:
    """The filters in a filter pipeline message, of a dataset with `item` bytes an item."""
    cursor = Bytes(data)
    cursor.expect(b"\2", "a filter pipeline")
    found = []
    for _ in range(cursor.number(1)):
        number = cursor.number(2)
        name_size = cursor.number(2) if number >= 256 else 0
        _, count = cursor.number(2), cursor.number(2)
        cursor.take(name_size)
        values = struct.unpack(f"<{count}I", cursor.take(4 * count))
        if number not in (DEFLATE, SHUFFLE, FLETCHER32) or (
            number == SHUFFLE and values != (item,)
        ):
            raise ValueError(f"filters may be gzip, shuffle and Fletcher-32; found number {number}")
        found.append(number)
    if found != [number for number in (SHUFFLE, DEFLATE, FLETCHER32) if number in found]:
        raise ValueError(f"filters must be shuffle, gzip, Fletcher-32 in this order; got {found}")
    return tuple(found)


def storage_of(data: bytes, shape: tuple[int, ...], item: int) -> Storage:
    """The storage in a data layout message."""
    cursor = Bytes(data)
    version, kind = cursor.take(2)
    if version not in (3, 4) or (kind, version) == (2, 3) or kind not in (1, 2):
        raise ValueError(f"a dataset is stored in a way that is not read: {kind}, {version}")
    if kind == 1:
        return Storage(None, 0, cursor.number(8), cursor.number(8), 0, 0)
    flags, rank, width = cursor.take(3)
    if rank != len(shape) + 1 or flags & ~2 or not 1 <= width <= 8:
        raise ValueError(f"chunks of rank {rank} and flags {flags} are not read")
    *chunks, last = (cursor.number(width) for _ in range(rank))
    if last != item or not all(chunks):
        raise ValueError(f"chunks of {chunks} items of {last} bytes are not read")
    index, size, mask, page_bits = cursor.number(1), 0, 0, 0
    if flags & 2 and index != SINGLE:
        raise ValueError("only a single chunk has its size in the header")
    if index == SINGLE and flags & 2:
        size = cursor.number(8)
        mask = cursor.number(4)
    elif index == FIXED_ARRAY:
        page_bits = cursor.number(1)
    elif index not in (SINGLE, IMPLICIT):
        raise ValueError("a dataset must have a fixed shape; this one has an index to grow by")
    return Storage(tuple(chunks), index, cursor.number(8), size, mask, page_bits)


def link_of(data: bytes) -> tuple[str, int]:
    """Name and address in a link message; ValueError for a link to another name or file."""
    cursor = Bytes(data)
    cursor.expect(b"\1", "a link")
    flags = cursor.number(1)
    kind = cursor.number(1) if flags & 8 else 0
    cursor.take(8 * (flags >> 2 & 1) + (flags >> 4 & 1))  # its number, its character set
    name = cursor.take(cursor.number(1 << (flags & 3))).decode()
    if kind != 0:
        raise ValueError(f"{name!r} is a link to another name or file: links are not followed")
    return name, cursor.number(8)
