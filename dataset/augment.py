# mypy: allow-subclassing-any
"""torchvision's RandAugment, AutoAugment and TrivialAugmentWide with label maps in step."""

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

# Ops that change colours but move nothing. Any other op is applied to the map too, where an op
# that the map has no kernel for raises: a future op can never leave the map behind in silence.
_PHOTOMETRIC = frozenset(
    "Identity Brightness Color Contrast Sharpness".split()
    + "Posterize Solarize AutoContrast Equalize Invert".split()
)

_Move = tuple[str, float, Any]  # op, magnitude, interpolation
# Of the sample in hand; a context variable, so that threads may share a transform.
_moves: ContextVar[list[_Move] | None] = ContextVar("moves", default=None)


def check_canvas(leaves: Iterable[Any]) -> None:
    """Refuse a sample whose pictures and maps are not all of one size.

    Raises:
        ValueError: sizes differ; torchvision's flips and affine ops would not notice.
    """
    sizes = [(type(leaf).__name__, tuple(F.get_size(leaf))) for leaf in leaves]
    if len({size for _, size in sizes}) > 1:
        raise ValueError(
            "pictures and label maps of a sample must share one canvas (height, width); got "
            + ", ".join(f"{name} {size}" for name, size in sizes)
            + ". Remedy: make the map with the picture's size, and transform them together"
        )


class _InStep(v2.Transform):
    """Mixin before a v2 auto-augment transform: the maps of the sample repeat its geometric ops.

    The base class sees the sample without its maps, draws from torch's generator as ever and
    transforms the picture; the ops it applied are recorded and then applied to each map with
    exactly the same parameters.
    """

    _fill: dict[Any, Any]

    def forward(self, *inputs: Any) -> Any:
        """Transform a sample: the picture as the base class does, each map in step."""
        leaves, spec = tree_flatten(inputs if len(inputs) > 1 else inputs[0])
        maps = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, tv_tensors.Mask)}
        bare = tree_unflatten([None if i in maps else leaf for i, leaf in enumerate(leaves)], spec)
        if not maps:
            return super().forward(bare)
        # Looked up first: a torchvision that renames its hook fails here, not in silence.
        apply = super()._apply_image_or_video_transform
        _, picture = self._flatten_and_extract_image_or_video((bare,))
        check_canvas([picture, *maps.values()])
        moves: list[_Move] = []
        token = _moves.set(moves)
        try:
            sample = super().forward(bare)
        finally:
            _moves.reset(token)
        leaves, spec = tree_flatten(sample)
        for i, label_map in maps.items():
            # A picture's fill colour means nothing in a map: only a fill given for the map's own
            # type counts, and what a TokenLabelMap gets from outside has no label, whatever it is.
            fill = self._fill.get(type(label_map), self._fill.get(tv_tensors.Mask))
            for op, magnitude, interpolation in moves:
                label_map = apply(label_map, op, magnitude, interpolation, {"others": fill})
            leaves[i] = label_map
        return tree_unflatten(leaves, spec)

    def _apply_image_or_video_transform(
        self,
        image: Any,
        transform_id: str,
        magnitude: float,
        interpolation: Any,
        fill: dict[Any, Any],
    ) -> Any:
        if transform_id not in _PHOTOMETRIC and (moves := _moves.get()) is not None:
            moves.append((transform_id, magnitude, interpolation))
        return super()._apply_image_or_video_transform(
            image, transform_id, magnitude, interpolation, fill
        )


class RandAugment(_InStep, v2.RandAugment):
    """`torchvision.transforms.v2.RandAugment` for samples with label maps.

    Takes the same arguments and, for one state of torch's generator, gives the identical picture.
    Shear, translation and rotation move every `TokenLabelMap` of the sample by the same
    parameters; photometric ops leave it as it is. A plain `tv_tensors.Mask` moves in step too,
    nearest pixel, filled with 0 unless `fill={tv_tensors.Mask: …, "others": …}` says otherwise.

    Raises:
        TypeError: the sample holds no picture or several, or boxes or keypoints.
    """


class AutoAugment(_InStep, v2.AutoAugment):
    """`torchvision.transforms.v2.AutoAugment` for samples with label maps; see `RandAugment`."""


class TrivialAugmentWide(_InStep, v2.TrivialAugmentWide):
    """`torchvision.transforms.v2.TrivialAugmentWide` for samples with label maps.

    See `RandAugment`. Its shears (up to 0.99) and rotations (up to 135 degrees) leave patches
    without any label; their weight in the targets is 0.
    """
