"""A tiny network as a job's teacher, slow as long as a file `slow` lies beside this one.

A test gets time that way to change the cluster under a job, on a machine of any speed.
"""

import time
from pathlib import Path

import torch
from torch import Tensor, nn

SLOW = Path(__file__).with_name("slow")


class Network(nn.Conv2d):
    """Patches of 16 px, each by itself."""

    num_classes, input_size = 10, (32, 32)
    mean = std = (0.5, 0.5, 0.5)

    def forward(self, images: Tensor) -> Tensor:
        if SLOW.exists():
            time.sleep(1.5)
        return super().forward(images)


def build() -> nn.Module:
    torch.manual_seed(0)
    return Network(3, 10, kernel_size=16, stride=16)


def build_another_each_time() -> nn.Module:
    torch.seed()
    return Network(3, 10, kernel_size=16, stride=16)
