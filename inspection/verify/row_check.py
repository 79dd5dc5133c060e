"""What must hold of each row of a shard; docs/format.md says why."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ...annotate.images import file_digest
from ...dataset.format.manifest import Manifest
from ...dataset.format.score_map import DROPPED, MapLayout
from ...dataset.sources.folder import FolderSource
from ...errors import ImageError, StorageError

Found = Iterator[tuple[int, str]]


def key_fault(keys: list[str]) -> Found:
    """Rows whose key is no path below the split, or not after the key before it."""
    last = b""
    for row, key in enumerate(keys):
        data = key.encode()
        if not _is_inside(key):
            yield row, "a key must be a path inside the split's folder"
        elif row and data <= last:
            rule = "keys must be unique" if data == last else "keys must ascend by UTF-8 bytes"
            yield row, f"{rule}; the key before it is {last.decode(errors='replace')!r}"
        last = data


def row_faults(columns: dict[str, Any], attrs: dict[str, Any]) -> Found:
    """Rows with impossible values in the columns.

    Args:
        columns: label, size, error and extent, each where it could be read.
        attrs: of the shard.
    """
    errors = columns.get("error")
    good = np.array([not error for error in errors]) if errors is not None else None
    if errors is not None and good is not None and (count := int((~good).sum())) != attrs["errors"]:
        yield 0, f"the header counts {attrs['errors']} rows with an error, there are {count}"
    if "label" in columns:
        labels = columns["label"]
        teachers = attrs.get("label_space") == "teacher"
        bad = (labels < -1) | (labels >= attrs["num_classes"] if teachers else False)
        for row in np.flatnonzero(bad).tolist():
            rule = f"below {attrs['num_classes']}" if teachers else "a class"
            yield row, f"a label must be -1 or {rule}, it is {labels[row]}"
    if "size" in columns:
        sizes = columns["size"]
        bad = (sizes < 0).any(1)
        if good is not None:
            bad |= good & (sizes < 1).any(1)
        for row in np.flatnonzero(bad).tolist():
            yield row, f"width and height must be positive, they are {sizes[row].tolist()}"
    boxes = columns["extent"] if "extent" in columns else np.array([attrs["extent"]], float)
    x0, y0, x1, y1 = boxes.T
    bad = ~((0 <= x0) & (x0 < x1) & (x1 <= 1) & (0 <= y0) & (y0 < y1) & (y1 <= 1))
    for row in np.flatnonzero(bad).tolist():
        yield row, f"the extent must be a box in the image, it is {boxes[row].tolist()}"


def map_faults(block: dict[str, np.ndarray], good: np.ndarray, layout: MapLayout) -> Found:
    """Rows of a block whose map cannot be a teacher's.

    Args:
        block: the planes of `layout` by name, [b, *shape] each, as stored.
        good: bool [b], which rows have a map.
        layout: of the map.
    """

    def rows(flags: np.ndarray, text: str) -> Found:
        for row in np.flatnonzero(good & flags.reshape(len(good), -1).any(1)).tolist():
            yield row, text

    codes, classes = block["codes"], block["classes"]
    dropped = codes == (DROPPED if layout.step else np.inf)
    yield from rows(np.isnan(codes) | (codes < 0), "codes must be 0 or more")
    yield from rows(codes[:, :, 1:] < codes[:, :, :-1], "the codes of a cell must not descend")
    yield from rows(dropped[:, :, 0], "the first class of a cell must not be dropped")
    yield from rows(dropped & (classes != 0), "dropped classes must be stored as 0")
    below = f"must be below {layout.num_classes}"
    yield from rows(classes >= layout.num_classes, f"class ids {below}")
    # Dropped ones have no class: what they are compared as differs from all others.
    ids = np.where(dropped, -1 - np.arange(layout.k)[:, None, None], classes.astype(np.int64))
    ordered = np.sort(ids, 2)
    yield from rows(ordered[:, :, 1:] == ordered[:, :, :-1], "classes of a cell must be different")
    if layout.residual:
        named = block["residual_classes"]
        yield from rows(named >= layout.num_classes, f"residual classes {below}")
        yield from rows(named[..., 1:] <= named[..., :-1], "residual classes must ascend")
    if layout.level:
        yield from rows(~np.isfinite(block["level"]), "level must be finite")


def manifest_faults(
    manifest: Manifest, first: int, keys: list[str], labels: np.ndarray | None
) -> Found:
    """The first row that is not the manifest's, and all rows with other labels.

    Args:
        manifest: of the split.
        first: row of the split that is row 0 of the shard.
        keys: of the shard.
        labels: of the shard, int32 [n]; None where they could not be read.
    """
    wanted = manifest.keys[first : first + len(keys)]
    for row, key in enumerate(keys):
        want = wanted[row] if row < len(wanted) else None
        if key != want:
            yield row, f"the manifest has {want!r} as row {first + row}"
            return  # all after it would differ too
    if labels is not None:
        wants = manifest.labels[first : first + len(keys)]
        for row in np.flatnonzero(wants != labels[: len(wants)]).tolist():
            yield row, f"its label is {labels[row]}, in the manifest {wants[row]}"


def image_faults(images: Path, keys: list[str], digests: np.ndarray) -> Found:
    """Rows whose image is not the file that was annotated.

    Args:
        images: folder of the split's images.
        keys: of the shard.
        digests: of the files as they were, uint64 [n]; 0 where that is not known.
    """
    source = FolderSource(images)
    for row, key in enumerate(keys):
        if digests[row] == 0:  # unknown: the file could not be read then
            continue
        try:
            (data,) = source.read([key])
        except StorageError as error:
            data = ImageError(str(error))
        if isinstance(data, ImageError):
            yield row, f"the image cannot be read: {data}"
        elif file_digest(data) != digests[row]:
            yield row, "the image's file is not the one that was annotated: its digest differs"


def _is_inside(key: str) -> bool:
    path = PurePosixPath(key)
    return bool(key) and not (path.is_absolute() or ".." in path.parts or "\0" in key)
