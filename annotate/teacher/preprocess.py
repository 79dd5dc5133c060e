"""How a batch of images becomes a teacher's input."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Images = npt.NDArray[np.uint8] | Tensor


def normalise(
    images: Sequence[Images], sizes: Sequence[tuple[int, int]], mean: Tensor, std: Tensor
) -> list[Tensor]:
    """Send squashed images to the device and normalise them there.

    Args:
        images: uint8 [B, h, w, 3] RGB of each pass; read-only arrays are fine.
        sizes: (h, w) of each pass.
        mean: float32 [3, 1, 1] of the colour channels, as fractions of white.
        std: likewise.

    Returns:
        float32 [B, 3, h, w] of each pass, on the device of `mean`.

    Raises:
        ValueError: `images` are not one for each pass, or have another dtype or shape.
    """
    pixels = []
    if len(images) != len(sizes):
        raise ValueError(
            f"images must be one array for each pass, {len(sizes)} here; got {len(images)}"
        )
    for batch, (h, w) in zip(images, sizes, strict=True):
        kind = getattr(batch, "dtype", type(batch).__name__)
        if not isinstance(batch, np.ndarray | Tensor) or kind not in (np.uint8, torch.uint8):
            raise ValueError(f"images must be a uint8 array or tensor; got {kind}")
        shape = tuple(batch.shape)
        if len(shape) != 4 or shape[1:] != (h, w, 3) or not shape[0]:
            raise ValueError(f"images must be [B, h, w, 3] = [1 or more, {h}, {w}, 3]; got {shape}")
        if isinstance(batch, np.ndarray):
            # A copy: torch warns of read-only arrays, and only pinned memory is sent while the
            # host goes on.
            host = torch.empty(shape, dtype=torch.uint8, pin_memory=mean.device.type == "cuda")
            host.numpy()[...] = batch
            batch = host
        sent = batch.to(mean.device, non_blocking=True).permute(0, 3, 1, 2).float()
        pixels.append(sent.div_(255).sub_(mean).div_(std))
    return pixels
