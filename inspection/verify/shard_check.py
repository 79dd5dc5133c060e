"""Every check of one shard: its bytes, its header, its rows, and what HDF5 sees in it.

What covers what. The directory has a CRC, and holds one of all bytes behind it: no flipped bit
passes. Each column has its own and each map an Adler-32, so that damage is named where it is. The
header's sha256 of all decoded arrays shows values that were changed with their checksums, and the
comparison with HDF5's view a file that shows HDF5 something else.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...dataset.format.manifest import open_manifest
from ...dataset.format.shard import COLUMNS, ContentDigest, Shard
from ...errors import FormatError, NewerVersionError
from .hdf5_view import view_difference
from .header_check import header_faults, settings_of
from .row_check import (
    image_faults,
    key_fault,
    manifest_faults,
    map_faults,
    row_faults,
)

#: Faults of a shard that are named one by one.
LISTED = 20
_BLOCK = 256


class Fault(NamedTuple):
    """Something wrong.

    Attributes:
        file: name of the shard, or of the other file of the split.
        row: row of that shard, None where it is not one row's.
        key: the row's image.
        text: what is wrong.
        redone_by_annotate: whether `annotate` can redo the file once it is deleted; not so where
            it is an image that changed.
    """

    file: str
    row: int | None
    key: str | None
    text: str
    redone_by_annotate: bool = True


class ShardCheck(NamedTuple):
    """What is known of one shard after the checks.

    Attributes:
        name: of the file.
        faults: at most `LISTED` of them; `more` were left out.
        header: its attributes; empty when it cannot be opened.
        rows: number of rows.
        nbytes: size of the file.
        first_key, last_key: empty when they cannot be read.
    """

    name: str
    faults: list[Fault]
    more: int
    header: dict[str, Any]
    rows: int = 0
    nbytes: int = 0
    first_key: str = ""
    last_key: str = ""


def crashed(path: Path) -> ShardCheck:
    """What is known of a shard whose check ended its process."""
    text = "reading it ends the process: it is damaged, or memory ran out"
    return ShardCheck(path.name, [Fault(path.name, None, None, text)], 0, {})


def check_shard(path: Path, manifest: Path | None = None, images: Path | None = None) -> ShardCheck:
    """Check one shard. Raises nothing for what is in the file.

    Args:
        path: the shard.
        manifest: the split's manifest, known to be undamaged; None leaves it out.
        images: folder of the images, whose digests are then compared; None leaves them out.

    Raises:
        PermissionError: it may not be read.
    """
    result = ShardCheck(path.name, [], 0, {})
    faults, more = result.faults, 0
    try:
        with Shard(path) as shard:
            nbytes = path.stat().st_size
            result = result._replace(header=shard.attrs, rows=shard.rows, nbytes=nbytes)
            with suppress(FormatError):  # said among the faults
                keys = shard.texts("key")
                result = result._replace(first_key=keys[0], last_key=keys[-1])
            for fault in _faults(shard, manifest, images):
                if len(faults) < LISTED:
                    faults.append(fault)
                else:
                    more += 1
            if not any(fault.redone_by_annotate for fault in faults):
                shard.check_bytes()
                if text := view_difference(shard):
                    faults.append(Fault(path.name, None, None, text))
    except PermissionError:
        raise  # of this machine, and no reason to delete the shard
    except NewerVersionError as error:  # for a later release; not to be deleted
        text = str(error).removeprefix(f"{path} ")
        faults.append(Fault(path.name, None, None, text, False))
    except MemoryError:
        faults.append(Fault(path.name, None, None, "too large for this machine's memory", False))
    # Damaged or hostile files can make NumPy and json raise nearly anything.
    except Exception as error:
        text = str(error) or type(error).__name__
        faults.append(Fault(path.name, None, None, _without(path, text)))
    return result._replace(more=more)


def _without(path: Path, text: str) -> str:
    """An error's text without the file's name, which stands before it, and the advice."""
    return text.removeprefix(f"{path}: ").removeprefix(f"{path} ").partition(". Remedy")[0]


def _faults(shard: Shard, manifest: Path | None, images: Path | None) -> Iterator[Fault]:
    name = shard.path.name
    yield from (Fault(name, None, None, text) for text in header_faults(shard))
    columns, unreadable = _columns(shard)
    yield from (Fault(name, None, None, text) for text in unreadable)
    keys = columns.get("key", [])
    missing = [""] * shard.rows

    def fault(row: int, text: str, redone: bool = True) -> Fault:
        return Fault(name, row, keys[row] if keys else None, text, redone)

    if keys:
        yield from (fault(*pair) for pair in key_fault(keys))
        yield from (fault(*pair) for pair in _order_faults(shard, keys, columns, manifest))
    yield from (fault(*pair) for pair in row_faults(columns, shard.attrs))
    errors = columns.get("error", missing)
    digest = ContentDigest()
    for column in columns["raw"]:
        digest.update(*column)
    complete = not unreadable
    for start in range(0, shard.rows, _BLOCK):
        stop = min(start + _BLOCK, shard.rows)
        block, bad = _read_maps(shard, start, stop)
        yield from (fault(*pair) for pair in bad)
        if bad:
            complete = False
            continue
        for part, array in block.items():
            digest.update(part, array)
        good = np.array([not error for error in errors[start:stop]])
        found = map_faults(block, good, shard.layout)
        yield from (fault(start + row, text) for row, text in found)
    if complete and (found_digest := digest.hexdigest()) != shard.attrs["sha256"]:
        text = (
            f"the sha256 of the decoded arrays must be {shard.attrs['sha256']}, it is "
            f"{found_digest}: values changed after they were written"
        )
        yield Fault(name, None, None, text)
    if images is not None and keys and "digest" in columns:
        yield from (
            fault(row, text, False) for row, text in image_faults(images, keys, columns["digest"])
        )


def _order_faults(
    shard: Shard, keys: list[str], columns: dict[str, Any], path: Path | None
) -> Iterator[tuple[int, str]]:
    if path is None:
        return
    manifest = open_manifest(path)
    # Another manifest is the split's fault, and said there once.
    if settings_of(shard.attrs).get("manifest", manifest.digest) == manifest.digest:
        yield from manifest_faults(manifest, shard.attrs["first_row"], keys, columns.get("label"))


def _columns(shard: Shard) -> tuple[dict[str, Any], list[str]]:
    """Columns by name, texts decoded, under "raw" as they are; and what cannot be read."""
    columns: dict[str, Any] = {"raw": []}
    faults = []
    for name in COLUMNS:
        if name not in shard:
            continue
        try:
            column = shard.read(name)
            columns["raw"].append((name, column))
            is_text = name in ("key", "error")
            columns[name] = [text.decode() for text in column] if is_text else column
        except (FormatError, UnicodeDecodeError) as error:
            faults.append(f"the column {name} cannot be read: {_without(shard.path, str(error))}")
    return columns, faults


def _read_maps(
    shard: Shard, start: int, stop: int
) -> tuple[dict[str, np.ndarray], list[tuple[int, str]]]:
    """Rows of the maps, or the rows that cannot be read."""
    try:
        return {name: shard.read(name, start, stop) for name in shard.layout.planes()}, []
    except FormatError as first:
        bad = []
        for row in range(start, stop):
            try:
                shard.planes(row)
            except FormatError as error:
                bad.append((row, _without(shard.path, str(error))))
        return {}, bad or [(start, _without(shard.path, str(first)))]
