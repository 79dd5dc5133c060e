"""How images are prepared for a teacher, and how a batch of them becomes its input."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ...errors import TeacherError

Images = npt.NDArray[np.uint8] | Tensor


class Preprocessing:
    """How images are prepared for a teacher on its device.

    Args:
        input_sizes: (h, w) in pixels of each pass, to which the whole image is squashed.
        interpolation: Pillow's name of the resampling filter, in lower case.
        mean: Mean of the three colour channels, as a fraction of white.
        std: Their standard deviation, likewise.
        device: Where the teacher is.

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
        filters = [resampling.name.lower() for resampling in Image.Resampling]
        if interpolation not in filters:
            raise TeacherError(
                f"interpolation must be one of {', '.join(filters)}; got {interpolation!r}. "
                "Remedy: name one of these."
            )
        self.input_sizes, self.interpolation = tuple(input_sizes), interpolation
        self.mean, self.std = _channels("mean", mean), _channels("std", std)
        # On the device already: to send them with each batch would wait for the GPU.
        self._mean = torch.tensor(self.mean, device=device)[:, None, None]
        self._std = torch.tensor(self.std, device=device)[:, None, None]

    def normalise(self, images: Sequence[Images]) -> list[Tensor]:
        """Send squashed images to the device and normalise them there.

        Args:
            images: uint8 [B, h, w, 3] RGB of each pass; read-only arrays are fine.

        Returns:
            float32 [B, 3, h, w] of each pass.

        Raises:
            ValueError: `images` are not one for each pass, or have another dtype or shape.
        """
        device, pixels = self._mean.device, []
        if len(images) != len(self.input_sizes):
            raise ValueError(
                f"images must be one array for each pass, {len(self.input_sizes)} here; "
                f"got {len(images)}"
            )
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
                # A copy: torch warns of read-only arrays, and only pinned memory is sent while the
                # host goes on.
                host = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
                host.numpy()[...] = batch
                batch = host
            sent = batch.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
            pixels.append(sent.div_(255).sub_(self._mean).div_(self._std))
        return pixels


def _channels(name: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        channels = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        channels = ()
    positive = name == "std"
    if len(channels) != 3 or not all(positive * 1e-9 <= c < float("inf") for c in channels):
        raise TeacherError(
            f"{name} must be three {'positive' if positive else 'non-negative'} numbers, one for "
            f"each colour channel; got {values!r}. Remedy: leave it out for the model's own."
        )
    return channels
