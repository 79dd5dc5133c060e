"""`compare-labels`: two label sets of the same images."""

import heapq
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..dataset.format.keys import KeyTable
from ..dataset.format.score_map import ScoreMap
from ..dataset.label_map.path import UNIT_BOX
from ..dataset.store import LabelStore
from ..errors import ConfigError
from .divergence import divergence
from .names import ClassNames
from .patch_map import Floats
from .splits import find_splits
from .statistics import LogHistogram
from .summary import SAMPLE_IMAGES

_LISTED = 10
Watch = Callable[[int, int], None]


def pair_splits(a: Path, b: Path) -> list[tuple[Path, Path]]:
    """The splits of two label sets, paired by their folders' names; single ones as they are.

    Raises ConfigError where there are none, or none of the same name.
    """
    one, two = find_splits(a), find_splits(b)
    if len(one) == len(two) == 1:
        return [(one[0], two[0])]
    by_name = {path.name: path for path in two}
    pairs = [(path, by_name[path.name]) for path in one if path.name in by_name]
    if not pairs:
        raise ConfigError(
            f"no split of the same name: {a} holds {', '.join(path.name for path in one)}; {b} "
            f"holds {', '.join(path.name for path in two)}. Remedy: name two splits"
        )
    return pairs


def compare(
    a: Path, b: Path, everything: bool = False, watch: Watch = lambda *_: None
) -> dict[str, Any]:
    """Compare two splits, image by image, in constant memory.

    Args:
        a: folder of a split.
        b: folder of another one, with the same images by key.
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
    common = _common(stores[0].keys, stores[1].keys)
    found = _Comparison(*stores)
    rows = len(common)
    if rows == 0:
        raise ConfigError(
            f"{a} and {b} have no image in common: keys such as {stores[0].keys[0]!r} and "
            f"{stores[1].keys[0]!r}. Remedy: compare labels of the same images"
        )
    picked = np.arange(rows)
    if not everything and rows > SAMPLE_IMAGES:
        picked = np.linspace(0, rows - 1, SAMPLE_IMAGES).astype(int)
    for done, (one, two) in enumerate(common[picked].tolist(), 1):
        if not (stores[0].failed[one] or stores[1].failed[two]):
            found.add(one, two)
        watch(done, len(picked))
    sets = [
        {
            "folder": str(store.root),
            "teacher": store.attrs.get("teacher", "unknown"),
            "images": len(store),
            "only_here": len(store) - rows,
            "grid": list(store.grid),
            "k": store.k,
            "views": list(store.views),
            "fingerprint": store.attrs["fingerprint"],
        }
        for store in stores
    ]
    return {"a": sets[0], "b": sets[1], "common": rows, "sampled": len(picked), **found.facts()}


def _check_classes(a: LabelStore, b: LabelStore) -> None:
    if a.num_classes != b.num_classes:
        raise ConfigError(
            f"both label sets must be of the same classes; {a.root} has {a.num_classes}, {b.root} "
            f"{b.num_classes}. Remedy: compare teachers of one set of classes"
        )
    one, two = a.classes, b.classes
    if one and two and one != two:
        number = next(i for i, pair in enumerate(zip(one, two, strict=False)) if len({*pair}) > 1)
        raise ConfigError(
            f"both label sets must name their classes alike; class {number} is {one[number]!r} in "
            f"{a.root}, {two[number]!r} in {b.root}. Remedy: compare teachers of one set of classes"
        )


def _common(a: KeyTable, b: KeyTable) -> np.ndarray:
    """Rows of the keys in both, int64 [n, 2]; both tables are sorted."""
    found = np.empty((min(len(a), len(b)), 2), np.int64)
    count = 0
    ones, twos = enumerate(a), enumerate(b)
    one, two = next(ones, None), next(twos, None)
    while one and two:
        if one[1] == two[1]:
            found[count] = one[0], two[0]
            count += 1
            one, two = next(ones, None), next(twos, None)
        elif one[1].encode() < two[1].encode():
            one = next(ones, None)
        else:
            two = next(twos, None)
    return found[:count]


class _Comparison:
    """Sums over the images of two stores."""

    def __init__(self, a: LabelStore, b: LabelStore) -> None:
        self._stores = a, b
        self._grid = (min(a.grid[0], b.grid[0]), min(a.grid[1], b.grid[1]))
        self._kl, self._reverse = LogHistogram(), LogHistogram()
        self._js, self._images_js = LogHistogram(), LogHistogram()
        self._images = self._patches = self._same = self._labels = 0
        self._worst: list[tuple[float, int, int, float, float]] = []

    def add(self, one: int, two: int) -> None:
        """Compare row `one` of the first with row `two` of the second store."""
        a, b = self._stores[0][one], self._stores[1][two]
        left, right, same = self._pair(a, b, (one, two))
        if len(same) == 0:  # extents that do not meet
            return
        kl, reverse, js = divergence(left, right)
        self._kl.add(kl)
        self._reverse.add(reverse)
        self._js.add(js)
        mean = float(js.mean())
        self._images_js.add(np.array([mean]))
        self._images += 1
        self._patches += len(kl)
        self._same += int(same.sum())
        self._labels += a.label != b.label
        image = (mean, -one, two, float(same.mean()), float(kl.mean()))
        if len(self._worst) < _LISTED:
            heapq.heappush(self._worst, image)
        else:
            heapq.heappushpop(self._worst, image)

    def _pair(
        self, a: ScoreMap, b: ScoreMap, rows: tuple[int, int]
    ) -> tuple[Floats, Floats, np.ndarray]:
        """Patches that both maps show, on one grid: their distributions, and if the best agree.

        Returns:
            Of the identity views, float32 [N, C] twice and bool [N].
        """
        if a.layout.grid == b.layout.grid and a.extent == b.extent:
            left, right = (entry.dense().reshape(-1, a.layout.num_classes) for entry in (a, b))
            # By rank: rounded to a code, the best two can be equally probable.
            return left, right, (a.classes[0, 0] == b.classes[0, 0]).ravel()
        (left, inside), (right, inside_too) = (
            _pooled(store, row, self._grid) for store, row in zip(self._stores, rows, strict=True)
        )
        shown = (inside > 0.5) & (inside_too > 0.5)
        return left[shown], right[shown], (left.argmax(1) == right.argmax(1))[shown]

    def facts(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "compared": self._images,
            "grid": list(self._grid),
            "top1_agreement": self._same / self._patches if self._patches else None,
            "kl_a_b": self._kl.facts(),
            "kl_b_a": self._reverse.facts(),
            "js": self._js.facts(),
            "js_of_images": self._images_js.facts(),
            "other_labels": self._labels,
            "different": [self._image(*image) for image in sorted(self._worst)[::-1] if image[0]],
        }

    def _image(self, js: float, minus: int, two: int, same: float, kl: float) -> dict[str, Any]:
        rows = (-minus, two)
        facts: dict[str, Any] = {"key": self._stores[0].keys[-minus]}
        facts |= {"js": js, "kl_a_b": kl, "top1_agreement": same}
        for side, store, row in zip("ab", self._stores, rows, strict=True):
            ids, counts = np.unique(store[row].classes[0, 0], return_counts=True)
            class_id = int(ids[counts.argmax()])
            facts[f"class_{side}"] = class_id
            facts[f"name_{side}"] = ClassNames(store.classes)[class_id]
        return facts


def _pooled(store: LabelStore, row: int, grid: tuple[int, int]) -> tuple[Floats, Floats]:
    """A map averaged over a coarser grid of the image, and how much of each patch it covers."""
    targets = store.labels([row], [UNIT_BOX]).targets(grid)
    return targets.dense()[0].numpy(), targets.weight[0].numpy()
