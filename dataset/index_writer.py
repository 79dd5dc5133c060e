"""Derives `index.h5` from the shards of a split. Its parts are in docs/format.md."""

import contextlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.files import create_h5, set_text
from tokenlabel.dataset.keys import KeySpool, Spool
from tokenlabel.dataset.shard import MAPS, Shard

FORMAT = "tokenlabel-index"
VERSION = 2
#: Where in the shard's file the chunks of a row are, in the order of MAPS; size 0: not known.
CHUNK = np.dtype([("offset", "<u8", len(MAPS)), ("size", "<u4", len(MAPS))])
#: Columns of the rows: dtype and width. The last two are there where a shard has them.
COLUMNS: dict[str, tuple[np.dtype | str, int]] = {
    "label": ("<i4", 1),
    "size": ("<i4", 2),
    "failed": ("|u1", 1),
    "chunk": (CHUNK, 1),
    "score_range": ("<f4", 2),
    "extent": ("<f4", 4),
}
OPTIONAL = ("score_range", "extent")


def checksums(keys: bytes, lengths: np.ndarray, columns: dict[str, bytes]) -> list[int | None]:
    """CRC-32 of a shard's keys with their lengths, and of each column; None of one not given."""
    return [
        zlib.crc32(lengths.astype("<u8").tobytes(), zlib.crc32(keys)),
        *(zlib.crc32(columns[name]) if name in columns else None for name in COLUMNS),
    ]


def open_shard(path: Path) -> Shard:
    """Open a shard that was there a moment ago.

    Raises FormatError as `Shard`, and where it has gone, as by `inspect-labels --repair`.
    """
    try:
        return Shard(path)
    except FileNotFoundError as error:
        raise _deleted(path) from error


def shard_size(path: Path) -> int:
    """Bytes of a shard that was there a moment ago; FormatError where it has gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise _deleted(path) from error


def _deleted(path: Path) -> FormatError:
    return FormatError(
        f"{path} has been deleted meanwhile. Remedy: wait for the job that makes it again, or "
        "run the same `annotate` again"
    )


def write_index(path: Path, shards: list[Path]) -> None:
    """Write the index of `shards` to `path`, row by row in constant memory.

    Raises FormatError for shards that do not belong together or have gone meanwhile.
    """
    with contextlib.ExitStack() as stack:
        keys = stack.enter_context(contextlib.closing(KeySpool(path.parent)))
        spools = {
            name: stack.enter_context(contextlib.closing(Spool(path.parent, dtype)))
            for name, (dtype, _) in COLUMNS.items()
        }
        rows, sizes, digests, checks = [0], [], [], []
        first: dict[str, Any] = {}
        optional: set[str] = set()
        for number, shard_path in enumerate(shards):
            with open_shard(shard_path) as shard:
                first = first or shard.attrs
                _check_neighbours(shard, number, rows[-1], shards[0], first)
                texts, columns = shard.read("key").tolist(), _columns(shard)
                optional |= {name for name in OPTIONAL if name in shard}
                rows.append(rows[-1] + shard.rows)
                digests.append(shard.attrs["sha256"].encode())
            keys.append(texts)
            for name, column in columns.items():
                spools[name].append(column)
            lengths = np.fromiter(map(len, texts), "<u8", len(texts))
            checks.append(checksums(b"".join(texts), lengths, columns))
            sizes.append(shard_size(shard_path))
        with create_h5(path) as file:
            set_text(file.attrs, "format", FORMAT)
            file.attrs["version"] = VERSION
            set_text(file.attrs, "fingerprint", first["fingerprint"])
            file.attrs["shards"] = len(shards)
            keys.write(file)
            for name, (_, width) in COLUMNS.items():
                if name in optional or name not in OPTIONAL:
                    spools[name].write(file, name, width)
            file.create_dataset("shard_rows", data=np.array(rows, "<u8"))
            file.create_dataset("shard_size", data=np.array(sizes, "<u8"))
            file.create_dataset("shard_sha256", data=np.array(digests, "S64"))
            file.create_dataset("shard_check", data=np.array(checks, "<u4"))


def _check_neighbours(
    shard: Shard, number: int, row: int, first_path: Path, first: dict[str, Any]
) -> None:
    """Raise FormatError unless this shard goes on where the one before it ended."""
    attrs, path = shard.attrs, shard.path
    if attrs["fingerprint"] != first["fingerprint"]:
        raise FormatError(
            "shards of different runs in one folder: "
            f"{first_path.name} has fingerprint {first['fingerprint']}, "
            f"{path.name} has {attrs['fingerprint']}. "
            "Remedy: delete those of the run that is not wanted and annotate again"
        )
    if (attrs["shard"], attrs["first_row"]) != (number, row):
        raise FormatError(
            f"{path} says it is shard {attrs['shard']} from row {attrs['first_row']}; its name and "
            f"neighbours say {number} from row {row}. Remedy: delete it and annotate again"
        )


def _columns(shard: Shard) -> dict[str, bytes]:
    offsets, sizes = zip(*(shard.chunk_places(name) for name in MAPS), strict=True)
    missing = {"score_range": [np.nan, np.nan], "extent": shard.attrs["extent"]}
    chunks = np.empty(shard.rows, CHUNK)
    chunks["offset"], chunks["size"] = np.stack(offsets, 1), np.stack(sizes, 1)
    columns = {
        "label": shard.read("label"),
        "size": shard.read("size"),
        "failed": np.array([bool(text) for text in shard.texts("error")]),
        "chunk": chunks,
        **{
            name: shard.read(name) if name in shard else np.tile(value, (shard.rows, 1))
            for name, value in missing.items()
        },
    }
    return {name: col.astype(COLUMNS[name][0]).tobytes() for name, col in columns.items()}
