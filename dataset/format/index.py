"""`index`: the row of every key of a split, derived from the shards and rebuilt at any time.

It holds the key table, labels, sizes and error flags of all rows, their files' digests sorted, and
the size and digest of each shard, by which a stale index is recognised. The shards are
authoritative.
"""

import logging
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from ...errors import FormatError
from ..storage.remote_path import AnyPath, RemotePath
from .directory import StoredFile
from .files import replacing
from .keys import KeyTable, KeyWriter, Lookup, LookupWriter
from .shard import Shard, parse_shard_name, shard_name

NAME = "index"
FORMAT = "tokenlabel-index"
VERSION = 4
#: Attempts to build an index that fits the shards: they may change at that moment.
_TRIES = 2
#: Objects that are read at once.
_AT_ONCE = 32

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Index(NamedTuple):
    """The rows of a split, in order.

    Attributes:
        keys: of the images.
        digests: row by digest of the image's file; of several equal files the first.
        labels: int32 [n], ground truth or -1.
        sizes: int32 [n, 2], (width, height) of the images.
        failed: bool [n], True where the image has no map.
        shard_rows: uint64 [shards + 1], the first row of each shard, and the number of rows.
        shard_sha256: the content digest of each shard.
        file: the file.
    """

    keys: KeyTable
    digests: Lookup
    labels: np.ndarray
    sizes: np.ndarray
    failed: np.ndarray
    shard_rows: np.ndarray
    shard_sha256: list[str]
    file: StoredFile

    def shard(self, row: int) -> int:
        """The shard that holds a row."""
        return bisect_right(self.shard_rows.data, row) - 1

    def fits(self, shard: Shard, number: int) -> bool:
        """Whether a shard is the one that was indexed, and both are undamaged."""
        first, last = self.shard_rows[number : number + 2].tolist()
        if shard.attrs["sha256"] != self.shard_sha256[number] or shard.rows != last - first:
            return False
        if "extent" in shard:
            shard.read("extent")  # whole, so that its CRC is checked: maps read single rows
        # Sizes and digests may fit while a byte of the index is damaged: compare all of the rows.
        # Read rather than mapped: mapped pages would stay in memory.
        ends = self.file.read("key_offsets", first, last + 1)
        keys = shard.read("key").tolist()
        if np.diff(ends).tolist() != list(map(len, keys)):
            return False
        pairs = [(self.file.read(name, first, last), part) for name, part in _columns(shard)]
        text = self.file.read("key_bytes", int(ends[0]), int(ends[-1]))
        return text.tobytes() == b"".join(keys) and all(np.array_equal(*pair) for pair in pairs)


def _columns(shard: Shard) -> list[tuple[str, np.ndarray]]:
    failed = (shard.read("error") != b"").view(np.uint8)
    return [("label", shard.read("label")), ("size", shard.read("size")), ("failed", failed)]


def in_order(work: Callable[[AnyPath], T], paths: Sequence[AnyPath]) -> Iterator[T]:
    """What `work` gives for each path; for objects, of 32 at once, since each waits for a store."""
    if not any(isinstance(path, RemotePath) for path in paths[:1]):
        yield from map(work, paths)
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(paths), _AT_ONCE):  # no more results in memory than that
            yield from pool.map(work, paths[start : start + _AT_ONCE])


