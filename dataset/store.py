"""`LabelStore`: random access to the score maps of a split."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenlabel.dataset.errors import TokenLabelError
from tokenlabel.dataset.handles import Handles
from tokenlabel.dataset.index import Index, find_shards
from tokenlabel.dataset.index_writer import open_shard
from tokenlabel.dataset.keys import KeyTable


class MissingMapError(TokenLabelError, KeyError):
    """A key has no score map: unknown, or its image could not be annotated."""


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
    process, without locks, and never written. Threads read maps side by side; a shard costs a
    process one file descriptor, and half of those that it may have are used at most.

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
        with open_shard(find_shards(self.root)[0]) as shard:
            self.attrs: dict[str, Any] = shard.attrs
            self._layout = shard.layout
        self._local = Handles(self.root)
        self._local.index()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = Handles(self.root)

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
            OSError: the system does not give them.
        """
        index = self._local.index()
        row = self._row(index, key)
        if index.failed[row]:
            raise MissingMapError(
                f"{index.keys[row]!r} has no score map: {self.error(row)}. "
                "Remedy: repair or leave out the image"
            )
        scores, classes, rest, extent = self._local.map(row)
        width, height = index.sizes[row].tolist()
        return ScoreMap(scores, classes, rest, index.labels.item(row), (width, height), extent)

    def row(self, key: str | int, near: int = -1) -> int:
        """Row of a key, found soonest if it is `near`; a row is checked and returned as it is."""
        return self._row(self._local.index(), key, near)

    def _row(self, index: Index, key: str | int, near: int = -1) -> int:
        keys = index.keys
        if isinstance(key, str):
            row = keys.find(key, near)
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
