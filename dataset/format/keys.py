"""Millions of image keys in a file, searched through the page cache instead of Python objects.

A key table is three columns that are not compressed: `key_bytes` (the UTF-8 keys, end to end, in
the order of the rows), `key_offsets` (where each starts, and the end) and `key_lookup` (16 bytes a
key, sorted by a hash of its canonical name).
"""

import hashlib
import re
import sys
import unicodedata
import weakref
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice, pairwise
from typing import IO, TYPE_CHECKING, overload

import numpy as np

from ...errors import FormatError
from .directory import StoredFile

if TYPE_CHECKING:
    from .new_file import NewFile

#: Endings of image files, in lower case: torchvision's, so that ImageFolder's images all have rows
#: (listed here because importing torchvision costs a driver or worker 200 MB).
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
#: As Hugging Face names ImageNet's files: the class once more at the end.
_CLASS_AT_END = re.compile(r"(n\d{8}_\d+|ILSVRC2012_(?:val|test)_\d{8})_n\d{8}")
#: Entries of a look-up kept as objects, at most: a search needs 13 of them, and then one read of
#: the entries between two, 157 in a split of ImageNet's size.
_FENCES = 8192
_BLOCK = 8192  # keys read at a time
_PAIR = 16  # bytes of an entry of a look-up: two uint64
#: A look-up is sorted in 256 pieces, of which one is in memory, and so much of the others.
_IN_MEMORY = 1 << 16
#: The half of an entry's second number that is the row.
_ROW = (1 << 32) - 1


def canonical_name(key: str) -> str:
    """A key's name in every form of a data set.

    Without folders, ending, and ImageNet's class at the end; in Unicode's NFC.

    >>> canonical_name("n01440764/n01440764_10026.JPEG")
    'n01440764_10026'
    >>> canonical_name("n01440764_10026_n01440764.JPEG")
    'n01440764_10026'
    """
    name = key.rpartition("/")[2]
    stem, dot, ending = name.rpartition(".")
    if stem and (dot + ending).lower() in EXTENSIONS:
        name = stem
    if "_n" in name and (match := _CLASS_AT_END.fullmatch(name)):
        name = match[1]
    return _composed(name)


