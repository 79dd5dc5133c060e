"""`RemotePath`: an object in a store, or a prefix of objects, used as pathlib's paths are."""

import fnmatch
import io
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, wraps
from pathlib import Path
from typing import IO, Any, TypeVar, cast
from urllib.parse import urlsplit

from ...errors import JobError, StoreError
from . import forked

#: What the text of a remote path begins with.
SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "adl", "https", "http")
#: A request that fails for a moment (500, 503, reset, cut short) is repeated for so long; one that
#: does not answer counts as failed after `_SILENCE`.
_PATIENCE, _SILENCE = timedelta(seconds=30), timedelta(seconds=10)
#: Seconds before a request is repeated that was not answered.
_PAUSES = (0.1, 0.3, 1.0, 2.0, 4.0)
#: Ranges of one object that are so near to one another are one request.
_GAP = 64 << 10
#: Bytes that requests fetch at most, so that each ends within `_SILENCE`.
_PIECE = 8 << 20


#: The process that has made requests first.
_owner: dict[str, int] = {}

M = TypeVar("M", bound=Callable[..., Any])


def _request(method: M) -> M:
    """A method that asks the store; in a forked process, through another one."""

    @wraps(method)
    def asked(path: "RemotePath", *args: Any, **options: Any) -> Any:
        if _owner.setdefault("pid", os.getpid()) == os.getpid():
            end = time.monotonic() + _PATIENCE.total_seconds()
            for pause in _PAUSES:
                try:
                    return method(path, *args, **options)
                except StoreError as error:
                    if not _is_unanswered(error) or time.monotonic() > end:
                        raise
                time.sleep(pause)
            return method(path, *args, **options)
        return forked.ask(RemotePath(path.url), method.__name__, *args, **options)

    return cast(M, asked)


def _is_unanswered(error: StoreError) -> bool:
    """Whether a connection ended before the answer: obstore repeats some of these requests only."""
    text = _reason(error.__cause__)
    return "HTTP error" in text and "retries" not in text


