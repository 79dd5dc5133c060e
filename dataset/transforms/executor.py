"""Runs a v2 pipeline on an image and its label map, without v2's work on samples of any shape.

torchvision flattens each sample to a list of leaves before each transform and puts it together
again after it. An image and its map already are such a list, so every transform that has one of
torchvision's own `forward` methods is run as that method runs it, on the list: the same checks, the
same draws from torch's generator in the same order, the same kernels. All else is called as it is.
"""

import functools
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torchvision.transforms import v2

from ..label_map.label_map import TokenLabelMap

_SINGLE = v2.Transform.forward
_AT_RANDOM = v2.RandomHorizontalFlip.forward  # that of all transforms with a probability
_CALL = nn.Module.__call__
#: They never move a map nor ask for it; listed because finding that out costs time each sample.
_PHOTOMETRIC = frozenset((v2.ToImage, v2.PILToTensor, v2.ToDtype, v2.Normalize, v2.ColorJitter))


def run(transform: Any, *sample: Any) -> Any:
    """What `transform(*sample)` gives, faster where the sample is an image and its map."""
    if nn_module._has_any_global_hook():
        return transform(*sample)
    return _run(transform, sample)


def _run(transform: Any, sample: Any) -> Any:
    if (
        len(sample) != 2
        or type(sample[1]) is not TokenLabelMap
        or not isinstance(sample[0], (Tensor, PIL.Image.Image))
        or not isinstance(transform, v2.Transform)
        or _does_more(transform)
    ):
        return transform(*sample)
    forward = type(transform).forward
    if forward is _SINGLE or forward is _AT_RANDOM:
        return _transformed(transform, list(sample), forward is _AT_RANDOM)
    if forward is v2.Compose.forward:
        steps = transform.transforms
    elif forward is v2.RandomApply.forward:
        steps = transform.transforms if torch.rand(1) < transform.p else ()
    elif forward is v2.RandomChoice.forward:
        steps = (transform.transforms[int(torch.multinomial(torch.tensor(transform.p), 1))],)
    else:
        return transform(*sample)
    for step in steps:
        sample = _run(step, sample)
    return sample


def _does_more(transform: Any) -> bool:
    """Whether calling the transform does more than its class's `forward`."""
    own = vars(transform)
    return bool(
        type(transform).__call__ is not _CALL
        or "forward" in own
        or "_compiled_call_impl" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def _transformed(transform: Any, leaves: list[Any], at_random: bool) -> tuple[Any, Any]:
    image, leaf = leaves
    if type(transform) in _PHOTOMETRIC:
        if transform._needs_transform_list([image])[0]:
            image = transform.transform(image, transform.make_params([image]))
        return image, leaf
    transform.check_inputs(leaves)
    if at_random and torch.rand(1) >= transform.p:
        return image, leaf
    needed = None
    if type(transform)._needs_transform_list is v2.Transform._needs_transform_list:
        kinds: Any = type(image)
        needed = _needed(transform._transformed_types, kinds)
    image_needs, leaf_needs = needed or transform._needs_transform_list(leaves)
    params = transform.make_params(
        ([image] if image_needs else []) + ([leaf] if leaf_needs else [])
    )
    return (
        transform.transform(image, params) if image_needs else image,
        transform.transform(leaf, params) if leaf_needs else leaf,
    )


@functools.cache
def _needed(kinds: tuple[Any, ...], image: Any) -> tuple[bool, bool] | None:
    """Whether a transform of these types takes an image and a map; None if it asks their values."""
    if all(isinstance(kind, type) for kind in kinds):
        return issubclass(image, kinds), issubclass(TokenLabelMap, kinds)
    return None
