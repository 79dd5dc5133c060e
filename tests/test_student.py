"""Any backbone as a student: the right patches, the model's own logits, a state dict for it."""

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision.models as tv
import transformers as hf
from timm.models import volo
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from tokenlabel.supervise import LVViT, MixToken, TokenStudent
from tokenlabel.supervise.backbones.backbone import grid_of

CLASSES = 7
_HF: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
_HF_VIT = _HF | {"image_size": 32, "patch_size": 8, "intermediate_size": 64}
_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2}


@dataclass(frozen=True)
class Case:
    """A small model of a family."""

    make: Callable[[], nn.Module]
    grid: tuple[int, int]
    image_size: int | None = None  # where the model does not know it
    classifier: bool = True
    mixes: bool = True
    #: Patches by which the largest change may lie beside the changed patch: wide convolutions.
    reach: int = 0


def timm_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    return timm.create_model(name, **(_VIT | options), num_classes=CLASSES)


def timm_swin() -> nn.Module:
    return timm.models.SwinTransformer(
        img_size=64, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=7
    )


def timm_volo() -> nn.Module:
    return volo.VOLO(
        layers=(1, 1, 1, 1),
        img_size=64,
        embed_dims=(32, 64, 64, 64),
        num_heads=(2, 4, 4, 4),
        num_classes=CLASSES,
    )


def tv_convnext() -> nn.Module:
    return tv.ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=CLASSES)


def tv_swin() -> nn.Module:
    return tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)


def hf_model(kind: str, options: dict[str, Any]) -> nn.Module:
    family = kind.removesuffix("Model").removesuffix("ForImageClassification")
    family = family.removesuffix("ForImageClassificationWithTeacher")
    config = getattr(hf, f"{family}Config")(**options, num_labels=CLASSES)
    model: nn.Module = getattr(hf, kind)(config)
    return model


