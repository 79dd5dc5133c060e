"""Per-patch soft labels for vision transformers: annotate once, read aligned with any augmentation.

The public names, each imported when it is first used:

    import tokenlabel as tl

    dataset = tl.TokenLabelDataset("imagenet/train", "labels/train", transform=tl.train_transform())
    student, criterion = tl.TokenStudent(model), tl.TokenLabelLoss()

Rooms: `dataset` reads label maps, `annotate` makes them, `published` imports those of others,
`supervise` trains with them, `inspection` shows them. Importing this package, or
`tokenlabel.dataset`, loads no ray, timm or click.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .annotate import AnnotateConfig, Teacher
    from .dataset import (
        Albumentations,
        Alignment,
        AutoAugment,
        ImageOnly,
        ImageSource,
        Kornia,
        LabelStore,
        MapLayout,
        RandAugment,
        ScoreMap,
        TokenLabelDataset,
        TokenLabelMap,
        TokenLabelMapper,
        TokenLabels,
        TokenTargets,
        TokenWindows,
        ToTokenLabels,
        TrivialAugmentWide,
        aligned,
        check_alignment,
        eval_transform,
        train_transform,
        validation_dataset,
    )
    from .errors import FormatError, MissingMapError, TokenLabelError
    from .supervise import (
        CutMix,
        LVViT,
        MixedLabels,
        MixToken,
        MixUp,
        MixUpOrCutMix,
        TokenBox,
        TokenLabelLoss,
        TokenStudent,
        load_backbone,
        load_published,
        lvvit_l,
        lvvit_m,
        lvvit_s,
        lvvit_t,
    )

__version__ = "0.1.0"

__all__ = [
    "Albumentations",
    "Alignment",
    "AnnotateConfig",
    "AutoAugment",
    "CutMix",
    "FormatError",
    "ImageOnly",
    "ImageSource",
    "Kornia",
    "LVViT",
    "LabelStore",
    "MapLayout",
    "MissingMapError",
    "MixToken",
    "MixUp",
    "MixUpOrCutMix",
    "MixedLabels",
    "RandAugment",
    "ScoreMap",
    "Teacher",
    "ToTokenLabels",
    "TokenBox",
    "TokenLabelDataset",
    "TokenLabelError",
    "TokenLabelLoss",
    "TokenLabelMap",
    "TokenLabelMapper",
    "TokenLabels",
    "TokenStudent",
    "TokenTargets",
    "TokenWindows",
    "TrivialAugmentWide",
    "aligned",
    "check_alignment",
    "eval_transform",
    "load_backbone",
    "load_published",
    "lvvit_l",
    "lvvit_m",
    "lvvit_s",
    "lvvit_t",
    "train_transform",
    "validation_dataset",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for room in ("errors", "dataset", "annotate", "supervise"):
            module = import_module(f".{room}", __name__)
            if name in getattr(module, "__all__", vars(module)):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
