"""Facts about one image's map, and the classes to point out in it."""

from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from PIL import ImageColor

from ..label_sets import Floats, Ids, PatchMap

#: Okabe and Ito's colours, which colour-blind readers distinguish too; then that of all others.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
OTHER = "#999999"
#: So that colour is not the only sign of a class.
LETTERS = "ABCDEFGHIJKL"
#: Viridis at equal steps from 0 to 1: perceptually uniform, dark to light.
VIRIDIS = (
    *("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c"),
    *("#28ae80", "#5ec962", "#addc30", "#fde725"),
)


class LegendEntry(NamedTuple):
    """One of the classes to point out: on top of `patches` patches, with `mean` probability."""

    class_id: int
    letter: str
    colour: str
    patches: int
    mean: float


def legend(best: Ids, probs: Floats, count: int = len(COLOURS)) -> list[LegendEntry]:
    """The classes that are on top of the most patches, most frequent first.

    Args:
        best: class on top of each patch, any shape.
        probs: its probability, the same shape.
        count: at most so many; those that no colour is left for have that of all others.
    """
    ids, inverse, counts = np.unique(best, return_inverse=True, return_counts=True)
    sums = np.bincount(inverse.ravel(), probs.ravel())
    order = np.lexsort((-sums, -counts))[:count]  # of equally frequent ones, the more probable
    colours = (*COLOURS, *repeat(OTHER, len(LETTERS)))
    return [
        LegendEntry(int(ids[i]), letter, colour, int(counts[i]), float(sums[i] / counts[i]))
        for i, letter, colour in zip(order, LETTERS, colours, strict=False)
    ]


def letters_of(best: Ids, probs: Floats, entries: Sequence[LegendEntry]) -> list[list[str]]:
    """The letter of each patch, [H, W]: upper case from probability one half up; · for others."""
    letters = {entry.class_id: entry.letter for entry in entries}
    return [
        [
            letter if chance >= 0.5 else letter.lower()
            for letter, chance in zip((letters.get(c, "·") for c in row), chances, strict=True)
        ]
        for row, chances in zip(best.tolist(), probs.tolist(), strict=True)
    ]


def map_facts(patches: PatchMap) -> dict[str, Any]:
    """Facts about one image's map as a whole.

    Returns:
        JSON-able: `mass` and `entropy`, means over the patches; `seen`, the class with the highest
        mean probability, which is `seen_prob`; `agreement`, the fraction of patches that have the
        label on top; `label_prob`, its mean probability; `suspicion`, how much more the teacher
        believes in some other class, from -1 to 1. The last three are None without a label.
    """
    label = patches.label
    ids, inverse = np.unique(patches.classes, return_inverse=True)
    means = np.bincount(inverse.ravel(), patches.probs.ravel()) / patches.best.size
    seen = int((means + 1e-9 * (ids == label)).argmax())  # of equals, the label
    facts: dict[str, Any] = {
        "mass": float(patches.mass.mean()),
        "entropy": float(patches.entropy.mean()),
        "seen": int(ids[seen]),
        "seen_prob": float(means[seen]),
        **dict.fromkeys(("agreement", "label_prob", "suspicion")),
    }
    if label >= 0:
        facts["agreement"] = float((patches.best == label).mean())
        facts["label_prob"] = float(means[ids == label].sum())
        facts["suspicion"] = float(means[ids != label].max(initial=0)) - facts["label_prob"]
    return facts


def viridis(value: float) -> tuple[int, int, int]:
    """RGB of a value from 0 to 1."""
    steps = np.linspace(0, 1, len(VIRIDIS))
    channels = zip(*map(ImageColor.getrgb, VIRIDIS), strict=True)
    red, green, blue = (round(float(np.interp(value, steps, channel))) for channel in channels)
    return red, green, blue
