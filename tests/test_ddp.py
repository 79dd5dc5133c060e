"""Two processes on halves of a batch have the gradients of one on the whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from tests.soft_targets import made_up
from tokenlabel.dataset import TokenTargets
from tokenlabel.supervise import MixedTargets, TokenLabelLoss, mix_targets

B, N, C, WIDTH = 6, 9, 20, 8


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, C)
        self.patch_head = nn.Linear(WIDTH, C)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        features = self.stem(tokens).tanh()
        return self.head(features.mean(1)), self.patch_head(features)


def batch(mixed: bool) -> tuple[Tensor, Any]:
    """Tokens and targets; the second half has fewer weights, maps and labels than the first."""
    targets = made_up(B, N, C, 4)
    targets.weight[3:] *= 0.3
    targets.weight[4] = 0
    targets.label[5] = -1
    tokens = torch.randn(B, N, WIDTH, generator=torch.Generator().manual_seed(0))
    return tokens, mix_targets(targets, torch.arange(B).roll(1), 0.3) if mixed else targets


def loss_of(model: nn.Module, tokens: Tensor, targets: TokenTargets | MixedTargets) -> Tensor:
    loss: Tensor = TokenLabelLoss(cls_target="both")(*model(tokens), targets)
    return loss


def train(rank: int, store: str, out: str) -> None:
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    half = slice(rank * B // 2, (rank + 1) * B // 2)
    for mixed in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(Student())
        tokens, targets = batch(mixed)
        loss_of(model, tokens[half], type(targets)(*(part[half] for part in targets))).backward()
        torch.save([p.grad for p in model.parameters()], f"{out}-{mixed}-{rank}")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")
def test_gradients_are_those_of_the_joined_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    out = str(tmp_path / "gradients")
    multiprocessing.spawn(train, (str(tmp_path / "store"), out), nprocs=2)
    for mixed in (False, True):
        torch.manual_seed(0)
        model = Student()
        loss_of(model, *batch(mixed)).backward()
        for rank in (0, 1):
            gradients = torch.load(f"{out}-{mixed}-{rank}")
            for found, parameter in zip(gradients, model.parameters(), strict=True):
                torch.testing.assert_close(found, parameter.grad, atol=1e-8, rtol=1e-5)
                assert found.any()
