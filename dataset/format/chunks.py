"""One image's plane as one HDF5 chunk: a zlib stream after a byte shuffle."""

import zlib
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

# libdeflate inflates faster. Its compressed bytes would differ from those of zlib.
_fast: Any = import_module("deflate") if find_spec("deflate") else None

#: zlib strategies by dataset, of the lowest bytes of the items and of all others, measured on real
#: maps. Ids of neighbouring cells repeat without a pattern: runs find most of it, at a fraction of
#: the time. The low bytes of logits hardly compress.
STRATEGIES = {
    "codes": (zlib.Z_FILTERED, zlib.Z_FILTERED),
    "classes": (zlib.Z_RLE, zlib.Z_RLE),
    "residual_classes": (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE),
    "residual_codes": (zlib.Z_FILTERED, zlib.Z_FILTERED),
    "level": (zlib.Z_HUFFMAN_ONLY, zlib.Z_HUFFMAN_ONLY),
}
_LEVEL = 4
_ERRORS = (zlib.error, _fast.DeflateError) if _fast else (zlib.error,)


def encode_chunk(array: np.ndarray, strategies: tuple[int, int]) -> bytes:
    """The bytes of a chunk with the filters shuffle and gzip.

    Each byte of the items is compressed in deflate blocks of its own: high and low bytes have
    different statistics, and one Huffman table for both would cost more.

    Args:
        array: what the chunk holds; little-endian.
        strategies: of zlib, for the lowest bytes and for the others.
    """
    data, width = shuffle(array), array.dtype.itemsize
    stream = [b"\x78\x5e"]  # RFC 1950: deflate, window of 32 kB, fast algorithm
    for byte in range(width):
        packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, 8, strategies[byte > 0])
        stream.append(packer.compress(data[byte * array.size : (byte + 1) * array.size]))
        stream.append(packer.flush(zlib.Z_SYNC_FLUSH if byte < width - 1 else zlib.Z_FINISH))
    return b"".join((*stream, zlib.adler32(data).to_bytes(4, "big")))


def inflate(data: bytes | bytearray | memoryview, size: int) -> bytes | bytearray:
    """The content of a zlib stream; ValueError unless it is whole and has exactly `size` bytes.

    `size` bytes are allocated, so the caller must have compared it with the size of the file (a
    stream grows to at most 1032 times `data`). Bytes after the stream are ignored.
    """
    try:
        # One call each: a decompression object, or another checksum, costs a tenth of a read.
        plain: bytes | bytearray = (
            _fast.zlib_decompress(data, size) if _fast else zlib.decompress(data, 15, size)
        )
    except _ERRORS as error:
        raise ValueError(f"the chunk must inflate to {size} bytes: {error}") from error
    if len(plain) != size:
        raise ValueError(f"the chunk must inflate to {size} bytes, got {len(plain)}")
    return plain


def shuffle(array: np.ndarray) -> bytes:
    """The bytes of an array after HDF5's shuffle filter: all lowest bytes first, then the next."""
    items = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return items.reshape(-1, array.dtype.itemsize).T.tobytes()


def unshuffle(
    plain: bytes | bytearray | memoryview, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """The array that `shuffle` gave as `plain`; writable, and not shared."""
    whole, width = bytearray(plain), dtype.itemsize
    count = len(whole) // width
    for byte in range(width if width > 1 else 0):  # slices: faster than NumPy at this size
        whole[byte::width] = plain[byte * count : (byte + 1) * count]
    return np.ndarray(shape, dtype, whole)
