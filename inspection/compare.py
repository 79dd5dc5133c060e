"""Comparison of two label sets of the same images."""

from bisect import insort
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dataset.format.keys import KeyTable
from ..dataset.label_map.path import UNIT_BOX
from ..dataset.storage.remote_path import AnyPath
from ..dataset.store import LabelStore
from ..errors import ConfigError
from ..terminal import Watch
from .label_sets import ClassNames, Floats, PatchMap, find_splits, patch_map
from .statistics import Histogram, divergence
from .summary import SAMPLE_IMAGES

_LISTED = 10


def pair_splits(a: AnyPath, b: AnyPath) -> list[tuple[AnyPath, AnyPath]]:
    """The splits of two label sets, paired by their folders' names; single ones as they are.

    Raises ConfigError where there are none, or none of the same name.
    """
    one, two = find_splits(a), find_splits(b)
    if len(one) == len(two) == 1:
        return [(one[0], two[0])]
    pairs = [(left, right) for left in one for right in two if left.name == right.name]
    if not pairs:
        raise ConfigError(
            f"no split of the same name: {a} holds {', '.join(path.name for path in one)}; {b} "
            f"holds {', '.join(path.name for path in two)}. Remedy: name two splits"
        )
    return pairs


def compare(
    a: AnyPath, b: AnyPath, everything: bool = False, watch: Watch = lambda *_: None
) -> dict[str, Any]:
    """Compare two splits, image by image, in constant memory.

    Args:
        a: folder of a split.
        b: folder of another one, with the same images by key, or by the name in another form.
        everything: compare all images, not an evenly spaced sample.
        watch: called with (images done, images).

    Returns:
        JSON-able. Divergences are in nats; the distribution is over patches, that of `images` over
        images; `different` names the ten with the largest mean Jensen-Shannon divergence.

    Raises:
        ConfigError: other classes, or no image in common.
        FormatError: a split is damaged or incomplete.
    """
    stores = LabelStore(a), LabelStore(b)
    _check_classes(*stores)
    common = _common(*(store.keys for store in stores))
    if not len(common):
        raise ConfigError(
            f"{a} and {b} have no image in common: keys such as {stores[0].keys[0]!r} and "
            f"{stores[1].keys[0]!r}. Remedy: compare labels of the same images"
        )
    picked = common
    if not everything and len(common) > SAMPLE_IMAGES:
        picked = common[np.linspace(0, len(common) - 1, SAMPLE_IMAGES).astype(int)]
    failed = [store.failed[picked[:, side]] for side, store in enumerate(stores)]
    good = picked[~(failed[0] | failed[1])].tolist()
    grid = min(stores[0].grid[0], stores[1].grid[0]), min(stores[0].grid[1], stores[1].grid[1])
    names = [ClassNames(store.classes) for store in stores]
    histograms = {
        name: Histogram.logarithmic() for name in ("kl_a_b", "kl_b_a", "js", "js_of_images")
    }
    compared = patches = equal = other_labels = 0
    worst: list[tuple[float, int, dict[str, Any]]] = []
    for done, rows in enumerate(good, 1):
        maps = [patch_map(store, row) for store, row in zip(stores, rows, strict=True)]
        left, right, same = _distributions(stores, rows, maps, grid)
        watch(done, len(good))
        if len(same) == 0:  # extents that do not meet
            continue
        found = divergence(left, right)
        image: dict[str, Any] = {
            "key": stores[0].keys[rows[0]],
            "js": float(found.js.mean()),
            "kl_a_b": float(found.kl.mean()),
            "top1_agreement": float(same.mean()),
        }
        for side, one, classes in zip("ab", maps, names, strict=True):
            ids, counts = np.unique(one.best, return_counts=True)
            image[f"class_{side}"] = class_id = int(ids[counts.argmax()])
            image[f"name_{side}"] = classes[class_id]
        values = (found.kl, found.reverse, found.js, np.array([image["js"]]))
        for histogram, part in zip(histograms.values(), values, strict=True):
            histogram.add(part)
        compared += 1
        patches += len(same)
        equal += int(same.sum())
        other_labels += maps[0].entry.label != maps[1].entry.label
        insort(worst, (image["js"], -rows[0], image))
        del worst[:-_LISTED]
    sets = [
        {
            "folder": str(store.root),
            "teacher": store.attrs.get("teacher", "unknown"),
            "images": len(store),
            "only_here": len(store) - len(common),
            "grid": list(store.grid),
            "k": store.k,
            "views": list(store.views),
            "fingerprint": store.attrs["fingerprint"],
        }
        for store in stores
    ]
    return {
        "a": sets[0],
        "b": sets[1],
        "common": len(common),
        "sampled": len(picked),
        "compared": compared,
        "grid": list(grid),
        "top1_agreement": equal / patches if patches else None,
        **{name: histogram.facts() for name, histogram in histograms.items()},
        "other_labels": other_labels,
        "different": [image for js, _, image in reversed(worst) if js],
    }


def _check_classes(a: LabelStore, b: LabelStore) -> None:
    if a.num_classes != b.num_classes:
        raise ConfigError(
            f"both label sets must be of the same classes; {a.root} has {a.num_classes}, {b.root} "
            f"{b.num_classes}. Remedy: compare teachers trained on the same classes"
        )
    one, two = a.classes, b.classes
    if one and two and one != two:
        number = next(i for i, pair in enumerate(zip(one, two, strict=False)) if len({*pair}) > 1)
        raise ConfigError(
            f"both label sets must name their classes alike; class {number} is {one[number]!r} in "
            f"{a.root}, {two[number]!r} in {b.root}. Remedy: compare teachers trained on the same "
            "classes"
        )


def _common(a: KeyTable, b: KeyTable) -> np.ndarray:
    """Rows of the images in both, int64 [n, 2]."""

    def pairs() -> Iterator[tuple[int, int]]:
        # Side by side first: a search costs ten times as much.
        for one, (key, beside) in enumerate(zip_longest(a, islice(b, len(a)))):
            two = one if key == beside else b.find(key)
            if two >= 0:
                yield one, two

    return np.fromiter(pairs(), np.dtype((np.int64, 2)))


def _distributions(
    stores: Sequence[LabelStore],
    rows: Sequence[int],
    maps: Sequence[PatchMap],
    grid: tuple[int, int],
) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """Probabilities [N, C] of the patches that both maps show, and whether their top-1 is equal."""
    a, b = (patches.entry for patches in maps)
    if a.layout.grid == b.layout.grid and a.extent == b.extent:
        left, right = (entry.dense().reshape(-1, a.layout.num_classes) for entry in (a, b))
        # By rank: rounded to a code, the best two can be equally probable.
        return left, right, (maps[0].best == maps[1].best).ravel()
    targets = [
        store.labels([row], [UNIT_BOX]).targets(grid)
        for store, row in zip(stores, rows, strict=True)
    ]
    # Patches that either map covers by half or less are left out.
    shown = ((targets[0].weight > 0.5) & (targets[1].weight > 0.5))[0].numpy()
    left, right = (target.dense()[0].numpy()[shown] for target in targets)
    return left, right, left.argmax(1) == right.argmax(1)
