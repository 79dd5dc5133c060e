"""Train a student on token labels: the loss, MixUp, CutMix and MixToken, and students."""

from .checkpoint import load_backbone, load_published
from .loss import TokenLabelLoss
from .lvvit import LVViT, lvvit_l, lvvit_m, lvvit_s, lvvit_t
from .mix_token import MixToken, TokenBox
from .mixed_labels import MixedLabels
from .mixup import CutMix, MixUp, MixUpOrCutMix
from .student import TokenStudent

__all__ = [
    "CutMix",
    "LVViT",
    "MixToken",
    "MixUp",
    "MixUpOrCutMix",
    "MixedLabels",
    "TokenBox",
    "TokenLabelLoss",
    "TokenStudent",
    "load_backbone",
    "load_published",
    "lvvit_l",
    "lvvit_m",
    "lvvit_s",
    "lvvit_t",
]
