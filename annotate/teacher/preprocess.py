"""What images a teacher wants, and how a batch of them becomes its input."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from timm.data import config as timm_config
from torch import Tensor, nn

from ...errors import TeacherError

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "hamming", "box", "nearest")

Images = npt.NDArray[np.uint8] | Tensor


class Preprocessing(NamedTuple):
    """How images are prepared for a teacher.

    Attributes:
        input_sizes: (h, w) in pixels of each pass, to which the whole image is squashed.
        interpolation: Pillow's name of the resampling filter, in lower case.
        mean: Mean of the three colour channels, as a fraction of white.
        std: Their standard deviation, likewise.
    """

    input_sizes: tuple[tuple[int, int], ...]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def as_dict(self) -> dict[str, Any]:
        """Return all that decides a teacher's input, as JSON-able values."""
        return {
            "resize": "squash",
            "input_size": [list(size) for size in self.input_sizes],
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def normalise(self, images: Sequence[Images], device: torch.device) -> list[Tensor]:
        """Send squashed images to a device and normalise them there.

        Args:
            images: uint8 [B, h, w, 3] RGB of each pass; read-only arrays are fine.
            device: Where to.

        Returns:
            float32 [B, 3, h, w] of each pass.

        Raises:
            ValueError: `images` are not one for each pass, or have another dtype or shape.
        """
        if len(images) != len(self.input_sizes):
            raise ValueError(
                f"images must be one array for each pass, {len(self.input_sizes)} here; "
                f"got {len(images)}"
            )
        sizes = zip(images, self.input_sizes, strict=True)
        return [self._normalise(batch, size, device) for batch, size in sizes]

    def _normalise(self, images: Images, size: tuple[int, int], device: torch.device) -> Tensor:
        kind = getattr(images, "dtype", type(images).__name__)
        if not isinstance(images, np.ndarray | Tensor) or kind not in (np.uint8, torch.uint8):
            raise ValueError(f"images must be a uint8 array or tensor; got {kind}")
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1:] != (*size, 3) or not shape[0]:
            h, w = size
            raise ValueError(f"images must be [B, h, w, 3] = [1 or more, {h}, {w}, 3]; got {shape}")
        if isinstance(images, np.ndarray):
            # A copy: torch warns of read-only arrays, and only pinned memory is sent in passing.
            host = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
            host.numpy()[...] = images
            images = host
        pixels = images.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
        mean, std = (_on_device(values, device) for values in (self.mean, self.std))
        return pixels.div_(255).sub_(mean).div_(std)


def resolve_preprocessing(
    model: nn.Module,
    input_sizes: Sequence[tuple[int, int]] | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preprocessing:
    """Return how images are prepared: as asked, and else as the model is tested by timm.

    Raises:
        TeacherError: A value that no image can be prepared with.
    """
    resolve: Any = timm_config.resolve_model_data_config
    default = resolve(model, use_test_size=True)
    # A model built for one size knows it best: its settings name the size of the weights.
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = built_for or default["input_size"][-2:]
    interpolation = interpolation or default["interpolation"]
    if interpolation not in INTERPOLATIONS:
        raise TeacherError(
            f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got {interpolation!r}. "
            "Remedy: name one of these."
        )
    return Preprocessing(
        tuple(input_sizes) if input_sizes else ((int(height), int(width)),),
        interpolation,
        _channels("mean", default["mean"] if mean is None else mean),
        _channels("std", default["std"] if std is None else std),
    )


@functools.cache
def _on_device(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Return [3, 1, 1]; kept, because sending it anew would wait for the GPU each time."""
    return torch.tensor(values, device=device)[:, None, None]


def _channels(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError):
        red = green = blue = -1.0
    if not all(0 <= value < float("inf") for value in (red, green, blue)) or (
        name == "std" and not red * green * blue
    ):
        raise TeacherError(
            f"{name} must be three {'positive' * (name == 'std') or 'non-negative'} numbers, one "
            f"for each colour channel; got {values!r}. Remedy: leave it out for the model's own."
        )
    return red, green, blue
