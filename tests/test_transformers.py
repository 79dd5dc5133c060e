"""Hugging Face's Trainer with token labels: train, mix, evaluate, save, resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tests.records import made_up
from tokenlabel.supervise import LVViT, MixUpOrCutMix, TokenStudent, load_backbone
from tokenlabel.supervise.transformers import TokenLabelTrainer

CLASSES, IMAGES = 30, 12
CONFIG = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    image_size=32, num_labels=CLASSES,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


class Rows(Dataset[Any]):
    """Images with records, or with classes, as pairs or as dictionaries."""

    def __init__(self, kind: str) -> None:
        self.kind, self.records = kind, made_up(IMAGES, CLASSES, grid=(2, 2))
        self.images = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> Any:
        label = self.records[index] if self.kind == "records" else int(self.records[index].label)
        if self.kind == "dictionaries":
            return {"pixel_values": self.images[index], "labels": label}
        return self.images[index], label


def student() -> TokenStudent:
    torch.manual_seed(0)
    return TokenStudent(ViTForImageClassification(CONFIG))


def trainer(folder: Path, evaluate: str = "classes", **options: Any) -> TokenLabelTrainer:
    given = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 6, "learning_rate": 3e-3,
        "report_to": [], "save_strategy": "epoch", "disable_tqdm": True, "use_cpu": True,
        "num_train_epochs": 2, "dataloader_drop_last": True,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **(given | options.pop("arguments", {})))
    return TokenLabelTrainer(
        student(), arguments, train_dataset=Rows("records"), eval_dataset=Rows(evaluate), **options
    )


def accuracy(prediction: Any) -> dict[str, float]:
    assert prediction.predictions.shape == (IMAGES, CLASSES)
    right = prediction.predictions.argmax(1) == prediction.label_ids
    return {"top1": float(np.mean(right))}


@pytest.mark.parametrize("evaluate", ["classes", "dictionaries", "records"])
def test_training_and_evaluation(tmp_path: Path, evaluate: str) -> None:
    one = trainer(
        tmp_path, evaluate, compute_metrics=accuracy, mix=MixUpOrCutMix(label_smoothing=0.1)
    )
    before = one.evaluate()
    result = one.train()
    assert result.global_step == 6 and np.isfinite(result.training_loss)
    after = one.evaluate()
    logits = one.model.eval()(one.eval_dataset.images)
    classes = one.eval_dataset.records.label
    expected = torch.nn.functional.cross_entropy(logits, classes).item()
    assert after["eval_loss"] == pytest.approx(expected, rel=1e-4) != before["eval_loss"]
    assert after["eval_top1"] == pytest.approx((logits.argmax(1) == classes).float().mean().item())


def test_what_is_saved_is_the_bare_model_and_checkpoints_go_back_into_it(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    one.train()
    one.save_model(str(tmp_path / "final"))
    images = one.eval_dataset.images
    logits = one.model.eval()(images)
    final = ViTForImageClassification.from_pretrained(tmp_path / "final").eval()
    assert torch.equal(final(images).logits, logits)
    bare = load_backbone(ViTForImageClassification(CONFIG), tmp_path / "checkpoint-6").eval()
    assert torch.equal(bare(images).logits, logits)


def test_a_bare_model_becomes_a_student_and_is_saved_with_its_processor(tmp_path: Path) -> None:
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    options: dict[str, Any] = {"processing_class": processor, "data_collator": None}
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    bare = ViTForImageClassification(CONFIG)
    one = TokenLabelTrainer(bare, arguments, train_dataset=Rows("records"), **options)
    assert isinstance(one.model, TokenStudent) and one.model.model is bare
    one.train()
    one.save_model()
    assert isinstance(one.model, TokenStudent)
    assert ViTImageProcessor.from_pretrained(tmp_path).size == processor.size
    images = Rows("classes").images
    final = ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(final(images).logits, one.model.eval()(images))


def test_lvvit_trains_and_no_column_is_taken_away(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)  # where Trainer writes without arguments
    arguments = TrainingArguments("out", max_steps=1, report_to=[], use_cpu=True)
    net = LVViT(width=32, depth=2, heads=2, image_size=32, num_classes=CLASSES)
    for given in (arguments, None):
        one = TokenLabelTrainer(net, given, train_dataset=Rows("records"))
        assert not one.args.remove_unused_columns
    assert TokenLabelTrainer(net, arguments, train_dataset=Rows("records")).train().global_step == 1


def test_resuming_gives_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    state = whole.model.state_dict()
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=name)


def test_accumulated_batches_are_averaged(tmp_path: Path) -> None:
    """Three batches of 4 in one step: the gradient of one of 12."""
    steps = {"num_train_epochs": 1, "save_strategy": "no", "optim": "sgd", "max_grad_norm": 0.0}
    small = trainer(tmp_path, arguments={**steps, "gradient_accumulation_steps": 3})
    large = trainer(tmp_path, arguments={**steps, "per_device_train_batch_size": 12})
    for one in (small, large):
        one.model.model.config.hidden_dropout_prob = 0.0
        assert one.train().global_step == 1
    state = large.model.state_dict()
    for name, value in small.model.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=1e-6, rtol=1e-4, msg=name)


def test_arguments_that_trainer_honours_are_honoured(tmp_path: Path) -> None:
    """The same step with and without checkpointed activations; the labels are smoothed."""
    options = {"max_steps": 1, "save_strategy": "no", "label_smoothing_factor": 0.2}
    plain = trainer(tmp_path, arguments=options)
    saving = trainer(tmp_path, arguments={**options, "activation_checkpointing": True})
    assert plain.criterion.label_smoothing == 0.2
    for one in (plain, saving):
        one.model.model.config.hidden_dropout_prob = 0.0
        one.train()
    layers = saving.model.model.vit.modules()
    assert any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
    state = plain.model.state_dict()
    for name, value in saving.model.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=name)
