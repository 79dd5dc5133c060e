"""What is fuzzed: real shards, an index and a manifest, and how each is read."""

import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from tests.faults.attacks import ATTACKS, attack
from tests.maps import write_split
from tokenlabel.annotate.manifest import build_manifest, open_manifest
from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.handles import _OpenShard
from tokenlabel.dataset.index import NAME, _load, build_index, find_shards
from tokenlabel.dataset.shard import MAPS, OPTIONAL_ROWS, ROWS, Shard, ShardLayout, shard_name
from tokenlabel.dataset.store import LabelStore, MissingMapError

KINDS = ("shard", "index", "split", "manifest")
#: What may come of reading: all as it was written, other content, an error that says so.
VERDICTS = ("equal", "changed", "refused")
#: Changes that HDF5's and our checksums must notice wherever they carry content.
NOTICED = ("bits", "bytes", "run", "number", "cut")
_ROWS_READ = 6


class Wrong(Exception):
    """A reader did what it must not."""


class Seed(NamedTuple):
    """A file to mutate.

    Attributes:
        name: of the seed; `kind` says how it is read.
        file: its name in the folder.
        folder: what it is read with.
        truth: what an undamaged one gives.
        checked: whether damage to any of its content shows: not where chunks have no checksum.
        weight: how often it is taken, relative to the others.
    """

    name: str
    kind: str
    file: str
    folder: Path
    data: bytes
    truth: Any
    checked: bool
    weight: float

    def place(self, folder: Path) -> None:
        """Copy what the file is read with."""
        shutil.copytree(self.folder, folder / self.name)


def make_seeds(folder: Path) -> list[Seed]:
    """All seeds, made anew in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    small = ShardLayout(("identity",), (2, 3), 2, 10)
    keys = ["a/b.jpg", "b/ü.png", "c/d.webp"]
    seeds = []

    def add(
        name: str, kind: str = "shard", file: str = "shard-00000-of-00001.h5", weight: float = 1
    ) -> None:
        path = folder / name / file
        seeds.append(
            Seed(
                name,
                kind,
                file,
                path.parent,
                path.read_bytes(),
                content(kind, path),
                name != "hdf5",
                weight,
            )
        )

    write_split(folder / "float16", keys, small, errors={keys[1]: "cut short"})
    add("float16", weight=3)
    two = ShardLayout(("identity", "hflip"), (2, 2), 3, 70_000, "uint8")
    write_split(folder / "uint8", keys, two)
    add("uint8", weight=2)
    names = [f"n{number:08d}" for number in range(600)]
    write_split(folder / "names", keys, small, class_names=names, settings="{}" * 99)
    add("names")
    write_split(folder / "hdf5", keys, small)
    _store_otherwise(folder / "hdf5" / "shard-00000-of-00001.h5")
    add("hdf5", weight=2)
    for name, kind, weight in (("index", "index", 2), ("split", "split", 0.1)):
        write_split(folder / name, [*keys, "e.jpg", "f.jpg"], small, shard_size=3)
        build_index(folder / name)
        add(name, kind, NAME, weight)
    # What is near them is as bad. Two hold a time or unset bytes, so they differ from run to run.
    for name in sorted(ATTACKS.keys() - {"named_type", "virtual"}):
        write_split(folder / name, keys, small)
        path = folder / name / shard_name(0, 1)
        attack(path, name, folder / "float16" / shard_name(0, 1))
        seeds.append(
            Seed(name, "shard", path.name, path.parent, path.read_bytes(), {}, False, 0.05)
        )
    pictures = folder / "pictures" / "a"
    pictures.mkdir(parents=True)
    for number in range(5):
        (pictures / f"{number}.jpg").write_bytes(b"")
    (folder / "manifest").mkdir()
    build_manifest(folder / "pictures", folder / "manifest" / "manifest.h5", None, None)
    add("manifest", "manifest", "manifest.h5", 2)
    return seeds


def _store_otherwise(path: Path) -> None:
    """Every storage that HDF5 has for a dataset, and that a writer may choose."""
    storages: dict[str, dict[str, Any]] = {
        "scores": {"chunks": (1, 1, 2, 3, 2), "fletcher32": True},
        "classes": {"chunks": (2, 1, 2, 3, 2), "compression": "gzip"},
        "rest": {"chunks": (1, 1, 2, 3)},
        "label": {},
        "size": {"chunks": (1, 2), "compression": "gzip"},
    }
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        for name, storage in storages.items():
            data = file[name][:]
            del file[name]
            file.create_dataset(name, data=data, **storage)


def content(kind: str, path: Path) -> Any:
    """All that is in a file, as its reader gives it; the parts by name."""
    return _CONTENTS[kind](path)


def _shard(path: Path) -> dict[str, Any]:
    with Shard(path) as shard:
        parts: dict[str, Any] = {
            name: value for name, value in shard.attrs.items() if len(str(value)) < 4000
        }
        for name in (*ROWS, *OPTIONAL_ROWS):
            if name in shard:
                parts[name] = shard.read(name)
        for name in MAPS:
            parts[name] = shard.read(name, 0, _ROWS_READ)
        places = [shard.chunk_places(name) for name in MAPS]
        chunks = shard.chunk_file()
        for row in range(min(shard.rows, _ROWS_READ)):
            if chunks is None or not all(size[row] for _, size in places):
                continue
            try:
                direct = chunks.read(
                    *([int(c[row]) for c in column] for column in zip(*places, strict=True))
                )
            except ValueError as error:
                raise FormatError(str(error)) from error
            for name, found in zip(MAPS, direct, strict=True):
                if found.tobytes() != parts[name][row].tobytes():
                    raise Wrong(f"{name} of row {row} is another by its place")
        parts["map"], parts["extent of row 0"] = shard.map(0), shard.extent(0)
    return parts


def _index(path: Path) -> dict[str, Any]:
    shards = find_shards(path.parent)
    index = _load(path, shards)
    parts: dict[str, Any] = {"rows": len(index.keys)}
    row = 0
    for number, shard in enumerate(shards):
        opened = _OpenShard(shard, index, number)
        for row in range(*index.shard_rows[number : number + 2].tolist()):
            found = opened.chunks and opened.read(row)
            parts[f"map {row}"] = (found or opened.read_hdf5(row))[:3]
    parts["keys"] = list(index.keys)
    parts["found"] = [index.keys.find(key) for key in parts["keys"]]
    for name in ("labels", "sizes", "failed"):
        parts[name] = getattr(index, name).copy()
    return parts


def _split(path: Path) -> dict[str, Any]:
    store = LabelStore(path.parent)
    maps = {key: store[key][:3] for key in store.keys}
    return {**maps, "labels": store.labels.copy(), "sizes": store.sizes.copy()}


def _manifest(path: Path) -> dict[str, Any]:
    found = open_manifest(path, verify=True)
    found = open_manifest(path)
    return {
        "keys": list(found.keys),
        "found": [found.keys.find(key) for key in ("a/0.jpg", "a/4.jpg", "b")],
        "labels": found.labels.copy(),
        "digest": found.digest,
        "space": found.label_space,
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
    if mutation in NOTICED and seed.checked:
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
