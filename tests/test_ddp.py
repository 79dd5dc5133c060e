"""Two processes on halves of a batch have the gradients of one on the whole."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from tests.records import made_up, with_word
from tokenlabel.dataset import TokenLabels
from tokenlabel.supervise import MixedLabels, TokenLabelLoss

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


def batch(mixed: bool, rows: slice) -> tuple[Tensor, TokenLabels | MixedLabels]:
    """Rows of the batch: tokens and labels; the second half has fewer maps and labels."""
    labels = with_word(with_word(made_up(B, C), 4, state=0), 5, label=-1)[rows]
    tokens = torch.randn(B, N, WIDTH, generator=torch.Generator().manual_seed(0))[rows]
    if not mixed:
        return tokens, labels
    # Partners are in the same half, as where each process mixes its own batch.
    partner = torch.tensor([1, 2, 0, 4, 5, 3])[rows] - (rows.start or 0)
    blend = torch.linspace(0.2, 0.8, B)[rows]
    return tokens, MixedLabels(labels, partner, blend, torch.zeros(len(blend), 4))


def loss_of(model: nn.Module, mixed: bool, rows: slice) -> Tensor:
    tokens, labels = batch(mixed, rows)
    loss: Tensor = TokenLabelLoss(cls_target="both")(*model(tokens), labels)
    return loss


def train(rank: int, store: str, out: str) -> None:
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    half = slice(rank * B // 2, (rank + 1) * B // 2)
    for mixed in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(Student())
        loss_of(model, mixed, half).backward()
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
        loss_of(model, mixed, slice(None)).backward()
        for rank in (0, 1):
            gradients = torch.load(f"{out}-{mixed}-{rank}")
            for found, parameter in zip(gradients, model.parameters(), strict=True):
                torch.testing.assert_close(found, parameter.grad, atol=1e-8, rtol=1e-5)
                assert found.any()
