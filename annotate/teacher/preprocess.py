"""How images are prepared for a teacher, and how a batch of them becomes its input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import TeacherError

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "hamming", "box", "nearest")

Images = npt.NDArray[np.uint8] | Tensor


class Preprocessing:
    """How images are prepared for a teacher on its device.

    Attributes:
        input_sizes: (h, w) in pixels of each pass, to which the whole image is squashed.
        interpolation: Pillow's name of the resampling filter, in lower case.
        mean: Mean of the three colour channels, as a fraction of white.
        std: Their standard deviation, likewise.

    Raises:
        TeacherError: A value that no image can be prepared with.
    """

    def __init__(
        self,
        input_sizes: Sequence[tuple[int, int]],
        interpolation: str,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> None:
        if interpolation not in INTERPOLATIONS:
            raise TeacherError(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got {interpolation!r}. "
                "Remedy: name one of these."
            )
        self.input_sizes, self.interpolation = tuple(input_sizes), interpolation
        self.mean, self.std = _channels("mean", mean), _channels("std", std)
        self._device = device
        # Made once: sending them with each batch would wait for the GPU.
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std)
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all that decides a teacher's input, as JSON-able values."""
        return {
            "resize": "squash",
            "input_size": [list(size) for size in self.input_sizes],
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def normalise(self, images: Sequence[Images]) -> list[Tensor]:
        """Send squashed images to the device and normalise them there.

        Args:
            images: uint8 [B, h, w, 3] RGB of each pass; read-only arrays are fine.

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
        pixels = []
        for batch, (h, w) in zip(images, self.input_sizes, strict=True):
            kind = getattr(batch, "dtype", type(batch).__name__)
            if not isinstance(batch, np.ndarray | Tensor) or kind not in (np.uint8, torch.uint8):
                raise ValueError(f"images must be a uint8 array or tensor; got {kind}")
            shape = tuple(batch.shape)
            if len(shape) != 4 or shape[1:] != (h, w, 3) or not shape[0]:
                raise ValueError(
                    f"images must be [B, h, w, 3] = [1 or more, {h}, {w}, 3]; got {shape}"
                )
            if isinstance(batch, np.ndarray):
                # A copy: torch warns of read-only arrays, and only pinned memory is sent in
                # passing.
                pinned = self._device.type == "cuda"
                host = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
                host.numpy()[...] = batch
                batch = host
            sent = batch.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float()
            pixels.append(sent.div_(255).sub_(self._mean).div_(self._std))
        return pixels


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
