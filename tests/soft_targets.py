"""Made-up sparse targets, and the dense ones that they stand for, written down plainly."""

import torch
from torch import Tensor

from tokenlabel.dataset import TokenTargets
from tokenlabel.supervise import MixedTargets


def made_up(
    batch: int, patches: int, num_classes: int, k: int, seed: int = 0, padded: bool = True
) -> TokenTargets:
    """A random batch; with entries that are padding, and weights below 1, if `padded`."""
    g = torch.Generator().manual_seed(seed)

    def part(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        classes = torch.rand(*shape, num_classes, generator=g).argsort(-1)[..., :k].int()
        mass = torch.randn(*shape, k + 1, generator=g).softmax(-1)
        probs, rest = mass[..., :k].clone(), mass[..., k].clone()
        if padded:
            gone = torch.rand(probs.shape, generator=g) < 0.2
            rest += probs.where(gone, 0).sum(-1)
            probs[gone], classes[gone] = 0, 0
        return classes, probs, rest

    weight = torch.rand(batch, patches, generator=g) if padded else torch.ones(batch, patches)
    targets = TokenTargets(
        torch.randint(num_classes, (batch,), generator=g),
        *part(batch, patches),
        weight,
        *part(batch),
    )
    if padded:  # as the dataset writes it where a patch shows nothing
        for name, value in {"classes": 0, "probs": 0.0, "rest": 1.0, "weight": 0.0}.items():
            getattr(targets, name)[:, 0] = value
    return targets


def densified(classes: Tensor, probs: Tensor, rest: Tensor, num_classes: int) -> Tensor:
    """Dense target [..., C], float64, of entries [..., K] and rest [...]."""
    dense = torch.zeros(*probs.shape[:-1], num_classes, dtype=torch.float64)
    dense.scatter_add_(-1, classes.long(), probs.double())
    absent = dense == 0
    return dense + absent * (rest.double() / absent.sum(-1).clamp(min=1)).unsqueeze(-1)


def patch_targets(targets: TokenTargets | MixedTargets, num_classes: int) -> Tensor:
    """Dense targets of the patches, [B, N, C]; of mixed ones, the sum of their halves."""
    return _summed(targets.classes, targets.probs, targets.rest, num_classes)


def crop_targets(targets: TokenTargets | MixedTargets, num_classes: int) -> Tensor:
    """Dense targets of the crops, [B, C]."""
    return _summed(targets.crop_classes, targets.crop_probs, targets.crop_rest, num_classes)


def _summed(classes: Tensor, probs: Tensor, rest: Tensor, num_classes: int) -> Tensor:
    if rest.ndim < probs.ndim:
        return densified(classes, probs, rest, num_classes)
    halves = zip(classes.chunk(2, -1), probs.chunk(2, -1), rest.unbind(-1), strict=True)
    return sum(densified(*half, num_classes) for half in halves)  # type: ignore[return-value]
