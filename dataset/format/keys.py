"""Millions of image keys in a file, searched through the page cache instead of Python objects.

A key table is two columns that are not compressed, `key_bytes` (the UTF-8 keys, sorted, end to end)
and `key_offsets` (where each starts, and the end).
"""

import sys
import unicodedata
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, overload

import numpy as np

from ...errors import FormatError
from .directory import StoredFile

if TYPE_CHECKING:
    from .new_file import NewFile

#: Keys kept as objects, at most: a search needs 13 of them, and then one read of the keys between
#: two, 157 in a split of ImageNet's size.
_FENCES = 8192


class KeyTable(Sequence[str]):
    """Sorted keys as a sequence of str, with `find`; 8 bytes and the key's own length an image.

    Read, not mapped: searches would in time make all of it memory of the process.

    Args:
        file: where `KeyWriter` stored them; it stays open while the table is used.

    Raises:
        FormatError: the file has no key table, or a damaged one.
    """

    def __init__(self, file: StoredFile) -> None:
        for name in ("key_offsets", "key_bytes"):
            if name not in file.columns or file.columns[name].gzip:
                raise file.damaged(f"the dataset {name!r} is missing or compressed")
        rows, size = file.columns["key_offsets"].shape[0] - 1, file.columns["key_bytes"].shape[0]
        self._ends_at = file.column("key_offsets", "<u8", (rows + 1,)).offset
        self._text_at = file.column("key_bytes", "|u1", (size,)).offset
        self._file, self._rows, self._size = file, rows, size
        if rows < 1 or (self._ends(0, 1)[0], self._ends(rows, rows + 1)[0]) != (0, size):
            raise file.damaged("the key offsets do not span the key bytes")
        # Every search begins with the same few rows. A proxy: in a cycle with its own cache, the
        # table would keep the file open until the garbage collector runs.
        self._fence = lru_cache(2 * _FENCES)(partial(KeyTable._raw, weakref.proxy(self)))

    def _ends(self, first: int, last: int) -> Sequence[int]:
        """Where keys `first` to `last` - 2 begin, and the last of them ends."""
        numbers = array("Q", self._file.pread(8 * (last - first), self._ends_at + 8 * first))
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers

    def _text(self, first: int, last: int) -> bytes:
        """Bytes of the keys, end to end; damaged offsets must not ask for all memory."""
        size = max(min(last, self._size) - first, 0)
        return self._file.pread(size, self._text_at + min(first, self._size))

    def __len__(self) -> int:
        return self._rows

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
        return _decoded(self._raw(row))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, self._rows, _FENCES):
            stop = min(start + _FENCES, self._rows)
            begin, *ends = self._ends(start, stop + 1)
            text = self._text(begin, ends[-1])
            for first, last in pairwise((begin, *ends)):
                yield _decoded(text[first - begin : last - begin])

    def _raw(self, row: int) -> bytes:
        first, last = self._ends(row, row + 2)
        return self._text(first, last)

    def find(self, key: str) -> int:
        """Row of `key`, or -1. Composed and decomposed accents, as of macOS, are equal."""
        row = self._find(key)
        if row >= 0 or key.isascii():
            return row
        composed, decomposed = unicodedata.normalize("NFC", key), unicodedata.normalize("NFD", key)
        return max(self._find(composed), self._find(decomposed))

    def _find(self, key: str) -> int:
        wanted = key.encode(errors="surrogatepass")  # no key has them
        fences = range(0, self._rows, self._rows // _FENCES + 1)
        after = bisect_right(fences, wanted, key=self._fence)
        if after == 0:
            return -1
        start = fences[after - 1]
        stop = fences[after] if after < len(fences) else self._rows
        ends = self._ends(start, stop + 1)
        text, begin = self._text(ends[0], ends[-1]), ends[0]

        def at(row: int) -> bytes:
            return text[ends[row] - begin : ends[row + 1] - begin]

        row = bisect_right(range(stop - start), wanted, key=at) - 1
        return start + row if row >= 0 and at(row) == wanted else -1

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.find(key) >= 0

    def index(self, value: str, start: int = 0, stop: int | None = None) -> int:
        """Row of `value`; raises ValueError when absent."""
        row = self.find(value)
        if row < start or (stop is not None and row >= stop):
            raise ValueError(f"{value!r} is not among the keys")
        return row


def _decoded(key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise FormatError(
            f"keys are UTF-8, but one is {key[:99]!r}: the key table is damaged. Remedy: delete "
            "the file it is in, index or manifest; it is rebuilt"
        ) from None


class KeyWriter:
    """Stores sorted keys as the key table of a new file, in constant memory."""

    def __init__(self, file: "NewFile") -> None:
        self._file, self._end = file, 0
        self._last: bytes | None = None
        self.rows = 0
        file.append("key_offsets", np.zeros(1, "<u8"))

    def append(self, keys: Sequence[bytes]) -> None:
        """Add UTF-8 keys; raises FormatError unless each sorts after the one before it."""
        before = self._last
        for key in keys:
            if before is not None and key <= before:
                raise FormatError(
                    "keys must be unique and sorted by their UTF-8 bytes: "
                    f"{key.decode(errors='replace')!r} comes after "
                    f"{before.decode(errors='replace')!r}"
                )
            before = key
        ends = self._end + np.cumsum([len(key) for key in keys], dtype="<u8")
        self._file.append("key_bytes", np.frombuffer(b"".join(keys), "|u1"))
        self._file.append("key_offsets", ends)
        self._last, self._end, self.rows = before, int(ends[-1]), self.rows + len(keys)