_DINO = _HF | {"image_size": 28, "patch_size": 7}
_HIERARCHY = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2}
CASES = {
    "timm vit": Case(timm_vit, (4, 4)),
    "timm vit, dynamic": Case(lambda: timm_vit(dynamic_img_size=True), (4, 4)),
    "timm vit, averaged": Case(lambda: timm_vit(class_token=False, global_pool="avg"), (4, 4)),
    "timm vit, registers": Case(lambda: timm_vit(reg_tokens=4), (4, 4)),
    "timm deit, distilled": Case(lambda: timm_vit("deit_tiny_distilled_patch16_224"), (4, 4)),
    "timm eva": Case(lambda: timm_vit("eva02_tiny_patch14_224"), (4, 4)),
    "timm volo": Case(timm_volo, (4, 4), image_size=64, reach=1),
    "timm swin": Case(timm_swin, (8, 8)),
    "timm convnext": Case(
        lambda: timm.create_model("convnext_atto", num_classes=7), (2, 2), 64, mixes=False
    ),
    "timm resnet": Case(
        lambda: timm.create_model("resnet10t", num_classes=7), (3, 3), 96, mixes=False, reach=1
    ),
    "timm inceptionnext": Case(
        lambda: timm.create_model("inception_next_atto", num_classes=7), (2, 2), 64, mixes=False
    ),
    "torchvision vit": Case(
        lambda: tv.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=CLASSES), (4, 4)
    ),
    "torchvision swin": Case(tv_swin, (8, 8), 64),
    "torchvision convnext": Case(tv_convnext, (8, 8), 64, mixes=False),
    "torchvision resnet": Case(
        lambda: tv.resnet18(num_classes=CLASSES), (3, 3), 96, mixes=False, reach=1
    ),
    "hf vit": Case(lambda: hf_model("ViTModel", _HF_VIT), (4, 4), classifier=False),
    "hf vit classifier": Case(lambda: hf_model("ViTForImageClassification", _HF_VIT), (4, 4)),
    "hf deit": Case(lambda: hf_model("DeiTForImageClassificationWithTeacher", _HF_VIT), (4, 4)),
    "hf dinov2": Case(lambda: hf_model("Dinov2Model", _DINO), (4, 4), classifier=False),
    "hf dinov2 classifier": Case(lambda: hf_model("Dinov2ForImageClassification", _DINO), (4, 4)),
    "hf dinov2, registers": Case(
        lambda: hf_model("Dinov2WithRegistersModel", _DINO), (4, 4), classifier=False
    ),
    "hf swin": Case(
        lambda: hf_model(
            "SwinForImageClassification",
            {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
            | {"image_size": 64},
        ),
        (8, 8),
    ),
    "hf convnext": Case(
        lambda: hf_model("ConvNextModel", _HIERARCHY), (8, 8), 64, classifier=False
    ),
    "hf resnet": Case(
        lambda: hf_model("ResNetForImageClassification", {"depths": [1, 1, 1, 1]}),
        (3, 3),
        96,
        mixes=False,
        reach=1,
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def student_of(case: Case) -> TokenStudent:
    torch.manual_seed(0)
    return TokenStudent(case.make(), CLASSES, image_size=case.image_size)


def random_images(student: TokenStudent, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *student.image_size)


def logits_of(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


@every_case
def test_contract(case: Case) -> None:
    student = student_of(case)
    assert student.grid == case.grid
    assert student.num_classes == CLASSES
    images = random_images(student)
    cls, patches = student(images)
    assert cls.shape == (2, CLASSES)
    assert patches.shape == (2, case.grid[0] * case.grid[1], CLASSES)
    (cls.square().sum() + patches.square().sum()).backward()
    # DistributedDataParallel waits for the gradients of all parameters that want one.
    without = [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@every_case
def test_class_logits_and_state_dict_are_the_backbones(case: Case) -> None:
    student = student_of(case)
    bare = case.make()
    bare.load_state_dict(student.model.state_dict(), strict=True)
    images = random_images(student)
    with torch.no_grad():
        logits = student.eval()(images)
        assert logits.shape == (2, CLASSES)
        if case.classifier:
            assert torch.equal(logits, logits_of(bare.eval()(images)))


def matched_by_function() -> nn.Module:
    return timm.create_model("inception_v3", num_classes=CLASSES, aux_logits=False)


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize(
    "case",
    [case for name, case in CASES.items() if not name.startswith("hf")]
    + [CASES["hf dinov2"], Case(matched_by_function, (8, 8))],
)
def test_parameter_groups_are_the_models(case: Case, layer_decay: float | None) -> None:
    """Weight decay and layer decay of each parameter; the patch head's are the classifier's."""
    with torch.device("meta"):
        student = student_of(case)

    def rules(model: nn.Module) -> dict[str, tuple[float, float]]:
        optimizer = create_optimizer_v2(
            model, "adamw", 1.0, weight_decay=0.05, layer_decay=layer_decay
        )
        names = {parameter: name for name, parameter in model.named_parameters()}
        return {
            names[parameter].removeprefix("model."): (group["weight_decay"], group["lr_scale"])
            for group in ({"lr_scale": 1.0} | group for group in optimizer.param_groups)
            for parameter in group["params"]
        }

    bare, wrapped = rules(student.model), rules(student)
    added = wrapped.keys() - bare.keys()
    assert {name.partition(".")[0] for name in added} <= {"patch_head", "cls_head"}
    for part in added:
        assert wrapped[part] == ((0.05 if part.endswith("weight") else 0.0), 1.0)
    assert {part: wrapped[part] for part in bare} == bare
    if layer_decay and hasattr(student.model, "group_matcher"):
        assert len({scale for _, scale in wrapped.values()}) > 3


@every_case
def test_patches_lie_where_the_grid_says(case: Case) -> None:
    """What changes most when a patch of the image is repainted is that patch."""
    student = student_of(case).eval()
    image = random_images(student, 1)
    rows, columns = case.grid
    height, width = student.image_size[0] // rows, student.image_size[1] // columns
    with torch.no_grad():
        before = student.features(image)[1]
        for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns - 2)):
            painted = image.clone()
            inside = slice(row * height, (row + 1) * height)
            across = slice(column * width, (column + 1) * width)
            painted[..., inside, across] += 3 * torch.randn(3, height, width)
            change = (student.features(painted)[1] - before).norm(dim=-1)[0]
            found = divmod(int(change.argmax()), columns)
            assert max(abs(found[0] - row), abs(found[1] - column)) <= case.reach


@every_case
def test_mix_token(case: Case) -> None:
    student = student_of(case)
    torch.manual_seed(1)
    box = MixToken().sample(student.grid)
    assert box is not None
    images = random_images(student, 3)
    if case.mixes:
        cls, patches = student(images, box)
        assert cls.shape == (3, CLASSES)
        assert patches.shape[:2] == (3, case.grid[0] * case.grid[1])
        with pytest.raises(ValueError, match="for training"):
            student.eval()(images, box)
    else:
        with pytest.raises(ValueError, match=r"needs a patch embedding; .* CutMix"):
            student(images, box)


@pytest.mark.parametrize(
    ("make", "grid"),
    [
        (lambda: timm.create_model("vit_small_patch16_224"), (14, 14)),
        (lambda: timm.create_model("deit_small_distilled_patch16_224"), (14, 14)),
        (lambda: timm.create_model("volo_d1_224"), (14, 14)),
        (lambda: timm.create_model("volo_d1_224", img_size=256), (16, 16)),
        (lambda: timm.create_model("visformer_tiny", img_size=256), (8, 8)),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), (7, 7)),
        (lambda: timm.create_model("convnext_tiny"), (7, 7)),
        (lambda: timm.create_model("inception_next_tiny"), (7, 7)),
        (lambda: timm.create_model("csatv2"), (8, 8)),  # its first convolution sees no colours
        (lambda: timm.create_model("resnet50"), (7, 7)),
        (lambda: timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=9), (37, 37)),
        (tv.vit_b_16, (14, 14)),
        (tv.swin_t, (7, 7)),
        (tv.convnext_tiny, (7, 7)),
        (tv.resnet50, (7, 7)),
        (lambda: hf.ViTForImageClassification(hf.ViTConfig()), (14, 14)),
    ],
)
def test_the_models_people_train(make: Callable[[], nn.Module], grid: tuple[int, int]) -> None:
    """At full size, without memory or arithmetic."""
    with torch.device("meta"):
        student = TokenStudent(make())
        cls, patches = student(torch.zeros(2, 3, *student.image_size))
    assert student.grid == grid
    assert cls.shape == (2, student.num_classes)
    assert patches.shape == (2, grid[0] * grid[1], student.num_classes)


