"""Reads the HDF5 files of docs/format.md without HDF5, which hostile files crash, hang or deceive.

HDF5 guards its structure by checksums, which whoever makes a file can set at will, and trusts many
numbers beyond that. Here each number is compared with what it must be or with the size of the file,
nothing points out of the file, and nothing is made larger than the file can hold. What is read is a
part of the HDF5 File Format Specification, version 3; its sections are named.
"""

import os
import stat
import struct
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from tokenlabel.dataset.hdf5_bytes import UNDEFINED, Bytes, read_at
from tokenlabel.dataset.hdf5_dataset import StoredDataset
from tokenlabel.dataset.hdf5_heap import Heap
from tokenlabel.dataset.hdf5_messages import (
    attribute_of,
    dtype_of,
    filters_of,
    link_of,
    shape_of,
    storage_of,
)

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
#: Messages of an object header, by their numbers; others say nothing that is needed.
_SPACE, _LINKS, _TYPE, _LINK, _EXTERNAL, _LAYOUT = 1, 2, 3, 6, 7, 8
_FILTERS, _ATTRIBUTE, _MORE, _ATTRIBUTES = 11, 12, 16, 21
_USED = {_SPACE, _LINKS, _TYPE, _LINK, _EXTERNAL, _LAYOUT, _FILTERS, _ATTRIBUTE, _MORE, _ATTRIBUTES}
_MANY = {_LINK, _ATTRIBUTE, _MORE}
_LONGEST_HEADER = 1 << 20
_HEAD = struct.Struct("<BHB")  # of a message: number, size, flags


