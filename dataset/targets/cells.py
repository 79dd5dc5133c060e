"""The maps of a batch decoded: each cell's probabilities, on any device.

What the stored numbers mean is defined in `format.score_map`, in NumPy; this is the same in torch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..format.score_map import DROPPED, LEAST_REST, RESIDUAL_STEPS
from .record import Records

#: The least that is divided by, or of which a logarithm is taken.
LEAST = 1e-12
#: Mass of the residual below this is rounding: a cell stores all that it names.
_NOTHING = 1e-5


class Cells(NamedTuple):
    """The cells of a batch's maps, of the view that matches each crop. P cells a map.

    A cell's probability of class c is that of `probs` where c is stored, else `leftover` times
    `residual` of c.

    Attributes:
        classes: int64 [B, P, K].
        probs: float32 [B, P, K], 0 where no class is stored.
        leftover: float32 [B, P], factor of `residual`.
        residual: float32 [B, C], how the leftover mass of each image is distributed.
        given: float32 [B, P, K], what `residual` has for each class.
    """

    classes: Tensor
    probs: Tensor
    leftover: Tensor
    residual: Tensor
    given: Tensor

    @property
    def values(self) -> Tensor:
        """`probs` less what the residual gives the same classes, so that all of it can be added."""
        beyond = self.probs - self.leftover[..., None] * self.given
        return torch.where(self.probs > 0, beyond, 0.0)

    def mean(self, amount: Tensor) -> Tensor:
        """The mixture [B, C] of the cells by amounts [B, P] that sum to 1."""
        total = self.residual * (self.leftover * amount).sum(1, keepdim=True)
        values = self.values * amount[..., None]
        return total.scatter_add(1, self.classes.flatten(1), values.flatten(1)).clamp_(min=0)

    def mean_logits(self, amount: Tensor) -> Tensor:
        """The mean of the logits [B, C] by amounts [B, P] that sum to 1, but for a constant.

        That is the mean of the log-probabilities, of which those that are not stored are
        log(leftover) + log(residual).
        """
        leftover = self.leftover.clamp(min=LEAST).log()
        logs = self.probs.clamp(min=LEAST).log() - leftover[..., None]
        logs = logs - self.given.clamp(min=LEAST).log()
        logs = torch.where(self.probs > 0, logs, 0.0) * amount[..., None]
        residual = self.residual.clamp(min=LEAST).log()
        return residual.scatter_add(1, self.classes.flatten(1), logs.flatten(1))


def decode(records: Records) -> Cells:
    """The cells of the records' maps."""
    layout = records.layout.maps
    stored = records.plane("codes").flatten(2).mT
    if layout.step:
        probs = torch.where(stored == DROPPED, 0.0, (stored * -layout.step).exp())
    else:
        probs = (-stored).exp()
    total = probs.sum(-1)
    complete = (probs > 0).sum(-1) == layout.num_classes
    room = LEAST_REST * ~complete if layout.step else total.new_zeros(())
    scale = (1 - room) / total.clamp(min=1e-30)
    probs = probs * torch.where(complete, scale, scale.clamp(max=1))[..., None]
    rest = torch.where(complete, 0.0, torch.maximum(1 - total, room))
    classes = records.plane("classes").flatten(2).mT.long().contiguous()
    residual = probs.new_full((len(classes), layout.num_classes), 1 / layout.num_classes)
    if layout.residual:
        codes = records.plane("residual_codes")
        parts = torch.where(codes == DROPPED, 0.0, (codes / -RESIDUAL_STEPS).exp())
        unnamed = layout.num_classes - (parts > 0).sum(1, keepdim=True)
        left = (1 - parts.sum(1, keepdim=True)).clamp(min=0) / unnamed.clamp(min=1)
        # Added to what all get, since a dropped entry has some class id as well.
        named = torch.where(parts > 0, parts - left, 0.0)
        ids = records.plane("residual_classes").long()
        residual = left.expand_as(residual).scatter_add(1, ids, named)
        residual = residual / residual.sum(1, keepdim=True)
    given = residual.gather(1, classes.flatten(1)).view_as(probs)
    # The leftover mass goes to the classes that are not stored: so much of the residual is theirs.
    theirs = 1 - torch.where(probs > 0, given, 0.0).sum(-1)
    leftover = torch.where(theirs > _NOTHING, rest / theirs.clamp(min=_NOTHING), 0.0)
    return Cells(classes, probs, leftover, residual, given)
