"""Cross entropy with sparse soft targets: no tensor of the logits' size but their gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Bytes of logits worked on at a time: what stays in the cache of each thread of a CPU, and
#: elsewhere what keeps the device busy.
_PIECE_OF_THREAD = 1 << 20
_PIECE = 1 << 26


class SparseTarget(NamedTuple):
    """Targets over C classes: `uniform` on each class, and `values` more on each of `classes`.

    Attributes:
        classes: int64 [B, N, K]; one may occur twice.
        values: [B, N, K], may be negative.
        uniform: [B, N].
        mass: [B, N], the sum over all classes.
    """

    classes: Tensor
    values: Tensor
    uniform: Tensor
    mass: Tensor


def sparse_target(
    classes: Tensor, probs: Tensor, rest: Tensor, num_classes: int, dtype: torch.dtype
) -> SparseTarget:
    """Targets in the form that the cross entropy takes.

    Entries with probability 0 are padding: they list no class. Probabilities of a class that is
    listed twice add. The mass of each `rest` is spread evenly over the classes that its own entries
    do not list, which is what the teacher's leftover mass is: that of the other classes. Where all
    classes are listed there is none to take it, and it is dropped.

    Args:
        classes: class ids [B, N, G * K] of G targets that are added up, one after the other.
        probs: [B, N, G * K].
        rest: [B, N, G], or [B, N] for G = 1.
        num_classes: C.
        dtype: of the result.
    """
    rest = (rest if rest.ndim == probs.ndim else rest.unsqueeze(-1)).to(dtype)
    classes, probs = classes.long(), probs.to(dtype)
    groups = (*rest.shape, -1)
    ids, listed = classes.reshape(groups), (probs > 0).reshape(groups)
    same = (ids.unsqueeze(-1) == ids.unsqueeze(-2)) & listed.unsqueeze(-2)
    first = listed & ~same.tril(-1).any(-1)
    others = num_classes - first.sum(-1)
    each = torch.where(others > 0, rest / others.clamp(min=1), 0)
    values = probs - (first * each.unsqueeze(-1)).flatten(-2)
    mass = probs.sum(-1) + (each * others).sum(-1)
    return SparseTarget(classes, values, each.sum(-1), mass)


def cross_entropy(logits: Tensor, target: SparseTarget) -> Tensor:
    """Cross entropy of each row, [B, N], in the target's dtype.

    Args:
        logits: [B, N, C], any floating dtype and strides.
        target: for the same rows.
    """
    rows: Tensor = _CrossEntropy.apply(logits, *target)
    return rows


class _CrossEntropy(torch.autograd.Function):
    """sum_c target_c (logsumexp(logits) - logits_c), with gradient softmax * mass - target.

    Exponentials are taken in the target's dtype, piece by piece. Saved are the logits, which the
    caller holds anyway, and two numbers a row; the gradient is the one large tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, classes: Tensor, values: Tensor, uniform: Tensor, mass: Tensor
    ) -> Tensor:
        loss, peak, norm = (torch.empty_like(mass) for _ in range(3))
        for piece in _pieces(logits):
            z = logits[piece].to(mass.dtype)
            peak[piece] = top = z.amax(-1)
            # Relative to the largest: what all logits have in common then cancels exactly.
            z = z - top.unsqueeze(-1)
            aim = (z.gather(-1, classes[piece]) * values[piece]).sum(-1)
            aim += z.sum(-1) * uniform[piece]
            norm[piece] = total = z.exp_().sum(-1).log_()
            loss[piece] = total * mass[piece] - aim
        ctx.save_for_backward(logits, classes, values, uniform, mass, peak, norm)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        logits, classes, values, uniform, mass, peak, norm = ctx.saved_tensors
        pieces = _pieces(logits)
        gradient = None
        if len(pieces) > 1:
            gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for piece in pieces:
            factor = scale[piece].unsqueeze(-1)
            part = logits[piece].to(mass.dtype) - peak[piece].unsqueeze(-1)
            part.sub_(norm[piece].unsqueeze(-1)).exp_().mul_(factor * mass[piece].unsqueeze(-1))
            part.sub_(factor * uniform[piece].unsqueeze(-1))
            part.scatter_add_(-1, classes[piece], -factor * values[piece])
            if gradient is None:
                gradient = part.to(logits.dtype)
            else:
                gradient[piece] = part
        return gradient, None, None, None, None


def _pieces(logits: Tensor) -> list[tuple[slice, slice]]:
    """Parts of [B, N, C]: some images, or rows of one where an image is large."""
    images, patches, classes = logits.shape
    everything = [(slice(0, images), slice(0, patches))]
    if torch.compiler.is_compiling() or not logits.numel():  # a compiler fuses; it unrolls loops
        return everything
    on_cpu = logits.device.type == "cpu"
    limit = _PIECE_OF_THREAD * torch.get_num_threads() if on_cpu else _PIECE
    rows = max(1, limit // (4 * classes))
    if rows >= images * patches:
        return everything
    together = max(1, rows // patches)
    return [
        (slice(image, image + together), slice(patch, patch + rows))
        for image in range(0, images, together)
        for patch in range(0, patches, rows)
    ]
