"""The manifest: which images a split has, in which order, with which ground truth.

Fixed before the first image is read and saved with the output, because the row numbers of every
shard refer to it. Scanned and stored in constant memory; read through the page cache.
"""

import hashlib
import heapq
import logging
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenlabel.annotate.errors import ConfigError
from tokenlabel.annotate.images import EXTENSIONS
from tokenlabel.dataset.directory import StoredFile
from tokenlabel.dataset.files import replacing
from tokenlabel.dataset.keys import KeyTable, KeyWriter
from tokenlabel.dataset.new_file import create, encode_texts
from tokenlabel.dataset.store import MANIFEST, MANIFEST_FORMAT, MANIFEST_VERSION

#: Its file's name, which the store knows too: it reads the names of the classes.
NAME = MANIFEST
_BLOCK = 8192
_RUN = 1 << 15
_WNID = re.compile(r"n\d{8}")

_log = logging.getLogger(__name__)


class Manifest(NamedTuple):
    """The images of a split.

    Attributes:
        keys: their paths relative to the split, sorted by UTF-8 bytes.
        labels: int32 [n], ground truth or -1.
        digest: hex sha256 of keys and labels.
        label_space: "teacher" when labels are class ids of the teacher, else "folders".
        class_names: names of the teacher's classes; None where they are not known.
    """

    keys: KeyTable
    labels: np.ndarray
    digest: str
    label_space: str
    class_names: list[str] | None


class Classes(NamedTuple):
    """Ground truth by top-level folder: `ids` of those that have one, and their space."""

    ids: dict[bytes, int]
    space: str


def build_manifest(
    root: Path, path: Path, names: Sequence[str] | None, num_classes: int | None
) -> Manifest:
    """Scan the image folder `root` and store its manifest at `path`.

    Args:
        root: folder of the split, with one folder a class or any other nesting.
        path: file to write.
        names: names of the teacher's classes (WordNet ids for ImageNet), None where unknown.
        num_classes: number of the teacher's classes, None where unknown.

    Raises:
        ConfigError: `root` is missing or holds no image, or a name is not UTF-8.
    """
    classes = find_classes(root, names, num_classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as temporary,
        create(
            temporary, MANIFEST_FORMAT, MANIFEST_VERSION, {"label_space": classes.space}
        ) as file,
    ):
        keys, found = KeyWriter(file), scan(root)
        digests = hashlib.sha256(), hashlib.sha256()
        while block := list(islice(found, _BLOCK)):
            ids = (classes.ids.get(key.partition(b"/")[0], -1) for key in block)
            labels = np.array(list(ids), "<i4")
            keys.append(block)
            file.append("label", labels)
            digests[0].update(b"\0".join((*block, b"")))
            digests[1].update(labels.tobytes())
        if keys.rows == 0:
            raise ConfigError(
                f"no images found in {root}: looked in all its folders for files ending in "
                f"{', '.join(EXTENSIONS)}. Remedy: check the path; the images of a split lie "
                "in DATA/SPLIT/CLASS/"
            )
        total = b"".join(digest.digest() for digest in digests)
        file.attrs["sha256"] = hashlib.sha256(total).hexdigest()
        if names:
            file.add("class_names", encode_texts(names), gzip=True)
    return open_manifest(path)


def open_manifest(path: Path, verify: bool = False) -> Manifest:
    """Map a stored manifest.

    Args:
        path: the file.
        verify: read it all and compare its checksum.

    Raises:
        FileNotFoundError: it is not there.
        FormatError: it is damaged or of another version.
    """
    # Not closed: keys and labels are read from it, and it closes with the last of them.
    file = StoredFile(path, MANIFEST_FORMAT, MANIFEST_VERSION, "delete it; `annotate` rebuilds it")
    keys = KeyTable.stored(file)
    labels = file.mapped("label", "<i4", (len(keys),))
    sha256, space = file.attrs.get("sha256"), file.attrs.get("label_space")
    if not isinstance(sha256, str) or not isinstance(space, str):
        raise file.damaged("it has no sha256 or no label_space")
    if verify:
        file.check_bytes()
    names = file.texts("class_names") if "class_names" in file.columns else None
    return Manifest(keys, labels, sha256, space, names)