class InputFile(Mapping[str, StoredDataset]):
    """An HDF5 file open for reading: the datasets of its root group by name, in order of the names.

    A dataset is looked at when it is asked for: then KeyError where it is not there, ValueError
    where it is not what the format allows. Other objects may be there.

    Args:
        path: of the file.

    Raises:
        OSError: as the system does.
        ValueError: it is no such file, was cut short, or points to places outside of it.

    Attributes:
        filename: the path.
        attrs: the root's attributes: str, int, float and lists of them; None of other types.
        end: size of the file when it was closed.
    """

    def __init__(self, path: Path) -> None:
        self.filename = str(path)
        self._lock = threading.Lock()
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        # Non-blocking, so that a named pipe cannot hang its reader.
        self._handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
        self._open = weakref.finalize(self, os.close, self._handle)
        self._open.atexit = False
        try:
            status = os.fstat(self._handle)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")
            self.end = status.st_size
            self._read_root()
        except BaseException:
            self.close()
            raise

    def _read_root(self) -> None:
        messages = self._messages(self._superblock())
        self.attrs: dict[str, Any] = {}
        for name, value in map(attribute_of, self._all(messages, _ATTRIBUTE, _ATTRIBUTES)):
            if name in self.attrs:
                raise ValueError(f"it has two attributes {name!r}")
            self.attrs[name] = value
        links: dict[str, int] = {}
        for name, address in map(link_of, self._all(messages, _LINK, _LINKS)):
            if name in links:
                raise ValueError(f"it has two datasets {name!r}")
            links[name] = address
        self._links = dict(sorted(links.items()))

    def _superblock(self) -> int:
        """II.C: versions 2 and 3, which have checksums; the address of the root's header."""
        cursor = self.at(0, 48)
        cursor.expect(_SIGNATURE, "an HDF5 file")
        version, offsets, lengths, flags = cursor.take(4)
        if version not in (2, 3):
            raise ValueError(
                f"its superblock has version {version}, which has no checksum or is not known; "
                'h5py writes version 3 with libver=("v110", "v110")'
            )
        base, extension, end, root = struct.unpack("<4Q", cursor.take(32))
        cursor.check()
        if (offsets, lengths, flags, base, extension) != (8, 8, 0, 0, UNDEFINED):
            raise ValueError("its superblock is not that of a closed file without extensions")
        if end > self.end:
            raise ValueError(f"it was cut short: it must have {end} bytes, it has {self.end}")
        self.end = end
        return int(root)

    def _messages(self, address: int) -> dict[int, list[bytes]]:
        """IV.A.1.b: the messages that are used of an object header of version 2, by number."""
        head = self.at(address, 6)
        head.expect(b"OHDR\2", "an object header")
        flags = head.number(1)
        # Sizes of the parts before the messages: times, limits, the size of the messages.
        skip = 6 + 16 * bool(flags & 32) + 4 * bool(flags & 16)
        width = 1 << (flags & 3)
        size = self.at(address + skip, width).number(width)
        blocks = [(address, skip + width, size)]
        found: dict[int, list[bytes]] = {}
        total = 0
        while blocks:
            place, before, size = blocks.pop()
            total += size + 8  # an end to circles
            if total > _LONGEST_HEADER:
                raise ValueError("an object header is too long")
            block = self.at(place, before + size + 4)
            block.take(before + size)
            block.check()
            for kind, body in _split(block.data[before:-4], bool(flags & 4)):
                found.setdefault(kind, []).append(body)
                if kind == _MORE:
                    start, length = struct.unpack("<QQ", Bytes(body).take(16))
                    self.at(start, 4).expect(b"OCHK", "the rest of an object header")
                    if length < 8:
                        raise ValueError("an object header goes on in no bytes")
                    blocks.append((start, 4, length - 8))
        for kind, bodies in found.items():
            if kind not in _MANY and len(bodies) > 1:
                raise ValueError(f"an object header has two messages {kind}")
        return found

    def _all(self, messages: dict[int, list[bytes]], kind: int, info: int) -> Iterator[bytes]:
        """All links or attributes of an object: those in its header, and those in a heap."""
        yield from messages.get(kind, [])
        for body in messages.get(info, []):
            cursor = Bytes(body)
            cursor.expect(b"\0", "a list of links or attributes")
            # Where they are numbered, the number to come; an order by numbers is not used.
            cursor.take((8 if kind == _LINK else 2) * (cursor.number(1) & 1))
            heap, tree = struct.unpack("<QQ", cursor.take(16))
            if heap != UNDEFINED:
                yield from Heap(self.at, heap, kind == _LINK).objects(tree)

    def __getitem__(self, name: str) -> StoredDataset:
        address = self._links[name]
        try:
            messages = self._messages(address)
            if _EXTERNAL in messages:
                raise ValueError("its values lie in another file, which is not followed")
            try:
                space, kind, layout = (messages[kind][0] for kind in (_SPACE, _TYPE, _LAYOUT))
            except KeyError:
                raise ValueError("it is no dataset") from None
            shape, dtype = shape_of(space), dtype_of(Bytes(kind))
            if not shape or dtype is None:
                raise ValueError("it must be an array of numbers or of texts of fixed length")
            filters: tuple[int, ...] = ()
            if _FILTERS in messages:
                filters = filters_of(messages[_FILTERS][0], dtype.itemsize)
            storage = storage_of(layout, shape, dtype.itemsize)
            return StoredDataset(self.at, self.end, shape, dtype, filters, storage)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._links)

    def __len__(self) -> int:
        return len(self._links)

    def __contains__(self, name: object) -> bool:
        return name in self._links

    def at(self, offset: int, size: int) -> Bytes:
        """Bytes of the file, all of them."""
        if offset + size > self.end:
            raise ValueError(f"bytes {offset} to {offset + size} lie outside the file: cut short?")
        if hasattr(os, "pread"):
            data = read_at(self.fileno(), size, offset)
        else:  # Windows
            with self._lock:
                os.lseek(self.fileno(), offset, os.SEEK_SET)
                data = os.read(self.fileno(), size)
        if len(data) != size:
            raise ValueError(f"the file ends before byte {offset + size}: it was cut short")
        return Bytes(data)

    def fileno(self) -> int:
        """The open file's descriptor, which stays this object's."""
        if not self._open.alive:
            raise ValueError(f"{self.filename} is closed")
        return self._handle

    def close(self) -> None:
        """Close the file."""
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _split(block: bytes, numbered: bool) -> Iterator[tuple[int, bytes]]:
    """The messages in a block of an object header."""
    head = 6 if numbered else 4
    place, end = 0, len(block)
    while place + head <= end:
        kind, size, flags = _HEAD.unpack_from(block, place)
        start = place + head
        place = start + size
        if place > end:
            raise ValueError("a message of an object header ends too early")
        if kind in _USED:
            if flags & 2:
                raise ValueError("a part of an object header is kept in another place")
            yield kind, block[start:place]
