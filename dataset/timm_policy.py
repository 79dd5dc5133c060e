"""timm's option strings for RandAugment and AutoAugment, and the policies they stand for."""

import math
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

_FORMS = (
    "'rand' followed by any of -m9 (magnitude), -n2 (ops a picture), -mstd0.5 (spread of the "
    "magnitude; above 100: uniform), -mmax10 (its bound), -inc1 (stronger with magnitude), -p0.5 "
    "(chance of each op), -tweights, -t3a or -t3aw (set of ops); 'original', 'originalr', 'v0', "
    "'v0r' or '3a', each perhaps with -mstd0.5; or None"
)

_RAND = (
    "AutoContrast Equalize Invert Rotate Posterize Solarize SolarizeAdd Color Contrast Brightness "
    "Sharpness ShearX ShearY TranslateXRel TranslateYRel"
).split()
_HAS_INCREASING = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}
_RAND_INCREASING = [f"{op}Increasing" if op in _HAS_INCREASING else op for op in _RAND]

# Sets of ops for -t…, with their weights; without weights an op can be drawn twice.
_SETS: dict[str, dict[str, float] | list[str]] = {
    "weights": {
        **{"Rotate": 3, "ShearX": 2, "ShearY": 2, "TranslateXRel": 1, "TranslateYRel": 1},
        **dict.fromkeys(("ColorIncreasing", "SharpnessIncreasing", "AutoContrast"), 0.25),
        **dict.fromkeys(("SolarizeIncreasing", "SolarizeAdd", "ContrastIncreasing"), 0.05),
        **dict.fromkeys(
            ("BrightnessIncreasing", "Equalize", "PosterizeIncreasing", "Invert"), 0.05
        ),
    },
    "3a": ["SolarizeIncreasing", "Desaturate", "GaussianBlur"],
    "3aw": {
        **dict.fromkeys(("SolarizeIncreasing", "Desaturate", "GaussianBlur"), 6),
        **{"Rotate": 3, "ShearX": 2, "ShearY": 2},
        **dict.fromkeys(("PosterizeIncreasing", "AutoContrast", "ColorIncreasing"), 1),
        **dict.fromkeys(("SharpnessIncreasing", "ContrastIncreasing", "BrightnessIncreasing"), 1),
        **dict.fromkeys(("Equalize", "Invert"), 1),
    },
}

# AutoAugment's learned pairs of (op, probability, magnitude): the ImageNet policy of the paper,
# arXiv 1805.09501, and "v0" of the EfficientNet reference for TPUs.
_ORIGINAL = """
    PosterizeOriginal .4 8 Rotate .6 9, Solarize .6 5 AutoContrast .6 5,
    Equalize .8 8 Equalize .6 3, PosterizeOriginal .6 7 PosterizeOriginal .6 6,
    Equalize .4 7 Solarize .2 4,
    Equalize .4 4 Rotate .8 8, Solarize .6 3 Equalize .6 7, PosterizeOriginal .8 5 Equalize 1 2,
    Rotate .2 3 Solarize .6 8, Equalize .6 8 PosterizeOriginal .4 6, Rotate .8 8 Color .4 0,
    Rotate .4 9 Equalize .6 2, Equalize 0 7 Equalize .8 8, Invert .6 4 Equalize 1 8,
    Color .6 4 Contrast 1 8, Rotate .8 8 Color 1 2, Color .8 8 Solarize .8 7,
    Sharpness .4 7 Invert .6 8, ShearX .6 5 Equalize 1 9, Color .4 0 Equalize .6 3,
    Equalize .4 7 Solarize .2 4, Solarize .6 5 AutoContrast .6 5, Invert .6 4 Equalize 1 8,
    Color .6 4 Contrast 1 8, Equalize .8 8 Equalize .6 3"""
_V0 = """
    Equalize .8 1 ShearY .8 4, Color .4 9 Equalize .6 3, Color .4 1 Rotate .6 8,
    Solarize .8 3 Equalize .4 7, Solarize .4 2 Solarize .6 2, Color .2 0 Equalize .8 8,
    Equalize .4 8 SolarizeAdd .8 3, ShearX .2 9 Rotate .6 8, Color .6 1 Equalize 1 2,
    Invert .4 9 Rotate .6 0, Equalize 1 9 ShearY .6 3, Color .4 7 Equalize .6 0,
    Posterize .4 6 AutoContrast .4 7, Solarize .6 8 Color .6 9, Solarize .2 4 Rotate .8 9,
    Rotate 1 7 TranslateYRel .8 9, ShearX 0 0 Solarize .8 4, ShearY .8 0 Color .6 4,
    Color 1 0 Rotate .6 2, Equalize .8 4 Equalize 0 8, Equalize 1 4 AutoContrast .6 2,
    ShearY .4 7 SolarizeAdd .6 7, Posterize .8 2 Solarize .6 10, Solarize .6 8 Equalize .6 1,
    Color .8 6 Rotate .4 5"""
