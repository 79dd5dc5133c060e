"""Cross entropy with windows as targets: no tensor of the logits' size but their gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dataset.targets.windows import TokenWindows

#: Images at a time, so that the entries of the windows, expanded, stay small beside the logits.
#: On a CPU a few fit its cache, and one alone would cost its threads too many barriers; measured at
#: [64, 196, 1000] on one thread: 50 ms for 1 to 8 images, 96 ms for all 64. A GPU waits for the
#: launches of small kernels; at [256, 196, 1000] on an H200: 10.2 ms and 288 MB by 16 images, 5.9
#: and 365 by 64, 5.4 and 678 by 256.
CPU_IMAGES, ACCELERATOR_IMAGES = 4, 64


def cross_entropy(logits: Tensor, parts: Sequence[tuple[TokenWindows, Tensor]]) -> Tensor:
    """Cross entropy of each patch, [B, N]: the sum over the parts of coefficient * H(target).

    In float32, or float64 for float64 logits. It has no second derivative. Where no gradient is
    wanted (validation under `no_grad`), none is computed.

    Args:
        logits: [B, N, C], any floating dtype and strides.
        parts: targets of the same patches, each with a coefficient [B, N]: one for plain labels,
            those of either image for mixed ones.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Cross entropy is linear in the target: the parts are one window over more cells.
    wanted = torch.is_grad_enabled() and logits.requires_grad
    cells, window, share, first = [], [], [], 0
    for windows, coefficient in parts:
        cells.append(windows.origin.unsqueeze(-1) + (windows.offsets + first))
        window.append(windows.window.to(dtype) * coefficient.unsqueeze(-1))
        share.append(windows.share.to(dtype) * coefficient.unsqueeze(-1))
        first += windows.classes.shape[1]
    rows: Tensor = _CrossEntropy.apply(
        logits,
        wanted,
        torch.cat([windows.classes for windows, _ in parts], 1),
        torch.cat([windows.values for windows, _ in parts], 1).to(dtype),
        torch.cat(cells, 2),
        torch.cat(window, 2),
        torch.cat([windows.basis for windows, _ in parts], 1).to(dtype),
        torch.cat(share, 2),
    )
    return rows


class _CrossEntropy(torch.autograd.Function):
    """-sum_c target_c log_softmax(logits)_c, with gradient softmax * mass - target.

    The forward pass computes the gradient, but for the factor that comes with the backward pass, in
    place of the log-probabilities and some images at a time: one tensor of the logits' size is all
    that remains.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: bool, *target: Tensor) -> Tensor:
        loss, gradient = _loss_and_gradient(logits, wanted, *target)
        ctx.save_for_backward(logits, *target)
        # No saved tensor, whose changes autograd would refuse to overlook in a second backward
        # pass over a retained graph. A compiler plans its memory itself, and drops what is unused.
        ctx.gradient = None if torch.compiler.is_compiling() else gradient
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        logits, *target = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            gradient = _loss_and_gradient(logits, True, *target)[1]
        assert gradient is not None
        gradient.mul_(scale.unsqueeze(-1))
        return gradient.to(logits.dtype), None, *(None for _ in target)


def _loss_and_gradient(
    logits: Tensor, wanted: bool, *target: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Loss [B, N] and, where it is wanted, its derivative by the logits [B, N, C]."""
    if torch.compiler.is_compiling():
        return _of_some_images(logits, wanted, *target)
    step = CPU_IMAGES if logits.device.type == "cpu" else ACCELERATOR_IMAGES
    dtype = target[-1].dtype
    loss = torch.empty(logits.shape[:2], dtype=dtype, device=logits.device)
    gradient = torch.empty(logits.shape, dtype=dtype, device=logits.device) if wanted else None
    for start in range(0, len(logits), step):
        images = slice(start, start + step)
        some = (part[images] for part in target)
        loss[images], slopes = _of_some_images(logits[images], wanted, *some)
        if gradient is not None and slopes is not None:
            gradient[images] = slopes
        del slopes  # or they would stay in memory beside the next ones
    return loss, gradient


def _of_some_images(
    logits: Tensor,
    wanted: bool,
    classes: Tensor,
    values: Tensor,
    cells: Tensor,
    window: Tensor,
    basis: Tensor,
    share: Tensor,
) -> tuple[Tensor, Tensor | None]:
    batch, count, k = classes.shape
    first = torch.arange(0, batch * count, count, device=cells.device).view(-1, 1, 1)
    rows = (cells + first).flatten()
    ids = classes.flatten(0, 1).index_select(0, rows).view(*cells.shape[:2], -1)
    entries = values.flatten(0, 1).index_select(0, rows).view(*cells.shape, k)
    entries = entries.mul_(window.unsqueeze(-1)).flatten(2)
    logs = torch.log_softmax(logits, -1, dtype=window.dtype)
    loss = -logs.gather(-1, ids).mul_(entries).sum(-1) - (logs @ basis.mT * share).sum(-1)
    if not wanted:
        return loss, None
    mass = (entries.sum(-1) + (share * basis.sum(-1).unsqueeze(1)).sum(-1)).unsqueeze(-1)
    gradient = logs.exp_().mul_(mass).scatter_add_(-1, ids, entries.neg_())
    return loss, gradient.baddbmm_(share, basis, alpha=-1)