@pytest.mark.parametrize(
    "name",
    [
        "timm vit",
        "timm deit, distilled",
        "timm volo",
        "torchvision vit",
        "torchvision convnext",
        "hf vit classifier",
        "hf deit",
        "hf resnet",
    ],
)
def test_another_number_of_classes(name: str) -> None:
    case = CASES[name]
    student = TokenStudent(case.make(), 3, image_size=case.image_size)
    cls, patches = student(random_images(student))
    assert cls.shape[-1] == patches.shape[-1] == student.num_classes == 3
    assert logits_of(student.model.eval()(random_images(student))).shape == (2, 3)


def test_the_models_own_classes() -> None:
    assert TokenStudent(timm_vit()).num_classes == CLASSES
    with pytest.raises(ValueError, match=r"ViTModel has no classifier.*num_classes=…"):
        TokenStudent(hf_model("ViTModel", _HF_VIT))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TokenStudent(timm_vit(), 0)


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("timm vit, dynamic", (32, 64), (4, 8)),
        ("timm resnet", (64, 128), (2, 4)),
        ("torchvision swin", (96, 64), (12, 8)),
        ("hf vit classifier", (48, 24), (6, 3)),
        ("hf dinov2, registers", (35, 49), (5, 7)),
    ],
)
def test_other_resolutions(name: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    student = student_of(CASES[name])
    before = student.training, student.grid
    assert student.grid_for(size) == student.grid_for(torch.Size(size)) == grid
    assert (student.training, student.grid) == before
    assert student(torch.randn(2, 3, *size))[1].shape == (2, grid[0] * grid[1], CLASSES)


def test_looking_at_the_grid_changes_nothing() -> None:
    model = tv.resnet18(num_classes=CLASSES)
    model.layer1.eval()  # frozen statistics stay frozen
    before = copy.deepcopy(model.state_dict())
    student = TokenStudent(model, image_size=64)
    assert student.grid == (2, 2)
    assert model.layer2.training
    assert not model.layer1.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_grid_of() -> None:
    for size in (224, 32, 96, 518):
        for patch in (4, 8, 14, 16, 32):
            for other in (size, 2 * size, 3 * size // 2):
                if patch <= size:
                    grid = (size // patch, other // patch)
                    assert grid_of(grid[0] * grid[1], (size, other)) == grid
    for tokens in (197, 198, 50, 51, 201, 66):
        with pytest.raises(ValueError, match=f"fill a grid; {tokens} tokens"):
            grid_of(tokens, (224, 224))


class Encoder(nn.Module):
    """A backbone that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(images).mean((2, 3)))
        return logits


class EncoderStudent(TokenStudent):
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.model, Encoder)
        patches = self.model.embed(images).permute(0, 2, 3, 1)
        return self.model.head(patches.mean((1, 2))), patches

    def patch_embedding(self) -> nn.Module:
        assert isinstance(self.model, Encoder)
        return self.model.embed


def test_a_model_of_ones_own() -> None:
    with pytest.raises(ValueError, match=r"parts of a Encoder.*override `features"):
        TokenStudent(Encoder(), CLASSES)
    student = EncoderStudent(Encoder(), image_size=(32, 48))
    assert student.grid == (4, 6)
    cls, patches = student(torch.randn(2, 3, 32, 48), MixToken().sample(student.grid))
    assert cls.shape == (2, CLASSES)
    assert patches.shape == (2, 24, CLASSES)
    with pytest.raises(ValueError, match="num_classes = 3 columns; the model's have 7"):
        EncoderStudent(Encoder(), 3)
    with pytest.raises(ValueError, match="a student already"):
        TokenStudent(student)
    with pytest.raises(ValueError, match="LVViT is a student already"):
        TokenStudent(LVViT(image_size=32, width=12, depth=1, heads=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: timm.create_model("pit_ti_224"),
            r"patch tokens, got \[1, 1, 256\].*override `features",
        ),
        (lambda: timm.create_model("coat_tiny"), r"got list.*override `features"),
        (timm_volo, r"VOLO must take .* \(224, 224\); it raised RuntimeError.*image_size=…"),
    ],
)
def test_models_without_patches_or_of_another_size(
    make: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenStudent(make())


def test_dropped_tokens() -> None:
    student = TokenStudent(timm_vit(patch_drop_rate=0.3))
    with pytest.raises(ValueError, match="drops or merges tokens"):
        student(random_images(student))


def test_a_replaced_embedding() -> None:
    student = TokenStudent(timm_vit())
    student.model.patch_embed = copy.deepcopy(student.model.patch_embed)
    student.model.patch_embed._forward_hooks.clear()
    with pytest.raises(ValueError, match="embedding did not run"):
        student(random_images(student), MixToken().sample(4))


@pytest.mark.parametrize("name", ["timm vit", "hf vit classifier", "hf dinov2", "torchvision vit"])
def test_copies(name: str) -> None:
    """As an average of the weights (EMA) makes one, and as a checkpoint of all does."""
    student = student_of(CASES[name])
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    images = random_images(student, 3)
    torch.manual_seed(3)
    box = MixToken().sample(student.grid)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for twin in (copy.deepcopy(student), torch.load(file, weights_only=False)):
        assert twin.training
        for mixed in (box, None):
            ours, theirs = student(images, mixed), twin(images, mixed)
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
        with torch.no_grad():
            next(twin.model.parameters()).add_(1.0)
        assert torch.equal(student(images, box)[1], student(images, box)[1])
        assert not torch.equal(student(images, box)[1], twin(images, box)[1])


@pytest.mark.parametrize("name", ["timm vit", "torchvision convnext", "hf vit"])
def test_compiled(name: str) -> None:
    """One graph, whatever the box."""
    case = CASES[name]
    student = student_of(case)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch._dynamo.reset()
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    images = random_images(student, 3)
    mix = MixToken()
    boxes = [mix.sample(case.grid) for _ in range(6)] if case.mixes else [None]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for box in filter(None, boxes):
            torch.testing.assert_close(compiled(images, box), student(images, box))
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(images), student(images))


@pytest.mark.parametrize("name", ["timm vit", "torchvision swin", "hf dinov2 classifier"])
def test_bfloat16(name: str) -> None:
    student = student_of(CASES[name])
    images = random_images(student)
    with torch.autocast("cpu", torch.bfloat16):
        cls, patches = student(images, MixToken().sample(student.grid))
    assert cls.dtype == patches.dtype == torch.bfloat16
    (cls.float().sum() + patches.float().sum()).backward()
    assert student.patch_head.weight.grad.isfinite().all()
    half = student_of(CASES[name]).to(torch.bfloat16)
    assert half(images.bfloat16())[1].dtype == torch.bfloat16
    half = TokenStudent(CASES[name].make().to(torch.bfloat16), 3, image_size=student.image_size)
    assert half(images.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["timm vit", "torchvision convnext", "torchvision resnet"])
def test_channels_last(name: str) -> None:
    student = student_of(CASES[name]).eval()
    images = random_images(student)
    plain = student.features(images)
    student.to(memory_format=torch.channels_last)
    other = student.features(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-4)


def test_the_import_is_light() -> None:
    """Backbones' libraries are looked at only where they have made the model."""
    code = (
        "import sys, tokenlabel.supervise; print({'timm', 'transformers', 'ray'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
