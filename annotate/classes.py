"""Ground truth: which class each folder of a split has, and the manifest made of it."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..dataset.format.manifest import Manifest, open_manifest, write_manifest
from ..dataset.sources.folder import EXTENSIONS, encode_name, is_folder, scan
from ..errors import ConfigError

_BLOCK = 8192
_WNID = re.compile(r"n\d{8}")

_log = logging.getLogger(__name__)


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
    classes, keys = find_classes(root, names, num_classes), scan(root)
    first = list(islice(keys, 1))
    if not first:
        raise ConfigError(
            f"no images found in {root}: looked in all its folders for files ending in "
            f"{', '.join(EXTENSIONS)}. Remedy: check the path; the images of a split lie "
            "in DATA/SPLIT/CLASS/"
        )

    def blocks() -> Iterator[tuple[list[bytes], np.ndarray]]:
        found = chain(first, keys)
        while block := list(islice(found, _BLOCK)):
            ids = [classes.ids.get(key.partition(b"/")[0], -1) for key in block]
            yield block, np.array(ids, "<i4")

    write_manifest(path, blocks(), classes.space, names)
    return open_manifest(path)


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
        folders = sorted(encode_name(entry.name, root) for entry in entries if is_folder(entry))
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
