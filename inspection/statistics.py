"""Statistics of many maps in constant memory."""

import heapq
from typing import Any

import numpy as np

from .patch_map import PatchMap

_BINS = 1000
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CHART_BINS = 16
_SMALLEST, _LARGEST = 1e-9, 100.0  # of a logarithmic histogram
#: Images that never contain their label are kept by name up to this many, the clearest first.
SUSPECTS = 1000


class Histogram:
    """Counts of values in equal bins from 0 to `high`; quantiles to half a bin.

    Args:
        high: where the last bin ends.
        bins: how many; with as many as `high`, values are whole numbers, and so are quantiles.
    """

    def __init__(self, high: float, bins: int = _BINS) -> None:
        self._high, self._counts = high, np.zeros(bins, np.int64)
        self._middle = 0.0 if bins == high else 0.5
        self._sum = 0.0

    def add(self, values: np.ndarray) -> None:
        """Count values; those outside go to the first or last bin."""
        bins = len(self._counts)
        places = (values * (bins / self._high)).astype(np.int64).clip(0, bins - 1)
        self._counts += np.bincount(places.ravel(), minlength=bins)
        self._sum += float(values.sum(dtype=np.float64))

    def quantile(self, share: float) -> float:
        """The value below which `share` of all values are."""
        place = int(np.searchsorted(np.cumsum(self._counts), share * self._counts.sum()))
        return (min(place, len(self._counts) - 1) + self._middle) * self._high / len(self._counts)

    def facts(self) -> dict[str, float] | None:
        """Mean and quantiles, JSON-able; None of no values."""
        return _facts(self, self._sum, int(self._counts.sum()))

    def chart(self) -> dict[str, list[float]]:
        """Edges and counts of fewer, wider bins, JSON-able."""
        # Whole numbers seldom come near the highest possible: up to the highest met.
        used = len(self._counts)
        if self._middle == 0 and self._counts.any():
            used = int(np.flatnonzero(self._counts)[-1]) + 1
        edges = np.linspace(0, used, min(_CHART_BINS, used) + 1).astype(int)
        counts = np.add.reduceat(self._counts[:used], edges[:-1])
        return {
            "edges": (edges * (self._high / len(self._counts))).tolist(),
            "counts": counts.tolist(),
        }


class LogHistogram:
    """Counts of values from 0 to 100 on a logarithmic scale; quantiles to 1.3%, below 1e-9 to 0."""

    def __init__(self) -> None:
        self._edges = np.geomspace(_SMALLEST, _LARGEST, _BINS * 2)
        self._counts = np.zeros(len(self._edges) + 1, np.int64)
        self._sum = 0.0

    def add(self, values: np.ndarray) -> None:
        """Count values."""
        places = np.searchsorted(self._edges, values.ravel(), side="right")
        self._counts += np.bincount(places, minlength=len(self._counts))
        self._sum += float(values.sum(dtype=np.float64))

    def quantile(self, share: float) -> float:
        """The value below which `share` of all values are."""
        place = int(np.searchsorted(np.cumsum(self._counts), share * self._counts.sum()))
        return float(self._edges[place - 1]) if place else 0.0

    def facts(self) -> dict[str, float] | None:
        """Mean and quantiles, JSON-able; None of no values."""
        return _facts(self, self._sum, int(self._counts.sum()))


def _facts(
    histogram: "Histogram | LogHistogram", total: float, count: int
) -> dict[str, float] | None:
    if count == 0:
        return None
    quantiles = {f"p{round(100 * q)}": histogram.quantile(q) for q in _QUANTILES}
    return {"mean": total / count, **quantiles}


class MapStatistics:
    """What single patches say, over the identity view of all maps that are added.

    Args:
        grid: (H, W) of the maps.
        num_classes: of the teacher.
        comparable: whether labels are class ids of the teacher.

    Attributes:
        images: maps added.
        mass: of the top k, by patch; `entropy` in nats, by patch; `distinct`, different top classes
            of an image.
        top: patches with each class on top; `labels`, images with each label.
        listed: classes among the top k of any patch.
        labelled: images with a label; of their `labelled_patches`, `hits` have it on top.
        misses: images whose label is among the top k of none of their patches.
    """

    def __init__(self, grid: tuple[int, int], num_classes: int, comparable: bool) -> None:
        self._classes, self._comparable = num_classes, comparable
        patches = grid[0] * grid[1]
        self.images = self.labelled = self.labelled_patches = self.hits = self.misses = 0
        self.mass = Histogram(1.0)
        self.entropy = Histogram(max(float(np.log(num_classes)), 1e-9))
        highest = min(patches, num_classes)
        self.distinct = Histogram(highest + 1, highest + 1)
        self.top = np.zeros(num_classes, np.int64)
        self.labels = np.zeros(num_classes, np.int64)
        self.listed = np.zeros(num_classes, bool)
        self._suspects: list[tuple[float, int, int, int]] = []

    def add(self, row: int, patches: PatchMap, label: int) -> None:
        """Count a map, and remember its row if it never contains its label."""
        best = patches.classes[..., 0].ravel()
        ids, counts = np.unique(best, return_counts=True)
        self.images += 1
        self.mass.add(patches.mass)
        self.entropy.add(patches.entropy)
        self.top[ids] += counts
        self.listed[patches.classes.ravel()] = True
        self.distinct.add(np.array([len(ids)]))
        if not self._comparable or not 0 <= label < self._classes:
            return
        self.labelled += 1
        self.labelled_patches += len(best)
        self.hits += int((best == label).sum())
        self.labels[label] += 1
        if (patches.classes == label).any():
            return
        self.misses += 1
        suspect = (int(counts.max()) / len(best), -row, label, int(ids[counts.argmax()]))
        if len(self._suspects) < SUSPECTS:
            heapq.heappush(self._suspects, suspect)
        else:
            heapq.heappushpop(self._suspects, suspect)

    def suspects(self) -> list[tuple[int, int, int, float]]:
        """(row, label, class, fraction) of images without their label: what most patches show.

        Those with the largest fraction come first.
        """
        found = sorted(self._suspects)[::-1]
        return [(-row, label, class_id, share) for share, row, label, class_id in found]

    def frequent(self, count: int) -> list[dict[str, Any]]:
        """The classes most often on top, with their share of the patches."""
        return [self._class(c) for c in np.argsort(-self.top, kind="stable")[:count] if self.top[c]]

    def overpredicted(self, times: float, count: int) -> list[dict[str, Any]]:
        """Classes on top `times` as often as they should be; the most patches first.

        That is as often as images have the label, and at least as if all classes were equally
        frequent; with one patch in a thousand or more.
        """
        patches = max(int(self.top.sum()), 1)
        share = self.top / patches
        expected = np.maximum(self.labels / max(self.labelled, 1), 1 / self._classes)
        many = (share > times * expected) & (share >= 1e-3)
        order = np.flatnonzero(many)[np.argsort(-share[many], kind="stable")]
        return [self._class(c) for c in order[:count]]

    def _class(self, class_id: int) -> dict[str, Any]:
        facts = {
            "class": int(class_id),
            "share": float(self.top[class_id] / max(self.top.sum(), 1)),
        }
        if self.labelled:
            facts["label_share"] = float(self.labels[class_id] / self.labelled)
        return facts
