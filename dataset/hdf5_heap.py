"""Objects in a fractal heap of an HDF5 file, by the B-tree that lists them: many links, attributes.

HDF5 File Format Specification, version 3: III.A.2 (B-trees of version 2) and III.G (fractal heaps).
HDF5 has fixed sizes for the heaps and trees of groups and of attributes (H5Gpkg.h, H5Opkg.h,
H5HFhuge.c), in all releases; only these are read.
"""

import struct
from collections.abc import Callable, Iterator

from tokenlabel.dataset.hdf5_bytes import UNDEFINED, Bytes, lookup3

_NODE = 512
_WIDTH, _LARGEST_BLOCK = 4, 1 << 16
_LARGEST_MANAGED = 4096
_MOST_OBJECTS = 1 << 16
_MOST_HUGE = 1 << 24
#: Kinds of B-trees: of huge objects, of links by name, of attributes by name; bytes of a record.
_HUGE, _LINKS, _ATTRIBUTES = 1, 5, 8
_RECORDS = {_HUGE: 24, _LINKS: 11, _ATTRIBUTES: 17}


class Heap:
    """A heap of links or of attributes.

    Args:
        at: gives bytes of the file by address and size; ValueError outside of it.
        address: of the heap's header.
        links: whether it holds links, not attributes.
    """

    def __init__(self, at: Callable[[int, int], Bytes], address: int, links: bool) -> None:
        self._at, self._address = at, address
        self._kind = _LINKS if links else _ATTRIBUTES
        self._id_size = 7 if links else 8
        start, self._bits = (512, 32) if links else (1024, 40)
        head = at(address, 146)
        head.expect(b"FRHP\0" + struct.pack("<HHBI", self._id_size, 0, 2, 4096), "a heap")
        head.take(8)  # the next number of a huge object
        self._huge_tree = head.number(8)
        numbers = struct.unpack("<10Q", head.take(80))
        self._check_counts(numbers)
        head.expect(struct.pack("<HQQHH", _WIDTH, start, _LARGEST_BLOCK, self._bits, 1), "a heap")
        root, rows = head.number(8), head.number(2)
        head.check()
        most_rows = (_LARGEST_BLOCK // start).bit_length() + 1
        if rows > most_rows:
            raise ValueError(f"a heap has {rows} rows of blocks; {most_rows} are read")
        sizes = (
            [start]
            if rows == 0
            else [start << max(row - 1, 0) for row in range(rows) for _ in range(_WIDTH)]
        )
        addresses = (root,) if rows == 0 else self._indirect(root, len(sizes))
        self._blocks: list[tuple[int, int, int]] = []
        place = 0
        for block, size in zip(addresses, sizes, strict=True):
            if block != UNDEFINED:
                self._check_block(block, place, size)
                self._blocks.append((place, size, block))
            place += size
        if numbers[2] != place:
            raise ValueError(f"a heap spans {place} bytes, not {numbers[2]}")
        self._huge: dict[int, bytes] = {}

    @property
    def _offset_size(self) -> int:
        return self._bits // 8

    def _check_counts(self, numbers: tuple[int, ...]) -> None:
        """Free space, its manager, space, allocated, iterator; managed, huge, tiny objects."""
        free, _, space, allocated, iterator, managed, huge_size, huge, tiny_size, tiny = numbers
        if max(free, allocated, iterator) > space or space > 1 << 24:
            raise ValueError("the sizes of a heap contradict each other")
        if managed + huge > _MOST_OBJECTS or huge_size > _MOST_HUGE or tiny or tiny_size:
            raise ValueError(f"a heap has {managed}, {huge} and {tiny} objects")

    def _indirect(self, address: int, children: int) -> tuple[int, ...]:
        size = 13 + self._offset_size + 8 * children + 4
        block = self._at(address, size)
        block.expect(b"FHIB\0" + self._address.to_bytes(8, "little"), "a list of a heap's blocks")
        block.expect(bytes(self._offset_size), "the place of a list of a heap's blocks")
        found = struct.unpack(f"<{children}Q", block.take(8 * children))
        block.check()
        return found

    def _check_block(self, address: int, place: int, size: int) -> None:
        block = self._at(address, size)
        block.expect(b"FHDB\0" + self._address.to_bytes(8, "little"), "a block of a heap")
        block.expect(place.to_bytes(self._offset_size, "little"), "the place of a heap's block")
        check = block.place
        blank = block.data[:check] + bytes(4) + block.data[check + 4 :]
        if block.number(4) != lookup3(blank):
            raise ValueError("a block of a heap has a wrong checksum: it is damaged")

    def objects(self, tree: int) -> Iterator[bytes]:
        """All objects that a B-tree by name lists."""
        if self._huge_tree != UNDEFINED:
            for record in self._records(self._huge_tree, _HUGE):
                address, size, number = struct.unpack("<QQQ", record)
                if size > _MOST_HUGE or number in self._huge:
                    raise ValueError(f"a heap has an object of {size} bytes")
                self._huge[number] = self._at(address, size).data
        start = 4 if self._kind == _LINKS else 0
        for record in self._records(tree, self._kind):
            # Of an attribute, the flags of its message follow.
            if self._kind == _ATTRIBUTES and record[8] & ~5:
                raise ValueError("an attribute is shared")
            yield self._object(record[start : start + self._id_size])

    def _object(self, name: bytes) -> bytes:
        kind = name[0]
        if kind == 0x10:
            number = int.from_bytes(name[1:], "little")
            if number not in self._huge:
                raise ValueError("a heap lacks an object")
            return self._huge[number]
        if kind != 0:
            raise ValueError(f"a heap has an object of kind {kind}")
        offset = int.from_bytes(name[1 : 1 + self._offset_size], "little")
        size = int.from_bytes(name[1 + self._offset_size :], "little")
        head = 17 + self._offset_size  # of a block
        for place, length, address in self._blocks:
            if place + head <= offset and offset + size <= place + length:
                if not 1 <= size <= _LARGEST_MANAGED:
                    break
                return self._at(address + offset - place, size).data
        raise ValueError("an object lies outside its heap")

    def _records(self, address: int, kind: int) -> Iterator[bytes]:
        """All records of a B-tree of one level or two."""
        size = _RECORDS[kind]
        head = self._at(address, 38)
        head.expect(b"BTHD\0" + struct.pack("<BIH", kind, _NODE, size), "a B-tree")
        depth, split, merge, root, count, total = struct.unpack("<HBBQHQ", head.take(22))
        head.check()
        if (split, merge) != (100, 40) or depth > 1 or total > _MOST_OBJECTS:
            raise ValueError(f"a B-tree has {depth + 1} levels and {total} records")
        most = (_NODE - 10) // size
        if depth == 0:
            if count != total:
                raise ValueError(f"a B-tree has {count} records, not {total}")
            if root != UNDEFINED or count:
                yield from self._leaf(root, kind, count, most)
            return
        node = self._at(root, _NODE)
        node.expect(b"BTIN\0" + bytes([kind]), "a node of a B-tree")
        width = (most.bit_length() + 7) // 8
        if not 1 <= count <= (_NODE - 10 - 8 - width) // (size + 8 + width):
            raise ValueError(f"a node of a B-tree has {count} records")
        records = [node.take(size) for _ in range(count)]
        found = count
        for _ in range(count + 1):
            child, held = node.number(8), node.number(width)
            found += held
            yield from self._leaf(child, kind, held, most)
        node.check()
        if found != total:
            raise ValueError(f"a B-tree has {found} records, not {total}")
        yield from records

    def _leaf(self, address: int, kind: int, count: int, most: int) -> Iterator[bytes]:
        if not 1 <= count <= most:
            raise ValueError(f"a leaf of a B-tree has {count} records; it has room for {most}")
        node = self._at(address, _NODE)
        node.expect(b"BTLF\0" + bytes([kind]), "a leaf of a B-tree")
        records = [node.take(_RECORDS[kind]) for _ in range(count)]
        node.check()
        yield from records
