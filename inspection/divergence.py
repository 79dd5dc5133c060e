"""How far the distributions of two maps are apart."""

from typing import NamedTuple

import numpy as np

from .patch_map import Floats

#: Of a probability, so that KL stays finite where one side has no mass at all.
FLOOR = 1e-12


class Divergence(NamedTuple):
    """Of N patches, in nats.

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
    log_a, log_b, log_middle = (np.log(np.maximum(probs, FLOOR)) for probs in (a, b, (a + b) / 2))
    own_a, own_b = ((p * log).sum(-1) for p, log in ((a, log_a), (b, log_b)))
    js = (own_a + own_b) / 2 - ((a + b) / 2 * log_middle).sum(-1)
    return Divergence(
        np.maximum(own_a - (a * log_b).sum(-1), 0),
        np.maximum(own_b - (b * log_a).sum(-1), 0),
        np.maximum(js, 0),
    )
