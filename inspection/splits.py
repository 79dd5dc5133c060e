"""Which folders hold labels, and where their images are."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..dataset.format.shard import parse_shard_name
from ..dataset.store import LabelStore
from ..errors import ConfigError, FormatError, MissingMapError


def find_splits(labels: Path) -> list[Path]:
    """Folders with shards: `labels` itself, or those inside it.

    Raises:
        ConfigError: there are none.
    """
    if not labels.is_dir():
        raise ConfigError(
            f"no folder {labels}. Remedy: make labels with `annotate`, or name their folder"
        )
    places = [labels, *sorted(path for path in labels.rglob("*") if path.is_dir())]
    splits = [place for place in places if any(map(parse_shard_name, os.listdir(place)))]
    if not splits:
        raise ConfigError(
            f"no shards in {labels} or its folders. Remedy: make labels with `annotate`, or name "
            "the folder that `out` named"
        )
    return splits


def find_key(splits: Sequence[Path], key: str) -> LabelStore:
    """The first of the splits that holds `key`; raises MissingMapError."""
    faults, example = [], ""
    for root in splits:
        try:
            store = LabelStore(root)
        except FormatError as error:
            faults.append(str(error))
            continue
        if key in store:
            return store
        example = f", such as {store.keys[0]!r}"
    raise MissingMapError(
        f"no image {key!r} in {', '.join(map(str, splits))}: keys are paths relative to the "
        f"split{example}. Remedy: check the key" + "".join(f"\n{fault}" for fault in faults)
    )


def split_images(root: Path, given: Path) -> Path:
    """The folder of a split's images: `given`, or the one in it that is named like the split.

    Raises ConfigError when it is not there.
    """
    if not given.is_dir():
        raise ConfigError(f"no folder {given}. Remedy: --images names the folder of the images")
    inside = given / root.resolve().name
    return inside if inside.is_dir() else given
