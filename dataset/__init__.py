"""Read label maps and keep them aligned with any augmentation. Needs no Ray, timm or click.

Names load on first use, so that the annotation job's driver and decode workers, which need the
file format and the errors only, do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenlabel.dataset.errors import FormatError, TokenLabelError

if TYPE_CHECKING:
    from tokenlabel.dataset.augment import AutoAugment, RandAugment, TrivialAugmentWide
    from tokenlabel.dataset.label_map import TokenLabelMap
    from tokenlabel.dataset.recipe import eval_transform, train_transform
    from tokenlabel.dataset.score_map import MapLayout, ScoreMap
    from tokenlabel.dataset.store import LabelStore, MissingMapError
    from tokenlabel.dataset.targets import ToTokenLabels
    from tokenlabel.dataset.token_label_dataset import TokenLabelDataset
    from tokenlabel.dataset.token_labels import TokenLabels
    from tokenlabel.dataset.windows import TokenTargets, TokenWindows

__all__ = [
    "AutoAugment",
    "FormatError",
    "LabelStore",
    "MapLayout",
    "MissingMapError",
    "RandAugment",
    "ScoreMap",
    "ToTokenLabels",
    "TokenLabelDataset",
    "TokenLabelError",
    "TokenLabelMap",
    "TokenLabels",
    "TokenTargets",
    "TokenWindows",
    "TrivialAugmentWide",
    "eval_transform",
    "train_transform",
]

_HOMES = {
    "AutoAugment": "augment",
    "LabelStore": "store",
    "MapLayout": "score_map",
    "MissingMapError": "store",
    "RandAugment": "augment",
    "ScoreMap": "score_map",
    "ToTokenLabels": "targets",
    "TokenLabelDataset": "token_label_dataset",
    "TokenLabelMap": "label_map",
    "TokenLabels": "token_labels",
    "TokenTargets": "windows",
    "TokenWindows": "windows",
    "TrivialAugmentWide": "augment",
    "eval_transform": "recipe",
    "train_transform": "recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
