"""Where an HDF5 file has checksums over its own structure, and how to make them right again."""

import re
import struct
from typing import NamedTuple

from tokenlabel.dataset.hdf5_bytes import lookup3

_SIGNATURES = re.compile(
    rb"OHDR|OCHK|FRHP|FHDB|FHIB|BTHD|BTIN|BTLF|FAHD|FADB|EAHD|EAIB|EASB|EADB|FSHD|FSSE"
)
_LONGEST = 4096


class Block(NamedTuple):
    """A part of a file with a checksum over it: its bounds, and where the checksum is."""

    first: int
    last: int
    check: int

    @property
    def content(self) -> tuple[int, int]:
        """Bounds of what can be changed so that the checksum is still found."""
        if self.check + 4 == self.last:
            return self.first, self.check
        return self.check + 4, self.last


def checksummed(data: bytes) -> list[Block]:
    """The superblock and all parts of the file with a checksum, as they are found to be right."""
    starts = [0, *(match.start() for match in _SIGNATURES.finditer(data))]
    blocks = []
    for first, following in zip(starts, [*starts[1:], len(data)], strict=True):
        if block := _block(data, first, min(following, first + _LONGEST)):
            blocks.append(block)
    return blocks


def _block(data: bytes, first: int, limit: int) -> Block | None:
    in_head = data.startswith(b"FHDB", first)
    for check in range(first + 8, limit - 3) if not in_head else ():
        if lookup3(data[first:check]) == struct.unpack_from("<I", data, check)[0]:
            return Block(first, check + 4, check)
    # A direct block of a heap has it in its head, taken as 0.
    for check in range(first + 17, min(first + 24, limit)) if in_head else ():
        for size in (512, 1024, 2048, 4096):
            whole = data[first : first + size]
            head = check - first
            blank = whole[:head] + bytes(4) + whole[head + 4 :]
            if lookup3(blank) == struct.unpack_from("<I", data, check)[0]:
                return Block(first, first + size, check)
    return None


def repair(data: bytearray, block: Block) -> None:
    """Set the checksum of a block that was changed."""
    if block.check + 4 == block.last:
        number = lookup3(bytes(data[block.first : block.check]))
    else:
        data[block.check : block.check + 4] = bytes(4)
        number = lookup3(bytes(data[block.first : block.last]))
    struct.pack_into("<I", data, block.check, number)
