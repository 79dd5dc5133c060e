"""`LabelStore`: random access to the score maps of a split."""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenlabel.dataset.errors import FormatError, TokenLabelError
from tokenlabel.dataset.index import Index, find_shards, open_index
from tokenlabel.dataset.keys import KeyTable
from tokenlabel.dataset.shard import Shard


class MissingMapError(TokenLabelError, KeyError):
    """A key has no score map: unknown, or its image could not be annotated."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class ScoreMap(NamedTuple):
    """What is stored of one image.

    Attributes:
        scores: float16 [V, H, W, K], the top-k raw logits of each patch, descending.
        classes: uint16 or uint32 [V, H, W, K], their class ids.
        rest: float16 [V, H, W], log-sum-exp of all other logits (-inf when there are none).
        label: ground-truth class, or -1.
        size: (width, height) of the picture in pixels.
        extent: box (x0, y0, x1, y1) of the picture, normalised, that the map covers.
    """

    scores: np.ndarray
    classes: np.ndarray
    rest: np.ndarray
    label: int
    size: tuple[int, int]
    extent: tuple[float, float, float, float]


class LabelStore:
    """The score maps of a split, by key or by row. Opens at once, whatever the size.

    Safe to pickle, to fork and to use from threads: files are opened on first use in each
    process, without locks, and never written.

    Args:
        root: folder of the split, OUT/SPLIT, with the shards.

    Raises:
        FileNotFoundError: the folder is not there or has no shards.
        FormatError: shards are missing, damaged, of a newer version or of different runs.

    Attributes:
        root: the folder.
        attrs: root attributes of the first shard: teacher, fingerprint, preprocessing and so on.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"{self.root} is not a folder. Remedy: name the folder of a split, OUT/SPLIT, "
                "that `annotate` has written"
            )
        with Shard(find_shards(self.root)[0]) as shard:
            self.attrs: dict[str, Any] = shard.attrs
            self._layout = shard.layout
        self._local = _Handles(self.root)
        self._local.index()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = _Handles(self.root)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def keys(self) -> KeyTable:
        """The keys in order, a read-only sequence: the images' paths relative to the split."""
        return self._local.index().keys

    @property
    def labels(self) -> np.ndarray:
        """Ground-truth classes, int32 [n], -1 where unknown; read-only."""
        return self._local.index().labels

    @property
    def sizes(self) -> np.ndarray:
        """(width, height) of the pictures in pixels, int32 [n, 2]; read-only."""
        return self._local.index().sizes

    @property
    def failed(self) -> np.ndarray:
        """True where the image has no map, bool [n]; `error(row)` says why."""
        return self._local.index().failed

    @property
    def num_classes(self) -> int:
        """Number of the teacher's classes."""
        return self._layout.num_classes

    @property
    def k(self) -> int:
        """Scores stored a patch."""
        return self._layout.k

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the maps, in patches."""
        return self._layout.grid

    @property
    def views(self) -> tuple[str, ...]:
        """Which views were annotated: "identity", perhaps "hflip"."""
        return self._layout.views

    @property
    def shards(self) -> list[Path]:
        """Paths of the shards, in order."""
        return find_shards(self.root)

    def __contains__(self, key: object) -> bool:
        return key in self.keys

    def __getitem__(self, key: str | int) -> ScoreMap:
        """The map of an image, by key or by row.

        Raises:
            MissingMapError: a KeyError; the key is unknown or its image had an error.
            IndexError: the row is out of range.
            FormatError: the stored bytes are damaged.
        """
        index = self._local.index()
        row = self.row(key)
        if index.failed[row]:
            raise MissingMapError(
                f"{index.keys[row]!r} has no score map: {self.error(row)}. "
                "Remedy: repair or leave out the image"
            )
        scores, classes, rest, extent = self._local.map(row)
        width, height = index.sizes[row].tolist()
        return ScoreMap(scores, classes, rest, int(index.labels[row]), (width, height), extent)

    def row(self, key: str | int) -> int:
        """Row of a key; a row is checked and returned as it is."""
        keys = self.keys
        if isinstance(key, str):
            row = keys.find(key)
            if row < 0:
                raise MissingMapError(
                    f"no score map for {key!r} in {self.root}: keys are image paths relative to "
                    f"the split, extension included, such as {keys[0]!r}. Remedy: check the key, "
                    "or annotate the folder that holds this image"
                )
            return row
        row = key + len(keys) if key < 0 else key
        if not 0 <= row < len(keys):
            raise IndexError(f"row {key} is outside 0..{len(keys) - 1} of {self.root}")
        return int(row)

    def error(self, key: str | int) -> str:
        """Why an image has no map; empty when it has one."""
        return self._local.error(self.row(key))


class _Handles:
    """This process's open index and shards. Forked children and unpickled copies open their own."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._index: Index | None = None
        self._paths: list[Path] = []
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def _here(self) -> None:
        if self._pid != os.getpid():
            # A lock that another thread held during the fork would never be released here.
            self._lock = threading.RLock()
            self._forget()

    def index(self) -> Index:
        self._here()
        if self._index is None:
            with self._lock:
                if self._index is None:
                    self._paths = find_shards(self._root)
                    self._index = open_index(self._root)
        return self._index

    def _shard(self, row: int) -> tuple[Shard, int]:
        index = self.index()
        number = int(np.searchsorted(index.shard_rows, row, side="right")) - 1
        shard = self._open.get(number)
        if shard is None:
            while len(self._open) >= _open_files_limit():
                self._open.popitem(last=False)[1].close()
            shard = Shard(self._paths[number])
            if not _agree(shard, index, number):
                shard.close()
                raise FormatError(
                    f"{shard.path} and the index do not agree: one of them changed. "
                    f"Remedy: delete {self._root / 'index.h5'}; it is rebuilt"
                )
            self._open[number] = shard
        return shard, row - int(index.shard_rows[number])

    def map(self, row: int) -> tuple[Any, Any, Any, Any]:
        self._here()
        with self._lock:  # h5py serialises calls anyway
            shard, local = self._shard(row)
            return *shard.map(local), shard.extent(local)

    def error(self, row: int) -> str:
        self._here()
        with self._lock:
            shard, local = self._shard(row)
            return str(shard.read("error", local, local + 1)[0].decode())


def _agree(shard: Shard, index: Index, number: int) -> bool:
    """Whether the index has this shard's rows: checked once, as the index has no checksum."""
    first, last = index.shard_rows[number : number + 2].tolist()
    rows = slice(first, last)
    return bool(
        shard.attrs["sha256"] == index.shard_sha256[number]
        and shard.rows == last - first
        and (shard.read("label") == index.labels[rows]).all()
        and (shard.read("size") == index.sizes[rows]).all()
        and ((shard.read("error") != b"") == index.failed[rows]).all()
        and b"".join(shard.read("key").tolist()) == index.keys.raw(first, last)
    )


def _open_files_limit() -> int:
    """Shards to keep open: all of them if the process may, for reopening one costs 300 us."""
    try:
        import resource
    except ImportError:  # Windows: the C runtime's own limit is 512
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(soft // 2, 1)
