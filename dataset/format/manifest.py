"""The manifest: which images a split has, in which order, where they are, and of which class.

Fixed before the first image is read and saved with the output, because the row numbers of every
shard refer to it. Written and read in constant memory, through the page cache.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...errors import FormatError
from ..storage.remote_path import AnyPath
from .directory import StoredFile
from .files import replacing
from .keys import KeyTable, KeyWriter

NAME, FORMAT, VERSION = "manifest", "tokenlabel-manifest", 3
#: Columns that say where an image is: number of its object, and two numbers that its source reads.
PLACE = {"part": "<u4", "start": "<u8", "size": "<u4"}


class Block(NamedTuple):
    """Some images in the order of the split.

    Attributes:
        keys: n of them.
        classes: int32 [n], the number of its class, in the order in which they are first met; -1
            where there is none.
        part, start, size: uint32, uint64, uint32 [n], as `sources.image_source.Entry` has them.
    """

    keys: Sequence[str]
    classes: np.ndarray
    part: np.ndarray
    start: np.ndarray
    size: np.ndarray


class Numbered(NamedTuple):
    """What `write_manifest` is told of the classes once it has seen all images.

    Attributes:
        label_space: "teacher" when labels are class ids of the teacher, else "folders".
        class_names: names of the teacher's classes; None where unknown.
        folders: class id by name of each of the images' classes, -1 where it has none.
        numbering: how these ids were found, see `annotate.classes`.
    """

    label_space: str
    class_names: Sequence[str] | None
    folders: Mapping[str, int]
    numbering: str = ""


class Manifest(NamedTuple):
    """The images of a split.

    Attributes:
        keys: their names, in the order of the rows; of a folder, paths relative to the split.
        classes: int32 [n], the number of each image's class in `folders`; -1: it has none.
        places: `part`, `start` and `size` of each image by name, [n] each; empty for a folder.
        digest: hex sha256 of keys and classes.
        label_space, class_names, folders, numbering: as in `Numbered`; of the images' classes in
            order of their numbers.
        source: the text of their source.
        parts: `parts_digest` of the objects that hold them.
    """

    keys: KeyTable
    classes: np.ndarray
    places: dict[str, np.ndarray]
    digest: str
    label_space: str
    class_names: list[str] | None
    folders: dict[str, int]
    numbering: str
    source: str
    parts: str

    def labels(self, rows: slice = slice(None)) -> np.ndarray:
        """Ground truth of the rows, int32, -1 where there is none.

        Raises:
            FormatError: a row's class is none of `folders`.
        """
        ids = np.array([*self.folders.values(), -1], "<i4")  # class -1 is the last
        classes = self.classes[rows]
        if len(classes) and not -1 <= classes.min() <= classes.max() < len(self.folders):
            raise FormatError(
                f"the manifest is damaged: it has {len(self.folders)} classes, and images of class "
                f"{classes.min()} to {classes.max()}. Remedy: delete it; `annotate` rebuilds it"
            )
        labels: np.ndarray = ids[classes]
        return labels


def write_manifest(
    path: AnyPath,
    blocks: Iterable[Block],
    number: Callable[[], Numbered],
    source: str,
    parts: Sequence[str] = (),
) -> None:
    """Store a manifest.

    Args:
        path: of the file.
        blocks: the images in order.
        number: called after the last block; gives the classes.
        source: the text of the images' source.
        parts: the objects that hold them.

    Raises:
        FormatError: two images have the same key.
        ValueError: there is no image.
    """
    from .new_file import add_folders, create, encode_texts

    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as temporary,
        create(temporary, FORMAT, VERSION, {"source": source}) as file,
    ):
        keys, located = KeyWriter(file), False
        digests = hashlib.sha256(), hashlib.sha256()
        for block in blocks:
            keys.append(block.keys)
            file.append("class", block.classes)
            for name, dtype in PLACE.items():
                file.append(name, getattr(block, name).astype(dtype))
            located = located or any(getattr(block, name).any() for name in PLACE)
            digests[0].update("\0".join((*block.keys, "")).encode())
            digests[1].update(block.classes.tobytes())
        if not located:
            for name in PLACE:
                file.drop(name)
        keys.finish()
        numbered = number()
        total = b"".join(digest.digest() for digest in digests)
        total += json.dumps([*numbered.folders.items()]).encode()
        file.attrs |= {
            "sha256": hashlib.sha256(total).hexdigest(),
            "label_space": numbered.label_space,
            "numbering": numbered.numbering,
            "parts": parts_digest(parts),
        }
        if numbered.class_names:
            file.add("class_names", encode_texts(numbered.class_names), gzip=True)
        add_folders(file, numbered.folders)


def open_manifest(path: AnyPath, verify: bool = False) -> Manifest:
    """Map a stored manifest; with `verify`, read it all and compare its checksum.

    Raises:
        FileNotFoundError: it is not there.
        FormatError: it is damaged or of another version.
    """
    # Not closed here: keys and columns are read from it later, and it closes with the last of them.
    file = StoredFile(path, FORMAT, VERSION, "delete it; `annotate` rebuilds it")
    keys = KeyTable(file)
    texts = [file.attrs.get(name) for name in ("sha256", "label_space", "source", "parts")]
    if not all(isinstance(text, str) for text in texts):
        raise file.damaged("it has no sha256, label_space, source or parts")
    if verify:
        file.check_bytes()
    rows = (len(keys),)
    places = {
        name: file.mapped(name, dtype, rows)
        for name, dtype in PLACE.items()
        if "part" in file.columns
    }
    folders = file.folders()
    classes = file.mapped("class", "<i4", rows)
    sha256, space, source, parts = map(str, texts)
    return Manifest(
        keys,
        classes,
        places,
        sha256,
        space,
        file.texts("class_names") if "class_names" in file.columns else None,
        folders,
        str(file.attrs.get("numbering", "")),
        source,
        parts,
    )


def parts_digest(parts: Sequence[str]) -> str:
    """What a manifest holds of the objects that its images are in."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def shard_rows(rows: int, shard_size: int, shard: int) -> range:
    """Rows of shard number `shard`."""
    return range(shard * shard_size, min((shard + 1) * shard_size, rows))
