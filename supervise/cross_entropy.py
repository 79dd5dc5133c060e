"""Cross entropy with sparse soft targets: no tensor of the logits' size but their gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    """-sum_c target_c log_softmax(logits)_c, with gradient softmax * mass - target.

    The log-probabilities, kept for the backward pass, become the gradient in place: there is one
    tensor of the logits' size in all. Whole-tensor operations, because many small ones, which a
    CPU's cache would like better, cost its threads a barrier each.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, classes: Tensor, values: Tensor, uniform: Tensor, mass: Tensor
    ) -> Tensor:
        logs = torch.log_softmax(logits, -1, dtype=mass.dtype)
        loss = (logs.gather(-1, classes) * values).sum(-1)
        loss += uniform * logs.sum(-1)
        ctx.save_for_backward(logits, classes, values, uniform, mass)
        # No saved tensor, whose changes autograd would refuse to overlook in a second backward
        # pass over a retained graph; a compiler plans its memory itself.
        ctx.logs = None if torch.compiler.is_compiling() else logs
        return loss.neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        logits, classes, values, uniform, mass = ctx.saved_tensors
        gradient, ctx.logs = ctx.logs, None
        if gradient is None:
            gradient = torch.log_softmax(logits, -1, dtype=mass.dtype)
        factor = scale.unsqueeze(-1)
        gradient.exp_().mul_(factor * mass.unsqueeze(-1)).sub_(factor * uniform.unsqueeze(-1))
        gradient.scatter_add_(-1, classes, -factor * values)
        return gradient.to(logits.dtype), None, None, None, None