class Lookup:
    """Entries (uint64, uint64) of a column, sorted, and searched without loading them.

    Args:
        file: where `LookupWriter` stored them; it stays open while the look-up is used.
        name: of the column.
        rows: how many entries there are.
    """

    def __init__(self, file: StoredFile, name: str, rows: int) -> None:
        self._file, self._name, self._rows = file, name, rows
        column = file.column(name, "<u8", (rows, 2))
        if column.gzip:
            raise file.damaged(f"{name} must not be compressed")
        self._at, self._checked = column.offset, False
        self._step = rows // _FENCES + 1
        # Every search begins with the same few entries. A proxy: in a cycle with its own cache, the
        # look-up would keep the file open until the garbage collector runs.
        self._fence = lru_cache(2 * _FENCES)(partial(Lookup._pair, weakref.proxy(self)))

    def _entries(self, first: int, last: int) -> Sequence[int]:
        """Entries `first` to `last` - 1, end to end."""
        count = max(min(last, self._rows) - first, 0)
        return _numbers(self._file.pread(_PAIR * count, self._at + _PAIR * first))

    def _pair(self, row: int) -> tuple[int, int]:
        first, second = self._entries(row, row + 1)
        return first, second

    def check(self) -> None:
        """Read all of the column, once; FormatError where it is damaged.

        An entry that is found can be compared with what it stands for; one that is missing cannot.
        """
        if not self._checked:
            self._file.check_column(self._name)
            self._checked = True

    def row(self, entry: int) -> int:
        """The row in the lower half of a second number; FormatError where there is no such row."""
        if (row := entry & _ROW) >= self._rows:
            raise self._file.damaged(f"{self._name} names row {row} of {self._rows}")
        return row

    def after(self, first: int, second: int = 0) -> Iterator[int]:
        """The second numbers of the entries with this first one, from `second` on, ascending."""
        fences = range(0, self._rows, self._step)
        start = max(bisect_left(fences, (first, second), key=self._fence) - 1, 0) * self._step
        found = self._entries(start, start + self._step + 1)
        at = bisect_left(
            range(len(found) // 2), (first, second), key=lambda n: (found[2 * n], found[2 * n + 1])
        )
        while True:
            if 2 * at == len(found):
                start, at = start + at, 0
                if not (found := self._entries(start, start + self._step)):
                    return
            if found[2 * at] != first:
                return
            yield found[2 * at + 1]
            at += 1


class LookupWriter:
    """Sorts entries of any number in little memory, and stores them as a column of a new file."""

    def __init__(self, file: "NewFile", name: str) -> None:
        self._file, self._name = file, name
        self._pieces: dict[int, IO[bytes]] = {}  # by the first byte of their entries
        self._rows = 0

    def append(self, entries: np.ndarray) -> None:
        """Add entries, uint64 [n, 2]."""
        piece = entries[:, 0] >> np.uint64(56)
        for number in np.unique(piece).tolist():
            if number not in self._pieces:
                self._pieces[number] = self._file.temporary_file(_IN_MEMORY)
            self._pieces[number].write(entries[piece == number].astype("<u8").tobytes())
        self._rows += len(entries)

    def finish(self, check: Callable[[np.ndarray], None] = lambda _: None) -> None:
        """Store the column; `check` sees each part of it, sorted, before."""

        def blocks() -> Iterator[np.ndarray]:
            for _, piece in sorted(self._pieces.items()):
                piece.seek(0)
                entries = np.frombuffer(piece.read(), "<u8").reshape(-1, 2)
                entries = entries[np.lexsort((entries[:, 1], entries[:, 0]))]
                check(entries)
                yield entries

        self._file.stream(self._name, np.dtype("<u8"), (self._rows, 2), blocks())


class KeyTable(Sequence[str]):
    """Keys as a sequence of str, with `find`; 24 bytes and the key's own length an image.

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
        self._lookup = Lookup(file, "key_lookup", rows)

    def _ends(self, first: int, last: int) -> Sequence[int]:
        """Where keys `first` to `last` - 2 begin, and the last of them ends."""
        return _numbers(self._file.pread(8 * (last - first), self._ends_at + 8 * first))

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(start, stop, step)]
            return self._block(start, stop) if start < stop else []
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} is outside 0..{len(self) - 1}")
        return self._block(row, row + 1)[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, self._rows, _BLOCK):
            yield from self._block(start, min(start + _BLOCK, self._rows))

    def _block(self, start: int, stop: int) -> list[str]:
        begin, *ends = self._ends(start, stop + 1)
        # Damaged offsets must not ask for all memory.
        size = max(min(ends[-1], self._size) - begin, 0)
        text = self._file.pread(size, self._text_at + min(begin, self._size))
        return [
            _decoded(text[first - begin : last - begin]) for first, last in pairwise((begin, *ends))
        ]

    def find(self, key: str, exact: bool = False) -> int:
        """Row of `key`, or else of the only key with its canonical name; -1 where there is none.

        With `exact`, of the key alone. Composed and decomposed accents, as of macOS, are equal.
        """
        key = _composed(key)
        name = canonical_name(key)
        first, second = _entry(key, name)
        for found in self._lookup.after(first, second):
            if found >> 32 != second >> 32:
                break
            if _composed(self[row := self._lookup.row(found)]) == key:
                return row
        self._lookup.check()
        if exact or not name:
            return -1
        rows = [self._lookup.row(found) for found in islice(self._lookup.after(first), 2)]
        if len(rows) == 1 and canonical_name(self[rows[0]]) == name:
            return rows[0]
        return -1

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.find(key) >= 0

    def index(self, value: str, start: int = 0, stop: int | None = None) -> int:
        """Row of `value`; raises ValueError when absent."""
        row = self.find(value)
        if row < start or (stop is not None and row >= stop):
            raise ValueError(f"{value!r} is not among the keys")
        return row


class KeyWriter:
    """Stores keys as the key table of a new file, in constant memory."""

    def __init__(self, file: "NewFile") -> None:
        self._file, self._end = file, 0
        self._lookup = LookupWriter(file, "key_lookup")
        self.rows = 0
        file.append("key_offsets", np.zeros(1, "<u8"))

    def append(self, keys: Sequence[str]) -> None:
        """Add the next rows' keys."""
        texts = [key.encode() for key in keys]
        ends = self._end + np.cumsum([len(text) for text in texts], dtype="<u8")
        self._file.append("key_bytes", np.frombuffer(b"".join(texts), "|u1"))
        self._file.append("key_offsets", ends)
        composed = map(_composed, keys)
        numbers = (number for key in composed for number in _entry(key, canonical_name(key)))
        entries = np.fromiter(numbers, "<u8", 2 * len(keys)).reshape(-1, 2)
        entries[:, 1] |= np.arange(self.rows, self.rows + len(keys), dtype="<u8")
        self._lookup.append(entries)
        self._end, self.rows = int(ends[-1]), self.rows + len(keys)

    def finish(self) -> None:
        """Store the look-up.

        Raises:
            FormatError: two keys are equal, or there are more than 2^32.
        """
        if self.rows > _ROW + 1:
            raise FormatError(f"a split has at most {_ROW + 1} images; this one has {self.rows}")
        self._lookup.finish(self._check)

    def _check(self, entries: np.ndarray) -> None:
        """Raise FormatError where two keys are equal."""
        plain = entries >> np.array([0, 32], "<u8")
        for place in np.flatnonzero((plain[1:] == plain[:-1]).all(1)).tolist():
            rows = (entries[place : place + 2, 1] & np.uint64(_ROW)).tolist()
            first, second = (self._key(row) for row in rows)
            if _composed(first) == _composed(second):
                raise FormatError(
                    f"each image needs a key of its own; rows {rows[0]} and {rows[1]} both have "
                    f"{first!a}. Remedy: rename one of the two, or leave it out"
                )

    def _key(self, row: int) -> str:
        begin, end = np.frombuffer(self._file.appended("key_offsets", 8 * row, 16), "<u8").tolist()
        return self._file.appended("key_bytes", begin, end - begin).decode()


def digest64(data: bytes) -> int:
    """BLAKE2b-64 as a little-endian number: what shards hold of the bytes of an image's file."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _entry(key: str, name: str) -> tuple[int, int]:
    """A key's entry, but for its row: hash of its canonical name; CRC-32 of the key, row."""
    # No stored key has lone surrogates, but one that is looked up may.
    hashed = digest64(name.encode(errors="surrogatepass"))
    return hashed, zlib.crc32(key.encode(errors="surrogatepass")) << 32


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _numbers(data: bytes) -> Sequence[int]:
    """Little-endian uint64."""
    numbers = array("Q", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _decoded(key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise FormatError(
            f"keys are UTF-8, but one is {key[:99]!r}: the key table is damaged. Remedy: delete "
            "the file it is in, index or manifest; it is rebuilt"
        ) from None
