"""One image's array as one HDF5 chunk: a zlib stream after a byte shuffle, made to inflate fast.

What is written is what docs/format.md says under "Chunks"; what is read is any such stream. Chunks
are read from places in the file that the index, or the file itself, has told.
"""

import os
import weakref
import zlib
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from tokenlabel.dataset import native
from tokenlabel.dataset.hdf5_bytes import read_at

# The same interface; faster. Never for writing, as its bytes are others.
_inflate: Any = import_module("isal.isal_zlib" if find_spec("isal") else "zlib")

#: zlib strategies by dataset, measured on real maps: the sign and exponent bytes of neighbouring
#: logits repeat, so matches save 8%; those of class ids and of `rest` gain nothing by matches, and
#: Huffman codes alone inflate faster.
STRATEGIES = {
    "scores": zlib.Z_DEFAULT_STRATEGY,
    "classes": zlib.Z_HUFFMAN_ONLY,
    "rest": zlib.Z_HUFFMAN_ONLY,
}
_LEVEL = 4
_STORED = 65535  # bytes of a stored block of deflate, at most
_GAP = 4096  # bytes between chunks of a row up to which one read is cheaper than several


def encode_chunk(array: np.ndarray, strategy: int) -> bytes:
    """The bytes of a chunk with the filters shuffle and gzip.

    The low bytes of logits, and of ids among many classes, hardly compress, yet they cost most of
    the time to inflate: they are stored. Where their collision entropy is below 4 of 8 bits (few
    classes, NaN) they are compressed with the rest.

    Args:
        array: what the chunk holds; little-endian, items of one byte or more.
        strategy: of zlib, for the compressed part.
    """
    width = array.dtype.itemsize
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, width).T.tobytes()
    # As many bytes as there are items; an array of single bytes has no low ones.
    low = data[: len(data) // width] if width > 1 else b""
    counts = np.bincount(np.frombuffer(low, np.uint8), minlength=1)
    if int(counts @ counts) * 16 > len(low) ** 2:
        low = b""
    stream = [b"\x78\x5e"]  # RFC 1950: deflate, window of 32 kB, made in a hurry
    for start in range(0, len(low), _STORED):
        part = low[start : start + _STORED]
        size = len(part)
        # RFC 1951, 3.2.4: not the last block, type 00, padded to a byte; length, its complement.
        stream += [b"\0", size.to_bytes(2, "little"), (size ^ 0xFFFF).to_bytes(2, "little"), part]
    stream += [_deflate(data[len(low) :], strategy), zlib.adler32(data).to_bytes(4, "big")]
    return b"".join(stream)


def _deflate(data: bytes, strategy: int) -> bytes:
    """A complete raw deflate stream."""
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, 8, strategy)
    return packer.compress(data) + packer.flush()


class ChunkCodec(NamedTuple):
    """How the chunks of a dataset are decoded.

    Attributes:
        shape: of one chunk, without the leading 1 of its row.
        dtype: little-endian.
        nbytes: size of the decoded chunk.
        shuffle: whether the bytes are shuffled.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int
    shuffle: bool

    def decode(self, data: bytes | memoryview) -> np.ndarray:
        """The array in a chunk; writable, and nobody else's.

        Raises ValueError when the bytes are damaged: unless they are a whole zlib stream, with its
        checksum, of exactly the size that the chunk must have.
        """
        inflater = _inflate.decompressobj()
        try:
            # One byte of room more than is right, and no stream can fill the memory.
            plain = inflater.decompress(data, self.nbytes + 1)
        except _inflate.error as error:
            raise ValueError(str(error)) from error
        if len(plain) != self.nbytes or not inflater.eof or inflater.unused_data:
            raise ValueError(f"the chunk must inflate to {self.nbytes} bytes, it does not")
        if not self.shuffle:
            return np.ndarray(self.shape, self.dtype, bytearray(plain))
        whole, width = bytearray(self.nbytes), self.dtype.itemsize
        if native.compiled is not None:
            native.compiled.unshuffle(plain, whole, width)
        else:
            count = self.nbytes // width
            for byte in range(width):  # slices of a bytearray: faster than NumPy at this size
                whole[byte::width] = plain[byte * count : (byte + 1) * count]
        return np.ndarray(self.shape, self.dtype, whole)


class ChunkFile:
    """Reads chunks of an open file at known places: no HDF5, no lock, one file descriptor.

    Any number of threads may read at once. The descriptor is closed when the last of them has let
    go of this object, so that dropping it from a cache never hurts who reads.

    Args:
        descriptor: of the file; this object takes it over.
        codecs: of the datasets whose chunks make up a row.
    """

    def __init__(self, descriptor: int, codecs: Sequence[ChunkCodec]) -> None:
        self._descriptor = descriptor
        self._codecs = tuple(codecs)
        # Deflate cannot do worse: more than this is no chunk of ours, and not worth the memory.
        self._limit = sum(2 * codec.nbytes + 1024 for codec in codecs)
        weakref.finalize(self, os.close, descriptor).atexit = False

    def read(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[np.ndarray]:
        """The arrays of a row from where its chunks are, one place for each codec.

        Raises OSError as the system does, ValueError where the bytes there are not such chunks.
        """
        total = sum(sizes)
        if total > self._limit:
            raise ValueError(f"chunks of {sizes} bytes are larger than uncompressed ones")
        start = min(offsets)
        span = max(map(int.__add__, offsets, sizes)) - start
        whole = memoryview(self._pread(span, start)) if span <= total + _GAP else None
        arrays = []
        for codec, offset, size in zip(self._codecs, offsets, sizes, strict=True):
            begin = offset - start
            data = self._pread(size, offset) if whole is None else whole[begin : begin + size]
            arrays.append(codec.decode(data))
        return arrays

    def stored(self, offset: int, size: int) -> bytes:
        """The bytes at a place; fewer where the file ends."""
        return read_at(self._descriptor, size, offset)

    def _pread(self, size: int, offset: int) -> bytes:
        data = self.stored(offset, size)
        if len(data) != size:
            raise ValueError(f"the file ends before byte {offset + size}: it was cut short")
        return data