@dataclass(frozen=True, order=True)
class RemotePath:
    """An object of S3 (`s3://bucket/…`), GCS (`gs://`), Azure (`az://container/…`), a web server.

        path = RemotePath("s3://bucket/imagenet") / "train-0000.tar"
        path.ranges([512], [1024])

    Needs the extra `cloud` (obstore), which takes credentials, region and endpoint from the
    environment, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL. Requests that fail for a moment are
    repeated for half a minute.

    May be used in processes that were forked from one that has used it, as DataLoader's workers
    are: see `forked`.

    Every method raises FileNotFoundError for an object that is not there, and `StoreError` for what
    is the store's fault: credentials, a bucket that is not there, requests that go on failing.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        raise TypeError(f"{self.url} is no local file")

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """What follows the last `/`."""
        return posixpath.basename(self.url.rstrip("/"))

    @property
    def parent(self) -> "RemotePath":
        """Without the name."""
        return RemotePath(posixpath.dirname(self.url.rstrip("/")))

    def absolute(self) -> "RemotePath":
        """Itself."""
        return self

    def with_name(self, name: str) -> "RemotePath":
        """With another name."""
        return self.parent / name

    @_request
    def facts(self) -> dict[str, Any]:
        """What the store knows of the object: `size`, `e_tag` and `last_modified`."""
        with self._store() as (obstore, store, key):
            return dict(obstore.head(store, key))

    def size(self) -> int:
        """Bytes of the object."""
        found: int = self.facts()["size"]
        return found

    def is_file(self) -> bool:
        """Whether the object is there."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def exists(self) -> bool:
        """Whether the object is there."""
        return self.is_file()

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a prefix is there with its first object."""

    @_request
    def start(self, size: int) -> tuple[bytes, int]:
        """The first `size` bytes of the object, or all, and how many it has: one request."""
        with self._store() as (obstore, store, key):
            try:
                found = obstore.get(store, key, options={"range": (0, size)})
            except obstore.exceptions.BaseError:
                if obstore.head(store, key)["size"]:
                    raise
                return b"", 0  # stores refuse ranges of an empty object
            return bytes(found.bytes()), found.meta["size"]

    @_request
    def read_bytes(self) -> bytes:
        """All bytes of the object."""
        with self._store() as (obstore, store, key):
            return bytes(obstore.get(store, key).bytes())

    @_request
    def download(self, path: Path) -> dict[str, Any]:
        """Write the object to a local file, a request for each 8 MiB; returns its `facts`.

        Raises:
            EOFError: the object became shorter meanwhile.
        """
        with self._store() as (obstore, store, key), open(path, "wb") as file:
            facts = dict(obstore.head(store, key))
            for at in range(0, facts["size"], _PIECE):
                file.writelines(self.ranges([at], [min(_PIECE, facts["size"] - at)]))
        return facts

    @_request
    def ranges(self, starts: Sequence[int], sizes: Sequence[int], gap: int = _GAP) -> list[bytes]:
        """Bytes of the object, a piece for each range; one request for those `gap` bytes apart.

        Raises:
            EOFError: the object ends before the end of a range.
        """
        found = [b""] * len(starts)
        with self._store() as (obstore, store, key):
            for part in _portions(starts, sizes):
                numbers, firsts, lengths = zip(*part, strict=True)
                pieces = obstore.get_ranges(
                    store, key, starts=firsts, lengths=lengths, coalesce=gap
                )
                for number, piece in zip(numbers, map(bytes, pieces), strict=True):
                    found[number] = found[number] + piece if found[number] else piece
        if list(map(len, found)) != list(sizes):
            raise EOFError(
                f"{self} ends before byte {max(map(sum, zip(starts, sizes, strict=True)))}"
            )
        return found

    def open(self, buffer: int = 1 << 20, size: int | None = None) -> IO[bytes]:
        """The object as a file to seek and read in, `buffer` bytes at a time or more.

        With `buffer` 0, each read is a request. With `size`, the object's, it is not asked for.
        """
        raw: Any = _Object(self, self.size() if size is None else size)
        return io.BufferedReader(raw, buffer) if buffer else raw

    @_request
    def iterdir(self) -> Iterable["RemotePath"]:
        """Objects and prefixes directly below it, in order; none where there is nothing.

        Raises as the class says; a web server lists nothing, which is an error as well.
        """
        prefixes, objects = self._below()
        return [self / name for name in sorted({*prefixes, *objects})]

    def glob(self, pattern: str) -> Iterable["RemotePath"]:
        """Those of `iterdir` whose names match a pattern."""
        return [path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern)]

    @_request
    def objects(self) -> dict[str, tuple[int, str]]:
        """Bytes and etag of the objects directly below it, by name."""
        return self._below()[1]

    def _below(self) -> tuple[list[str], dict[str, tuple[int, str]]]:
        """Names of the prefixes directly below it, and `objects`."""
        with self._store() as (obstore, store, key):
            found = obstore.list_with_delimiter(store, f"{key}/" if key else "")
        objects = {
            posixpath.basename(one["path"]): (one["size"], str(one["e_tag"]))
            for one in found["objects"]
            if one["path"] != key  # consoles store an empty object `prefix/`
        }
        return [posixpath.basename(path) for path in found["common_prefixes"]], objects

    @_request
    def walk(self) -> Iterable[tuple[str, int]]:
        """(path below this one, bytes) of all objects below it, sorted by their UTF-8 bytes."""
        prefix = f"{key}/" if (key := _connected(self.url)[2]) else ""
        last, pauses = None, iter(_PAUSES)
        while True:
            try:
                with self._store() as (obstore, store, _):
                    for block in obstore.list(store, prefix or None, offset=last, chunk_size=1000):
                        for one in block:
                            last = one["path"]
                            if last != key:
                                yield last[len(prefix) :], one["size"]
                return
            except StoreError as error:
                if not _is_unanswered(error) or (pause := next(pauses, None)) is None:
                    raise
            time.sleep(pause)

    @_request
    def put(self, data: bytes | Path, create: bool = False, match: str | None = None) -> str:
        """Store an object in one request; returns its etag.

        Args:
            data: its bytes, or the local file that holds them.
            create: only if there is no such object yet.
            match: only if the object has this etag.

        Raises:
            FileExistsError: the object is there already, or has another etag.
        """
        content = data.read_bytes() if isinstance(data, Path) else data
        mode: Any = "create" if create else {"e_tag": match} if match else "overwrite"
        # A megabyte a second is enough: a large object must not count as one without an answer.
        with self._store(1 + len(content) // (_PIECE + 1)) as (obstore, store, key):
            return str(obstore.put(store, key, content, mode=mode, use_multipart=False)["e_tag"])

    @_request
    def replace(self, target: "AnyPath") -> None:
        """Rename the object; one of that name is replaced."""
        with self._store() as (obstore, store, key):
            obstore.copy(store, key, _connected(str(target))[2], overwrite=True)
        self.unlink()

    @_request
    def unlink(self) -> None:
        """Delete the object, if it is there."""
        with self._store() as (obstore, store, key):
            obstore.delete(store, key)

    @contextmanager
    def _store(self, patience: int = 1) -> Iterator[tuple[Any, Any, str]]:
        """obstore, the store of this path and its key there; its errors as the class says."""
        obstore, store, key = _connected(self.url, patience)
        errors = obstore.exceptions
        try:
            yield obstore, store, key
        except (errors.AlreadyExistsError, errors.PreconditionError) as error:
            raise FileExistsError(f"{self} is there already, or has changed") from error
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise StoreError(self._refused(error)) from error
            raise FileNotFoundError(f"{self} is not there") from error
        except NotImplementedError as error:
            raise StoreError(
                f"{self}: a web server lists nothing and keeps nothing. Remedy: name each file, or "
                "a pattern with braces; write to a folder, or to S3, GCS or Azure"
            ) from error
        except errors.BaseError as error:
            raise StoreError(self._refused(error)) from error

    def _refused(self, error: Exception) -> str:
        return (
            f"{self} cannot be used: {_reason(error).rstrip('.')}. Remedy: check the credentials, "
            "the bucket and the network, and run the same command again"
        )


class _Object(io.RawIOBase):
    """The bytes of an object, a request for each read."""

    def __init__(self, path: RemotePath, size: int) -> None:
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self._size - self._at), 0)
        if count:
            (buffer[:count],) = self._path.ranges([self._at], [count])
            self._at += count
        return count


def _portions(starts: Sequence[int], sizes: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Ranges, cut and grouped so that no request for one group gives more than `_PIECE` bytes.

    Each is the number of its range, its first byte and its bytes.
    """
    group, total = list[tuple[int, int, int]](), 0
    for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        for at in range(start, start + size, _PIECE):
            count = min(_PIECE, start + size - at)
            if group and total + count > _PIECE:
                yield group
                group, total = [], 0
            group.append((number, at, count))
            total += count
    if group:
        yield group


