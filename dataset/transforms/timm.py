# mypy: allow-subclassing-any
"""timm's RandAugment, AutoAugment and 3-Augment for samples with label maps.

timm parses the string, draws and paints. Its own objects run once for each sample, with a list in
place of the image: each op that they draw is appended to it, and afterwards applied to every leaf.
"""

import copy
import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any

import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .torchvision import check_canvas

# timm skips sections that it cannot read ("-m", "-mstdinf"), so they are refused here.
_STRINGS = re.compile(
    r"rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?|-t(weights|3a|3aw))*"
    r"|(original|originalr|v0|v0r|3a)(-mstd\d+(\.\d+)?)?"
)
#: timm's name of an op, and its function with all arguments but the image: what timm made of the
#: magnitude (degrees, a slope, …), and by name PIL's `resample` and `fillcolor`.
DrawnOp = tuple[str, partial[PIL.Image.Image]]


def _affine(label_map: Any, *coefficients: float) -> Any:
    """Move a map by the six coefficients that PIL takes, from new pixels to old ones."""
    return F.perspective(label_map, None, None, coefficients=[*coefficients, 0.0, 0.0])


# How a label map follows an op: (map, timm's argument) -> map; None: the op changes colours only.
_OPS: dict[str, Callable[[Any, float], Any] | None] = {
    "Rotate": F.rotate,
    "ShearX": lambda leaf, slope: _affine(leaf, 1, slope, 0, 0, 1, 0),
    "ShearY": lambda leaf, slope: _affine(leaf, 1, 0, 0, slope, 1, 0),
    "TranslateXRel": lambda leaf, part: _affine(leaf, 1, 0, part * F.get_size(leaf)[1], 0, 1, 0),
    "TranslateYRel": lambda leaf, part: _affine(leaf, 1, 0, 0, 0, 1, part * F.get_size(leaf)[0]),
    **dict.fromkeys(
        "AutoContrast Equalize Invert Posterize PosterizeIncreasing PosterizeOriginal Solarize "
        "SolarizeIncreasing SolarizeAdd Color ColorIncreasing Contrast ContrastIncreasing "
        "Brightness BrightnessIncreasing Sharpness SharpnessIncreasing Desaturate GaussianBlur "
        "GaussianBlurRand".split()
    ),
}


def _record(
    name: str, paint: Callable[..., Any], drawn: list[DrawnOp], *args: float, **options: Any
) -> list[DrawnOp]:
    """Takes the place of timm's function of an op, which would change the image at once."""
    if _OPS[name] and isinstance(options["resample"], list | tuple):
        # timm's geometric ops draw their filter as they paint, before the next op's draws.
        options["resample"] = random.choice(options["resample"])
    if name.startswith("Posterize"):
        # timm asks for 0 bits where the magnitude is extreme (about one image in 650 with
        # rand-m9-mstd0.5-inc1): Pillow 13 raises, older ones paint the image black.
        args = (max(1, args[0]),)
    return [*drawn, (name, partial(paint, *args, **options))]


