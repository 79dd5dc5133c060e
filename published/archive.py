"""A published label set where it lies: a folder, a .zip or a .tar, with a small file an image.

Nothing is unpacked. The set is listed once, in some 30 bytes a file (and its name, in a folder);
then a file is read by its place.
"""

import hashlib
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..errors import ConfigError, FormatError

SUFFIX = ".pt"
#: Larger files are none of a label map: so that none exhausts the memory.
MOST_BYTES = 4 << 20
_LISTED = 6
_SAMPLED = 64
_DEFLATED = 8
#: Records of a zip: signature, then the fields that are used, with their offsets skipped over.
_END = struct.Struct("<4s6xHIIH")  # entries, size and offset of the directory, comment
_END_64 = struct.Struct("<4s28xQQQ")
_LOCATOR = struct.Struct("<4s4xQ4x")
_ENTRY = struct.Struct("<4s4xHH4xIIIHHH8xI")
_LOCAL = struct.Struct("<4s22xHH")
_FULL_32, _MOST_COMMENT = 0xFFFFFFFF, 0xFFFF


class _Member(NamedTuple):
    """A label file: its name, and where its bytes are."""

    name: str
    place: int
    size: int
    packed: int = 0
    crc: int = 0
    is_deflated: bool = False


#: What is kept of each: `hash_stem` instead of the name.
_ROW = np.dtype("<u8, <i8, <i8, <i8, <u4, ?")
_ROW.names = ("stem", *_Member._fields[1:])


class LabelFiles:
    """The label files of a set, found by the names of the images.

        with LabelFiles(Path("label_top5_train_nfnet.zip")) as files:
            row = files.find(hash_stems(["n01440764/n01440764_10026.JPEG"]))[0]
            data = files.read(row)

    A label's file is called like its image up to the first dot, and lies in a folder of the same
    name; what is above that folder does not count.

    Args:
        path: the folder or the archive.

    Attributes:
        path: the same.
        sample: int64 [up to 64], rows evenly spaced over the set in the order of `hash_stem`.
        digest: hex sha256 of what names and sizes of all files there are, and of the bytes of the
            sample; the same for a folder and an archive of it. It does not cover the bytes of the
            others: a set of which a few files were exchanged for some of equal size has the same.

    Raises:
        ConfigError: it is no folder and no archive, cannot be read, or holds no label file.
        FormatError: the archive is damaged, or two files are the label of one image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names = bytearray()  # of a folder's files, each followed by a NUL
        self._archive: IO[bytes] | None = None if path.is_dir() else _open(path)
        try:
            self._list()
        except OSError as error:
            self.__exit__()
            raise ConfigError(
                f"all of a label set must be readable; {error.filename or path} is not: "
                f"{error.strerror}. Remedy: check the permissions and the disk"
            ) from error
        except BaseException:
            self.__exit__()
            raise

    def _list(self) -> None:
        self._is_zip = self._archive is not None and _is_zip(self._archive)
        rows = ((hash_stem(member.name), *member[1:]) for member in self._members())
        self._table = np.fromiter(rows, _ROW)
        if not len(self._table):
            raise ConfigError(
                f"{self.path} holds no label file: looked for names that end in {SUFFIX}, in all "
                "folders. Remedy: check the path"
            )
        self._table.sort(order="stem")
        stems = self._table["stem"]
        if twice := {*stems[1:][stems[1:] == stems[:-1]].tolist()}:
            names = (m.name for m in self._members() if hash_stem(m.name) in twice)
            raise FormatError(
                f"{self.path}: an image must have one label file, which is called like it up to "
                f"the first dot; {len(twice)} have more: {', '.join(islice(names, _LISTED))}, … "
                "Remedy: leave out all but the right one"
            )
        last = len(stems) - 1
        self.sample = np.unique(np.linspace(0, last, min(_SAMPLED, len(stems)), dtype=int))
        digest = hashlib.sha256(stems.tobytes() + self._table["size"].tobytes())
        for row in self.sample.tolist():
            with suppress(ValueError):  # a damaged file: its image will get an error
                digest.update(self.read(row))
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._table)

    def __enter__(self) -> "LabelFiles":
        return self

    def __exit__(self, *_: object) -> None:
        if self._archive:
            self._archive.close()

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Rows of the label files with these `hash_stem`, uint64 [n]; int64 [n], -1: none."""
        stems = self._table["stem"]
        rows = np.searchsorted(stems, hashes).clip(max=len(stems) - 1)
        return np.where(stems[rows] == hashes, rows, -1)

    def name(self, row: int) -> str:
        """The name of a label file, below the folder or in the archive, which is listed again."""
        stem, place = self._table[row].item()[:2]
        if self._archive is None:
            return os.fsdecode(bytes(self._names[place : self._names.index(0, place)]))
        return next(member.name for member in self._members() if hash_stem(member.name) == stem)

    def read(self, row: int) -> bytes:
        """The bytes of a label file.

        Raises:
            ValueError: they are not there, or not those that were stored. Says what is wrong.
        """
        _, place, size, packed, crc, is_deflated = self._table[row].item()
        if size > MOST_BYTES:
            raise ValueError(f"it has {size} bytes, more than a label map can ({MOST_BYTES})")
        if self._archive is None:
            with open(self.path / self.name(row), "rb") as file:
                return file.read(MOST_BYTES)
        if not self._is_zip:
            return self._pread(place, size)
        signature, name_size, extra = _LOCAL.unpack(self._pread(place, _LOCAL.size))
        if signature != b"PK\3\4" or packed > MOST_BYTES:
            raise ValueError("the zip holds no file where its directory says so")
        data = self._pread(place + _LOCAL.size + name_size + extra, packed)
        if is_deflated:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = inflater.decompress(data, size)
            except zlib.error as error:
                raise ValueError(f"it cannot be inflated: {error}") from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise ValueError("its checksum in the zip is another")
        return data

    def _pread(self, place: int, size: int) -> bytes:
        assert self._archive is not None
        data = os.pread(self._archive.fileno(), size, place)
        if len(data) != size:
            raise ValueError("the archive ends inside it")
        return data

    def _members(self) -> Iterator[_Member]:
        if self._archive is None:
            found: Any = self._folder_members()
        else:
            found = _zip_members(self._archive) if self._is_zip else _tar_members(self._archive)
        try:
            for member in found:
                file = member.name.rpartition("/")[2]
                if file.endswith(SUFFIX) and not file.startswith("."):
                    yield member
        except (tarfile.TarError, struct.error, ValueError, EOFError) as error:
            raise FormatError(
                f"{self.path} is damaged or was cut short: {error}. Remedy: copy or download it "
                "again, and compare its size and checksum"
            ) from error

    def _folder_members(self) -> Iterator[_Member]:
        self._names.clear()

        def refuse(error: OSError) -> None:  # os.walk would leave the folder out
            raise error

        for folder, _, names in os.walk(self.path, onerror=refuse, followlinks=True):
            for name in names:
                path = os.path.join(folder, name)
                place, inner = len(self._names), os.path.relpath(path, self.path)
                if name.endswith(SUFFIX):
                    self._names += os.fsencode(inner) + b"\0"
                    yield _Member(inner.replace(os.sep, "/"), place, os.stat(path).st_size)


