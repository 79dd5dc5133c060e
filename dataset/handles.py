"""A process's open index and shards."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tokenlabel.dataset.chunks import ChunkFile
from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.index import Index, find_shards, open_index
from tokenlabel.dataset.index_writer import open_shard
from tokenlabel.dataset.shard import MAPS, Shard, dequantise, unreadable

_Extent = tuple[float, float, float, float]


class Handles:
    """This process's open index and shards. Forked children and unpickled copies open their own."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._index: Index | None = None
        self._paths: list[Path] = []
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def index(self) -> Index:
        """The index, opened on first use in a process."""
        if self._pid != os.getpid():
            # A lock that another thread held during the fork would never be released here.
            self._lock = threading.RLock()
            self._forget()
        index = self._index
        if index is None:
            with self._lock:
                index = self._index
                if index is None:
                    self._paths = find_shards(self._root)
                    self._index = index = open_index(self._root)
        return index

    def map(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, _Extent]:
        """Scores, classes, rest and extent of a row."""
        index = self.index()
        number = index.shard(row)
        # Without the lock: who has got hold of an open shard keeps its file open.
        shard = self._open.get(number) or self._shard(index, number)
        if shard.chunks is not None and (found := shard.read(row)):
            return found
        with self._lock:  # against another thread that closes it
            return self._shard(index, number).read_hdf5(row)

    def error(self, row: int) -> str:
        """Why a row has no map; empty when it has one."""
        index = self.index()
        number = index.shard(row)
        with self._lock:
            return self._shard(index, number).error(row)

    def _shard(self, index: Index, number: int) -> "_OpenShard":
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                while len(self._open) >= _open_files_limit():
                    self._open.popitem(last=False)[1].close()
                shard = _OpenShard(self._paths[number], index, number)
                self._open[number] = shard
            return shard


class _OpenShard:
    """A shard that agrees with the index. Read by its places there, if each map is one chunk.

    Attributes:
        chunks: its open file; None where `Shard` has to read everything.
    """

    def __init__(self, path: Path, index: Index, number: int) -> None:
        self.path = path
        self.first = int(index.shard_rows[number])
        self._index, self._number = index, number
        shard = open_shard(path)
        try:
            self.chunks = shard.chunk_file()
            if not _agree(shard, index, number, self.chunks):
                raise _disagree(path)
            self._coded = "score_range" in shard
            self._extent = None if "extent" in shard else shard.extent(0)
        except BaseException:
            shard.close()
            raise
        # Not kept where it is not needed: its attributes alone can be 100 kB.
        self._shard: Shard | None = shard
        if self.chunks is not None:
            self.close()

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, _Extent] | None:
        """What is stored of a row of the split, by its places; None when that cannot be done."""
        index = self._index
        offsets, sizes = index.chunks(row)
        if not all(sizes):
            return None
        assert self.chunks is not None
        try:
            scores, classes, rest = self.chunks.read(offsets, sizes)
        except (OSError, ValueError) as error:
            raise unreadable(self.path, row - self.first, error) from error
        if self._coded:
            assert index.score_ranges is not None
            scores = dequantise(scores, index.score_ranges[row])
        if self._extent is not None:
            return scores, classes, rest, self._extent
        assert index.extents is not None
        x0, y0, x1, y1 = index.extents[row].tolist()
        return scores, classes, rest, (x0, y0, x1, y1)

    def read_hdf5(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, _Extent]:
        """The same by `Shard`, however it is stored."""
        local = row - self.first
        with self._opened() as shard:
            return *shard.map(local), shard.extent(local)

    def error(self, row: int) -> str:
        """Why a row has no map; empty when it has one."""
        local = row - self.first
        with self._opened() as shard:
            return str(shard.read("error", local, local + 1)[0].decode())

    @contextmanager
    def _opened(self) -> Iterator[Shard]:
        """The shard: the one that is open, or opened for once."""
        if self._shard is not None:
            yield self._shard
            return
        with open_shard(self.path) as shard:
            if shard.attrs["sha256"] != self._index.shard_sha256[self._number]:
                raise _disagree(self.path)
            yield shard

    def close(self) -> None:
        """Close the shard; `chunks` is closed when nobody reads it any more."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None


def _disagree(path: Path) -> FormatError:
    return FormatError(
        f"{path} and the index do not agree: one of them changed. "
        f"Remedy: delete {path.parent / 'index.h5'}; it is rebuilt"
    )


def _agree(shard: Shard, index: Index, number: int, chunks: ChunkFile | None) -> bool:
    """Whether the index is of this shard: looked at once, when the shard is opened.

    The digest of a shard is that of its decoded arrays: places can differ where digests do not.
    """
    first, last = index.shard_rows[number : number + 2].tolist()
    if (
        shard.attrs["sha256"] != index.shard_sha256[number]
        or shard.rows != last - first
        or not index.undamaged(number)
    ):
        return False
    if chunks is None:
        return True
    told = index.places(first, last)
    for column, name in enumerate(MAPS):
        offsets, sizes = shard.chunk_places(name)
        same = (told["offset"][:, column] == offsets) & (told["size"][:, column] == sizes)
        if not (same | (told["size"][:, column] == 0)).all():
            return False
    return True


def _open_files_limit() -> int:
    """Shards to keep open: all of them if the process may, for opening one takes milliseconds."""
    try:
        import resource
    except ImportError:  # Windows: the C runtime's own limit is 512
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(soft // 2, 1)