def find_shards(root: AnyPath) -> list[AnyPath]:
    """The complete, ordered list of a split's shards.

    Raises FileNotFoundError when there is none, FormatError when some are missing or when the
    folder mixes splits of different length.
    """
    entries: Iterable[RemotePath | os.DirEntry[str]]
    entries = root.iterdir() if isinstance(root, RemotePath) else os.scandir(root)
    found = sorted(
        (parsed, entry.name) for entry in entries if (parsed := parse_shard_name(entry.name))
    )
    if not found and isinstance(root, RemotePath):
        raise FileNotFoundError(
            f"{root} holds no shards. Remedy: name the folder of a split, or run `annotate` into it"
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
    present, total = {shard for (shard, _), _ in found}, totals[0]
    if missing := total - sum(shard < total for shard in present):
        # Not counted one by one: the total is only what the name of a file says.
        first = islice((shard for shard in range(total) if shard not in present), 3)
        names = ", ".join(shard_name(shard, total) for shard in first)
        raise FormatError(
            f"{root} is incomplete: {missing} of {total} shards are missing ({names}"
            f"{', …' if missing > 3 else ''}). Remedy: wait for the job that makes them, or run "
            "the same `annotate` again"
        )
    return [root / name for _, name in found]


def open_index(root: AnyPath) -> Index:
    """The index of a split; built first where it is absent, stale or damaged.

    A folder that cannot be written to gets no file: the index is then built for this process.
    """
    shards = find_shards(root)
    path = root / NAME
    for _ in range(_TRIES):
        try:
            return load_index(path, shards)
        except (FormatError, OSError) as error:  # none yet, or one that does not fit
            _log.info("building the index of %s: %s", root, error)
        try:
            build_index(root, shards)
        except OSError as error:
            _log.info("the index cannot be kept in %s (%s): it is built in memory", root, error)
            return _built_in_memory(root, shards, error)
    reason = OSError("it vanishes or is of other shards each time")
    try:  # other processes delete or replace the index all the time
        return _built_in_memory(root, shards, reason)
    except FormatError as error:
        raise FormatError(
            f"{root} changes while it is read: {error}. Remedy: wait for the job that writes to it"
        ) from error


def _built_in_memory(root: AnyPath, shards: list[AnyPath], reason: OSError) -> Index:
    try:
        # Mapped memory outlives the file's name, so the folder may go at once.
        with tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder:
            path = Path(folder) / NAME
            write_index(path, shards)
            return load_index(path, shards)
    except OSError as error:
        raise OSError(
            f"{root} needs an index, and it can be written neither there ({reason}) nor to the "
            f"temporary folder ({error}). Remedy: name a folder with room in TMPDIR"
        ) from error


def build_index(root: AnyPath, shards: list[AnyPath] | None = None) -> AnyPath:
    """Write `index` from the shards; return its path.

    Raises FormatError for shards that do not belong together or have gone meanwhile.
    """
    path = root / NAME
    with replacing(path) as temporary:
        write_index(temporary, shards or find_shards(root))
    return path


def load_index(path: AnyPath, shards: Sequence[AnyPath]) -> Index:
    """Map a stored index.

    Raises:
        FileNotFoundError: it is not there.
        FormatError: it is damaged, of another version or of other shards.
    """
    # Not closed here: keys and columns read from it, and it closes with the last of them.
    file = StoredFile(path, FORMAT, VERSION, "delete it; it is rebuilt")
    if "shard_size" not in file.columns:
        raise file.damaged("it has no shard_size")
    try:
        sizes = [shard.stat().st_size for shard in shards if isinstance(shard, Path)]
        if isinstance(shards[0], RemotePath):
            found = shards[0].parent.objects()
            sizes = [found.get(shard.name, (-1, ""))[0] for shard in shards]
    except FileNotFoundError as error:
        raise FormatError(f"{error.filename} has been deleted meanwhile") from error
    if file.read("shard_size").tolist() != sizes:
        raise FormatError(f"{path} is older than the shards")
    keys, count = KeyTable(file), len(shards)
    shard_rows = file.mapped("shard_rows", "<u8", (count + 1,)).astype("=u8")
    ends = shard_rows.tolist()
    if (ends[0], ends[-1]) != (0, len(keys)) or ends != sorted(set(ends)):
        raise file.damaged(f"the shards' rows do not ascend from 0 to {len(keys)}")
    file.column("shard_sha256", "|S64", (count,))
    index = Index(
        keys=keys,
        digests=Lookup(file, "digest_lookup", len(keys)),
        labels=file.mapped("label", "<i4", (len(keys),)),
        sizes=file.mapped("size", "<i4", (len(keys), 2)),
        failed=file.mapped("failed", "|u1", (len(keys),)).view(bool),
        shard_rows=shard_rows,
        shard_sha256=[digest.decode("latin1") for digest in file.read("shard_sha256").tolist()],
        file=file,
    )
    # Another run's shards may have the same sizes; one header shows it. The others are compared
    # when they are opened.
    with open_shard(shards[0]) as shard:
        if shard.attrs["sha256"] != index.shard_sha256[0]:
            raise FormatError(f"{path} is of other shards")
    return index


def open_shard(path: AnyPath) -> Shard:
    """Open a shard that was there a moment ago.

    Raises FormatError as `Shard`, and where it has gone, as by `inspect-labels --repair`.
    """
    try:
        return Shard(path)
    except FileNotFoundError as error:
        raise FormatError(
            f"{path} has been deleted meanwhile. Remedy: wait for the job that rewrites it, or run "
            "the same `annotate` again"
        ) from error


def write_index(path: Path, shards: list[AnyPath]) -> None:
    """Write the index of `shards` to `path`, in constant memory; raises as `build_index`."""
    # What finds an index starts without h5py.
    from .new_file import create

    with create(path, FORMAT, VERSION, {}) as file:
        keys, files, first = KeyWriter(file), LookupWriter(file, "digest_lookup"), None
        rows, sizes, digests = [0], [], []
        for number, (shard, names, found, columns) in enumerate(in_order(_rows, shards)):
            first = first or shard
            _check_neighbours(shard, number, rows[-1], first)
            keys.append(names)
            places = np.arange(rows[-1], rows[-1] + shard.rows, dtype="<u8")
            files.append(np.stack([found, places], 1))
            for name, column in columns:
                file.append(name, column)
            rows.append(rows[-1] + shard.rows)
            sizes.append(shard.end)
            digests.append(shard.attrs["sha256"].encode())
            file.attrs["fingerprint"] = shard.attrs["fingerprint"]
        keys.finish()
        files.finish()
        file.add("shard_rows", np.array(rows, "<u8"))
        file.add("shard_size", np.array(sizes, "<u8"))
        file.add("shard_sha256", np.array(digests, "S64"))


def _rows(path: AnyPath) -> tuple[Shard, list[str], np.ndarray, list[tuple[str, np.ndarray]]]:
    """A shard, closed, its keys, its files' digests, and its columns in the index."""
    with open_shard(path) as shard:
        return shard, shard.texts("key"), shard.read("digest"), _columns(shard)


def _check_neighbours(shard: Shard, number: int, row: int, first: Shard) -> None:
    """Raise FormatError unless this shard begins where the one before it ended."""
    for what, one, other in (
        ("fingerprint", first.attrs["fingerprint"], shard.attrs["fingerprint"]),
        ("layout", first.layout, shard.layout),
    ):
        if one != other:
            raise FormatError(
                f"shards of different runs in one folder: {first.path.name} has {what} {one}, "
                f"{shard.path.name} has {other}. Remedy: delete those of the run that is not "
                "wanted and annotate again"
            )
    said = shard.attrs["shard"], shard.attrs["first_row"]
    if said != (number, row):
        raise FormatError(
            f"{shard.path} says it is shard {said[0]} from row {said[1]}; its name and neighbours "
            f"say {number} from row {row}. Remedy: delete it and annotate again"
        )
