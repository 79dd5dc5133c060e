"""The manifest: which images a split has, in which order, with which ground truth.

Fixed before the first image is read and saved with the output, because the row numbers of every
shard refer to it. Written and read in constant memory, through the page cache.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .directory import StoredFile
from .files import replacing
from .keys import KeyTable, KeyWriter

NAME, FORMAT, VERSION = "manifest", "tokenlabel-manifest", 2


class Manifest(NamedTuple):
    """The images of a split.

    Attributes:
        keys: their paths relative to the split, sorted by UTF-8 bytes.
        labels: int32 [n], ground truth or -1.
        digest: hex sha256 of keys and labels.
        label_space: "teacher" when labels are class ids of the teacher, else "folders".
        class_names: names of the teacher's classes; None where unknown.
        folders: class id of each top-level folder, -1 where it has none.
        numbering: how these ids were found, see `annotate.classes`.
    """

    keys: KeyTable
    labels: np.ndarray
    digest: str
    label_space: str
    class_names: list[str] | None
    folders: dict[str, int]
    numbering: str


def write_manifest(
    path: Path,
    blocks: Iterable[tuple[Sequence[bytes], np.ndarray]],
    label_space: str,
    class_names: Sequence[str] | None,
    folders: Mapping[str, int] = {},  # never changed
    numbering: str = "",
) -> None:
    """Store a manifest of `blocks`: keys, sorted by UTF-8 bytes, and the int32 labels of each."""
    from .new_file import add_folders, create, encode_texts

    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as temporary,
        create(
            temporary, FORMAT, VERSION, {"label_space": label_space, "numbering": numbering}
        ) as file,
    ):
        keys = KeyWriter(file)
        digests = hashlib.sha256(), hashlib.sha256()
        for block, labels in blocks:
            keys.append(block)
            file.append("label", labels)
            digests[0].update(b"\0".join((*block, b"")))
            digests[1].update(labels.tobytes())
        total = b"".join(digest.digest() for digest in digests)
        file.attrs["sha256"] = hashlib.sha256(total).hexdigest()
        if class_names:
            file.add("class_names", encode_texts(class_names), gzip=True)
        add_folders(file, folders)


def open_manifest(path: Path, verify: bool = False) -> Manifest:
    """Map a stored manifest; with `verify`, read it all and compare its checksum.

    Raises:
        FileNotFoundError: it is not there.
        FormatError: it is damaged or of another version.
    """
    # Not closed here: keys and labels are read from it later, and it closes with the last of them.
    file = StoredFile(path, FORMAT, VERSION, "delete it; `annotate` rebuilds it")
    keys = KeyTable(file)
    labels = file.mapped("label", "<i4", (len(keys),))
    sha256, space = file.attrs.get("sha256"), file.attrs.get("label_space")
    if not isinstance(sha256, str) or not isinstance(space, str):
        raise file.damaged("it has no sha256 or no label_space")
    if verify:
        file.check_bytes()
    names = file.texts("class_names") if "class_names" in file.columns else None
    numbering = str(file.attrs.get("numbering", ""))
    return Manifest(keys, labels, sha256, space, names, file.folders(), numbering)


def shard_rows(rows: int, shard_size: int, shard: int) -> range:
    """Rows of shard number `shard`."""
    return range(shard * shard_size, min((shard + 1) * shard_size, rows))
