"""Label sets: their folders, the names of their classes, and the checked probabilities of a map."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..dataset.format.score_map import ScoreMap
from ..dataset.format.shard import parse_shard_name
from ..dataset.sources.open_source import open_images
from ..dataset.storage.remote_path import AnyPath, RemotePath
from ..dataset.store import LabelStore
from ..errors import ConfigError, FormatError, MissingMapError

Floats = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int64]


def find_splits(labels: AnyPath) -> list[AnyPath]:
    """Folders with shards: `labels` itself, or those below it; raises ConfigError for none.

    Of a URL, those directly below it.
    """
    folders: list[AnyPath]
    if isinstance(labels, RemotePath):
        names = [path.name for path in labels.iterdir()]
        folders = [labels] if any(map(parse_shard_name, names)) else [labels / n for n in names]
    elif labels.is_dir():
        folders = [labels, *sorted(path for path in labels.rglob("*") if path.is_dir())]
    else:
        raise ConfigError(
            f"no folder {labels}. Remedy: make labels with `annotate`, or name their folder"
        )
    splits = [f for f in folders if any(parse_shard_name(path.name) for path in f.iterdir())]
    if not splits:
        raise ConfigError(
            f"no shards in {labels} or below it. Remedy: make labels with `annotate`, or name the "
            "folder that its option `out` named"
        )
    return splits


def find_key(splits: Sequence[AnyPath], key: str) -> LabelStore:
    """The first of the splits that holds `key`; raises MissingMapError."""
    faults, example = [], ""
    for root in splits:
        try:
            store = LabelStore(root)
        except FormatError as error:  # the key may be in another, undamaged split
            faults.append(str(error))
            continue
        if key in store:
            return store
        example = f", such as {store.keys[0]!r}"
    raise MissingMapError(
        f"no image {key!r} in {', '.join(map(str, splits))}: keys are paths relative to the "
        f"split{example}. Remedy: check the key" + "".join(f"\n{fault}" for fault in faults)
    )


def split_images(root: AnyPath, images: str) -> str:
    """A split's images, as `open_images` takes them: `images`, or the folder in it of its name.

    Raises ConfigError where `images` does not exist.
    """
    open_images(images)
    inside = Path(images) / root.absolute().name
    return str(inside) if inside.is_dir() else images


class ClassNames:
    """Names of a label set's classes by id: WordNet ids become words, unnamed classes numbers."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self._names = names or ()

    def __getitem__(self, class_id: int) -> str:
        if not 0 <= class_id < len(self._names):
            return str(class_id)
        name = self._names[class_id]
        return wordnet_words().get(name, name)


@cache
def wordnet_words() -> dict[str, str]:
    """The first synonym of each WordNet id, from the list that timm ships.

    Read without importing timm, which takes seconds and 700 MB with the torch that it imports.
    """
    spec = importlib.util.find_spec("timm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "data" / "_info" / "imagenet_synset_to_lemma.txt"
        if path.is_file():
            lines = (line.split("\t") for line in path.read_text("utf-8").splitlines())
            return {wordnet_id: words.split(",")[0] for wordnet_id, words in lines}
    return {}


class PatchMap(NamedTuple):
    """The first view of a map, as probabilities of K classes a patch on an [H, W] grid.

    Attributes:
        entry: the map as it is stored.
        label: the image's label as a class of the teacher; -1 where it is unknown or of others.
        classes: int64 [H, W, K], class ids, most probable first. Where no class is stored, the
            first one is repeated with probability 0, so that no class shows up by mistake.
        probs: float32 [H, W, K], their probabilities.
        mass: float32 [H, W], probability of all stored classes together.
        entropy: float32 [H, W], in nats, over all classes.
    """

    entry: ScoreMap
    label: int
    classes: Ids
    probs: Floats
    mass: Floats
    entropy: Floats

    @property
    def best(self) -> Ids:
        """Most probable class of each patch, [H, W]."""
        return self.classes[..., 0]


def patch_map(store: LabelStore, key: str | int) -> PatchMap:
    """The probabilities of a map, checked.

    Args:
        store: the label set.
        key: of the image, or its row.

    Raises:
        MissingMapError: no such key, or the image has no map.
        FormatError: the file is damaged, or the map holds NaN, a patch without any class, or a
            class that the teacher does not have.
    """
    entry = store[key]
    classes, probs, rest = entry.probabilities()
    ids = np.where(probs > 0, classes, classes[..., :1]).astype(np.int64)
    if not (probs[..., 0] > 0).all() or ids.max() >= store.num_classes:
        raise FormatError(
            f"a map must have one of the {store.num_classes} classes in each patch, without NaN; "
            f"row {store.row(key)} of {store.root} has others. Remedy: `inspect-labels --verify` "
            "names the damaged shard; remove it, and the next `annotate` redoes it"
        )
    # The others have rest * residual / free each, free being the residual's sum over them: their
    # entropy follows from sums over the stored classes, in a seventh of the time of a dense map.
    residual = entry.residual()
    stored = np.where(probs > 0, residual[ids], 0)
    free = np.maximum(1 - stored.sum(-1), np.finfo(np.float32).tiny)
    scale = rest / free
    unstored = np.maximum(plogp(residual).sum() - plogp(stored).sum(-1), 0)
    entropy = plogp(probs).sum(-1) + scale * unstored + free * plogp(scale)
    label = entry.label if store.attrs.get("label_space") == "teacher" else -1
    return PatchMap(entry, label, ids, probs, 1 - rest, entropy)


def plogp(probs: Floats) -> Floats:
    """-p log p of each probability, 0 at 0."""
    result: Floats = -probs * np.log(np.maximum(probs, np.finfo(np.float32).tiny))
    return result
