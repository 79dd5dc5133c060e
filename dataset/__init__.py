"""Read label maps and keep them aligned with any augmentation. Needs no ray, timm or click.

`TokenLabelDataset` pairs images (`sources`) with the maps of a `LabelStore` (`format`); a map
follows its image through any pipeline (`label_map`, `transforms`) and becomes the targets of the
student's patches on its device (`targets`).

Names load on first use, so that an annotation job, which needs the file format only, does not pay
for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .format.score_map import MapLayout, ScoreMap
    from .keyed_images import validation_dataset
    from .label_map.label_map import TokenLabelMap
    from .mapper import TokenLabelMapper
    from .sources.image_source import ImageSource
    from .store import LabelStore
    from .targets.token_labels import TokenLabels
    from .targets.windows import TokenTargets, TokenWindows
    from .token_label_dataset import TokenLabelDataset
    from .transforms.albumentations import Albumentations
    from .transforms.aligned import ImageOnly, aligned
    from .transforms.alignment import Alignment, check_alignment
    from .transforms.kornia import Kornia
    from .transforms.recipe import eval_transform, train_transform
    from .transforms.to_token_labels import ToTokenLabels
    from .transforms.torchvision import AutoAugment, RandAugment, TrivialAugmentWide

__all__ = [
    "Albumentations",
    "Alignment",
    "AutoAugment",
    "ImageOnly",
    "ImageSource",
    "Kornia",
    "LabelStore",
    "MapLayout",
    "RandAugment",
    "ScoreMap",
    "ToTokenLabels",
    "TokenLabelDataset",
    "TokenLabelMap",
    "TokenLabelMapper",
    "TokenLabels",
    "TokenTargets",
    "TokenWindows",
    "TrivialAugmentWide",
    "aligned",
    "check_alignment",
    "eval_transform",
    "train_transform",
    "validation_dataset",
]

_HOMES = {
    "format.score_map": ("MapLayout", "ScoreMap"),
    "keyed_images": ("validation_dataset",),
    "label_map.label_map": ("TokenLabelMap",),
    "mapper": ("TokenLabelMapper",),
    "sources.image_source": ("ImageSource",),
    "store": ("LabelStore",),
    "targets.token_labels": ("TokenLabels",),
    "targets.windows": ("TokenTargets", "TokenWindows"),
    "token_label_dataset": ("TokenLabelDataset",),
    "transforms.albumentations": ("Albumentations",),
    "transforms.aligned": ("ImageOnly", "aligned"),
    "transforms.alignment": ("Alignment", "check_alignment"),
    "transforms.kornia": ("Kornia",),
    "transforms.recipe": ("eval_transform", "train_transform"),
    "transforms.to_token_labels": ("ToTokenLabels",),
    "transforms.torchvision": ("AutoAugment", "RandAugment", "TrivialAugmentWide"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
