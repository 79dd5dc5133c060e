"""`index.h5`: where every key of a split is, derived from the shards and rebuilt at any time.

The index holds the key table, labels, sizes and error flags of all rows, and the name, size and
digest of each shard, by which a stale index is recognised. The shards are the truth.
"""

import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.files import (
    attribute,
    check_identity,
    create_h5,
    open_h5,
    replacing,
    set_text,
)
from tokenlabel.dataset.keys import KeySpool, KeyTable, MappedFile, Spool
from tokenlabel.dataset.shard import Shard, parse_shard_name, shard_name

FORMAT = "tokenlabel-index"
VERSION = 1
NAME = "index.h5"

_log = logging.getLogger(__name__)


class Index(NamedTuple):
    """The rows of a split, in order.

    Attributes:
        keys: the sorted keys.
        labels: int32 [n], ground truth or -1.
        sizes: int32 [n, 2], (width, height) of the pictures.
        failed: bool [n], True where the image has no map.
        shard_rows: uint64 [shards + 1], the first row of each shard, and the number of rows.
        shard_sha256: the content digest of each shard.
    """

    keys: KeyTable
    labels: np.ndarray
    sizes: np.ndarray
    failed: np.ndarray
    shard_rows: np.ndarray
    shard_sha256: list[str]


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
        raise FileNotFoundError(f"{root} holds no shards. Remedy: run `annotate` into this folder")
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
            f"{', …' if len(missing) > 3 else ''}). Remedy: run the same `annotate` again"
        )
    return [Path(path) for _, path in found]


def open_index(root: Path) -> Index:
    """The index of a split; built first where it is absent, stale or damaged.

    A folder that cannot be written to gets no file: the index is then built for this process.
    """
    shards = find_shards(root)
    path = root / NAME
    try:
        return _load(path, shards)
    except FileNotFoundError:
        _log.info("%s has no index yet: building it", root)
    except FormatError as error:
        _log.info("building the index anew: %s", error)
    try:
        build_index(root, shards)
    except OSError as error:
        _log.info("the index cannot be kept in %s (%s): it is built in memory", root, error)
        # Mapped memory outlives the file's name, so the folder may go at once.
        with tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder:
            path = Path(folder) / NAME
            _write(path, shards)
            return _load(path, shards)
    return _load(path, shards)


def build_index(root: Path, shards: list[Path] | None = None) -> Path:
    """Write `index.h5` from the shards, row by row in constant memory; return its path.

    Raises FormatError for shards that do not belong together.
    """
    path = root / NAME
    with replacing(path) as temporary:
        _write(temporary, shards or find_shards(root))
    return path


def _write(path: Path, shards: list[Path]) -> None:
    columns = {"label": ("<i4", 1), "size": ("<i4", 2), "failed": ("|u1", 1)}
    with contextlib.ExitStack() as stack:
        keys = stack.enter_context(contextlib.closing(KeySpool(path.parent)))
        spools = {
            name: stack.enter_context(contextlib.closing(Spool(path.parent, dtype)))
            for name, (dtype, _) in columns.items()
        }
        rows, sizes, digests = [0], [], []
        first: dict[str, Any] = {}
        for number, shard_path in enumerate(shards):
            with Shard(shard_path) as shard:
                attrs = shard.attrs
                first = first or attrs
                if attrs["fingerprint"] != first["fingerprint"]:
                    raise FormatError(
                        "shards of different runs in one folder: "
                        f"{shards[0].name} has fingerprint {first['fingerprint']}, "
                        f"{shard_path.name} has {attrs['fingerprint']}. "
                        "Remedy: delete those of the run that is not wanted and annotate again"
                    )
                if (attrs["shard"], attrs["first_row"]) != (number, rows[-1]):
                    raise FormatError(
                        f"{shard_path} says it is shard {attrs['shard']} from row "
                        f"{attrs['first_row']}; its name and neighbours say {number} from row "
                        f"{rows[-1]}. Remedy: delete it and annotate again"
                    )
                keys.append(shard.read("key").tolist())
                failed = np.array([bool(text) for text in shard.texts("error")], "u1")
                for name in ("label", "size"):
                    spools[name].append(np.ascontiguousarray(shard.read(name)).tobytes())
                spools["failed"].append(failed.tobytes())
                rows.append(rows[-1] + shard.rows)
                digests.append(attrs["sha256"].encode())
            sizes.append(shard_path.stat().st_size)
        with create_h5(path) as file:
            set_text(file.attrs, "format", FORMAT)
            file.attrs["version"] = VERSION
            set_text(file.attrs, "fingerprint", first["fingerprint"])
            file.attrs["shards"] = len(shards)
            keys.write(file)
            for name, (_, width) in columns.items():
                spools[name].write(file, name, width)
            file.create_dataset("shard_rows", data=np.array(rows, "<u8"))
            file.create_dataset("shard_size", data=np.array(sizes, "<u8"))
            file.create_dataset("shard_sha256", data=np.array(digests, "S64"))


def _load(path: Path, shards: list[Path]) -> Index:
    with open_h5(path) as file:
        check_identity(file, FORMAT, VERSION, "Remedy: delete it; it is rebuilt")
        try:
            rows, count = (attribute(file.attrs[name]) for name in ("rows", "shards"))
            sizes = file["shard_size"][:].tolist()
            if count != len(shards) or sizes != [shard.stat().st_size for shard in shards]:
                raise FormatError(f"{path} is older than the shards")
            index = _map(path, file, int(rows), len(shards))
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is damaged: {error}") from error
    # Another run's shards may have the same sizes; one header tells. The others are compared
    # when they are opened.
    with Shard(shards[0]) as shard:
        if shard.attrs["sha256"] != index.shard_sha256[0]:
            raise FormatError(f"{path} is of other shards")
    return index


def _map(path: Path, file: h5py.File, rows: int, shards: int) -> Index:
    mapped = MappedFile(path, file)
    return Index(
        KeyTable.mapped(mapped, rows, int(attribute(file.attrs["key_size"]))),
        mapped.array("label", "<i4", (rows,)),
        mapped.array("size", "<i4", (rows, 2)),
        mapped.array("failed", "|u1", (rows,)).view(bool),
        mapped.array("shard_rows", "<u8", (shards + 1,)),
        [digest.decode() for digest in file["shard_sha256"][:]],
    )
