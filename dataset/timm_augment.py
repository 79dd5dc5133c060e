# mypy: allow-subclassing-any
"""timm's RandAugment and AutoAugment by their option strings, with label maps in step."""

import math
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tokenlabel.dataset.augment import check_canvas
from tokenlabel.dataset.timm_ops import OPS, Geometric
from tokenlabel.dataset.timm_policy import Policy, parse_auto_augment

RESAMPLING = {
    "nearest": (PIL.Image.Resampling.NEAREST,),
    "bilinear": (PIL.Image.Resampling.BILINEAR,),
    "bicubic": (PIL.Image.Resampling.BICUBIC,),
    "random": (PIL.Image.Resampling.BILINEAR, PIL.Image.Resampling.BICUBIC),
}


class TimmAugment(v2.Transform):
    """timm's RandAugment or AutoAugment on samples with label maps.

    Pictures, PIL in mode RGB or uint8 tensors [3, H, W], get the pixels that timm's ops give;
    every `TokenLabelMap` (and plain `tv_tensors.Mask`) moves with the geometric ones. All draws
    come from torch's global generator, so `torch.manual_seed` and the DataLoader's seeding of its
    workers govern them; timm draws from `random` and NumPy, so equal seeds give other samples of
    the same distribution.

    Args:
        policy: option string as timm spells it, or a `Policy`.
        fill: colour (R, G, B), 0 to 255, of pixels that come from outside.
        interpolation: "nearest", "bilinear", "bicubic", or "random": bilinear or bicubic by op.

    Raises:
        ValueError: a bad option string or interpolation; pictures and maps of different sizes.
        TypeError: a picture of another mode or dtype, or boxes or keypoints in the sample.
    """

    def __init__(
        self,
        policy: str | Policy,
        *,
        fill: Sequence[int] = (128, 128, 128),
        interpolation: str = "random",
    ) -> None:
        super().__init__()
        self.policy = parse_auto_augment(policy) if isinstance(policy, str) else policy
        self.fill = tuple(fill)
        if interpolation not in RESAMPLING:
            raise ValueError(
                f"interpolation of auto_augment is one of {', '.join(RESAMPLING)}; "
                f"got {interpolation!r}"
            )
        self.interpolation = interpolation

    def extra_repr(self) -> str:
        """The string the policy came from, and the other arguments."""
        return f"{self.policy.text!r}, fill={self.fill}, interpolation={self.interpolation!r}"

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the ops for one sample, each with its argument and its resampling filter."""
        check_canvas(flat_inputs)
        policy = self.policy
        chances = torch.tensor(policy.weights or [1.0] * len(policy.choices))
        picks = torch.multinomial(chances, policy.draws, replacement=policy.weights is None)
        steps = [step for pick in picks.tolist() for step in policy.choices[pick]]
        uniform = torch.rand(len(steps), 4).tolist()
        noise = torch.randn(len(steps)).tolist()
        filters = RESAMPLING[self.interpolation]
        ops = []
        for step, (chance, spread, draw, which), normal in zip(steps, uniform, noise, strict=True):
            if chance >= step.prob:
                continue
            if policy.magnitude_std == math.inf:
                magnitude = step.magnitude * spread
            else:
                magnitude = step.magnitude + policy.magnitude_std * normal
            strength = max(0.0, min(magnitude, policy.magnitude_max)) / 10.0
            argument = OPS[step.op].argument(strength, draw)
            ops.append((step.op, argument, filters[int(which * len(filters))]))
        return {"ops": ops}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply the drawn ops to a picture, or the geometric ones to a label map."""
        if isinstance(inpt, tv_tensors.Mask):
            for name, argument, _ in params["ops"]:
                op = OPS[name]
                if isinstance(op, Geometric):
                    inpt = op.follow(inpt, argument)
            return inpt
        if isinstance(inpt, PIL.Image.Image) and inpt.mode == "RGB":
            return self._paint(inpt, params)
        if _is_rgb_tensor(inpt):
            picture = F.pil_to_tensor(self._paint(F.to_pil_image(inpt), params)).to(inpt.device)
            return tv_tensors.wrap(picture, like=inpt)
        raise TypeError(
            "TimmAugment takes PIL pictures of mode RGB, uint8 tensors [3, H, W] and label maps; "
            f"got {_describe(inpt)}. Remedy: convert the picture, as with image.convert('RGB'), "
            "and leave boxes and keypoints out"
        )

    def _paint(self, image: PIL.Image.Image, params: dict[str, Any]) -> PIL.Image.Image:
        for name, argument, resample in params["ops"]:
            op = OPS[name]
            if isinstance(op, Geometric):
                image = op.picture(image, argument, resample, self.fill)
            else:
                image = op.picture(image, argument)
        return image


def _is_rgb_tensor(inpt: Any) -> bool:
    return (
        isinstance(inpt, torch.Tensor)
        and (isinstance(inpt, tv_tensors.Image) or not isinstance(inpt, tv_tensors.TVTensor))
        and inpt.dtype == torch.uint8
        and inpt.ndim == 3
        and inpt.shape[0] == 3
    )


def _describe(inpt: Any) -> str:
    if isinstance(inpt, torch.Tensor):
        return f"{type(inpt).__name__} {inpt.dtype} {list(inpt.shape)}"
    return f"{type(inpt).__name__} of mode {inpt.mode}"
