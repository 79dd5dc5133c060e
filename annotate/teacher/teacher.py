"""What the job asks of a teacher, whatever its family."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

#: Agreement of two orders of summation, as a fraction of the largest logit: float32 differs by
#: 1e-6, TF32 convolutions (a CUDA default) by up to 5e-4, a head that does not average by 0.1.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class PatchHead:
    """A teacher's classifier at every location of an image, for one input size.

    Attributes:
        grid: (H, W) of the map, in cells.
        mode: How the map is derived, in words; shards keep it as `dense_rule`.
        exact: Whether the mean of the patch logits must equal the pooled logits, up to float error.
        patch_logits: From float32 features of B images to logits [B, H, W, C], row-major.
        pooled_logits: From the same features to the logits of each image as a whole, [B, C].
    """

    grid: tuple[int, int]
    mode: str
    exact: bool
    patch_logits: Callable[[Tensor], Tensor]
    pooled_logits: Callable[[Tensor], Tensor]


@runtime_checkable
class Teacher(Protocol):
    """A network that labels every patch of an image.

    >>> class MyNetwork(nn.Conv2d):
    ...     num_classes, input_size = 10, (224, 224)
    ...     mean = std = (0.5, 0.5, 0.5)
    >>> def build():
    ...     return MyNetwork(3, 10, kernel_size=16, stride=16)
    >>> build()(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 10, 14, 14])

    Saved as a file, `annotate --model my_teacher.py:build` runs it. `build` returns a plain
    `nn.Module` that maps normalised images [B, 3, h, w] to patch logits [B, C, H, W] and has the
    attributes `num_classes` (C), `input_size`, `mean` and `std` as below; `interpolation`
    ("bicubic") and `class_names` (None) are optional. Where pooled logits are not the mean of the
    patch logits, or the classifier needs float32, it returns an object with all that stands here.

    Attributes:
        name: What shards and reports call it.
        network: All its weights; the job moves it to its device, in eval mode and float32.
        num_classes: C.
        class_names: One name a class, or None if they are not known. Ground truth of an image is
            the class that its folder is named after.
        input_size: (h, w) of its images in pixels; the whole image is squashed to it.
        interpolation: Pillow's name of the filter that resizes images, in lower case.
        mean, std: Of the colour channels, as fractions of white.
    """

    name: str
    network: nn.Module
    num_classes: int
    class_names: Sequence[str] | None
    input_size: tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def features(self, images: Tensor) -> Tensor:
        """All before the classifier, in the precision of the job, and compiled where it says so.

        Args:
            images: Normalised, float32 [B, 3, h, w].
        """
        ...

    def patch_head(self, features: Tensor, input_size: tuple[int, int]) -> PatchHead:
        """The classifier for images of one size; the job asks once a size, and runs it in float32.

        Args:
            features: Of one image.
            input_size: (h, w) of that image in pixels.

        Raises:
            TeacherError: There is no per-patch form at this size.
        """
        ...