def hash_stem(name: str) -> int:
    """64 bits that say which image a label's or an image's name is of.

    Names are equal that end in the same folder and file, up to the file's first dot.
    """
    folders, _, file = name.rpartition("/")
    stem = f"{folders.rpartition('/')[2]}/{file.partition('.')[0]}"
    digest = hashlib.blake2b(stem.encode(errors="surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def hash_stems(names: Sequence[str]) -> np.ndarray:
    """`hash_stem` of many, uint64 [n]."""
    return np.fromiter(map(hash_stem, names), "<u8", len(names))


def _open(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ConfigError(
            f"a label set must be a folder, a .zip or a .tar; {path} cannot be read: "
            f"{error.strerror}. Remedy: check the path"
        ) from error


def _is_zip(file: IO[bytes]) -> bool:
    if file.read(2) == b"PK":
        return True
    file.seek(0)
    try:
        tarfile.open(fileobj=file, mode="r:").close()
        return False
    except tarfile.TarError as error:
        raise ConfigError(
            f"a label set must be a folder, a .zip or a .tar that is not compressed; {file.name} "
            "is none of these. Remedy: gunzip it, or unpack it"
        ) from error


def _tar_members(file: IO[bytes]) -> Iterator[_Member]:
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.name.endswith(SUFFIX) and (member.islnk() or member.issym()):
                raise FormatError(
                    f"{file.name}: labels must be stored as files; {member.name} is a link to "
                    f"{member.linkname}. Remedy: pack the set again, with tar --dereference "
                    "--hard-dereference"
                )
            if member.isreg():
                yield _Member(member.name, member.offset_data, member.size)
        # tarfile takes any header that it cannot read for the end.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("its end mark is missing")


def _zip_members(file: IO[bytes]) -> Iterator[_Member]:
    """By the directory of the archive. `zipfile` needs 700 bytes of memory for each entry."""
    size = file.seek(0, os.SEEK_END)
    tail_start = max(size - _END.size - _MOST_COMMENT, 0)
    file.seek(tail_start)
    tail = file.read()
    if (at := tail.rfind(b"PK\5\6")) < 0:
        raise EOFError("its directory, which is at the end, is missing")
    _, count, length, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    if tail[max(at - _LOCATOR.size, 0) :][:4] == b"PK\6\7":  # numbers of 64 bits
        _, end = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        file.seek(end)
        signature, count, length, start = _END_64.unpack(file.read(_END_64.size))
        if signature != b"PK\6\6":
            raise ValueError("its directory is damaged")
    if start + length != end:
        raise ValueError(f"its directory must end at byte {end}, it ends at {start + length}")
    file.seek(start)
    for _ in range(count):
        signature, flags, method, crc, packed, whole, *sizes, place = _ENTRY.unpack(
            file.read(_ENTRY.size)
        )
        if signature != b"PK\1\2":
            raise ValueError("its directory is damaged")
        name = file.read(sizes[0]).decode("utf-8" if flags & 0x800 else "cp437")
        extra, _ = file.read(sizes[1]), file.read(sizes[2])
        whole, packed, place = _wide(extra, whole, packed, place)
        if flags & 1 or method not in (0, _DEFLATED):
            raise ValueError(f"{name} is encrypted, or packed by method {method}, not deflate")
        if method == 0 and packed != whole:
            raise ValueError(f"the sizes of {name} differ")
        yield _Member(name, place, whole, packed, crc, method == _DEFLATED)


def _wide(extra: bytes, *values: int) -> list[int]:
    """Values of 32 bits, or those of 64 that the extra field holds for each that is full."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{size // 8}Q", extra, 4))
            return [next(wide, value) if value == _FULL_32 else value for value in values]
        extra = extra[4 + size :]
    return [*values]
