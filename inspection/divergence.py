"""How far two sparse distributions over the same classes are apart."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
#: Of a probability, so that KL stays finite where one side has no mass at all.
FLOOR = 1e-12


class Sparse(NamedTuple):
    """Distributions of N patches over C classes, K of them listed.

    Attributes:
        classes: [N, K], different within a patch where their probability is not 0.
        probs: [N, K].
        rest: [N], spread evenly over the classes that are not listed.
    """

    classes: npt.NDArray[np.integer]
    probs: Floats
    rest: Floats

    @classmethod
    def of_logits(cls, scores: np.ndarray, classes: np.ndarray, rest: np.ndarray) -> "Sparse":
        """From logits [..., K], their classes, and the log-sum-exp of all others [...]."""
        k = scores.shape[-1]
        logits = scores.reshape(-1, k).astype(np.float64)
        others = rest.reshape(-1).astype(np.float64)
        peak = np.maximum(logits.max(1), others)
        weights, left = np.exp(logits - peak[:, None]), np.exp(others - peak)
        total = weights.sum(1) + left
        return cls(classes.reshape(-1, k).astype(np.int64), weights / total[:, None], left / total)


class Divergence(NamedTuple):
    """Of N patches, in nats.

    Attributes:
        kl: KL(a || b), float64 [N].
        reverse: KL(b || a).
        js: Jensen-Shannon divergence, between 0 and log 2.
        same: whether both have the same class on top, bool [N].
    """

    kl: Floats
    reverse: Floats
    js: Floats
    same: npt.NDArray[np.bool_]


def divergence(a: Sparse, b: Sparse, num_classes: int) -> Divergence:
    """How far the patches of `a` and `b` are apart, without making them dense.

    The classes listed by either are compared one by one; all others have one probability in each.
    """
    even_a, even_b = _even(a, num_classes), _even(b, num_classes)
    real_a, real_b = a.probs > 0, b.probs > 0
    equal = (a.classes[:, :, None] == b.classes[:, None, :]) & real_a[:, :, None]
    equal &= real_b[:, None, :]
    in_b, in_a = equal.any(2), equal.any(1)
    # b's probability of the classes that a lists, and a's of those that only b lists.
    of_a = np.where(in_b, (equal * b.probs[:, None, :]).sum(2), even_b[:, None])
    only_b = real_b & ~in_a
    p = np.concatenate([a.probs, np.where(only_b, even_a[:, None], 0)], 1)
    q = np.concatenate([np.where(real_a, of_a, 0), np.where(only_b, b.probs, 0)], 1)
    others = np.maximum(num_classes - real_a.sum(1) - only_b.sum(1), 0)
    count = np.concatenate([np.ones_like(p), others[:, None]], 1)
    p = np.concatenate([p, even_a[:, None]], 1)
    q = np.concatenate([q, even_b[:, None]], 1)
    middle = (p + q) / 2
    js = (_kl(p, middle, count) + _kl(q, middle, count)) / 2
    best_a, best_b = (
        side.classes[np.arange(len(side.rest)), side.probs.argmax(1)] for side in (a, b)
    )
    return Divergence(_kl(p, q, count), _kl(q, p, count), np.maximum(js, 0), best_a == best_b)


def _even(side: Sparse, num_classes: int) -> Floats:
    """The probability of each class that is not listed, [N]."""
    result: Floats = side.rest / np.maximum(num_classes - (side.probs > 0).sum(1), 1)
    return result


def _kl(p: Floats, q: Floats, count: Floats) -> Floats:
    ratio = np.log(np.maximum(p, FLOOR)) - np.log(np.maximum(q, FLOOR))
    result: Floats = (count * p * ratio).sum(1)
    return np.maximum(result, 0)