#: A file or folder wherever it is.
AnyPath = Path | RemotePath


def as_path(path: str | os.PathLike[str] | RemotePath) -> Path | RemotePath:
    """The path of a text: remote where it begins like a URL."""
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path)
    scheme, separator, _ = text.partition("://")
    return RemotePath(text) if separator and scheme.lower() in SCHEMES else Path(text)


def _connected(url: str, patience: int = 1) -> tuple[Any, Any, str]:
    """obstore, the store that a URL is in, and its key there; `patience` in times `_SILENCE`."""
    parts = urlsplit(url)
    depth = 1 if parts.scheme in ("az", "azure", "adl") else 0  # obstore: az://container/prefix
    names = parts.path.strip("/").split("/")
    root = "/".join([f"{parts.scheme}://{parts.netloc}", *names[:depth]])
    obstore, store = _store_of(root, patience)
    return obstore, store, "/".join(names[depth:])


@lru_cache
def _store_of(root: str, patience: int) -> tuple[Any, Any]:
    try:
        import obstore
        from obstore.store import from_url
    except ImportError as error:
        raise JobError(
            f"{root} needs the package obstore. Remedy: pip install 'tokenlabel[cloud]'"
        ) from error
    plain = root.startswith("http://") or os.environ.get("AWS_ENDPOINT_URL", "").startswith("http:")
    try:
        store = from_url(
            root,
            client_options={"timeout": patience * _SILENCE, "allow_http": plain},
            retry_config={"max_retries": 100, "retry_timeout": _PATIENCE},
        )
    except obstore.exceptions.BaseError as error:
        raise StoreError(f"{root} names no store: {_reason(error)}. Remedy: check it") from error
    return obstore, store


def _reason(error: BaseException | None) -> str:
    """What a store says went wrong, in a line."""
    text = str(error).partition("\n\nDebug source")[0]
    codes = re.findall(r"<(?:Code|Message)>([^<]*)</", text)
    return ": ".join(codes) or text.splitlines()[0]
