"""Statistics of many maps in constant memory."""

import heapq
from typing import Any

import numpy as np

from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.store import ScoreMap

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
        mass: of the top k, by patch; `entropy` in nats, by patch, with the mass of the other
            classes spread evenly over them; `distinct`, different top classes of an image.
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
        self._suspects: list[tuple[float, int, int]] = []

    def add(self, rows: list[int], maps: list[ScoreMap]) -> None:
        """Count some maps, and remember `rows` of those that never contain their label.

        Raises FormatError for scores that are no numbers.
        """
        scores = np.stack([entry.scores[0] for entry in maps]).astype(np.float32)
        rest = np.stack([entry.rest[0] for entry in maps]).astype(np.float32)
        unusable = ~(np.isfinite(scores).all((1, 2, 3)) & (rest < np.inf).all((1, 2)))
        if unusable.any():
            row = rows[int(unusable.argmax())]
            raise FormatError(
                f"the map of row {row} holds NaN or infinity. Remedy: `inspect-labels --verify` "
                "names what is damaged"
            )
        # A damaged class id must not become an index out of range.
        classes = np.stack([entry.classes[0] for entry in maps]).clip(0, self._classes - 1)
        labels = np.array([entry.label for entry in maps])
        count, k = len(maps), scores.shape[-1]
        self.images += count
        peak = np.maximum(scores.max(-1), rest)[..., None]
        weights = np.exp(scores - peak)
        others = np.exp(rest - peak[..., 0])
        total = weights.sum(-1) + others
        probs, left = weights / total[..., None], others / total
        self.mass.add(1 - left)
        self.entropy.add(_plogp(probs).sum(-1) + _plogp(left) + left * np.log(self._absent(k)))
        best = classes[..., 0].reshape(count, -1)
        self.top += np.bincount(best.ravel(), minlength=self._classes)
        self.listed[np.unique(classes)] = True
        ordered = np.sort(best, 1)
        self.distinct.add(1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1))
        if self._comparable:
            known = (labels >= 0) & (labels < self._classes)
            self._add_labelled(rows, known, best, classes.reshape(count, -1), labels, k)

    def _absent(self, k: int) -> int:
        return max(self._classes - k, 1)

    def _add_labelled(
        self,
        rows: list[int],
        known: np.ndarray,
        best: np.ndarray,
        classes: np.ndarray,
        labels: np.ndarray,
        k: int,
    ) -> None:
        self.labelled += int(known.sum())
        self.labelled_patches += int(known.sum()) * best.shape[1]
        self.hits += int((best == labels[:, None])[known].sum())
        self.labels += np.bincount(labels[known], minlength=self._classes)
        missing = known & ~(classes == labels[:, None]).any(1)
        self.misses += int(missing.sum())
        for image in np.flatnonzero(missing).tolist():
            ids, counts = np.unique(best[image], return_counts=True)
            suspect = (int(counts.max()) / best.shape[1], -rows[image], int(ids[counts.argmax()]))
            if len(self._suspects) < SUSPECTS:
                heapq.heappush(self._suspects, suspect)
            else:
                heapq.heappushpop(self._suspects, suspect)

    def suspects(self) -> list[tuple[int, int, float]]:
        """(row, class, share) of images without their label: what most patches show instead.

        Those with the largest share come first.
        """
        return [(-row, class_id, share) for share, row, class_id in sorted(self._suspects)[::-1]]

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


def _plogp(probs: np.ndarray) -> np.ndarray:
    """-p log p, 0 at 0."""
    result: np.ndarray = -probs * np.log(np.maximum(probs, np.finfo(np.float32).tiny))
    return result
