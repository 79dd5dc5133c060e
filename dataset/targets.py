# mypy: allow-subclassing-any
"""`ToTokenTargets`: the end of a pipeline, from label maps to each patch's soft target."""

from typing import Any

import PIL.Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tokenlabel.dataset.exact import exact_targets
from tokenlabel.dataset.label_map import TokenLabelMap
from tokenlabel.dataset.merging import TokenTargets
from tokenlabel.dataset.published import published_targets
from tokenlabel.dataset.sampling import INTERPOLATIONS, Grid

__all__ = ["ToTokenTargets", "TokenTargets", "exact_targets"]

RULES = ("exact", "published")


class ToTokenTargets(v2.Transform):
    """Turns every `TokenLabelMap` of a sample into `TokenTargets`. Ends a pipeline.

    The rule "exact" gives, for each patch of the student's grid, the average of the teacher's
    probabilities over what the patch shows: softmax of the map's logits and its leftover mass, with
    nothing renormalised. Along paths of crops, flips, resizes, padding and quarter turns the
    average is an exact integral; along any other, one over 4x4 sub-points of each patch or more.

    The rule "published" reproduces the target of TokenLabeling (Jiang et al., 2021) and LV-ViT, for
    comparison: *logits* averaged over the patch (RoIAlign of the crop's box), every class that is
    not among a cell's stored ones at logit 0, then softmax over all classes. The published code
    passes its boxes with x and y exchanged; here they are the right way round, so that a study can
    tell the two effects apart. Only for crops, flips and resizes.

    Args:
        grid: the student's patches, (h, w), or one number for a square.
        k: classes kept for each patch; the mass of the others goes to `rest`.
        rule: "exact" or "published".
        interpolation: what the map is between its cells' centres, for the rule "exact". "bilinear",
            or "nearest": each cell is constant, and a patch that shows one whole cell gets exactly
            that cell's probabilities. Measured against a teacher run at a quarter of the stride,
            bilinear is nearer the truth the smaller the crop, and equal for the whole picture.
        num_classes: number of the teacher's classes; only the rule "published" needs it.

    Raises:
        ValueError: for a bad option; when called, for a map whose canvas is not the size of the
            sample's picture, or, by the rule "published", that went through another geometry.
    """

    _transformed_types = (TokenLabelMap,)

    def __init__(
        self,
        grid: int | Grid = 14,
        k: int = 10,
        rule: str = "exact",
        *,
        interpolation: str = "bilinear",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        height, width = (grid, grid) if isinstance(grid, int) else grid
        if height < 1 or width < 1:
            raise ValueError(f"grid must be patches (h, w), at least 1 each way, got {grid}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if rule not in RULES:
            raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
        if interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {INTERPOLATIONS}, got {interpolation!r}"
            )
        if rule == "published" and (num_classes is None or num_classes < 1):
            raise ValueError(
                'rule "published" is a softmax over all classes and needs num_classes, '
                f"got {num_classes}. Remedy: num_classes=store.num_classes"
            )
        self.grid: Grid = (int(height), int(width))
        self.k = k
        self.rule = rule
        self.interpolation = interpolation
        self.num_classes = num_classes

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        """Refuse maps that do not lie on the sample's picture."""
        sizes = {tuple(F.get_size(picture)) for picture in _pictures(flat_inputs)}
        for leaf in flat_inputs:
            if isinstance(leaf, TokenLabelMap) and sizes - {leaf.canvas_size}:
                raise ValueError(
                    "a label map must lie on its picture; the map's canvas is (h, w) = "
                    f"{leaf.canvas_size}, the picture is {sorted(sizes)}. Remedy: give from_scores "
                    "the picture's size, and send picture and map through the same transforms"
                )

    def transform(self, inpt: TokenLabelMap, params: dict[str, Any]) -> TokenTargets:
        """The targets of one map."""
        if self.rule == "published":
            assert self.num_classes is not None
            return published_targets(inpt, self.grid, self.k, self.num_classes)
        return exact_targets(inpt, self.grid, self.k, self.interpolation)


def _pictures(flat_inputs: list[Any]) -> list[Any]:
    """The leaves of a sample that v2 transforms take for pictures."""
    explicit = (PIL.Image.Image, tv_tensors.Image, tv_tensors.Video)
    pictures = [leaf for leaf in flat_inputs if isinstance(leaf, explicit)]
    if pictures:
        return pictures
    pure = [leaf for leaf in flat_inputs if F.is_pure_tensor(leaf)]
    return [leaf for leaf in pure[:1] if leaf.ndim >= 2]
