"""Runs a v2 pipeline on an image and its label map, without v2's work on samples of any shape.

torchvision flattens each sample to a list of leaves before each transform and puts it together
again after it. An image and its map already are such a list, so every transform that has one of
torchvision's own `forward` methods is run as that method runs it, on the list: the same checks, the
same draws from torch's generator in the same order, the same kernels. All else is called as it is.
"""

from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torchvision.transforms import v2

from tokenlabel.dataset.label_map import TokenLabelMap

_SINGLE = v2.Transform.forward
_AT_RANDOM = v2.RandomHorizontalFlip.forward  # that of all transforms with a probability
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def run(transform: Any, *sample: Any) -> Any:
    """What `transform(*sample)` gives, sooner where the sample is an image and its map."""
    forward = _forward(transform)
    image, leaf = sample if len(sample) == 2 else (None, None)
    if type(leaf) is not TokenLabelMap or not isinstance(image, (Tensor, PIL.Image.Image)):
        return transform(*sample)
    if forward is _SINGLE or forward is _AT_RANDOM:
        return _transformed(transform, list(sample), forward is _AT_RANDOM)
    if forward is v2.Compose.forward:
        steps = transform.transforms
    elif forward is v2.RandomApply.forward:
        steps = transform.transforms if torch.rand(1) < transform.p else ()
    elif forward is v2.RandomChoice.forward:
        number = int(torch.multinomial(torch.tensor(transform.p), 1))
        steps = (transform.transforms[number],)
    else:
        return transform(*sample)
    for step in steps:
        sample = run(step, *sample)
    return sample


def _forward(transform: Any) -> Any:
    """The method that calling `transform` comes to; None where calling it does more than that."""
    kind = type(transform)
    if not isinstance(transform, v2.Transform) or kind.__call__ is not nn.Module.__call__:
        return None
    own = vars(transform)
    if "forward" in own or own.get("_compiled_call_impl") or any(own[name] for name in _HOOKS):
        return None
    return None if nn_module._has_any_global_hook() else kind.forward


def _transformed(transform: Any, leaves: list[Any], at_random: bool) -> tuple[Any, ...]:
    transform.check_inputs(leaves)
    if at_random and torch.rand(1) >= transform.p:
        return tuple(leaves)
    needed = transform._needs_transform_list(leaves)
    params = transform.make_params([x for x, need in zip(leaves, needed, strict=True) if need])
    return tuple(
        transform.transform(x, params) if need else x
        for x, need in zip(leaves, needed, strict=True)
    )
