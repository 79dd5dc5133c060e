"""What training scripts do with student, labels and criterion: timm, DDP, EMA, checkpoints."""

import argparse
from collections import OrderedDict
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from tests.records import made_up
from tokenlabel.dataset import TokenLabels
from tokenlabel.supervise import (
    MixedLabels,
    MixUpOrCutMix,
    TokenBox,
    TokenLabelLoss,
    TokenStudent,
    load_backbone,
)

CLASSES = 30
IMAGES = torch.randn(4, 3, 160, 160)


def vit(**options: Any) -> nn.Module:
    return timm.create_model("test_vit", num_classes=CLASSES, **options)


def labels(batch: int = 4) -> TokenLabels:
    return made_up(batch, CLASSES, grid=(10, 10))


def hugging_face(kind: Any = ViTForImageClassification) -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(ViTConfig(**shape, intermediate_size=64, image_size=32, num_labels=CLASSES))


# The student in the model's place


def test_timms_scripts_find_the_models_own_settings() -> None:
    model = vit()
    student = TokenStudent(model)
    assert student.default_cfg is model.default_cfg
    assert resolve_data_config({}, model=student) == resolve_data_config({}, model=model)
    assert resolve_data_config({}, model=student)["input_size"] == (3, 160, 160)
    assert student.get_classifier() is model.head and student.num_features == model.num_features
    student.set_grad_checkpointing(True)
    assert model.grad_checkpointing
    loss = TokenLabelLoss()(student(IMAGES), labels())
    loss.backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None
    assert not hasattr(student, "config"), "that is Hugging Face's"


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_layer_decay_groups_are_the_bare_models(name: str) -> None:
    model = timm.create_model(name, num_classes=CLASSES)

    def rates(net: nn.Module) -> dict[int, tuple[float, float]]:
        optimizer = create_optimizer_v2(net, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
        return {
            id(parameter): (group["lr_scale"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    bare, wrapped = rates(model), rates(TokenStudent(model))
    assert {key: wrapped[key] for key in bare} == bare
    assert len(wrapped) == len(bare) + 2, "and the patch head"


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_new_classifier_is_one_for_the_patches_too(name: str) -> None:
    student = TokenStudent(timm.create_model(name, num_classes=CLASSES))
    student.reset_classifier(7)
    cls, patches = student(IMAGES)
    assert cls.shape == (4, 7) and patches.shape[2] == 7 and student.num_classes == 7
    beside = TokenStudent(hugging_face(ViTModel), num_classes=5)
    beside.reset_classifier(7)
    assert beside(torch.randn(2, 3, 32, 32))[0].shape == (2, 7)


def test_patch_logits_when_they_are_asked_for() -> None:
    student = TokenStudent(vit())
    assert len(student(IMAGES)) == 2 and student(IMAGES, patches=False).shape == (4, CLASSES)
    student.eval()
    cls, patches = student(IMAGES, patches=True)
    assert torch.equal(cls, student(IMAGES)) and patches.shape == (4, 100, CLASSES)
    with pytest.raises(TypeError, match="takes images"):
        student()


def test_a_control_without_patches() -> None:
    """The same backbone, no patch head, the same class loss."""
    model = vit()
    control, student = TokenStudent(model, patches=False), TokenStudent(model)
    assert sum(1 for _ in control.parameters()) == sum(1 for _ in model.parameters())
    batch, loss = labels(), TokenLabelLoss(dense_weight=0)
    one, other = loss(control(IMAGES), batch), loss(student(IMAGES), batch)
    assert torch.equal(one, other)
    other.backward()
    assert student.patch_head.weight.grad.abs().max() == 0, "which DDP waits for"
    assert control(IMAGES, TokenBox(torch.eye(10) > 0)).shape == (4, CLASSES)
    with pytest.raises(ValueError, match="patches=False has no patch logits"):
        control(IMAGES, patches=True)


def test_the_loss_comes_with_the_labels_as_hugging_face_gives_it() -> None:
    student, batch = TokenStudent(hugging_face()), {"pixel_values": IMAGES, "labels": labels()}
    torch.manual_seed(0)
    output = student(**batch)
    torch.manual_seed(0)
    logits = student(IMAGES)
    assert torch.equal(output.logits, logits[0])
    assert torch.equal(output.loss, TokenLabelLoss()(logits, batch["labels"]))
    classes = batch["labels"].hard_label()
    evaluated = student.eval()(pixel_values=IMAGES, labels=classes)
    assert torch.equal(evaluated.loss, cross_entropy(evaluated.logits, classes))
    control = TokenStudent(hugging_face(), patches=False)
    assert control(**batch).loss.isfinite()
    assert not any(name.startswith("criterion") for name in student.state_dict())


def test_hugging_faces_way_to_call_and_to_save(tmp_path: Any) -> None:
    model = hugging_face()
    student = TokenStudent(model)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(student.eval()(pixel_values=pixels), student(pixels))
    assert student.config is model.config
    student.save_pretrained(tmp_path)
    again = ViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(pixels).logits, student(pixels))


def test_the_backbones_first_weights_are_those_of_the_bare_model() -> None:
    torch.manual_seed(0)
    bare = vit().state_dict()
    torch.manual_seed(0)
    inside = TokenStudent(vit()).model.state_dict()
    assert all(torch.equal(value, inside[name]) for name, value in bare.items())


# Checkpoints


def averaged(student: nn.Module) -> dict[str, Any]:
    ema = ModelEmaV3(student)
    with torch.no_grad():
        student.model.cls_token += 1  # what the averaging has not seen
    return {"state_dict": student.state_dict(), "state_dict_ema": ema.module.state_dict()}


WRAPPED = {
    "whole student": lambda s: s.state_dict(),
    "its model": lambda s: {"model": s.model.state_dict(), "epoch": 3},
    "timm": lambda s: {"state_dict": s.state_dict(), "args": argparse.Namespace(lr=1.0)},
    "distributed": lambda s: {f"module.{k}": v for k, v in s.state_dict().items()},
    "compiled": lambda s: {"model": torch.compile(s).state_dict()},
    "lightning": lambda s: {
        "state_dict": {
            **{f"student.{k}": v for k, v in s.state_dict().items()},
        },
        "hyper_parameters": {"lr": 1},
    },
    "ordered": lambda s: OrderedDict(s.state_dict()),
    "torch's averaging": lambda s: torch.optim.swa_utils.AveragedModel(s).state_dict(),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_what_scripts_save_goes_back_into_the_bare_model(how: str, tmp_path: Any) -> None:
    student = TokenStudent(vit())
    torch.save(WRAPPED[how](student), tmp_path / "last.pth")
    fresh = vit()
    assert load_backbone(fresh, tmp_path / "last.pth") is fresh
    expected = student.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())


def test_averaged_weights_are_preferred_unless_they_are_not_wanted() -> None:
    student = TokenStudent(vit())
    before = student.model.cls_token.detach().clone()
    saved = averaged(student)
    assert torch.equal(load_backbone(vit(), saved).cls_token, before)
    assert torch.equal(load_backbone(vit(), saved, ema=False).cls_token, before + 1)


def test_a_trainers_folder(tmp_path: Any) -> None:
    student = TokenStudent(hugging_face())
    save_file(student.state_dict(), tmp_path / "model.safetensors")
    fresh = load_backbone(hugging_face(), tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh.eval()(pixels).logits, student.eval()(pixels))
    with pytest.raises(FileNotFoundError, match=r"must hold one of model\.safetensors"):
        load_backbone(fresh, tmp_path.parent)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Any) -> None:
    student = TokenStudent(vit())
    state = student.state_dict()
    for change, message in (
        (lambda s: s.pop("model.norm.weight"), r"1 missing \(norm.weight\)"),
        (lambda s: s.update({"model.extra": torch.ones(1)}), r"1 unexpected \(model.extra\)"),
        (lambda s: s.update({"model.head.weight": torch.ones(1)}), "of another shape .head.weight"),
    ):
        changed = dict(state)
        change(changed)
        with pytest.raises(ValueError, match=rf"must fit \w+ in every name.*{message}.*Remedy"):
            load_backbone(vit(), changed)
    with pytest.raises(ValueError, match="must fit"):
        load_backbone(vit(), {"optimizer": {}})
    torch.save({"state_dict": state, "run": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="load without running code"):
        load_backbone(vit(), tmp_path / "code.pth")


# Labels and criterion


def test_the_criterion_takes_the_students_output_as_it_is() -> None:
    student, batch, criterion = TokenStudent(vit()), labels(), TokenLabelLoss()
    output = student(IMAGES)
    assert torch.equal(criterion(output, batch), criterion(*output, batch))
    assert torch.equal(criterion(list(output), batch), criterion(*output, batch))
    logits, ids = student.eval()(IMAGES), torch.tensor([1, 2, 3, 4])
    assert torch.equal(criterion(logits, ids), cross_entropy(logits, ids))
    soft = torch.rand(4, CLASSES).softmax(1)
    assert torch.equal(criterion(logits, soft), cross_entropy(logits, soft))


@pytest.mark.parametrize(
    ("output", "targets", "message"),
    [
        ("evaluation", "records", r"gave class logits alone. Remedy: student.train\(\), or"),
        ("training", "ids", r"must be TokenLabels, .*got Tensor.*for class ids, student.eval"),
        ("dictionary", "records", "output must be class logits.*got dict"),
    ],
)
def test_wrong_pairs_say_what_was_expected(output: str, targets: str, message: str) -> None:
    student = TokenStudent(vit())
    student.train(output != "evaluation")
    given = {"logits": IMAGES} if output == "dictionary" else student(IMAGES)
    with pytest.raises(TypeError, match=message):
        TokenLabelLoss()(given, labels() if targets == "records" else torch.arange(4))


def test_records_that_lost_their_class_are_still_labels() -> None:
    """As Accelerate's dispatch broadcasts bytes to other processes."""
    output, batch = TokenStudent(vit())(IMAGES), labels()
    received = torch.empty(batch.shape, dtype=batch.dtype)
    received.copy_(batch.as_subclass(torch.Tensor))
    assert type(received) is torch.Tensor
    criterion = TokenLabelLoss()
    assert torch.equal(criterion(output, received), criterion(output, batch))
    assert torch.equal(TokenLabels.wrap(received).label, batch.label)
    _, mixed = MixUpOrCutMix()(IMAGES, received)
    assert isinstance(mixed, MixedLabels)


def test_accelerates_own_functions_keep_labels() -> None:
    from accelerate.utils import concatenate, find_batch_size, send_to_device, slice_tensors

    batch = (IMAGES, labels())
    assert find_batch_size(batch) == 4
    halves = [slice_tensors(batch, slice(0, 2)), slice_tensors(batch, slice(2, 4))]
    assert all(type(half[1]) is TokenLabels and len(half[1]) == 2 for half in halves)
    _, joined = concatenate(halves)
    assert type(joined) is TokenLabels and torch.equal(joined, batch[1])
    _, moved = send_to_device(batch, torch.device("cpu"), non_blocking=True)
    assert type(moved) is TokenLabels


def test_mixed_labels_are_indexed_by_image() -> None:
    torch.manual_seed(0)
    _, mixed = MixUpOrCutMix(mode="elem")(IMAGES, labels())
    logits = torch.randn(4, CLASSES), torch.randn(4, 100, CLASSES)
    criterion = TokenLabelLoss(cls_target="both")
    whole = criterion(logits, mixed)
    parts = [
        criterion([part[index] for part in logits], mixed[index])
        for index in (slice(0, 1), torch.tensor([1, 2]), [3])
    ]
    torch.testing.assert_close(whole, (parts[0] + 2 * parts[1] + parts[2]) / 4)
    some = mixed[torch.tensor([True, False, True, False])]
    assert len(some) == 2 and torch.equal(some.hard_label(), mixed.hard_label()[::2])
    assert torch.equal(some[1:].label, mixed.label[2:3])
    torch.testing.assert_close(some.crop(), mixed.crop()[::2])
    assert len(mixed.to("cpu", non_blocking=True)) == 4
    with pytest.raises(TypeError, match=r"got one index. Remedy: labels\[i : i \+ 1\]"):
        mixed[0]


def test_timms_mixup_arguments_and_its_switch() -> None:
    arguments = {
        "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "cutmix_minmax": None, "prob": 1.0,
        "switch_prob": 0.5, "mode": "batch", "label_smoothing": 0.1, "num_classes": CLASSES,
    }  # fmt: skip
    mix = MixUpOrCutMix(**arguments)
    mix.mixup_enabled = False
    images, off = mix(IMAGES, labels())
    assert torch.equal(images, IMAGES) and (off.label_probs[:, 0] == 1).all()
    logits = torch.randn(4, CLASSES), torch.randn(4, 100, CLASSES)
    smoothed = TokenLabelLoss(label_smoothing=0.1)(logits, labels())
    torch.testing.assert_close(TokenLabelLoss()(logits, off), smoothed)
    torch.testing.assert_close(TokenLabelLoss(label_smoothing=0.1)(logits, off), smoothed)
    mix.mixup_enabled = True
    images, _ = mix(IMAGES, labels())
    assert not torch.equal(images, IMAGES)
    with pytest.raises(ValueError, match="num_classes must be the labels' 30, got 1000"):
        MixUpOrCutMix(num_classes=1000)(IMAGES, labels())
    with pytest.raises(ValueError, match="correct_lam must be True"):
        MixUpOrCutMix(correct_lam=False)


def test_cutmix_minmax_bounds_the_box() -> None:
    torch.manual_seed(0)
    mix = MixUpOrCutMix(0.0, cutmix_minmax=(0.3, 0.8), mode="elem")
    sides = torch.cat(
        [box[:, 2:] - box[:, :2] for box in (mix(IMAGES, labels())[1].box for _ in range(100))]
    )
    assert 0.29 < sides.min() < 0.35 and 0.75 < sides.max() < 0.81
    assert mix(IMAGES, labels())[1].box.min() >= 0 and mix(IMAGES, labels())[1].box.max() <= 1
    with pytest.raises(ValueError, match="cutmix_minmax must be"):
        MixUpOrCutMix(cutmix_minmax=(0.8, 0.3))


def test_a_step_with_timms_averaging_and_compile() -> None:
    student, criterion = TokenStudent(vit()), TokenLabelLoss()
    ema, optimizer = ModelEmaV3(student, decay=0.5), create_optimizer_v2(student, "adamw", lr=1e-3)
    compiled = torch.compile(student, backend="eager")
    for _ in range(2):
        loss = criterion(compiled(IMAGES), labels())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(student)
    assert torch.isfinite(loss)
    assert not torch.equal(ema.module.model.head.weight, student.model.head.weight)
    logits = ema.module.eval()(IMAGES)
    assert criterion(logits, torch.arange(4)).isfinite()


def test_labels_collate_through_workers() -> None:
    rows = list(labels())
    loader = DataLoader([(IMAGES[i], rows[i]) for i in range(4)], batch_size=2, num_workers=2)
    for images, batch in loader:
        assert type(batch) is TokenLabels and batch.hard_label().shape == (2,)
        TokenLabelLoss()(TokenStudent(vit())(images), batch)
    assert torch.equal(default_collate(rows), labels())


def test_timms_training_task_takes_student_and_criterion() -> None:
    from timm.task import ClassificationTask

    student, batch = TokenStudent(vit()), labels()
    task = ClassificationTask(student, criterion=TokenLabelLoss(), device=torch.device("cpu"))
    task.setup_ema(decay=0.5)
    optimizer = create_optimizer_v2(task.get_trainable_module(), "adamw", lr=0.1, layer_decay=0.7)
    result = task(IMAGES, batch)
    assert torch.equal(result["loss"], TokenLabelLoss()(result["output"], batch))
    result["loss"].backward()
    optimizer.step()
    task.update_ema()
    evaluated = task.get_eval_model(ema=True)(IMAGES)
    assert evaluated.shape == (4, CLASSES)
