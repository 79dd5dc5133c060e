"""What a stored map says of each patch, as probabilities that were checked."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..dataset.format.score_map import ScoreMap
from ..errors import FormatError

Floats = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int64]


class PatchMap(NamedTuple):
    """A map of K classes a patch on an [H, W] grid.

    Attributes:
        classes: int64 [H, W, K], class ids, most probable first. Where no class is stored, the
            first one stands again, with probability 0, so that no class shows up by mistake.
        probs: float32 [H, W, K], their probabilities.
        rest: float32 [H, W], probability of all other classes.
        entropy: float32 [H, W], in nats, over all classes.
    """

    classes: Ids
    probs: Floats
    rest: Floats
    entropy: Floats

    @property
    def mass(self) -> Floats:
        """Probability of all stored classes together, [H, W]."""
        return 1 - self.rest


def patch_map(entry: ScoreMap) -> PatchMap:
    """Probabilities of a map's first view.

    Raises:
        FormatError: the map holds NaN, a patch without any class, or a class that the teacher does
            not have.
    """
    classes, probs, rest = entry.probabilities()
    ids = np.where(probs > 0, classes, classes[..., :1]).astype(np.int64)
    if not (probs[..., 0] > 0).all() or ids.max() >= entry.layout.num_classes:
        raise FormatError(
            f"a map must have one of the {entry.layout.num_classes} classes in each patch, without "
            "NaN; this one has others. Remedy: `inspect-labels --verify` names the damaged shard; "
            "remove it, and the next `annotate` redoes it"
        )
    residual = entry.residual()
    # The others have rest * residual / free each, free being the residual's sum over them: their
    # entropy follows from sums over the stored classes, without making the map dense.
    stored = np.where(probs > 0, residual[ids], 0)
    free = np.maximum(1 - stored.sum(-1), np.finfo(np.float32).tiny)
    scale = rest / free
    spread = np.maximum(_plogp(residual).sum() - _plogp(stored).sum(-1), 0)
    entropy = _plogp(probs).sum(-1) + scale * spread + free * _plogp(scale)
    return PatchMap(ids, probs, rest, entropy)


def _plogp(probs: Floats) -> Floats:
    """-p log p, 0 at 0."""
    result: Floats = -probs * np.log(np.maximum(probs, np.finfo(np.float32).tiny))
    return result
