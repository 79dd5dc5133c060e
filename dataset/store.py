"""`LabelStore`: random access to the score maps of a split."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FormatError, MissingMapError
from .format import manifest
from .format.directory import StoredFile
from .format.index import Index, find_shards, open_index, open_shard
from .format.keys import KeyTable, digest64
from .format.score_map import MapLayout, ScoreMap
from .format.shard import Shard
from .storage.cache import Cache, CachedPath, cache_folder
from .storage.remote_path import AnyPath, RemotePath, as_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .label_map.label_map import TokenLabelMap
    from .targets.record import Grid
    from .targets.token_labels import TokenLabels

#: Requests that are under way at the same time.
_AT_ONCE = 32

_log = logging.getLogger(__name__)


class LabelStore:
    """The score maps of a split, by key or by row. Opens at once, whatever the size.

        store = LabelStore("labels/train")
        entry = store[store.keys[0]]  # a key is the image's path, such as "n01440764/1.JPEG"
        classes, probs, rest = entry.probabilities()  # of each cell: [H, W, K] twice, and [H, W]

    Safe to pickle, to fork and to use from threads: files are opened on first use, without locks,
    and never written. A shard costs a process one file descriptor; at most half of those that the
    process may have are used.

    Labels in an object store are copied to a cache on first use, a shard at a time, once a machine,
    and then read like local ones. The set is the one that is there when the store is opened.

    Args:
        root: folder of the split, OUT/SPLIT, with the shards; or its URL, such as
            s3://bucket/labels/train.
        cache: folder of the copies; by default TOKENLABEL_CACHE or ~/.cache/tokenlabel. None: none
            are made. Each map is then a request, unless `prefetch` has fetched it with others.
        cache_bytes: beyond it, those copies in that folder are deleted that were used longest ago.
            Less than the labels have means that each epoch fetches some again.

    Raises:
        FileNotFoundError: the folder is not there or has no shards.
        FormatError: shards are missing, damaged, of another version or of different runs.
        StoreError: an object store refuses.

    Attributes:
        root: the folder, or the objects that stood at the URL.
        attrs: attributes of the first shard: teacher, fingerprint, preprocessing and so on, and
            `class_names` where the manifest holds them.
        layout: shapes and dtypes of the maps.
        classes: names of the teacher's classes; None where they are unknown.
        folders: class id of each top-level folder of the split, -1 where it has none; empty where
            the labels do not say. `attrs["label_space"]` is "folders" where these ids number the
            folders and are no classes of the teacher.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | RemotePath,
        cache: str | os.PathLike[str] | None = "",
        cache_bytes: int = 100 << 30,
    ) -> None:
        self.root: AnyPath = as_path(root)
        if isinstance(self.root, RemotePath):
            folder = Path(cache or cache_folder()) / "labels"
            kept = None if cache is None else Cache(folder, cache_bytes)
            self.root = CachedPath.listed(self.root, kept)
        elif not self.root.is_dir():
            raise FileNotFoundError(
                f"{self.root} is not a folder. Remedy: name the folder of a split, OUT/SPLIT, "
                "that `annotate` has written"
            )
        with open_shard(find_shards(self.root)[0]) as shard:
            self.attrs: dict[str, Any] = shard.attrs
            self.layout: MapLayout = shard.layout
            self.folders: dict[str, int] = shard.folders()
        self.classes = _class_names(self.root / manifest.NAME)
        if self.classes is not None:
            self.attrs["class_names"] = self.classes
        self._index  # noqa: B018  # missing or damaged files raise here, not in the first read

    _index: Index
    _shards: Callable[[int], Shard]

    def __getattr__(self, name: str) -> Any:
        """Open the index, and shards by number, where they are not open yet: new or unpickled.

        No lock: threads that open a file at once get one each, and a thread that has got hold of a
        shard keeps it open when the cache drops it. A forked process keeps using its parent's
        files: each read names its offset, so no file position is shared between the two.
        """
        if name not in ("_index", "_shards"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        paths, self._index = find_shards(self.root), open_index(self.root)
        limit = _open_files_limit()
        if isinstance(self.root, CachedPath) and self.root.cache:
            # A copy that is open keeps its room on the disk.
            largest = int(self._index.file.read("shard_size").max())
            limit = min(limit, max(self.root.cache.limit // largest, 1))
        self._shards = lru_cache(limit)(partial(_open_indexed, self._index, paths))
        return self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_index", "_shards")}

    def _shard(self, row: int) -> tuple[Shard, int]:
        """The open shard that holds a row of the split, and its row there."""
        number = self._index.shard(row)
        return self._shards(number), row - int(self._index.shard_rows[number])

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def keys(self) -> KeyTable:
        """The keys in order, a read-only sequence: the images' paths relative to the split."""
        return self._index.keys

    @property
    def ground_truth(self) -> np.ndarray:
        """Ground-truth classes, int32 [n], -1 where unknown; read-only."""
        return self._index.labels

    @property
    def sizes(self) -> np.ndarray:
        """(width, height) of the images in pixels, int32 [n, 2]; read-only."""
        return self._index.sizes

    @property
    def failed(self) -> np.ndarray:
        """True where the image has no map, bool [n]; `error(row)` says why."""
        return self._index.failed

    @property
    def num_classes(self) -> int:
        """Number of the teacher's classes."""
        return self.layout.num_classes

    @property
    def k(self) -> int:
        """Classes stored a cell."""
        return self.layout.k

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the maps, in cells."""
        return self.layout.grid

    @property
    def views(self) -> tuple[str, ...]:
        """Which views were annotated: "identity", perhaps "hflip"."""
        return self.layout.views

    @property
    def nbytes(self) -> int:
        """Bytes of the shards."""
        return int(self._index.file.read("shard_size").sum())

    @property
    def shards(self) -> list[AnyPath]:
        """Paths of the shards, in order."""
        return [self.root / path.name for path in find_shards(self.root)]

    def __contains__(self, key: object) -> bool:
        return key in self.keys

    def __getitem__(self, key: str | int) -> ScoreMap:
        """The map of an image, by key or by row.

        Raises:
            MissingMapError: a KeyError; the key is unknown or its image had an error.
            IndexError: the row is out of range.
            FormatError: the stored bytes are damaged.
            OSError: the system cannot read them.
        """
        row, index = self.row(key), self._index
        if index.failed[row]:
            raise MissingMapError(
                f"{index.keys[row]!r} has no score map: {self.error(row)}. "
                "Remedy: repair or leave out the image"
            )
        shard, local = self._shard(row)
        return shard.map(local)

    def prefetch(self, rows: "Sequence[int]") -> None:
        """Fetch the maps of some rows together, where the labels are in a store without a cache.

        They are held until the next call. `TokenLabelDataset` does so with each batch.
        """
        if not isinstance(self.root, CachedPath) or self.root.cache:
            return
        first, by_shard = self._index.shard_rows.tolist(), dict[int, list[int]]()
        for row in rows:
            number = self._index.shard(row)
            by_shard.setdefault(number, []).append(row - first[number])
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(lambda n: self._shards(n).prefetch(by_shard[n]), by_shard):
                pass

    def leaf(self, row: int, canvas_size: tuple[int, int] | None = None) -> "TokenLabelMap":
        """A row's map as the leaf that follows its image through v2 transforms.

        Args:
            row: of the map; the leaf has no planes where the image has no map.
            canvas_size: (h, w) of the image in pixels; None: as it was annotated.
        """
        from .label_map.label_map import TokenLabelMap  # the store itself needs no torch

        index, row = self._index, self.row(row)
        shard, local = self._shard(row)
        if canvas_size is None:
            width, height = index.sizes[row].tolist()
            canvas_size = (max(height, 1), max(width, 1))  # unknown (0) where decoding failed
        return TokenLabelMap(
            b"" if index.failed[row] else shard.planes(local),
            self.layout,
            canvas_size=canvas_size,
            extent=shard.extent(local),
            label=index.labels.item(row),
        )

    def labels(
        self,
        rows: "Sequence[int | str]",
        boxes: "Sequence[Sequence[float]]",
        flips: "Sequence[bool] | None" = None,
        grid: "int | Grid | None" = None,
        shrink: float = 0.0,
    ) -> "TokenLabels":
        """The records of a batch of crops that your own code cuts from the images.

        Args:
            rows: row or key of each crop's image, B of them.
            boxes: [B, 4], the crops (x0, y0, x1, y1), normalised to their images, x along the
                width; they may reach beyond them.
            flips: whether each crop was flipped left to right after it; None: none was.
            grid: the student's patches, for `labels.targets()` without one.
            shrink: as in `TokenLabelDataset`.

        Raises:
            ValueError: no row, an empty box or one in pixels, or not one of each for every row.
            IndexError, KeyError, FormatError, OSError: as `store[row]`; but an image that could
                not be annotated gives targets of weight 0.
        """
        from .label_map.path import UNIT_BOX, PixelPath
        from .targets.token_labels import TokenLabels, student_grid

        turned = np.zeros(len(rows), bool) if flips is None else np.asarray(flips)
        if not len(rows) or not len(rows) == len(boxes) == len(turned) or turned.dtype != bool:
            raise ValueError(
                "each row needs a box, and a flip that is True or False if any are given; got "
                f"{len(rows)} rows, {len(boxes)} boxes and {len(turned)} flips of {turned.dtype}"
            )
        leaves = []
        for row, box, flip in zip(rows, boxes, turned, strict=True):
            x0, y0, x1, y1 = map(float, box)
            width, height = x1 - x0, y1 - y0
            # A box far larger than the image is one in pixels.
            if not (0 < width <= 4 and 0 < height <= 4):
                raise ValueError(
                    "a box is (x0, y0, x1, y1) with x0 < x1 and y0 < y1, normalised to the image; "
                    f"got {(x0, y0, x1, y1)}. Remedy: divide pixels by the image's (width, height)"
                )
            # From the unit square of the crop to its box on the image.
            along = (-width, 0.0, x1) if flip else (width, 0.0, x0)
            path = PixelPath((*along, 0.0, height, y0, 0.0, 0.0, 1.0), UNIT_BOX)
            leaves.append(self.leaf(self.row(row), (1, 1)).with_path(path, (1, 1)))
        return TokenLabels.collate(leaves, None if grid is None else student_grid(grid), shrink)

    def row(self, key: str | int) -> int:
        """Row of a key; a row is checked and returned as it is.

        A key that is none is taken for another form's name of the image, such as WebDataset's
        `n01440764_10026` of `n01440764/n01440764_10026.JPEG`, where one image alone has that name.
        """
        keys = self._index.keys
        if isinstance(key, str):
            row = keys.find(key)
            if row < 0:
                raise MissingMapError(
                    f"no score map for {key!a} in {self.root}: keys are image paths relative to "
                    f"the split, extension included, such as {keys[0]!a}. Remedy: check the key, "
                    "or annotate the folder that holds this image"
                )
            return row
        row = key + len(keys) if key < 0 else key
        if not 0 <= row < len(keys):
            raise IndexError(f"row {key} is outside 0..{len(keys) - 1} of {self.root}")
        return int(row)

    def row_of_file(self, data: bytes) -> int:
        """Row of the image whose file had exactly these bytes; -1 where there is none."""
        digests = self._index.digests
        digests.check()
        return next(map(digests.row, digests.after(digest64(data))), -1)

    def digest(self, key: str | int) -> int:
        """`digest64` of the annotated image's file; 0 where none is stored."""
        shard, local = self._shard(self.row(key))
        return int(shard.read("digest", local, local + 1).item())

    def thumbprint(self, key: str | int) -> np.ndarray:
        """The thumbprint of the annotated image, uint8 [64]; all 0 where there is none.

        `tokenlabel.dataset.sources.thumbprint` says what an image is compared with this one.
        """
        shard, local = self._shard(self.row(key))
        stored: np.ndarray = shard.read("thumbprint", local, local + 1)[0]
        return stored

    def orientation(self, key: str | int) -> int:
        """EXIF orientation of the annotated file, 1 to 8, not applied; 0 where it does not say."""
        shard, local = self._shard(self.row(key))
        return int(shard.read("orientation", local, local + 1).item())

    def error(self, key: str | int) -> str:
        """Why an image has no map; empty when it has one."""
        shard, local = self._shard(self.row(key))
        return shard.texts("error")[local]


def _class_names(path: AnyPath) -> list[str] | None:
    try:
        with StoredFile(path, manifest.FORMAT, manifest.VERSION, "delete it") as file:
            return file.texts("class_names") if "class_names" in file.columns else None
    except FileNotFoundError:
        return None
    except FormatError as error:  # maps do without names
        _log.warning("the names of the classes cannot be read: %s", error)
        return None


def _open_indexed(index: Index, paths: list[AnyPath], number: int) -> Shard:
    shard = open_shard(paths[number])
    if not index.fits(shard, number):
        raise FormatError(
            f"{shard.path} and the index do not agree: one of them changed. Remedy: "
            f"delete {index.file.path}; it is rebuilt"
        )
    return shard


def _open_files_limit() -> int:
    """Shards to keep open: all of them, if half of the files that the process may have suffice."""
    try:
        import resource
    except ImportError:  # Windows: the C runtime's own limit is 512
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(soft // 2, 1)
