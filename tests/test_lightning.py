"""Lightning's Trainer with token labels: fit, mix, validate, save, resume."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.records import made_up
from tokenlabel.supervise import MixUpOrCutMix, TokenStudent, load_backbone

with warnings.catch_warnings():  # Lightning calls what torch wants nobody to call
    warnings.simplefilter("ignore")
    import lightning

    from tokenlabel.supervise.lightning import TokenLabelModule

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, about workers and loggers

CLASSES = 30


def vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("test_vit", num_classes=CLASSES, img_size=32)
    return model


def module(**options: Any) -> TokenLabelModule:
    def optimizer(student: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(student.parameters(), lr=1e-3)

    return TokenLabelModule(TokenStudent(vit()), optimizer, **options)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    records, images = made_up(8, CLASSES, grid=(2, 2)), torch.randn(8, 3, 32, 32)
    rows: Any = list(zip(images, records, strict=True))
    classes = TensorDataset(images, records.label)
    return DataLoader(rows, batch_size=4), DataLoader(classes, batch_size=4)


def trainer(folder: Path, epochs: int) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip


def test_fit_validate_and_back_into_the_bare_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    train, validation = loaders()
    one, run = module(mix=MixUpOrCutMix()), trainer(tmp_path, 2)
    run.fit(one, train, validation)
    assert run.global_step == 4 and run.callback_metrics["train_loss"].isfinite()
    images, classes = validation.dataset.tensors
    right = (one.student.eval()(images).argmax(1) == classes).float().mean()
    assert run.callback_metrics["val_acc"] == pytest.approx(right.item())
    run.save_checkpoint(tmp_path / "last.ckpt")
    fresh = load_backbone(vit(), tmp_path / "last.ckpt").eval()
    assert torch.equal(fresh(images), one.student(images))
    again = trainer(tmp_path, 3)
    resumed = module()
    again.fit(resumed, train, validation, ckpt_path=tmp_path / "last.ckpt")
    assert again.global_step == 6
    (found,) = run.validate(one, train, verbose=False)
    assert found["val_loss"] > 0, "records have classes too"


SCRIPT = """
import warnings; warnings.simplefilter("ignore")
import lightning, torch
from torch.utils.data import DataLoader, TensorDataset
from tokenlabel.supervise.lightning import TokenLabelModule

module = TokenLabelModule(torch.nn.Identity(), None)
classes = torch.arange(8) % 2  # shown to two processes in turn
loader = DataLoader(TensorDataset(torch.eye(2)[torch.zeros(8).long()], classes), batch_size=4)
run = lightning.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
    enable_checkpointing=False, enable_model_summary=False,
)
(found,) = run.validate(module, loader, verbose=False)
assert found["val_acc"] == 0.5, found
"""


def test_validation_is_that_of_all_processes(tmp_path: Path) -> None:
    """One of two sees class 0 alone, the other class 1: neither half is the accuracy."""
    (tmp_path / "run.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
