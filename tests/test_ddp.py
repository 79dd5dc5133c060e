"""Students in two processes: gradients of the joined batch, and boxes of MixToken on one side."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from tests.records import made_up, with_word
from tokenlabel.dataset import TokenLabels
from tokenlabel.supervise import MixedLabels, TokenBox, TokenLabelLoss, TokenStudent

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


def start(rank: int, store: str) -> None:
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def train(rank: int, store: str, out: str) -> None:
    start(rank, store)
    half = slice(rank * B // 2, (rank + 1) * B // 2)
    for mixed in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(Student())
        loss_of(model, mixed, half).backward()
        torch.save([p.grad for p in model.parameters()], f"{out}-{mixed}-{rank}")
    distributed.destroy_process_group()


def train_with_boxes(rank: int, store: str, out: str) -> None:
    """Three steps: one process mixes in the first and the last, the other in the second."""
    start(rank, store)
    vit = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=24, patch_size=8, depth=2, num_classes=C
    )
    student = DistributedDataParallel(TokenStudent(vit))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    labels, images = made_up(2, C, seed=rank), torch.randn(2, 3, 24, 24)
    weights = [[p.detach().clone() for p in student.parameters()]]
    for step in range(3):
        box = TokenBox(torch.eye(3) > 0) if step % 2 == rank else None
        outputs = student(images, box)
        TokenLabelLoss()(*outputs, labels if box is None else box.mix_labels(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights.append([p.detach().clone() for p in student.parameters()])
    torch.save(weights, f"{out}-{rank}")
    distributed.destroy_process_group()


def train_control(rank: int, store: str) -> None:
    """Two steps without the patches' loss: the second waits for every gradient of the first."""
    start(rank, store)
    model = DistributedDataParallel(Student())
    tokens, labels = batch(False, slice(rank * B // 2, (rank + 1) * B // 2))
    for _ in range(2):
        TokenLabelLoss(dense_weight=0)(model(tokens), labels).backward()
    assert not model.module.patch_head.weight.grad.any()
    assert model.module.stem.weight.grad.any()
    distributed.destroy_process_group()


class Rows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Tokens and labels of twelve images."""

    def __len__(self) -> int:
        return 2 * B

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((N, WIDTH), float(index)), made_up(2 * B, C)[index]


def train_with_accelerate(rank: int, port: int) -> None:
    """An epoch each: one process hands out the batches, then each reads its own."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, (str(rank), str(rank), "2", "127.0.0.1", str(port)), strict=True))
    torch.set_num_threads(1)
    for dispatch in (True, False):
        loading = DataLoaderConfiguration(dispatch_batches=dispatch)
        accelerator = Accelerator(cpu=True, dataloader_config=loading)
        model: Any = Student()
        optimizer: Any = torch.optim.SGD(model.parameters(), 0.1)
        loader: Any = DataLoader(Rows(), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        seen = []
        for tokens, labels in loader:
            loss = TokenLabelLoss()(model(tokens), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            gathered = TokenLabels.wrap(accelerator.gather(labels))
            assert torch.equal(
                gathered.label, made_up(2 * B, C)[accelerator.gather(tokens[:, 0, 0]).long()].label
            )
            seen += accelerator.gather(tokens[:, 0, 0]).tolist()
        assert sorted(seen) == list(range(2 * B))
    distributed.destroy_process_group()


needs_gloo = pytest.mark.skipif(
    not distributed.is_gloo_available(), reason="torch was built without gloo"
)


@needs_gloo
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


@needs_gloo
def test_boxes_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step would raise if a parameter had got no gradient in the first."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    out = str(tmp_path / "weights")
    multiprocessing.spawn(train_with_boxes, (str(tmp_path / "store"), out), nprocs=2)
    (first, last), (_, others) = (torch.load(f"{out}-{rank}") for rank in (0, 1))
    for before, after, other in zip(first, last, others, strict=True):
        assert torch.equal(after, other)
        assert not torch.equal(before, after)


@needs_gloo
def test_the_control_without_the_patches_loss_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(train_control, (str(tmp_path / "store"),), nprocs=2)


@needs_gloo
def test_accelerate_hands_labels_to_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(train_with_accelerate, (port,), nprocs=2)
