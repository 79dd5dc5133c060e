"""What must hold of a shard's attributes; docs/format.md says why."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from ...dataset.format.shard import Shard, parse_shard_name


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
    if "settings" not in attrs:
        return
    want = hashlib.sha256(str(attrs["settings"]).encode()).hexdigest()
    if attrs["fingerprint"] != want:
        yield (
            f"the fingerprint must be {want}, the sha256 of `settings`; it is "
            f"{attrs['fingerprint']}"
        )
    settings = settings_of(attrs)
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
    try:
        settings = json.loads(attrs.get("settings", "{}"))
    except (RecursionError, TypeError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
