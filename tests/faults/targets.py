"""What is fuzzed: real shards, an index and a manifest, and how each is read."""

import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.faults.attacks import ATTACKS, attack
from tests.maps import attrs, manifest_of, random_rows, write_split
from tokenlabel.dataset.format.index import NAME, build_index, find_shards, load_index
from tokenlabel.dataset.format.manifest import open_manifest
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.format.shard import COLUMNS, Shard, shard_name, write_shard
from tokenlabel.dataset.store import LabelStore
from tokenlabel.errors import FormatError, MissingMapError

KINDS = ("shard", "index", "split", "manifest")
#: What may come of reading: all as it was written, other content, an error that says so.
VERDICTS = ("equal", "changed", "refused")
#: Changes that checksums must notice wherever they carry content.
NOTICED = ("bytes", "run", "splice", "number", "cut")
_ROWS_READ = 6


class Wrong(Exception):
    """A reader did what it must not."""


class Seed(NamedTuple):
    """A file to mutate.

    Attributes:
        name: of the seed; `kind` says how it is read.
        file: its name in the folder.
        folder: what it is read with.
        truth: what an undamaged one gives; nothing for what is refused as it is.
        weight: how often it is taken, relative to the others.
    """

    name: str
    kind: str
    file: str
    folder: Path
    data: bytes
    truth: Any
    weight: float

    def place(self, folder: Path) -> None:
        """Copy what the file is read with."""
        shutil.copytree(self.folder, folder / self.name)


def make_seeds(folder: Path) -> list[Seed]:
    """All seeds, made in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    first = shard_name(0, 1)
    small = MapLayout(("identity",), (2, 3), 2, 10, residual=3)
    keys = ["a/b.jpg", "b/ü.png", "c/d.webp"]
    seeds = []

    def add(name: str, kind: str = "shard", file: str = first, weight: float = 1) -> None:
        path = folder / name / file
        truth = content(kind, path)
        seeds.append(Seed(name, kind, file, path.parent, path.read_bytes(), truth, weight))

    write_split(folder / "small", keys, small, errors={keys[1]: "cut short"})
    add("small", weight=3)
    precise = MapLayout(("identity", "hflip"), (2, 2), 3, 70_000, residual=0, step=0.0, level=False)
    write_split(folder / "precise", keys, precise)
    add("precise", weight=2)
    (folder / "extents").mkdir()
    boxes = np.sort(np.random.default_rng(0).random((3, 2, 2)), 1).reshape(3, 4)
    header = attrs(0, 1, 0, settings="{}" * 99)
    with write_shard(folder / "extents" / first, small, keys, [0, 1, 2], header, boxes) as writer:
        writer.append(*random_rows(small, 3))
    add("extents", weight=2)
    for name, kind, weight in (("index", "index", 2), ("split", "split", 0.3)):
        write_split(folder / name, [*keys, "e.jpg", "f.jpg"], small, shard_size=3)
        build_index(folder / name)
        add(name, kind, NAME, weight)
    # A store's shard, damaged after it was indexed.
    shutil.copytree(folder / "split", folder / "shard of a split")
    add("shard of a split", "split", shard_name(1, 2), 0.3)
    # What is near them is as bad.
    for name in ATTACKS:
        write_split(folder / name, keys, small)
        path = folder / name / first
        attack(path, name)
        seeds.append(Seed(name, "shard", first, path.parent, path.read_bytes(), {}, 0.02))
    images = folder / "images" / "a"
    images.mkdir(parents=True)
    for number in range(5):
        (images / f"{number}.jpg").write_bytes(b"")
    (folder / "manifest").mkdir()
    names = ["a", *(f"n{number:08d}" for number in range(59))]
    manifest_of(folder / "images", folder / "manifest" / "manifest", names)
    add("manifest", "manifest", "manifest", 2)
    return seeds


def content(kind: str, path: Path) -> Any:
    """All that is in a file, as its reader gives it; the parts by name."""
    return _CONTENTS[kind](path)


def _shard(path: Path) -> dict[str, Any]:
    with Shard(path) as shard:
        parts: dict[str, Any] = {
            name: value for name, value in shard.attrs.items() if len(str(value)) < 4000
        }
        for name in COLUMNS:
            if name in shard:
                parts[name] = shard.read(name)
        for name in shard.layout.planes():
            parts[name] = shard.read(name, 0, _ROWS_READ)
        for row in range(min(shard.rows, _ROWS_READ)):
            found = shard.map(row)
            for name in shard.layout.planes():
                if getattr(found, name).tobytes() != parts[name][row].tobytes():
                    raise Wrong(f"{name} of row {row} is another in the map")
            parts[f"extent of row {row}"] = shard.extent(row)
    return parts


def _index(path: Path) -> dict[str, Any]:
    shards = find_shards(path.parent)
    index = load_index(path, shards)
    parts: dict[str, Any] = {"keys": list(index.keys)}
    for number, shard in enumerate(shards):
        with Shard(shard) as opened:
            parts[f"fits {number}"] = index.fits(opened, number)
            if not parts[f"fits {number}"]:
                raise FormatError("and the index do not agree")
    parts["shards"] = [index.shard(row) for row in range(len(index.keys))]
    parts["found"] = [index.keys.find(key) for key in parts["keys"]]
    index.digests.check()
    parts["digests"] = [
        [*map(index.digests.row, index.digests.after(digest))] for digest in _digests(shards)
    ]
    for name in ("labels", "sizes", "failed"):
        parts[name] = getattr(index, name).copy()
    return parts


def _digests(shards: list[Path]) -> Iterator[int]:
    for path in shards:
        with Shard(path) as shard:
            yield from shard.read("digest").tolist()


def _split(path: Path) -> dict[str, Any]:
    store = LabelStore(path.parent)
    maps = {key: tuple(store[key]) for key in store.keys}
    return {**maps, "labels": store.ground_truth.copy(), "sizes": store.sizes.copy()}


def _manifest(path: Path) -> dict[str, Any]:
    found = open_manifest(path, verify=True)
    return {
        "keys": list(found.keys),
        "found": [found.keys.find(key) for key in ("a/0.jpg", "a/4.jpg", "b")],
        "labels": found.labels(),
        "places": {name: column.copy() for name, column in found.places.items()},
        "source": (found.source, found.parts),
        "digest": found.digest,
        "space": found.label_space,
        "names": found.class_names,
        "folders": found.folders,
        "numbering": found.numbering,
    }


_CONTENTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "shard": _shard,
    "index": _index,
    "split": _split,
    "manifest": _manifest,
}


def read(seed: Seed, folder: Path, data: bytes, mutation: str) -> str:
    """Read a mutated file; the verdict. Raises Wrong, or MemoryError."""
    path = folder / seed.name / seed.file
    path.write_bytes(data)
    try:
        found = content(seed.kind, path)
    except (FormatError, OSError, MissingMapError) as error:
        if "alloc" in str(error):
            raise MemoryError(str(error)) from error
        return "refused"
    except (Wrong, MemoryError):
        raise
    except Exception as error:
        raise Wrong(traceback.format_exc()) from error
    different = [name for name in seed.truth if not _same(seed.truth[name], found.get(name))]
    if not different:
        return "equal"
    if mutation in NOTICED:
        raise Wrong(f"changed without notice: {', '.join(different)}")
    return "changed"


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, tuple):
        return isinstance(two, tuple) and all(map(_same, one, two))
    if isinstance(one, np.ndarray):
        return (
            isinstance(two, np.ndarray)
            and (one.dtype, one.shape) == (two.dtype, two.shape)
            and one.tobytes() == two.tobytes()
        )
    return bool(one == two)
