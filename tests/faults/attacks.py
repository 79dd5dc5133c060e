"""Directories that somebody made to do harm, with the right checksum."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenlabel.dataset.format.directory import HEAD, MAGIC

Found = dict[str, Any]
Attack = Callable[[Found], Any]
_FAR = 1 << 62


def _column(name: str, **values: object) -> Attack:
    return lambda found: found["columns"][name].update(values)


def _attr(name: str, value: object) -> Attack:
    return lambda found: found["attrs"].update({name: value})


def _maps(**values: object) -> Attack:
    return lambda found: found["maps"].update(values)


def _plane(number: int, *entry: object) -> Attack:
    return lambda found: found["maps"]["planes"].__setitem__(number, list(entry))


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


#: By name. `later` is none: what a later release may add is ignored.
ATTACKS: dict[str, Attack] = {
    "terabyte column": _column("label", shape=[1 << 40]),
    "terabyte of compressed text": _column("key", dtype="|S99999999", shape=[3]),
    "long text": _column("key", dtype="|S999999999999"),
    "many rows": lambda found: [c.update(shape=[1 << 40]) for c in found["columns"].values()],
    "no rows": lambda found: [c.update(shape=[0]) for c in found["columns"].values()],
    "column outside": _column("label", offset=_FAR),
    "column at the end": lambda found: found["columns"]["label"].update(offset=found["size"] - 1),
    "column before": _column("label", offset=-8),
    "size below 0": _column("label", size=-12),
    "offset of no type": _column("label", offset=1.5),
    "offset that is true": _column("label", offset=True),
    "shape of no type": _column("label", shape=["3"]),
    "shape that is no list": _column("label", shape={"3": 3}),
    "negative shape": _column("size", shape=[-3, -2]),
    "seven dimensions": _column("label", shape=[3, 1, 1, 1, 1, 1, 1]),
    "object type": _column("label", dtype="|O"),
    "structure type": _column("label", dtype="i4,i4"),
    "big-endian type": _column("label", dtype=">i4"),
    "no type": _column("label", dtype=None),
    "compressed, or not": _column("label", gzip=True),
    "not compressed": lambda found: found["columns"]["key"].pop("gzip"),
    "compressed bounds": _column("bounds", gzip=True),
    "column that is no entry": lambda found: found["columns"].update(label=[1, 2]),
    "no columns": lambda found: found.update(columns=None),
    "no maps": lambda found: found.pop("maps"),
    "maps outside": _maps(offset=_FAR),
    "maps beyond the end": _maps(size=_FAR),
    "maps before": _maps(offset=-1),
    "no planes": _maps(planes=[]),
    "planes that are none": _maps(planes=[["codes"]]),
    "planes of another order": lambda found: found["maps"]["planes"].reverse(),
    "plane of one dimension": _plane(0, "codes", "|u1", [3]),
    "plane without cells": _plane(0, "codes", "|u1", [1, 2, 0, 3]),
    "plane of a terabyte": _plane(0, "codes", "|u1", [1, 2, 1 << 20, 1 << 20]),
    "grid of a terabyte": lambda found: [
        plane[2].__setitem__(slice(-2, None), [1 << 20, 1 << 20])
        for plane in found["maps"]["planes"]
        if not plane[0].startswith("residual")
    ],
    "plane of another type": _plane(1, "classes", "<u8", [1, 2, 2, 3]),
    "header of another k": _attr("k", 1 << 40),
    "no classes": _attr("num_classes", -1),
    "a billion classes": _attr("num_classes", 1 << 30),
    "infinite classes": _attr("num_classes", float("inf")),
    "step below 0": _attr("step", -0.25),
    "step that is no number": _attr("step", float("nan")),
    "residual of a terabyte": _attr("residual", 1 << 40),
    "views of no text": _attr("views", [1, {}]),
    "extent of no numbers": _attr("extent", ["0", 0, 1, 1]),
    "nested attribute": _attr("extent", _nested(900)),
    "attributes that are none": lambda found: found.update(attrs=[1]),
    "another size": lambda found: found.update(size=found["size"] + 1),
    "huge number": lambda found: found.update(size=10**4000),
    "later": lambda found: found.update(later=_nested(50)),
}


def parsed(data: bytes) -> Found:
    """The directory of a file."""
    _, size, _ = HEAD.unpack(data[: HEAD.size])
    return dict(json.loads(data[HEAD.size : HEAD.size + size]))


def with_directory(data: bytes, found: object) -> bytes:
    """The file with another directory and its right checksum; the rest stays where it is."""
    return with_text(data, json.dumps(found).encode())


def with_text(data: bytes, text: bytes) -> bytes:
    """The same with any text as the directory."""
    new = HEAD.pack(MAGIC, len(text), zlib.crc32(text)) + text
    return new + data[len(new) :]


def attack(path: Path, name: str) -> None:
    """Turn the shard at `path` into the attack `name`."""
    data = path.read_bytes()
    found = parsed(data)
    ATTACKS[name](found)
    path.write_bytes(with_directory(data, found))
