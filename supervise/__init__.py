"""Supervise a student with token targets: loss, mix labels with images, students."""

from tokenlabel.supervise.loss import TokenLabelLoss
from tokenlabel.supervise.lvvit import LVViT, lvvit_l, lvvit_m, lvvit_s, lvvit_t
from tokenlabel.supervise.mix_token import MixToken, TokenBox
from tokenlabel.supervise.mixed import MixedLabels
from tokenlabel.supervise.mixing import CutMix, MixUp, MixUpOrCutMix
from tokenlabel.supervise.student import TokenStudent

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
    "lvvit_l",
    "lvvit_m",
    "lvvit_s",
    "lvvit_t",
]