class TimmAugment(v2.Transform):
    """timm's RandAugment, AutoAugment or 3-Augment on samples with label maps.

    Images, PIL in mode RGB or uint8 tensors [3, H, W], get the pixels that timm's transform gives;
    every `TokenLabelMap` (and plain `tv_tensors.Mask`) moves with the geometric ops.

    timm draws from Python's `random` and NumPy's global generator, not from torch's: for equal
    states of these two the images are timm's, byte for byte (but where timm posterizes to 0 bits,
    which is 1 bit here). A DataLoader seeds both in each worker from torch's generator, so with
    workers `torch.manual_seed` governs a run; without (`num_workers=0`), seed all three.

    Args:
        policy: as timm spells it: "rand" followed by any of -m9 (magnitude), -n2 (ops an image),
            -mstd0.5 (spread of the magnitude; above 100: uniform), -mmax10 (its bound), -inc1
            (stronger with magnitude), -p0.5 (chance of each op), -tweights, -t3a or -t3aw (set of
            ops); or "original", "originalr", "v0", "v0r" or "3a", each perhaps with -mstd0.5. Or
            timm's own `RandAugment` or `AutoAugment`, which has its fill and interpolation.
        fill: colour (R, G, B), 0 to 255, of pixels that come from outside.
        interpolation: "nearest", "bilinear", "bicubic", or "random": bilinear or bicubic by op.

    Attributes:
        policy: timm's `RandAugment` or `AutoAugment`, its ops set to be recorded.

    Raises:
        ImportError: timm is not installed.
        ValueError: a bad string or interpolation, or an op of timm's that is not known here; from a
            sample: images and maps of different sizes.
        TypeError: an image of another mode or dtype, or boxes or keypoints in the sample.
    """

    def __init__(
        self, policy: Any, *, fill: Sequence[int] = (128, 128, 128), interpolation: str = "random"
    ) -> None:
        super().__init__()
        self._arguments = f"{policy!r}, fill={tuple(fill)}, interpolation={interpolation!r}"
        is_made = not isinstance(policy, str)
        self.policy: Any = (
            copy.deepcopy(policy) if is_made else _make_policy(policy, fill, interpolation)
        )
        ops = [self.policy.ops] if hasattr(self.policy, "ops") else self.policy.policy
        for op in chain(*ops):
            if op.name not in _OPS:
                raise ValueError(
                    f"label maps can follow the ops {', '.join(_OPS)}; got {op.name!r}, which this "
                    f"timm has in {policy!r}. Remedy: another auto_augment, or an older timm"
                )
            op.aug_fn = partial(_record, op.name, op.aug_fn)

    def extra_repr(self) -> str:
        """The arguments."""
        return self._arguments

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Let timm draw the ops of one sample: "ops", a list of `DrawnOp`."""
        check_canvas(flat_inputs)
        return {"ops": self.policy([])}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply the drawn ops to an image, or the geometric ones to a label map."""
        ops: list[DrawnOp] = params["ops"]
        if isinstance(inpt, tv_tensors.Mask):
            for name, paint in ops:
                if follow := _OPS[name]:
                    inpt = follow(inpt, *paint.args)
            return inpt
        if isinstance(inpt, PIL.Image.Image) and inpt.mode == "RGB":
            for _, paint in ops:
                inpt = paint.func(inpt, *paint.args, **paint.keywords)
            return inpt
        # tv_tensors of other kinds (boxes, videos) are tensors as well.
        plain = isinstance(inpt, tv_tensors.Image) or type(inpt) is torch.Tensor
        if plain and inpt.dtype == torch.uint8 and inpt.ndim == 3 and len(inpt) == 3:
            image = F.pil_to_tensor(self.transform(F.to_pil_image(inpt), params))
            return tv_tensors.wrap(image.to(inpt.device), like=inpt)
        kind = f"mode {inpt.mode}" if isinstance(inpt, PIL.Image.Image) else f"{inpt.dtype}"
        raise TypeError(
            "TimmAugment takes PIL images of mode RGB, uint8 tensors [3, H, W] and label maps; "
            f"got {type(inpt).__name__} of {kind}. Remedy: convert the image, as with "
            "image.convert('RGB'), and leave boxes and keypoints out"
        )


def _make_policy(policy: str, fill: Sequence[int], interpolation: str) -> Any:
    """The transform that timm makes of a string; refuses what timm would skip."""
    if policy.startswith("augmix"):
        raise ValueError(
            f"auto_augment {policy!r} blends copies of the image that were moved differently, "
            "so no patch has one source. Remedy: use a 'rand-…' string"
        )
    if not _STRINGS.fullmatch(policy):
        raise ValueError(
            f"auto_augment is a string that timm knows; got {policy!r}. Remedy: one such as "
            "'rand-m9-mstd0.5-inc1', 'original' or '3a'; help(TimmAugment) lists the options"
        )
    if interpolation not in ("nearest", "bilinear", "bicubic", "random"):
        raise ValueError(
            "interpolation of auto_augment is nearest, bilinear, bicubic or random; "
            f"got {interpolation!r}"
        )
    try:
        timm: Any = import_module("timm.data.auto_augment")
    except ImportError as error:
        raise ImportError(
            f"auto_augment {policy!r} needs timm, which cannot be imported: {error}. "
            "Remedy: pip install 'tokenlabel[timm]', or auto_augment=None"
        ) from error
    hparams: dict[str, Any] = {"img_mean": tuple(fill)}
    if interpolation != "random":
        hparams["interpolation"] = PIL.Image.Resampling[interpolation.upper()]
    is_rand = policy.startswith("rand")
    make = timm.rand_augment_transform if is_rand else timm.auto_augment_transform
    return make(policy, hparams)
