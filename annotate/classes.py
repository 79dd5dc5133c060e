"""Ground truth: the class of each folder of a split, and the manifest that stores it."""

import logging
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from ..dataset.format.manifest import Manifest, open_manifest, write_manifest
from ..dataset.sources.image_source import ImageSource

_BLOCK = 8192  # images
_WNID = re.compile(r"n\d{8}")

_log = logging.getLogger(__name__)


def build_manifest(
    source: ImageSource, path: Path, names: Sequence[str] | None, num_classes: int | None
) -> Manifest:
    """Scan a split and store its manifest at `path`.

    Args:
        source: the split's images.
        path: file to write.
        names: names of the teacher's classes (WordNet ids for ImageNet), None where unknown.
        num_classes: their number, None where unknown.

    Raises:
        ConfigError: there is no image, or the source cannot be listed.
    """
    folders, entries = source.classes(), source.scan()
    known, space = find_classes(folders, names, num_classes)
    # By the source's numbers; its -1 is the last.
    ids = np.array([*(known.get(name, -1) for name in folders), -1], "<i4")

    def blocks() -> Iterator[tuple[list[bytes], np.ndarray]]:
        while block := list(islice(entries, _BLOCK)):
            yield [entry.key for entry in block], ids[[entry.label for entry in block]]

    write_manifest(path, blocks(), space, names)
    return open_manifest(path)


def find_classes(
    folders: Sequence[str], names: Sequence[str] | None, num_classes: int | None
) -> tuple[dict[str, int], str]:
    """Ground truth of those top-level folders of a split that have one, and its label space.

    Folders called like the teacher's classes get those ids, so that a subset of the folders does
    not renumber the classes; a folder the teacher does not know then has no ground truth (-1).
    Where no name fits, folders are numbered in sorted order as by torchvision's ImageFolder; the
    teacher's accuracy is then known only if it has as many classes as there are folders.
    """
    known = {name: number for number, name in enumerate(names or [])}
    ids = {folder: known[folder] for folder in folders if folder in known}
    if ids or (folders and all(_WNID.fullmatch(folder) for folder in folders)):
        if unknown := [folder for folder in folders if folder not in known]:
            _log.warning(
                "%d of %d folders are no class of the teacher and have no ground truth: %s",
                len(unknown),
                len(folders),
                ", ".join(unknown[:3]) + ", …" * (len(unknown) > 3),
            )
        return ids, "teacher"
    numbers = {folder: number for number, folder in enumerate(folders)}
    same = names is None and len(folders) == num_classes
    return numbers, "teacher" if same else "folders"
