# mypy: allow-subclassing-any
"""torchvision's RandAugment, AutoAugment and TrivialAugmentWide with aligned label maps."""

import copy
from collections.abc import Iterable
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

# Ops that change colours but move nothing. Any other op is applied to the map too, where an op
# that the map has no kernel for raises: a future op can never leave the map behind in silence.
PHOTOMETRIC = frozenset(
    "Identity Brightness Color Contrast Sharpness".split()
    + "Posterize Solarize AutoContrast Equalize Invert".split()
)

_Move = tuple[str, float, Any]  # op, magnitude, interpolation


def check_canvas(leaves: Iterable[Any]) -> None:
    """Refuse a sample whose images and maps are not all of one size.

    Raises:
        ValueError: sizes differ; torchvision's flips and affine ops would not notice.
    """
    sizes = [(type(leaf).__name__, tuple(F.get_size(leaf))) for leaf in leaves]
    if len({size for _, size in sizes}) > 1:
        raise ValueError(
            "images and label maps of a sample must share one canvas (height, width); got "
            + ", ".join(f"{name} {size}" for name, size in sizes)
            + ". Remedy: make the map with the image's size, and transform them together"
        )


class _WithMaps(v2.Transform):
    """Mixin before a v2 auto-augment transform: the maps of the sample repeat its geometric ops.

    The base class draws from torch's generator and transforms the image as always; the ops that it
    applies are recorded, then applied to each map with exactly the same parameters.
    """

    _fill: dict[Any, Any]
    _moves: list[_Move]

    def forward(self, *inputs: Any) -> Any:
        """Transform a sample: the image as the base class does, each map aligned with it."""
        # Looked up first: a torchvision that renames its hook fails here, not in silence.
        apply = super()._apply_image_or_video_transform
        one = copy.copy(self)  # of this sample alone: threads may share a transform
        one._moves = []
        leaves, spec = tree_flatten(super(_WithMaps, one).forward(*inputs))
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, tv_tensors.Mask):
                # An image's fill colour means nothing in a map: only a fill given for the map's own
                # type counts, and what a TokenLabelMap gets from outside has no label anyway.
                fill = {"others": self._fill.get(type(leaf), self._fill.get(tv_tensors.Mask))}
                for move in one._moves:
                    leaves[i] = apply(leaves[i], *move, fill)
        return tree_unflatten(leaves, spec)

    def _flatten_and_extract_image_or_video(self, inputs: Any, *_: Any) -> Any:
        # Masks go through, which torchvision refuses. It has keypoints from 0.23 on.
        kinds = [getattr(tv_tensors, name, None) for name in ("BoundingBoxes", "KeyPoints")]
        refused = tuple(filter(None, kinds))
        found, image = super()._flatten_and_extract_image_or_video(inputs, refused)
        check_canvas([image, *(leaf for leaf in found[0] if isinstance(leaf, tv_tensors.Mask))])
        return found, image

    def _apply_image_or_video_transform(
        self, image: Any, transform_id: str, magnitude: float, interpolation: Any, fill: Any
    ) -> Any:
        if transform_id not in PHOTOMETRIC:
            self._moves.append((transform_id, magnitude, interpolation))
        return super()._apply_image_or_video_transform(
            image, transform_id, magnitude, interpolation, fill
        )


class RandAugment(_WithMaps, v2.RandAugment):
    """`torchvision.transforms.v2.RandAugment` for samples with label maps.

    Takes the same arguments and, for one state of torch's generator, gives the identical image.
    Shear, translation and rotation move every `TokenLabelMap` of the sample by the same
    parameters; photometric ops leave it as it is. So they move a plain `tv_tensors.Mask`, nearest
    pixel, filled with 0 unless `fill={tv_tensors.Mask: …, "others": …}` says otherwise.

    Raises:
        TypeError: the sample holds no image or several, or boxes or keypoints.
    """


class AutoAugment(_WithMaps, v2.AutoAugment):
    """`torchvision.transforms.v2.AutoAugment` for samples with label maps; see `RandAugment`."""


class TrivialAugmentWide(_WithMaps, v2.TrivialAugmentWide):
    """`torchvision.transforms.v2.TrivialAugmentWide` for samples with label maps.

    See `RandAugment`. Its shears (up to 0.99) and rotations (up to 135 degrees) leave patches
    without any label; their weight in the targets is 0.
    """
