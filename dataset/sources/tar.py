"""Images in tars, read in place: tars as downloaded, tars of tars, and WebDataset's shards."""

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, ClassVar

from ...errors import ConfigError, ImageError, StorageError
from ..format.keys import EXTENSIONS
from ..storage.remote_path import RemotePath, as_path
from .ground_truth import ground_truth
from .image_source import Entry, size_fault

#: Bytes that one request for headers brings: those of a member, and small members that follow it.
_WINDOW = 4096
_WNID = re.compile(r"(n\d{8})_")
#: Where a sample's JSON says its class, in this order.
_CLASS_FIELDS = ("label", "cls", "class_id", "class", "wnid", "class_name")
_MOST_TEXT = 1 << 20
#: Objects that are read at the same time.
_AT_ONCE = 16


@dataclass(frozen=True)
class TarSource:
    """The images of tars, in the order in which they lie there.

    A tar in a tar is a class, as in ILSVRC2012_img_train.tar. Other images get their class, first
    match first: from `truth`; from a file of the same name that ends in `.cls`, or in `.json` with
    a field `label`, `cls`, `class_id`, `class`, `wnid` or `class_name`, as in WebDataset; from the
    folder that they are in; from the WordNet id that their name begins with.

    Attributes:
        name: what the user calls it.
        files: paths or URLs of the tars.
        truth: file of the classes, see `ground_truth`; empty for none.
    """

    name: str
    files: tuple[str, ...]
    truth: str = ""
    numbered: ClassVar[list[str] | None] = None
    in_blocks: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.name

    def parts(self) -> list[str]:
        """The tars."""
        return list(self.files)

    def scan(self, part: int) -> Iterator[Entry]:
        """The images of one tar, by its headers: nothing else of it is read but classes.

        Raises:
            ConfigError: it is no tar, or is damaged, compressed or cut short.
            StorageError: it cannot be read.
        """
        path = as_path(self.files[part])
        truth = ground_truth(self.truth) if self.truth else {}
        try:
            with closing(_opened(path)) as file:
                for group in _samples(_members(file)):
                    yield from self._entries(group, part, truth)
        except (tarfile.TarError, EOFError) as error:
            raise ConfigError(
                f"{path} must be a tar that is whole and not compressed: {error}. Remedy: download "
                "it again; unpack .tar.gz to .tar"
            ) from error
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error

    def _entries(self, group: list["_Member"], part: int, truth: dict[str, str]) -> Iterator[Entry]:
        images = [one for one in group if one.name.lower().endswith(EXTENSIONS)]
        # Of `1.jpg` and `1.mask.png` the first is the image.
        images = [one for one in images if one.ending in EXTENSIONS] or images
        named = _stored_class(group)
        for one in images:
            folder, name = posixpath.split(one.name)
            found = truth.get(posixpath.splitext(name)[0]) or named or folder.partition("/")[0]
            if not found and (match := _WNID.match(name)):
                found = match[1]
            yield Entry(one.name, found, part, one.start, one.size)

    def read(self, entries: Sequence[Entry]) -> Iterator[bytes | ImageError]:
        """The bytes of each image; of a store, all of them are fetched first, near ones at once.

        Raises:
            StorageError: a tar cannot be read, or has changed since it was scanned.
        """
        by_part: dict[int, list[Entry]] = {}
        for entry in entries:
            if not size_fault(entry.size):
                by_part.setdefault(entry.part, []).append(entry)
        if any(isinstance(as_path(self.files[part]), RemotePath) for part in by_part):
            with ThreadPoolExecutor(min(len(by_part), _AT_ONCE)) as pool:
                pieces = dict(zip(by_part, pool.map(self._pieces, by_part.values()), strict=True))
        else:
            pieces = {part: self._pieces(group) for part, group in by_part.items()}
        for entry in entries:
            yield size_fault(entry.size) or next(pieces[entry.part])

    def _pieces(self, entries: list[Entry]) -> Iterator[bytes]:
        """Bytes of images of one tar."""
        path = as_path(self.files[entries[0].part])
        try:
            if isinstance(path, RemotePath):
                starts, sizes = [one.start for one in entries], [one.size for one in entries]
                return iter(path.ranges(starts, sizes))
            return _pread(path, entries)
        except FileNotFoundError as error:
            raise StorageError(_gone(path)) from error
        except EOFError as error:
            raise StorageError(f"{error}: it has changed since it was scanned") from error


def _pread(path: Path, entries: list[Entry]) -> Iterator[bytes]:
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise StorageError(_gone(path, error.strerror)) from error
    try:
        with os.fdopen(handle, "rb", buffering=0) as file:
            for one in entries:
                file.seek(one.start)
                data = file.read(one.size)
                while len(data) < one.size and (more := file.read(one.size - len(data))):
                    data += more
                if len(data) < one.size:
                    raise StorageError(
                        f"{path} ends before byte {one.start + one.size}: it has changed since it "
                        "was scanned. Remedy: run the same command again, which scans it"
                    )
                yield data
    except OSError as error:
        raise StorageError(_gone(path, error.strerror)) from error


def _gone(path: Path | RemotePath, reason: str | None = "it is not there") -> str:
    return (
        f"{path} cannot be read: {reason}. That is the storage's fault, not the image's. Remedy: "
        "fix the disk or the mount, the same on every node, and run the same command again"
    )


@dataclass(frozen=True)
class _Member:
    name: str
    start: int
    size: int
    text: str = ""  # of a file that may name the class

    @property
    def base(self) -> str:
        """The name of the sample that it belongs to, as WebDataset divides names."""
        folder, name = posixpath.split(self.name)
        return posixpath.join(folder, name.partition(".")[0])

    @property
    def ending(self) -> str:
        """What follows that name, in lower case."""
        return self.name[len(self.base) :].lower()


def _members(file: IO[bytes], prefix: str = "", end: int | None = None) -> Iterator[_Member]:
    """The files of a tar that begins where `file` stands, those of tars in it too."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            start, size = member.offset_data, member.size
            if end is not None and start + size > end:
                raise EOFError(f"{prefix} in it has no end")
            if not member.isreg() or member.issparse():
                continue
            name = prefix + member.name.removeprefix("./")
            if name.endswith(".tar") and not prefix:
                file.seek(start)
                yield from _members(file, f"{name.removesuffix('.tar')}/", start + size)
                continue
            text = b""
            if name.endswith((".cls", ".json")) and size <= _MOST_TEXT:
                file.seek(start)
                text = file.read(size)
            yield _Member(name, start, size, text.decode(errors="replace").strip())


def _samples(members: Iterator[_Member]) -> Iterator[list[_Member]]:
    for _, group in groupby(members, key=lambda member: member.base):
        yield list(group)


def _stored_class(group: list[_Member]) -> str:
    """The class that the small files of a sample name; empty where none does."""
    texts = {one.ending: one.text for one in group if one.text}
    if ".cls" in texts:
        return texts[".cls"]
    try:
        found: Any = json.loads(texts.get(".json", "null"))
    except ValueError:
        return ""
    if isinstance(found, dict):
        values = (found.get(name) for name in _CLASS_FIELDS)
        found = next((value for value in values if isinstance(value, str | int)), "")
    return str(found) if isinstance(found, str | int) else ""


def _opened(path: Path | RemotePath) -> IO[bytes]:
    if isinstance(path, RemotePath):
        return path.open(_WINDOW)
    return open(path, "rb", buffering=_WINDOW)