_POLICIES = {
    "original": _ORIGINAL,
    "originalr": _ORIGINAL.replace("PosterizeOriginal", "PosterizeIncreasing"),
    "v0": _V0,
    "v0r": _V0.replace("Posterize", "PosterizeIncreasing"),
    "3a": "Solarize 1 5, Desaturate 1 10, GaussianBlurRand 1 10",
}


class Step(NamedTuple):
    """One op of a policy: its name in `timm_ops.OPS`, its probability and its magnitude."""

    op: str
    prob: float
    magnitude: float


class Policy(NamedTuple):
    """What an option string stands for.

    Attributes:
        text: the string.
        choices: groups of steps; a group that is drawn is done in order.
        draws: groups drawn for a picture.
        weights: relative chance of each group, drawn without replacement; None: equal chances,
            with replacement.
        magnitude_std: spread of the magnitude; inf: uniform between 0 and the magnitude.
        magnitude_max: bound of the magnitude.
    """

    text: str
    choices: tuple[tuple[Step, ...], ...]
    draws: int = 1
    weights: tuple[float, ...] | None = None
    magnitude_std: float = 0.0
    magnitude_max: float = 10.0


def parse_auto_augment(text: str) -> Policy:
    """Read an option string as timm spells them, such as "rand-m9-mstd0.5-inc1".

    Raises:
        ValueError: timm has no such form or option, a value is out of range, or the form
            ("augmix") leaves no patch with a label.
    """
    name, *sections = text.split("-")
    if name == "augmix":
        raise ValueError(
            f"augmix cannot carry label maps: got {text!r}, which blends copies of the picture "
            "that were moved differently, so no patch has one source. Remedy: use a 'rand-…' string"
        )
    if name in _POLICIES:
        options = _options(text, sections, {"mstd": (float, 0, math.inf)})
        return Policy(text, _read(_POLICIES[name]), magnitude_std=options.get("mstd", 0.0))
    if name != "rand":
        _refuse(text, f"{name!r} is no augmentation")
    sets = [section[1:] for section in sections if section.startswith("t")]
    options = _options(
        text,
        [section for section in sections if not section.startswith("t")],
        {
            "m": (int, 0, math.inf),
            "n": (int, 1, math.inf),
            "p": (float, 0, 1),
            "mstd": (float, 0, math.inf),
            "mmax": (int, 1, math.inf),
            "inc": (int, 0, 1),
        },
    )
    ops: dict[str, float] | list[str] = _RAND_INCREASING if options.get("inc") else _RAND
    if sets:
        if len(sets) > 1 or sets[0] not in _SETS:
            _refuse(text, f"-t takes one of {', '.join(_SETS)}")
        ops = _SETS[sets[0]]
    draws = int(options.get("n", 2))
    weights = tuple(map(float, ops.values())) if isinstance(ops, dict) else None
    if weights and draws > len(weights):
        _refuse(text, f"-n may be at most {len(weights)} with -t{sets[0]}, which draws no op twice")
    std = options.get("mstd", 0.0)
    return Policy(
        text,
        tuple((Step(op, options.get("p", 0.5), options.get("m", 10.0)),) for op in ops),
        draws,
        weights,
        magnitude_std=math.inf if std > 100 else std,
        magnitude_max=options.get("mmax", 10.0),
    )


def _options(
    text: str, sections: Sequence[str], kinds: dict[str, tuple[type, float, float]]
) -> dict[str, float]:
    options: dict[str, float] = {}
    for section in sections:
        key = section.rstrip("0123456789.")
        if key == "w":
            _refuse(text, "-w0 is gone from timm; -tweights is its successor, with other weights")
        if key not in kinds:
            _refuse(text, f"-{section} is no option of it")
        kind, low, high = kinds[key]
        try:
            number = float(kind(section.removeprefix(key)))
        except ValueError:
            _refuse(text, f"-{key} takes {'an integer' if kind is int else 'a number'}")
        if not low <= number <= high:
            _refuse(text, f"-{key} lies between {low} and {high}")
        if key in options:
            _refuse(text, f"-{key} is given twice")
        options[key] = number
    return options


def _refuse(text: str, rule: str) -> NoReturn:
    raise ValueError(f"auto_augment: {rule}; got {text!r}. Remedy: give {_FORMS}")


def _read(table: str) -> tuple[tuple[Step, ...], ...]:
    groups = [group.split() for group in table.split(",")]
    return tuple(
        tuple(Step(g[i], float(g[i + 1]), float(g[i + 2])) for i in range(0, len(g), 3))
        for g in groups
    )
