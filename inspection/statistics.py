"""Statistics of many maps in constant memory."""

from bisect import insort
from typing import Any, NamedTuple

import numpy as np

from .label_sets import ClassNames, Floats, PatchMap

_PERCENTS = (5, 25, 50, 75, 95)
_CHART_BINS = 16
#: Of a probability, so that KL stays finite where one side has no mass at all.
_FLOOR = 1e-12
#: Images that never contain their label are kept by name up to this many, the clearest first.
SUSPECTS = 1000


class Divergence(NamedTuple):
    """How far distributions `a` and `b` are apart, of N patches, in nats.

    Attributes:
        kl: KL(a || b), [N].
        reverse: KL(b || a).
        js: Jensen-Shannon divergence, between 0 and log 2.
    """

    kl: Floats
    reverse: Floats
    js: Floats


def divergence(a: Floats, b: Floats) -> Divergence:
    """How far the patches of `a` and `b` are apart, float [N, C] over all classes each."""
    middle = (a + b) / 2
    log_a, log_b, log_middle = (np.log(np.maximum(probs, _FLOOR)) for probs in (a, b, middle))
    js = (a * (log_a - log_middle) + b * (log_b - log_middle)).sum(-1) / 2
    kl, reverse = (a * (log_a - log_b)).sum(-1), (b * (log_b - log_a)).sum(-1)
    # Rounding can leave equal distributions a little below zero.
    return Divergence(np.maximum(kl, 0), np.maximum(reverse, 0), np.maximum(js, 0))


class Histogram:
    """Counts of values in bins: mean and quantiles of any number of values.

    Args:
        edges: [n + 1], ascending; values outside go to the first or last bin.
        values: [n], what a quantile in each bin is.
    """

    def __init__(self, edges: np.ndarray, values: np.ndarray) -> None:
        self._edges, self._values = edges, values
        self._counts = np.zeros(len(values), np.int64)
        self._sum = 0.0

    @classmethod
    def even(cls, high: float, bins: int = 1000) -> "Histogram":
        """Equal bins from 0 to `high`; quantiles to half a bin."""
        return cls(np.arange(bins + 1) * (high / bins), (np.arange(bins) + 0.5) * high / bins)

    @classmethod
    def whole(cls, highest: int) -> "Histogram":
        """Whole numbers from 0 to `highest`, exactly."""
        return cls(np.arange(highest + 2.0), np.arange(highest + 1.0))

    @classmethod
    def logarithmic(cls) -> "Histogram":
        """0 to 100 on a logarithmic scale; quantiles to 1.3%, those below 1e-9 are 0."""
        starts = np.concatenate([[0], np.geomspace(1e-9, 100, 2000)])
        return cls(np.append(starts, np.inf), starts)

    def add(self, values: np.ndarray) -> None:
        """Count values."""
        bins = np.searchsorted(self._edges[1:-1], values.ravel(), side="right")
        self._counts += np.bincount(bins, minlength=len(self._counts))
        self._sum += float(values.sum(dtype=np.float64))

    def quantile(self, fraction: float) -> float:
        """The value below which this fraction of all values are."""
        total = np.cumsum(self._counts)
        return float(self._values[np.searchsorted(total, fraction * total[-1])])

    def facts(self) -> dict[str, float] | None:
        """Mean and quantiles, JSON-able; None of no values."""
        if not (count := int(self._counts.sum())):
            return None
        quantiles = {f"p{percent}": self.quantile(percent / 100) for percent in _PERCENTS}
        return {"mean": self._sum / count, **quantiles}

    def chart(self, trimmed: bool = False) -> dict[str, list[float]]:
        """Edges and counts of fewer, wider bins, JSON-able; `trimmed` to the highest value met."""
        highest = np.flatnonzero(self._counts).max(initial=0)
        used = int(highest) + 1 if trimmed else len(self._counts)
        starts = np.linspace(0, used, min(_CHART_BINS, used) + 1).astype(int)
        counts = np.add.reduceat(self._counts[:used], starts[:-1])
        return {"edges": self._edges[starts].tolist(), "counts": counts.tolist()}


class MapStatistics:
    """Statistics of single patches, over the identity view of all maps that are added.

    Args:
        grid: (H, W) of the maps.
        num_classes: of the teacher.
        names: of its classes.

    Attributes:
        mass: histogram of the top-k mass of patches.
        entropy: of the entropy of patches, in nats.
        distinct: of the number of different top classes of an image.
        top: patches with each class on top.
        labels: images with each label.
        listed: whether each class is among the top k of any patch.
        labelled: images with a label; `hits` of their patches have it on top.
        misses: images whose label is among the top k of none of their patches.
        suspects: the clearest of these, ascending: (fraction, -row, facts), the fraction being that
            of the patches which show the class that most of them show.
    """

    def __init__(self, grid: tuple[int, int], num_classes: int, names: ClassNames) -> None:
        self._names = names
        self.mass = Histogram.even(1.0)
        self.entropy = Histogram.even(max(float(np.log(num_classes)), 1e-9))
        self.distinct = Histogram.whole(min(grid[0] * grid[1], num_classes))
        self.top = np.zeros(num_classes, np.int64)
        self.labels = np.zeros(num_classes, np.int64)
        self.listed = np.zeros(num_classes, bool)
        self.labelled = self.hits = self.misses = 0
        self.suspects: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, row: int, patches: PatchMap) -> None:
        """Count a map, and remember its row if it never contains its label."""
        label = patches.label
        ids, counts = np.unique(patches.best, return_counts=True)
        self.mass.add(patches.mass)
        self.entropy.add(patches.entropy)
        self.distinct.add(np.array([len(ids)]))
        self.top[ids] += counts
        self.listed[patches.classes.ravel()] = True
        if not 0 <= label < len(self.labels):
            return
        self.labelled += 1
        self.hits += int((patches.best == label).sum())
        self.labels[label] += 1
        if (patches.classes == label).any():
            return
        self.misses += 1
        fraction, shown = int(counts.max()) / patches.best.size, int(ids[counts.argmax()])
        facts = {
            "label": label,
            "label_name": self._names[label],
            "class": shown,
            "name": self._names[shown],
            "share": fraction,
        }
        # Of equally clear ones, the first rows are kept: hence -row.
        insort(self.suspects, (fraction, -row, facts))
        del self.suspects[:-SUSPECTS]

    def frequent(self, count: int) -> list[dict[str, Any]]:
        """The classes most often on top, with their fraction of the patches."""
        order = np.argsort(-self.top, kind="stable")[:count]
        return self._classes(order[self.top[order] > 0])

    def overpredicted(self, times: float, count: int) -> list[dict[str, Any]]:
        """Classes on top `times` as often as they should be; the most patches first.

        They should be as often as images have the label, or as all classes on average, whichever
        is more. Classes on top of less than one patch in a thousand are left out.
        """
        expected = np.maximum(self.labels / max(self.labelled, 1), 1 / len(self.labels))
        fraction = self.top / max(int(self.top.sum()), 1)
        many = (fraction > times * expected) & (fraction >= 1e-3)
        order = np.flatnonzero(many)[np.argsort(-fraction[many], kind="stable")]
        return self._classes(order[:count])

    def _classes(self, ids: np.ndarray) -> list[dict[str, Any]]:
        found = []
        for class_id in ids.tolist():
            entry = {"class": class_id, "share": float(self.top[class_id] / self.top.sum())}
            if self.labelled:
                entry["label_share"] = float(self.labels[class_id] / self.labelled)
            found.append({**entry, "name": self._names[class_id]})
        return found
