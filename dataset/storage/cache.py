"""Local copies of a prefix's objects, each fetched once a machine."""

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import StorageError
from .remote_path import RemotePath


def cache_folder() -> Path:
    """Where files are kept that can be made again: TOKENLABEL_CACHE, or ~/.cache/tokenlabel."""
    return Path(os.environ.get("TOKENLABEL_CACHE") or Path.home() / ".cache" / "tokenlabel")


class Cache(NamedTuple):
    """Where copies are kept, and how many bytes of them; those used longest ago are deleted."""

    folder: Path
    limit: int


@dataclass(frozen=True, order=True)
class CachedPath(RemotePath):
    """A prefix as it was when it was listed, or an object below it, read from a local copy.

        root = CachedPath.listed("s3://bucket/labels/train", Cache(cache_folder(), 10 << 30))
        (root / "index").local()  # the path of the copy, made on first use

    The copy is of the very object that was listed, by its etag; one process of a machine fetches
    it, others wait. May be pickled: nothing is listed again.

    Attributes:
        cache: where the copies are; None: there are none, and reading asks the store.
        listing: `objects` of the prefix.
    """

    cache: Cache | None = field(compare=False, repr=False)
    listing: dict[str, tuple[int, str]] = field(compare=False, repr=False)

    @classmethod
    def listed(cls, root: RemotePath, cache: Cache | None) -> "CachedPath":
        """A prefix, with one request for each thousand objects of it."""
        return cls(root.url, cache, root.objects())

    def __truediv__(self, name: str) -> "CachedPath":
        return CachedPath(super().__truediv__(name).url, self.cache, self.listing)

    @property
    def parent(self) -> "CachedPath":
        """The prefix."""
        return CachedPath(super().parent.url, self.cache, self.listing)

    def objects(self) -> dict[str, tuple[int, str]]:
        """What was listed."""
        return self.listing

    def iterdir(self) -> Iterable["CachedPath"]:
        """What was listed, in order."""
        return (self / name for name in sorted(self.listing))

    def size(self) -> int:
        """Bytes of the object when it was listed."""
        return self._listed()[0]

    def _listed(self) -> tuple[int, str]:
        try:
            return self.listing[self.name]
        except KeyError:
            raise FileNotFoundError(f"{self} is not there") from None

    def place(self) -> Path:
        """Where the copy is, or would be; of an object that is not there, of one derived."""
        assert self.cache is not None
        what = self.listing.get(self.name) or sorted(self.listing.items())
        text = f"{self.url}\n{what}"
        return self.cache.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}-{self.name}"

    def local(self) -> Path:
        """The copy, which is fetched where it is not there yet.

        Raises:
            FileNotFoundError: the object was not listed, and nothing was put in its place.
            StorageError: it has changed since; the cache cannot be written. StoreError: the store
                refuses.
        """
        from filelock import FileLock

        place = self.place()
        if _used(place):
            return place
        size, etag = self._listed()
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = place.with_name(f".{place.name}.lock")
            with FileLock(lock):
                if not _used(place):
                    self._make_room(size)
                    self._fetch(place, size, etag)
                lock.unlink(missing_ok=True)  # who waits for it looks for the copy first
        except OSError as error:
            raise StorageError(
                f"{self} cannot be kept in {place.parent}: {error}. Remedy: room or permissions "
                "there, another folder in TOKENLABEL_CACHE, or LabelStore(..., cache=None)"
            ) from error
        return place

    def _fetch(self, place: Path, size: int, etag: str) -> None:
        part = place.with_name(f"{place.name}.part")
        try:
            facts: dict[str, Any] = RemotePath(self.url).download(part)
            if (facts["size"], facts["e_tag"]) != (size, etag) or part.stat().st_size != size:
                raise EOFError
            os.replace(part, place)
        except (EOFError, FileNotFoundError) as error:
            raise StorageError(
                f"{self} has changed since it was listed. Remedy: wait for the job that writes "
                "there, and open the labels again"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Delete copies, those used longest ago first, so that the limit holds with one more."""
        assert self.cache is not None
        found = []
        for entry in os.scandir(self.cache.folder):
            with suppress(FileNotFoundError):
                status = entry.stat()
                found.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in found) + size
        for _, freed, path in sorted(found):
            if total <= self.cache.limit:
                break
            if freed:  # not a lock
                Path(path).unlink(missing_ok=True)
                total -= freed


def _used(place: Path) -> bool:
    """Whether a copy is there; if so, it is now the one used last."""
    try:
        os.utime(place)
    except FileNotFoundError:
        return False
    return True