def find_classes(root: Path, names: Sequence[str] | None, num_classes: int | None) -> Classes:
    """Ground truth of the top-level folders of `root`.

    Folders called like the teacher's classes get those ids, so that a subset of the folders does
    not renumber the classes; a folder the teacher does not know then has no ground truth (-1).
    Where no name fits, folders are numbered in sorted order as by torchvision's ImageFolder; the
    teacher's accuracy is then known only if it has as many classes as there are folders.
    """
    if not root.is_dir():
        raise ConfigError(
            f"the split's folder {root} is not there. Remedy: `data` names the folder that holds "
            "a folder a split (train, val), `split` one of these"
        )
    with os.scandir(root) as entries:
        folders = sorted(_encode(entry.name, root) for entry in entries if _is_folder(entry))
    known = {name.encode(): number for number, name in enumerate(names or [])}
    ids = {folder: known[folder] for folder in folders if folder in known}
    if ids or (folders and all(_WNID.fullmatch(folder.decode()) for folder in folders)):
        if unknown := [folder.decode() for folder in folders if folder not in known]:
            _log.warning(
                "%d of %d folders are no class of the teacher and have no ground truth: %s%s",
                len(unknown),
                len(folders),
                ", ".join(unknown[:3]),
                ", …" if len(unknown) > 3 else "",
            )
        return Classes(ids, "teacher")
    same = names is None and len(folders) == num_classes
    return Classes(
        {folder: number for number, folder in enumerate(folders)}, "teacher" if same else "folders"
    )


def scan(root: Path) -> Iterator[bytes]:
    """Keys of all images under `root`, sorted by their UTF-8 bytes.

    Holds the names of one folder at a time, and those of the folders above it.

    Follows symbolic links, but not back into a folder it is in. What counts as an image is its
    ending, as for torchvision's ImageFolder, in upper or lower case.
    """
    yield from _scan(os.fspath(root), b"", [])


def _scan(folder: str, prefix: bytes, above: list[tuple[int, int]]) -> Iterator[bytes]:
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            _log.warning("%s links back to a folder above it: left out", folder)
            return
        with os.scandir(folder) as entries:
            # A folder sorts as its name plus "/", which makes the walk's order the keys' order.
            names = _sorted(
                _encode(entry.name, folder) + (b"/" if _is_folder(entry) else b"")
                for entry in entries
                if _is_folder(entry) or entry.name.lower().endswith(EXTENSIONS)
            )
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} cannot be listed: {error.strerror}. Remedy: give this user "
            "permission to read it, or move it out of the split"
        ) from error
    for name in names:
        if name.endswith(b"/"):
            child = os.path.join(folder, name[:-1].decode())
            yield from _scan(child, prefix + name, [*above, here])
        else:
            yield prefix + name


def _sorted(names: Iterator[bytes]) -> Iterator[bytes]:
    """The names of a folder in order; of millions, without an object for each.

    Merges sorted runs, each one string with NUL, which no name can hold, between its names.
    """
    runs = []
    while run := sorted(islice(names, _RUN)):
        runs.append(b"\0".join(run))
    return heapq.merge(*map(_split, runs))


def _split(run: bytes) -> Iterator[bytes]:
    return (found[0] for found in re.finditer(rb"[^\0]+", run))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _encode(name: str, folder: str | Path) -> bytes:
    try:
        return name.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"keys are UTF-8, but a file name in {folder} is not: {os.fsencode(name)!r}. "
            "Remedy: rename it (for example with convmv)"
        ) from None


def shard_rows(rows: int, shard_size: int, shard: int) -> range:
    """Rows of shard number `shard`."""
    return range(shard * shard_size, min((shard + 1) * shard_size, rows))


def shard_count(rows: int, shard_size: int) -> int:
    """How many shards a split of `rows` images has."""
    return -(-rows // shard_size)
