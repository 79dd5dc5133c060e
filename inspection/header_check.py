"""What must hold of a shard's root attributes; docs/format.md says why."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.shard import Shard, parse_shard_name


def check_types(attrs: dict[str, Any]) -> None:
    """Raise FormatError unless attributes are what other checks rely on."""
    kinds: dict[str, type] = {
        **dict.fromkeys(("shard", "shards", "first_row", "errors", "k", "num_classes"), int),
        **dict.fromkeys(("fingerprint", "sha256", "settings"), str),
    }
    for name, kind in kinds.items():
        if name in attrs and not isinstance(attrs[name], kind):
            raise FormatError(f"the attribute {name} must be {kind.__name__}, got {attrs[name]!r}")


def header_faults(shard: Shard) -> Iterator[str]:
    """What is wrong with the header, or with the header of a file of this name."""
    attrs, layout = shard.attrs, shard.layout
    number = parse_shard_name(shard.path.name)
    said = (attrs["shard"], attrs["shards"])
    if number is not None and number != said:
        yield (
            f"its name says shard {number[0]} of {number[1]}, its header {said[0]} of {said[1]}: "
            "it was renamed, or swapped with another"
        )
    if attrs["k"] != layout.k:
        yield f"k must be {layout.k}, the last side of scores; the header says {attrs['k']}"
    if "settings" not in attrs:
        return
    want = hashlib.sha256(attrs["settings"].encode()).hexdigest()
    if attrs["fingerprint"] != want:
        yield (
            f"the fingerprint must be {want}, the sha256 of `settings`; it is "
            f"{attrs['fingerprint']}"
        )
    settings = settings_of(attrs)
    names = attrs.get("class_names")
    named = settings.get("class_names")
    if named is not None and named != _json_sha256(names):
        yield f"class_names must have the sha256 {named} that `settings` says; they changed"
    size = settings.get("shard_size")
    if isinstance(size, int) and attrs["first_row"] != attrs["shard"] * size:
        yield (
            f"first_row must be {attrs['shard'] * size} with {size} images a shard; it is "
            f"{attrs['first_row']}"
        )
    for name, here in (("num_classes", layout.num_classes), ("k", layout.k)):
        if settings.get(name, here) != here:
            yield f"{name} is {here}, but `settings` says {settings[name]}"


def settings_of(attrs: dict[str, Any]) -> dict[str, Any]:
    """What the fingerprint is the digest of; empty where the header does not say."""
    settings = json.loads(attrs.get("settings", "{}"))
    return settings if isinstance(settings, dict) else {}


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
