# mypy: allow-subclassing-any
"""`ToTokenLabels`: the end of a pipeline of your own, from label maps to records."""

from typing import Any

import PIL.Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..label_map.label_map import TokenLabelMap
from ..targets.record import Grid
from ..targets.token_labels import TokenLabels, student_grid


class ToTokenLabels(v2.Transform):
    """Turns every `TokenLabelMap` of a sample into `TokenLabels`. Ends a pipeline.

        transform = v2.Compose([v2.RandomResizedCrop(224), ToTokenLabels(grid=14)])
        image, labels = transform(image, leaf)
        labels[None].targets()  # a DataLoader makes the batch dimension

    Args:
        grid: the student's patches, (h, w), or one number for a square, for `labels.targets()`;
            None: `targets` is then called with one.
        shrink: as in `TokenLabelDataset`.

    Raises:
        ValueError: a bad option; when called, for a map whose canvas is not the size of the
            sample's image.
    """

    _transformed_types = (TokenLabelMap,)

    def __init__(self, grid: int | Grid | None = None, *, shrink: float = 0.0) -> None:
        super().__init__()
        self.grid = None if grid is None else student_grid(grid)
        if not 0 <= shrink:
            raise ValueError(f"shrink must be 0 or more, such as 0.3; got {shrink}")
        self.shrink = shrink

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        """Refuse maps that do not lie on the sample's image."""
        explicit = (PIL.Image.Image, tv_tensors.Image, tv_tensors.Video)
        images = [leaf for leaf in flat_inputs if isinstance(leaf, explicit)]
        if not images:  # v2 takes the first plain tensor for the image
            plain = [leaf for leaf in flat_inputs if F.is_pure_tensor(leaf)]
            images = [leaf for leaf in plain[:1] if leaf.ndim >= 2]
        sizes = {tuple(F.get_size(image)) for image in images}
        for leaf in flat_inputs:
            if isinstance(leaf, TokenLabelMap) and sizes - {leaf.canvas_size}:
                raise ValueError(
                    "a label map must lie on its image; the map's canvas is (h, w) = "
                    f"{leaf.canvas_size}, the image is {sorted(sizes)}. Remedy: give from_scores "
                    "the image's size, and send image and map through the same transforms"
                )

    def transform(self, inpt: TokenLabelMap, params: dict[str, Any]) -> TokenLabels:
        """The record of one map."""
        return TokenLabels.of(inpt, self.grid, self.shrink)
