"""A scan of a source in blocks of images: small enough to send, large enough to be fast."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np

from ...errors import ConfigError
from ..format.manifest import PLACE, Block, Manifest
from ..storage.remote_path import RemotePath, as_path
from .image_source import Entry, ImageSource

_IMAGES = 8192
#: Parts that are scanned at the same time where that is mostly waiting.
_AT_ONCE = 16


class ScanBlock(NamedTuple):
    """Some images of one part.

    Attributes:
        keys: n of them.
        names: classes of these images, each once; not of those without.
        classes: int32 [n], number of each image's class in `names`, -1 where it has none.
        part, start, size: [n], as in `Entry`.
    """

    keys: list[str]
    names: list[str]
    classes: np.ndarray
    part: np.ndarray
    start: np.ndarray
    size: np.ndarray


def scan_part(source: ImageSource, part: int) -> Iterator[ScanBlock]:
    """The images of a part, in order; raises as `ImageSource.scan`."""
    entries = source.scan(part)
    while block := list(islice(entries, _IMAGES)):
        keys, classes, *places = zip(*block, strict=True)
        number = {"": -1}
        for name in classes:
            number.setdefault(name, len(number) - 1)
        columns = zip(places, PLACE.values(), strict=True)
        yield ScanBlock(
            list(keys),
            [*number][1:],
            np.array([number[name] for name in classes], "<i4"),
            *(np.array(column, dtype) for column, dtype in columns),
        )


def scan_all(source: ImageSource) -> Iterator[ScanBlock]:
    """The images of all parts, in order, in this process; of parts in a store, 16 at once."""
    parts = source.parts()
    if not waits_for_store(parts):
        for part in range(len(parts)):
            yield from scan_part(source, part)
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(parts), _AT_ONCE):  # no more of them in memory
            some = range(start, min(start + _AT_ONCE, len(parts)))
            for blocks in pool.map(lambda part: list(scan_part(source, part)), some):
                yield from blocks


def waits_for_store(parts: Sequence[str]) -> bool:
    """Whether these are several objects in a store: scanning them is mostly waiting for it."""
    return len(parts) > 1 and isinstance(as_path(parts[0]), RemotePath)


def manifest_blocks(
    blocks: Iterable[ScanBlock], source: ImageSource, classes: dict[str, int]
) -> Iterator[Block]:
    """A scan as a manifest stores it.

    Args:
        blocks: the scan.
        source: for errors.
        classes: number of each class, in the order in which they are met; empty, and filled here.

    Raises:
        ConfigError: there is no image.
    """
    block = None
    for block in blocks:
        numbers = np.array([*(classes.setdefault(n, len(classes)) for n in block.names), -1], "<i4")
        yield Block(block.keys, numbers[block.classes], block.part, block.start, block.size)
    if block is None:
        raise ConfigError(f"no images found in {source}. Remedy: check the path")


def entries_of(manifest: Manifest, rows: Sequence[int]) -> list[Entry]:
    """The images of some rows, for `ImageSource.read`; without their classes."""
    where: slice | list[int]
    if isinstance(rows, range) and rows.step == 1:
        where, keys = slice(rows.start, rows.stop), manifest.keys[rows.start : rows.stop]
    else:
        where, keys = list(rows), [manifest.keys[row] for row in rows]
    if not manifest.places:
        return [Entry(key) for key in keys]
    places = (manifest.places[name][where].tolist() for name in PLACE)
    return [Entry(key, "", *place) for key, *place in zip(keys, *places, strict=True)]
