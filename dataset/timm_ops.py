"""The augmentation ops of timm's recipes: the same pixels on PIL pictures, label maps in step.

A magnitude and a random draw become the op's own argument (`argument`); a picture and that
argument become a picture (`picture`). Geometric ops also move a label map (`follow`), by the same
argument, through torchvision's functionals.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as F

Picture = Image.Image
Color = tuple[int, ...]

#: (strength, draw) -> argument: strength is magnitude / 10, draw is uniform in [0, 1).
Argument = Callable[[float, float], float]


class Photometric(NamedTuple):
    """An op that changes colours and moves nothing."""

    argument: Argument
    picture: Callable[[Picture, float], Picture]


class Geometric(NamedTuple):
    """An op that moves pixels; its argument is a slope, a share of the side, or degrees.

    Attributes:
        argument: as `Argument`.
        picture: (picture, argument, resample, fill colour) -> picture.
        follow: (label map, argument) -> the map, moved exactly like the picture.
    """

    argument: Argument
    picture: Callable[[Picture, float, Image.Resampling, Color], Picture]
    follow: Callable[[Any, float], Any]


def _none(strength: float, draw: float) -> float:
    return 0.0


def _signed(value: float, draw: float) -> float:
    return -value if draw > 0.5 else value


def _symmetric(limit: float) -> Argument:
    return lambda strength, draw: _signed(strength * limit, draw)


def _between(low: float, high: float) -> Argument:
    return lambda strength, draw: max(low, min(high, low + (high - low) * strength))


def _blend(strength: float, draw: float) -> float:
    return strength * 1.8 + 0.1


def _blend_increasing(strength: float, draw: float) -> float:
    # 1 leaves the picture as it is; either side of it is stronger.
    return max(0.1, 1.0 + _signed(strength * 0.9, draw))


def _bits(strength: float, draw: float) -> int:
    return int(strength * 4)


def _threshold(strength: float, draw: float) -> int:
    return min(256, int(strength * 256))


def _blur_radius(strength: float, draw: float) -> float:
    return 0.1 + (2.0 * min(1.0, strength) - 0.1) * draw


def _through_table(table: Callable[[int, int], int]) -> Callable[[Picture, float], Picture]:
    """An op that maps every value by itself: table(value, argument) -> value."""
    return lambda image, argument: image.point(
        [table(value, int(argument)) for value in range(256)] * len(image.getbands())
    )


def _enhance(enhancer: Callable[[Picture], Any]) -> Callable[[Picture, float], Picture]:
    return lambda image, factor: enhancer(image).enhance(factor)


def _keep_bits(value: int, bits: int) -> int:
    # Not ImageOps.posterize: it refuses 0 bits (black) from Pillow 13 on, and rand-m9-mstd0.5-inc1
    # asks for that once in forty times.
    return value & ~0 << 8 - max(0, min(8, bits))


_posterize = _through_table(_keep_bits)
_solarize = _through_table(lambda value, threshold: value if value < threshold else 255 - value)
_add_below_128 = _through_table(lambda value, add: min(255, value + add) if value < 128 else value)
_color = _enhance(ImageEnhance.Color)
_contrast = _enhance(ImageEnhance.Contrast)
_brightness = _enhance(ImageEnhance.Brightness)
_sharpness = _enhance(ImageEnhance.Sharpness)


def _blur(image: Picture, radius: float) -> Picture:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _transform(
    coefficients: Callable[[Picture, float], tuple[float, ...]],
) -> Callable[[Picture, float, Image.Resampling, Color], Picture]:
    """A PIL affine op: coefficients(picture, argument), from output pixels to input pixels."""
    return lambda image, argument, resample, fill: image.transform(
        image.size,
        Image.Transform.AFFINE,
        coefficients(image, argument),
        resample=resample,
        fillcolor=fill,
    )


def _shear(label_map: Any, x: float, y: float) -> Any:
    degrees = [math.degrees(math.atan(slope)) for slope in (x, y)]
    # About the top left corner, as PIL's coefficients say, not about the centre.
    return F.affine(
        label_map, angle=0.0, translate=[0.0, 0.0], scale=1.0, shear=degrees, center=[0.0, 0.0]
    )


def _translate(label_map: Any, x: float, y: float) -> Any:
    height, width = F.get_size(label_map)
    # PIL's offset says where a pixel comes from, torchvision's where it goes.
    shift = [-x * width, -y * height]
    return F.affine(label_map, angle=0.0, translate=shift, scale=1.0, shear=[0.0, 0.0])


#: Every op that timm's RandAugment, AutoAugment and 3-Augment strings can name.
OPS: dict[str, Photometric | Geometric] = {
    "AutoContrast": Photometric(_none, lambda image, _: ImageOps.autocontrast(image)),
    "Equalize": Photometric(_none, lambda image, _: ImageOps.equalize(image)),
    "Invert": Photometric(_none, lambda image, _: ImageOps.invert(image)),
    "Posterize": Photometric(_bits, _posterize),
    "PosterizeIncreasing": Photometric(lambda *level: 4 - _bits(*level), _posterize),
    "PosterizeOriginal": Photometric(lambda *level: 4 + _bits(*level), _posterize),
    "Solarize": Photometric(_threshold, _solarize),
    "SolarizeIncreasing": Photometric(lambda *level: 256 - _threshold(*level), _solarize),
    "SolarizeAdd": Photometric(lambda strength, _: min(128, int(strength * 110)), _add_below_128),
    "Color": Photometric(_blend, _color),
    "ColorIncreasing": Photometric(_blend_increasing, _color),
    "Contrast": Photometric(_blend, _contrast),
    "ContrastIncreasing": Photometric(_blend_increasing, _contrast),
    "Brightness": Photometric(_blend, _brightness),
    "BrightnessIncreasing": Photometric(_blend_increasing, _brightness),
    "Sharpness": Photometric(_blend, _sharpness),
    "SharpnessIncreasing": Photometric(_blend_increasing, _sharpness),
    "Desaturate": Photometric(lambda *level: 1.0 - _between(0.5, 1.0)(*level), _color),
    "GaussianBlur": Photometric(_between(0.1, 2.0), _blur),
    "GaussianBlurRand": Photometric(_blur_radius, _blur),
    "Rotate": Geometric(
        _symmetric(30.0),
        lambda image, degrees, resample, fill: image.rotate(degrees, resample, fillcolor=fill),
        lambda label_map, degrees: F.rotate(label_map, angle=degrees),
    ),
    "ShearX": Geometric(
        _symmetric(0.3),
        _transform(lambda image, slope: (1, slope, 0, 0, 1, 0)),
        lambda label_map, slope: _shear(label_map, slope, 0.0),
    ),
    "ShearY": Geometric(
        _symmetric(0.3),
        _transform(lambda image, slope: (1, 0, 0, slope, 1, 0)),
        lambda label_map, slope: _shear(label_map, 0.0, slope),
    ),
    "TranslateXRel": Geometric(
        _symmetric(0.45),
        _transform(lambda image, share: (1, 0, share * image.width, 0, 1, 0)),
        lambda label_map, share: _translate(label_map, share, 0.0),
    ),
    "TranslateYRel": Geometric(
        _symmetric(0.45),
        _transform(lambda image, share: (1, 0, 0, 0, 1, share * image.height)),
        lambda label_map, share: _translate(label_map, 0.0, share),
    ),
}
