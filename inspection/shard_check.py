"""Every check of one shard: its container, its header, its rows, and each of its bytes.

What covers what. The maps: an Adler-32 in each gzip chunk, and the header's sha256 of all decoded
arrays. HDF5's metadata and attributes up to 4 kB: a checksum in every block, which HDF5 compares on
reading. The class names, which are larger and which HDF5 therefore stores without one: their sha256
in `settings`, and its own in the fingerprint. Bytes without content: the comparison with the shard
written again (`tokenlabel.inspection.rewrite`).
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenlabel.annotate.errors import OutputError
from tokenlabel.annotate.manifest import open_manifest
from tokenlabel.dataset.errors import FormatError, NewerVersionError
from tokenlabel.dataset.files import open_h5
from tokenlabel.dataset.shard import MAPS, OPTIONAL_ROWS, ROWS, ContentDigest, Shard
from tokenlabel.inspection.header_check import check_types, header_faults, settings_of
from tokenlabel.inspection.rewrite import compare_with_rewrite
from tokenlabel.inspection.row_check import (
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
        mended_by_annotate: whether the file can be deleted and made again; not so where it is an
            image that changed.
    """

    file: str
    row: int | None
    key: str | None
    text: str
    mended_by_annotate: bool = True


class ShardCheck(NamedTuple):
    """What is known of one shard after the checks.

    Attributes:
        name: of the file.
        faults: at most `LISTED` of them; `more` were left out.
        header: its root attributes without the class names; empty when it cannot be opened.
        rows: number of rows.
        nbytes: size of the file.
        first_key, last_key: empty when they cannot be read.
        proven: whether each byte is what the writer wrote; None where another version wrote it, so
            that bytes without content could not be compared.
    """

    name: str
    faults: list[Fault]
    more: int
    header: dict[str, Any]
    rows: int = 0
    nbytes: int = 0
    first_key: str = ""
    last_key: str = ""
    proven: bool | None = None


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
        OutputError: there is no room for the copy that proves its bytes.
        PermissionError: it may not be read.
    """
    result = ShardCheck(path.name, [], 0, {})
    faults, more = result.faults, 0
    try:
        with Shard(path) as shard:
            check_types(shard.attrs)
            header = {name: value for name, value in shard.attrs.items() if name != "class_names"}
            result = result._replace(header=header, rows=shard.rows, nbytes=path.stat().st_size)
            with suppress(FormatError, UnicodeDecodeError):  # said among the faults
                first, last = (shard.read("key", row)[0].decode() for row in (0, shard.rows - 1))
                result = result._replace(first_key=first, last_key=last)
            for fault in _faults(shard, manifest, images):
                if len(faults) < LISTED:
                    faults.append(fault)
                else:
                    more += 1
            if not any(fault.mended_by_annotate for fault in faults):
                result = result._replace(proven=_prove(shard, faults))
    except (OutputError, PermissionError):
        raise  # of this machine, and no reason to delete the shard
    except NewerVersionError as error:  # for a later release; not to be deleted
        text = str(error).removeprefix(f"{path} ")
        faults.append(Fault(path.name, None, None, text, False))
    except MemoryError:
        faults.append(Fault(path.name, None, None, "too large for this machine's memory", False))
    # Damaged or hostile files can make h5py, NumPy and json raise nearly anything.
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

    def fault(row: int, text: str, mended: bool = True) -> Fault:
        return Fault(name, row, keys[row] if keys else None, text, mended)

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
        found = map_faults(block, good, shard.layout.num_classes)
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
    for name in ("key", "label", "size", "digest", "error", "score_range", "extent"):
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
        return {name: shard.read(name, start, stop) for name in MAPS}, []
    except FormatError as first:
        bad = []
        for row in range(start, stop):
            try:
                for name in MAPS:
                    shard.read(name, row, row + 1)
            except FormatError as error:
                bad.append((row, _without(shard.path, str(error))))
        return {}, bad or [(start, _without(shard.path, str(first)))]


def _prove(shard: Shard, faults: list[Fault]) -> bool | None:
    """Whether each byte of the file is as written; adds the fault where one is not."""
    with open_h5(shard.path) as file:
        if set(file) - {*MAPS, *ROWS, *OPTIONAL_ROWS}:
            return None  # a later release's: this one would leave it out
    difference = compare_with_rewrite(shard)
    if difference is None:
        covered = "class_names" not in shard.attrs or "class_names" in settings_of(shard.attrs)
        return True if covered else None
    if not difference.same_writer:
        return None
    found = f"0x{difference.found.hex()}" if difference.found else "nothing"
    expected = f"0x{difference.expected.hex()}" if difference.expected else "the end of the file"
    text = (
        f"byte {difference.offset} must be {expected}, it is {found} ({difference.changed} such "
        "bytes): they were changed, though all maps and columns still have their right values"
    )
    faults.append(Fault(shard.path.name, None, None, text))
    return False
