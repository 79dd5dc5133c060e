"""Bytes of an HDF5 file: a cursor that never runs over their end, and the checksum over them."""

import os
import struct

#: What HDF5 writes for an address of nothing.
UNDEFINED = 0xFFFFFFFFFFFFFFFF
_MASK = 0xFFFFFFFF


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Bytes of an open file; fewer where it ends, but not where the system just gives fewer."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


class Bytes:
    """A cursor over some bytes; reading past their end is a ValueError."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, size: int) -> bytes:
        """The next bytes."""
        start = self.place
        self.place = stop = start + size
        if stop > len(self.data):
            raise ValueError("a part of HDF5's structure ends too early")
        return self.data[start:stop]

    def number(self, size: int) -> int:
        """The next unsigned number."""
        return int.from_bytes(self.take(size), "little")

    def expect(self, wanted: bytes, what: str) -> None:
        """Raise ValueError unless these bytes follow."""
        if (found := self.take(len(wanted))) != wanted:
            raise ValueError(f"{what} must begin with {wanted!r}, not with {found!r}")

    def check(self) -> None:
        """Raise ValueError unless the checksum of all before it follows."""
        found = lookup3(self.data[: self.place])
        if self.number(4) != found:
            raise ValueError(f"{self.data[:4]!r} has a wrong checksum: it is damaged")


def lookup3(data: bytes) -> int:
    """Bob Jenkins's hash lookup3 (hashlittle, 2006) with the initial value 0, as HDF5 uses it."""
    mask = _MASK
    a = b = c = (0xDEADBEEF + len(data)) & mask
    if not data:
        return c
    rounds = (len(data) - 1) // 12
    padded = data.ljust(12 * rounds + 12, b"\0")
    words: tuple[int, ...] = struct.unpack(f"<{3 * rounds + 3}I", padded)
    for place in range(0, 3 * rounds, 3):
        c = c + words[place + 2] & mask
        b = b + words[place + 1] & mask
        a = (a + words[place] - c ^ (c << 4 | c >> 28)) & mask
        c = c + b & mask
        b = (b - a ^ (a << 6 | a >> 26)) & mask
        a = a + c & mask
        c = (c - b ^ (b << 8 | b >> 24)) & mask
        b = b + a & mask
        a = (a - c ^ (c << 16 | c >> 16)) & mask
        c = c + b & mask
        b = (b - a ^ (a << 19 | a >> 13)) & mask
        a = a + c & mask
        c = (c - b ^ (b << 4 | b >> 28)) & mask
        b = b + a & mask
    a, b, c = a + words[-3] & mask, b + words[-2] & mask, c + words[-1] & mask
    c = (c ^ b) - (b << 14 & mask | b >> 18) & mask
    a = (a ^ c) - (c << 11 & mask | c >> 21) & mask
    b = (b ^ a) - (a << 25 & mask | a >> 7) & mask
    c = (c ^ b) - (b << 16 & mask | b >> 16) & mask
    a = (a ^ c) - (c << 4 & mask | c >> 28) & mask
    b = (b ^ a) - (a << 14 & mask | a >> 18) & mask
    return (c ^ b) - (b << 24 & mask | b >> 8) & mask
