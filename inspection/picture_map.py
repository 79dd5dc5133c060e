"""What a picture's map says: probabilities of each patch, and the classes to point out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.store import ScoreMap

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

#: Okabe and Ito's colours, told apart by colour-blind readers too; then the colour of all others.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
OTHER = "#999999"
#: So that colour is not the only sign of a class.
LETTERS = "ABCDEFGH"
#: Viridis at equal steps from 0 to 1: perceptually uniform, dark to light.
VIRIDIS = (
    *("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c"),
    *("#28ae80", "#5ec962", "#addc30", "#fde725"),
)


class PatchMap(NamedTuple):
    """A map as probabilities.

    Attributes:
        classes: int64 [H, W, K], class ids, most probable first.
        probs: float64 [H, W, K], their probabilities.
        extent: box (x0, y0, x1, y1) of the picture, normalised, that the map covers.
    """

    classes: Ids
    probs: Floats
    extent: tuple[float, float, float, float]

    @property
    def mass(self) -> Floats:
        """Probability of all stored classes together, [H, W]."""
        mass: Floats = self.probs.sum(-1)
        return mass


class LegendEntry(NamedTuple):
    """One of the classes to point out: on top of `patches` patches, with `mean` probability."""

    class_id: int
    letter: str
    colour: str
    patches: int
    mean: float


class MapFacts(NamedTuple):
    """What a map as a whole says.

    Attributes:
        mass: mean probability of the stored classes.
        entropy: mean entropy of the patches, in nats, the mass of the classes that are not stored
            spread evenly over them.
        seen: the class with the highest probability on average over the patches, of equals the
            label; `seen_prob` is that probability.
        agreement: share of the patches that have the label on top; None without a label.
        label_prob: probability of the label on average over the patches, 0 where it is not among
            the stored classes; None without a label.
        suspicion: how much more the teacher believes in some other class than in the label, from
            -1 to 1; None without a label.
    """

    mass: float
    entropy: float
    seen: int
    seen_prob: float
    agreement: float | None
    label_prob: float | None
    suspicion: float | None


def patch_map(entry: ScoreMap) -> PatchMap:
    """Probabilities of an entry's first view; raises FormatError where they cannot be."""
    scores = entry.scores[0].astype(np.float64)
    rest = entry.rest[0].astype(np.float64)
    with np.errstate(invalid="ignore"):  # refused below
        top = np.maximum(scores[..., 0], rest)[..., None]
        mass = np.exp(scores - top)
        total = mass.sum(-1) + np.exp(rest - top[..., 0])
    probs = mass / total[..., None]
    if not np.isfinite(probs).all():
        raise FormatError(
            "a map must have logits without NaN or +inf, and a finite one in each patch; this one "
            "has others. Remedy: remove its shard; the next `annotate` makes it again"
        )
    return PatchMap(entry.classes[0].astype(np.int64), probs, entry.extent)


def legend(best: Ids, probs: Floats) -> list[LegendEntry]:
    """The classes that are on top of the most patches, at most 8, most frequent first.

    Args:
        best: class on top of each patch, any shape.
        probs: its probability, the same shape.
    """
    ids, places, counts = np.unique(best, return_inverse=True, return_counts=True)
    sums = np.bincount(places.ravel(), probs.ravel())
    order = np.lexsort((-sums, -counts))[: len(LETTERS)]
    return [
        LegendEntry(int(ids[i]), letter, colour, int(counts[i]), float(sums[i] / counts[i]))
        for i, letter, colour in zip(order, LETTERS, COLOURS, strict=False)
    ]


def map_facts(patches: PatchMap, label: int, num_classes: int) -> MapFacts:
    """What a map says of its picture; `label` is a class id of the teacher's, or -1."""
    cells = patches.mass.size
    probs, rest = patches.probs, np.clip(1 - patches.mass, 0, 1)
    others = max(num_classes - probs.shape[-1], 1)
    spread = rest * (np.log(np.maximum(rest, 1e-300)) - math.log(others))
    entropy = -(probs * np.log(np.maximum(probs, 1e-300))).sum(-1) - spread
    ids, places = np.unique(patches.classes, return_inverse=True)
    means = np.bincount(places.ravel(), probs.ravel()) / cells
    best = int((means + 1e-9 * (ids == label)).argmax())  # of equals, the label
    agreement = label_prob = suspicion = None
    if label >= 0:
        agreement = float((patches.classes[..., 0] == label).mean())
        label_prob = float(means[ids == label].sum())
        suspicion = float(means[ids != label].max(initial=0)) - label_prob
    return MapFacts(
        mass=float(patches.mass.mean()),
        entropy=float(entropy.mean()),
        seen=int(ids[best]),
        seen_prob=float(means[best]),
        agreement=agreement,
        label_prob=label_prob,
        suspicion=suspicion,
    )


def viridis(value: float) -> tuple[int, int, int]:
    """RGB of a value from 0 to 1."""
    place = min(max(value, 0.0), 1.0) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    ends = [rgb(VIRIDIS[low]), rgb(VIRIDIS[low + 1])]
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(*ends, strict=True))
    return red, green, blue


def rgb(colour: str) -> tuple[int, int, int]:
    """(red, green, blue) of a colour written #rrggbb."""
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def letters_of(best: Ids, probs: Floats, entries: Sequence[LegendEntry]) -> list[list[str]]:
    """The sign of each patch, [H, W]: upper case from probability one half up; · for others."""
    signs = {entry.class_id: entry.letter for entry in entries}
    return [
        [
            (sign if chance >= 0.5 else sign.lower()) if (sign := signs.get(class_id)) else "·"
            for class_id, chance in zip(row, chances, strict=True)
        ]
        for row, chances in zip(best.tolist(), probs.tolist(), strict=True)
    ]
