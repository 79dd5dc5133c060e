"""Supervise a student with token targets: loss, mixing in step, students."""

from tokenlabel.supervise.loss import TokenLabelLoss
from tokenlabel.supervise.lvvit import LVViT, lvvit_l, lvvit_m, lvvit_s, lvvit_t
from tokenlabel.supervise.mix_token import MixToken, TokenBox
from tokenlabel.supervise.mixed import MixedTargets, mix_labels, mix_targets
from tokenlabel.supervise.mixing import CutMix, MixUp, MixUpOrCutMix
from tokenlabel.supervise.student import TokenStudent

__all__ = [
    "CutMix",
    "LVViT",
    "MixToken",
    "MixUp",
    "MixUpOrCutMix",
    "MixedTargets",
    "TokenBox",
    "TokenLabelLoss",
    "TokenStudent",
    "lvvit_l",
    "lvvit_m",
    "lvvit_s",
    "lvvit_t",
    "mix_labels",
    "mix_targets",
]
