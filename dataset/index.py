"""`index.h5`: where every key of a split is, derived from the shards and rebuilt at any time.

The index holds the key table, labels, sizes and error flags of all rows, where their maps are in
the shards, and the size and digest of each shard, by which a stale index is recognised. The shards
are the truth.
"""

import logging
import os
import struct
import tempfile
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.files import check_identity, open_h5, replacing
from tokenlabel.dataset.hdf5_file import InputFile
from tokenlabel.dataset.index_writer import (
    CHUNK,
    COLUMNS,
    FORMAT,
    OPTIONAL,
    VERSION,
    checksums,
    open_shard,
    shard_size,
    write_index,
)
from tokenlabel.dataset.keys import KeyTable, MappedFile
from tokenlabel.dataset.shard import MAPS, parse_shard_name, shard_name

NAME = "index.h5"
#: How often an index is built that does not fit the shards: they may change at that moment.
_TRIES = 2

_CHUNK = struct.Struct(f"<{len(MAPS)}Q{len(MAPS)}I")
_log = logging.getLogger(__name__)


class Index(NamedTuple):
    """The rows of a split, in order.

    Attributes:
        keys: the sorted keys.
        labels: int32 [n], ground truth or -1.
        sizes: int32 [n, 2], (width, height) of the pictures.
        failed: bool [n], True where the image has no map.
        score_ranges: float32 [n, 2], low and high of uint8 scores; None for float16 scores.
        extents: float32 [n, 4], boxes of the pictures; None where the shards have one for all.
        shard_rows: uint64 [shards + 1], the first row of each shard, and the number of rows.
        shard_sha256: the content digest of each shard.
        shard_checks: uint32 [shards, 7], CRC-32 of each shard's part of the keys and columns.
        file: the file, and `offsets`, where in it the columns begin.
    """

    keys: KeyTable
    labels: np.ndarray
    sizes: np.ndarray
    failed: np.ndarray
    score_ranges: np.ndarray | None
    extents: np.ndarray | None
    shard_rows: np.ndarray
    shard_sha256: list[str]
    shard_checks: np.ndarray
    file: MappedFile
    offsets: dict[str, int]

    def shard(self, row: int) -> int:
        """The shard that holds a row."""
        return bisect_right(self.shard_rows.data, row) - 1

    def chunks(self, row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where the chunks of scores, classes and rest are in the shard's file: offsets, sizes.

        Size 0 stands for a map that is not one chunk of gzip.
        """
        start = self.offsets["chunk"] + row * CHUNK.itemsize
        found = _CHUNK.unpack(self.file.read(start, CHUNK.itemsize))
        return found[: len(MAPS)], found[len(MAPS) :]

    def places(self, first: int, last: int) -> np.ndarray:
        """The same of rows `first` to `last` - 1, CHUNK [n]."""
        start = self.offsets["chunk"] + first * CHUNK.itemsize
        return np.frombuffer(self.file.read(start, (last - first) * CHUNK.itemsize), CHUNK)

    def undamaged(self, shard: int) -> bool:
        """Whether a shard's part of the columns is what was written."""
        first, last = self.shard_rows[shard : shard + 2].tolist()

        def column(name: str, start: int, stop: int, size: int) -> bytes:
            return self.file.read(self.offsets[name] + start * size, (stop - start) * size)

        ends = np.frombuffer(column("key_offsets", first, last + 1, 8), "<u8")
        lengths = np.diff(ends)
        sizes = {
            name: np.dtype(dtype).itemsize * width
            for name, (dtype, width) in COLUMNS.items()
            if name in self.offsets
        }
        found = checksums(
            column("key_bytes", int(ends[0]), int(ends[-1]), 1)
            if (ends[1:] >= ends[0]).all()
            else b"",
            lengths,
            {name: column(name, first, last, size) for name, size in sizes.items()},
        )
        want = self.shard_checks[shard].tolist()
        return all(crc in (None, stored) for crc, stored in zip(found, want, strict=True))


def find_shards(root: Path) -> list[Path]:
    """The complete, ordered list of a split's shards.

    Raises FileNotFoundError when there is none, FormatError when some are missing or when the
    folder mixes splits of different length.
    """
    found = sorted(
        (parsed, entry.path)
        for entry in os.scandir(root)
        if (parsed := parse_shard_name(entry.name))
    )
    if not found:
        below = [
            folder.path
            for folder in sorted(os.scandir(root), key=lambda entry: entry.name)
            if folder.is_dir() and any(map(parse_shard_name, os.listdir(folder.path)))
        ]
        remedy = f"name a split: {' or '.join(below)}" if below else "run `annotate` into it"
        raise FileNotFoundError(f"{root} holds no shards. Remedy: {remedy}")
    totals = sorted({shards for (_, shards), _ in found})
    if len(totals) > 1:
        raise FormatError(
            f"{root} mixes shards of splits of {' and '.join(map(str, totals))} shards. "
            "Remedy: keep one set, move the others away"
        )
    present = {shard for (shard, _), _ in found}
    missing = [shard for shard in range(totals[0]) if shard not in present]
    if missing:
        names = ", ".join(shard_name(shard, totals[0]) for shard in missing[:3])
        raise FormatError(
            f"{root} is incomplete: {len(missing)} of {totals[0]} shards are missing ({names}"
            f"{', …' if len(missing) > 3 else ''}). Remedy: wait for the job that makes them, or "
            "run the same `annotate` again"
        )
    return [Path(path) for _, path in found]


def open_index(root: Path) -> Index:
    """The index of a split; built first where it is absent, stale or damaged.

    A folder that cannot be written to gets no file: the index is then built for this process.
    """
    shards = find_shards(root)
    path = root / NAME
    for _ in range(_TRIES):
        try:
            return _load(path, shards)
        except FileNotFoundError:
            _log.info("%s has no index yet: building it", root)
        except (FormatError, OSError) as error:
            _log.info("building the index anew: %s", error)
        try:
            build_index(root, shards)
        except OSError as error:
            _log.info("the index cannot be kept in %s (%s): it is built in memory", root, error)
            return _built_in_memory(root, shards, error)
    try:  # where others delete or replace the index all the time
        return _built_in_memory(root, shards, OSError("it is gone or of other shards each time"))
    except FormatError as error:
        raise FormatError(
            f"{root} changes while it is read: {error}. Remedy: wait for the job that writes to it"
        ) from error


def _built_in_memory(root: Path, shards: list[Path], reason: OSError) -> Index:
    try:
        # Mapped memory outlives the file's name, so the folder may go at once.
        with tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder:
            path = Path(folder) / NAME
            write_index(path, shards)
            return _load(path, shards)
    except OSError as error:
        raise OSError(
            f"{root} needs an index, and it can be written neither there ({reason}) nor to the "
            f"temporary folder ({error}). Remedy: name a folder with room in TMPDIR"
        ) from error


def build_index(root: Path, shards: list[Path] | None = None) -> Path:
    """Write `index.h5` from the shards; return its path.

    Raises FormatError for shards that do not belong together or have gone meanwhile.
    """
    path = root / NAME
    with replacing(path) as temporary:
        write_index(temporary, shards or find_shards(root))
    return path


def _load(path: Path, shards: list[Path]) -> Index:
    with open_h5(path) as file:
        check_identity(file, FORMAT, VERSION, "Remedy: delete it; it is rebuilt")
        try:
            if file.attrs["version"] != VERSION:
                raise FormatError(f"{path} is of an older version")
            rows, count = (file.attrs[name] for name in ("rows", "shards"))
            sizes = file["shard_size"].read().tolist()
            if count != len(shards) or sizes != [shard_size(shard) for shard in shards]:
                raise FormatError(f"{path} is older than the shards")
            index = _map(path, file, int(rows), len(shards))
        except (KeyError, OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is damaged: {error}") from error
    # Another run's shards may have the same sizes; one header tells. The others are compared
    # when they are opened.
    with open_shard(shards[0]) as shard:
        if shard.attrs["sha256"] != index.shard_sha256[0]:
            raise FormatError(f"{path} is of other shards")
    return index


def _map(path: Path, file: InputFile, rows: int, shards: int) -> Index:
    mapped = MappedFile(path, file)

    present = [name for name in COLUMNS if name in file or name not in OPTIONAL]
    shapes = {n: (rows,) if COLUMNS[n][1] == 1 else (rows, COLUMNS[n][1]) for n in present}
    key_size = int(file.attrs["key_size"])

    def column(name: str) -> np.ndarray:
        return mapped.array(name, COLUMNS[name][0], shapes[name])

    offsets = {name: mapped.offset(name, COLUMNS[name][0], shapes[name]) for name in present}
    offsets["key_offsets"] = mapped.offset("key_offsets", "<u8", (rows + 1,))
    offsets["key_bytes"] = mapped.offset("key_bytes", "|u1", (key_size,)) if key_size else 0
    shard_rows = mapped.array("shard_rows", "<u8", (shards + 1,)).astype("=u8")
    ends = shard_rows.tolist()
    if (ends[0], ends[-1]) != (0, rows) or ends != sorted(set(ends)):
        raise FormatError(f"{path}: the shards' rows do not ascend from 0 to {rows}")
    return Index(
        keys=KeyTable.mapped(mapped, rows, key_size),
        labels=column("label"),
        sizes=column("size"),
        failed=column("failed").view(bool),
        score_ranges=column("score_range") if "score_range" in file else None,
        extents=column("extent") if "extent" in file else None,
        shard_rows=shard_rows,
        shard_sha256=[digest.decode() for digest in file["shard_sha256"].read().tolist()],
        shard_checks=mapped.array("shard_check", "<u4", (shards, 1 + len(COLUMNS))),
        file=mapped,
        offsets=offsets,
    )
