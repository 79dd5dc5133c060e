"""The proof that every byte of a shard is what its writer wrote.

A shard is a function of its content: equal content gives equal bytes. So the content, once it is
known to be right by its checksums, is written again, and the two files are compared byte by byte.
That finds what no checksum covers: padding bits of deflate, unused space of HDF5's blocks, bytes
behind the end.
"""

import mmap
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenlabel.annotate.errors import OutputError
from tokenlabel.dataset.files import create_h5
from tokenlabel.dataset.shard import VIEWS, Shard, ShardWriter, dequantise

#: HDF5 stores attributes in the order they come in, and forgets it. This is the job's order.
#: Another writer's is guessed from where they are in the file.
_ATTRIBUTES = (
    "teacher",
    "weights_digest",
    "dense_rule",
    "preprocessing",
    "extent",
    "label_space",
    "settings",
    "fingerprint",
    "libraries",
    "shards",
    "split_rows",
    "class_names",
    "shard",
    "first_row",
    "labelled",
    "top1",
    "top5",
    "mass",
)
#: What the writer stores by itself.
_WRITERS = ("format", "version", "num_classes", "k", "views", "errors", "sha256")
_BLOCK = 256
#: Damage that leaves every checksum right lies in the few, scattered bytes without content. What
#: differs in more of them was written by other versions of zlib, HDF5 or the writer.
_MOST_DAMAGED = 64
_COMPARED = 1 << 20


class Difference(NamedTuple):
    """How a file differs from what its content gives when it is written again.

    Attributes:
        offset: the first byte that differs, or where the shorter file ends.
        found: the bytes there, at most 1; none behind the end of the file.
        expected: the bytes that the writer gives.
        changed: how many bytes differ, the difference in length included.
        same_writer: whether the difference can be damage; not so where too much differs.
    """

    offset: int
    found: bytes
    expected: bytes
    changed: int
    same_writer: bool


def compare_with_rewrite(shard: Shard) -> Difference | None:
    """Write a shard's content again, in a temporary folder, and compare; None where equal.

    Raises:
        FormatError: the content cannot be read.
        ValueError: it is nothing that the writer writes.
        OutputError: there is no room for the copy.
    """
    try:
        return _least_difference(shard)
    except OSError as error:
        raise OutputError(
            f"a copy of {shard.path.name} must be written to be compared, in "
            f"{tempfile.gettempdir()}: {error}. Remedy: name a folder with room in TMPDIR"
        ) from error


def _least_difference(shard: Shard) -> Difference | None:
    least: Difference | None = None
    with tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder:
        for number, order in enumerate(_orders(shard)):
            path = Path(folder) / str(number)
            _write(shard, path, order)
            difference = _compare(shard.path, path)
            if difference is None:
                return None
            if least is None or difference.changed < least.changed:
                least = difference
            if difference.same_writer:
                break
    return least


def _orders(shard: Shard) -> Iterator[list[str]]:
    """Orders in which the attributes may have been stored, without those the writer adds."""
    names = shard.attrs.keys() - {*_WRITERS}
    place = {name: number for number, name in enumerate(_ATTRIBUTES)}
    jobs = sorted(names, key=lambda name: (place.get(name, len(place)), name))
    yield jobs
    longest_first = sorted(names, key=len, reverse=True)
    alternatives = b"|".join(re.escape(name.encode()) for name in longest_first)
    # HDF5's attribute message, version 3: flags, three sizes, encoding, the name.
    message = re.compile(rb"\x03\x00(..)....[\x00\x01](%s)\x00" % alternatives, re.DOTALL)
    with open(shard.path, "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = [match[2].decode() for match in message.finditer(content)]
    as_stored = list(dict.fromkeys([*found, *jobs]))
    if as_stored != jobs:
        yield as_stored


def _write(shard: Shard, path: Path, order: list[str]) -> None:
    attrs = {name: shard.attrs[name] for name in order}
    if shard.layout.views not in (VIEWS[:1], VIEWS):
        raise ValueError(f"views must be {VIEWS[:1]} or {VIEWS}, got {shard.layout.views}")
    errors, digests, sizes = shard.texts("error"), shard.read("digest"), shard.read("size")
    extents = shard.read("extent") if "extent" in shard else None
    ranges = shard.read("score_range") if "score_range" in shard else None
    with create_h5(path) as file:
        writer = ShardWriter(
            file, shard.layout, shard.texts("key"), shard.read("label"), attrs, extents
        )
        for start in range(0, shard.rows, _BLOCK):
            rows = slice(start, min(start + _BLOCK, shard.rows))
            scores = shard.read("scores", rows.start, rows.stop)
            if ranges is not None:
                scores = np.stack(list(map(dequantise, scores, ranges[rows])))
            writer.append(
                scores,
                shard.read("classes", rows.start, rows.stop),
                shard.read("rest", rows.start, rows.stop),
                sizes[rows],
                digests[rows],
                errors[rows],
            )
        writer.finish()


def _compare(path: Path, other: Path) -> Difference | None:
    with open(path, "rb") as one, open(other, "rb") as two:
        sizes = [os.fstat(file.fileno()).st_size for file in (one, two)]
        with (
            mmap.mmap(one.fileno(), 0, access=mmap.ACCESS_READ) as found,
            mmap.mmap(two.fileno(), 0, access=mmap.ACCESS_READ) as expected,
        ):
            common, first, count = min(sizes), -1, abs(sizes[0] - sizes[1])
            for start in range(0, common, _COMPARED):
                stop = min(start + _COMPARED, common)
                a, b = (np.frombuffer(file[start:stop], "u1") for file in (found, expected))
                places = np.flatnonzero(a != b)
                if len(places):
                    first = start + int(places[0]) if first < 0 else first
                    count += len(places)
            if count == 0:
                return None
            first = common if first < 0 else first
            # Bytes that were appended leave the others alone.
            same = count - max(sizes[0] - sizes[1], 0) <= _MOST_DAMAGED
            return Difference(
                first, found[first : first + 1], expected[first : first + 1], count, same
            )
