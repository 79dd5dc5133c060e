"""TokenLabelMap: what it is made of, how transforms move it, and how it travels."""

import copy
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional._utils import _KERNEL_REGISTRY

from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.label_map.label_map import TokenLabelMap
from tokenlabel.dataset.label_map.path import PixelPath
from tokenlabel.dataset.targets.record import Records, pack, read_layout
from tokenlabel.dataset.targets.token_labels import TokenLabels
from tokenlabel.dataset.transforms.to_token_labels import ToTokenLabels

SIZE = (120, 160)
METADATA = ("planes", "map_layout", "label", "extent", "canvas_size", "source_size", "path")


def a_view(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, 6, 4, generator=generator)
    classes = torch.rand(5, 6, 50, generator=generator).argsort(-1)[..., :4]
    return scores, classes, torch.randn(5, 6, generator=generator)


def a_map(size: tuple[int, int] = SIZE, *, seed: int = 0, **options: Any) -> TokenLabelMap:
    options = {"num_classes": 50} | options
    return TokenLabelMap.from_scores(*a_view(seed), canvas_size=size, **options)


def an_image(size: tuple[int, int] = SIZE) -> tv_tensors.Image:
    return tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))


def plane(made: TokenLabelMap, name: str) -> torch.Tensor:
    """A plane of a map's record, as targets read it."""
    data = pack([made], None, 0.0)
    return Records(data, read_layout(data)).plane(name)[0]


def same(one: TokenLabelMap, other: TokenLabelMap) -> bool:
    return (
        type(one) is type(other) is TokenLabelMap
        and one.numel() == other.numel() == 0
        and all(getattr(one, name) == getattr(other, name) for name in METADATA)
    )


def corners(score_map: TokenLabelMap) -> list[tuple[float, float]]:
    """Where the current image's four corners lie in the source image, in its pixels."""
    h, w = score_map.canvas_size
    x, y, _ = score_map.path(np.array([0.0, w, w, 0.0]), np.array([0.0, 0.0, h, h]))
    height, width = score_map.source_size
    return list(zip(np.round(x * width, 6), np.round(y * height, 6), strict=True))


# --- made ------------------------------------------------------------------------------------


def test_from_scores_keeps_what_it_was_given() -> None:
    made = a_map(label=7, extent=(0.1, 0, 0.9, 1))
    assert isinstance(made, tv_tensors.Mask)
    assert made.numel() == 0
    assert made.map_layout == MapLayout(("identity",), (5, 6), 4, 50, residual=0, step=0.0)
    assert (made.label, made.extent) == (7, (0.1, 0.0, 0.9, 1.0))
    assert made.canvas_size == made.source_size == SIZE
    assert made.path == PixelPath.of(SIZE)
    assert "5x6 cells" in repr(made)
    scores, classes, rest = a_view()
    level = torch.cat([scores, rest[..., None]], -1).logsumexp(-1)
    codes = plane(made, "codes")
    torch.testing.assert_close(
        codes, (level[..., None] - scores).permute(2, 0, 1), atol=0.01, rtol=0
    )
    assert torch.equal(plane(made, "classes").permute(1, 2, 0).long(), classes)
    torch.testing.assert_close(plane(made, "level"), level, atol=0.01, rtol=0)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
@pytest.mark.parametrize("writeable", [True, False])
def test_numpy_arrays(dtype: Any, writeable: bool) -> None:
    scores, rest = np.ones((2, 3, 4), "<f2"), np.zeros((2, 3), ">f2")
    classes = np.broadcast_to(np.arange(4, dtype=dtype), (2, 3, 4)).copy()
    for array in (scores, rest, classes):
        array.flags.writeable = writeable
    made = TokenLabelMap.from_scores(scores, classes, rest, canvas_size=SIZE)
    assert plane(made, "classes")[:, 1, 2].tolist() == [0, 1, 2, 3]


def test_the_number_of_classes_is_read_off_the_ids() -> None:
    scores, classes, rest = a_view()
    open_ended = TokenLabelMap.from_scores(scores, classes, rest, canvas_size=SIZE)
    assert open_ended.map_layout.num_classes == int(classes.max()) + 2
    nothing_else = torch.full_like(rest, -torch.inf)
    closed = TokenLabelMap.from_scores(scores, classes, nothing_else, canvas_size=SIZE)
    assert closed.map_layout.num_classes == int(classes.max()) + 1
    wide = TokenLabelMap.from_scores(scores, classes + 70_000, rest, canvas_size=SIZE)
    assert wide.map_layout.class_dtype == np.uint32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.full((2, 2, 3), torch.nan)}, "NaN"),
        ({"scores": torch.full((2, 2, 3), torch.inf)}, "inf"),
        ({"rest": torch.full((2, 2), torch.nan)}, "NaN"),
        (
            {"scores": torch.full((2, 2, 3), -torch.inf), "rest": torch.full((2, 2), -torch.inf)},
            "finite",
        ),
        ({"classes": torch.zeros(2, 2, 2, dtype=torch.int64)}, "classes"),
        ({"classes": torch.zeros(2, 2, 3)}, "integers"),
        ({"scores": torch.zeros(2, 2, 3, dtype=torch.int64)}, "floats"),
        ({"rest": torch.zeros(2, 3)}, "rest"),
        ({"scores": torch.zeros(2, 2, 0)}, "K"),
        ({"canvas_size": (0, 5)}, "canvas_size"),
        ({"extent": (0.5, 0, 0.5, 1)}, "extent"),
        ({"extent": (0, 0, 1, 1.5)}, "extent"),
        ({"mirrored": (torch.zeros(2, 3, 3),) * 3}, "equal shape"),
        ({"num_classes": 0}, r"class ids must be in \[0, -1\], got 2"),
        ({"classes": torch.arange(-1, 2).expand(2, 2, 3)}, "got -1"),
        ({"classes": torch.tensor([1, 2, 1]).expand(2, 2, 3)}, "of a cell must differ"),
    ],
)
def test_bad_maps_are_refused(change: dict[str, Any], message: str) -> None:
    good = {
        "scores": torch.zeros(2, 2, 3),
        "classes": torch.arange(3).expand(2, 2, 3),
        "rest": torch.zeros(2, 2),
        "canvas_size": SIZE,
    }
    with pytest.raises(ValueError, match=message):
        TokenLabelMap.from_scores(**(good | change))


def test_one_finite_logit_a_cell_is_enough() -> None:
    one_hot = torch.tensor([[[0.0, -torch.inf]]])
    classes = torch.tensor([[[3, 0]]])
    TokenLabelMap.from_scores(one_hot, classes, torch.tensor([[-torch.inf]]), canvas_size=SIZE)


# --- moved -----------------------------------------------------------------------------------


def test_every_functional_that_moves_masks_moves_maps() -> None:
    """Fails when torchvision teaches masks something that maps do not know."""
    lacking = [
        functional.__name__
        for functional, kernels in _KERNEL_REGISTRY.items()
        if tv_tensors.Mask in kernels and TokenLabelMap not in kernels
    ]
    assert lacking == []
    assert {F.five_crop, F.ten_crop, F.erase} <= {
        functional for functional, kernels in _KERNEL_REGISTRY.items() if TokenLabelMap in kernels
    }


@pytest.mark.parametrize("vertical", [False, True])
def test_several_crops_have_the_canvases_of_the_images(vertical: bool) -> None:
    """The tests of the oracle check the canvas of all other functionals."""
    for functional, size, more in ((F.five_crop, [30, 41], []), (F.ten_crop, 30, [vertical])):
        images, moved = (functional(x, size, *more) for x in (an_image(), a_map()))
        for image, label_map in zip(images, moved, strict=True):
            assert F.get_size(label_map) == list(label_map.canvas_size) == F.get_size(image)
            assert label_map.source_size == SIZE and label_map.planes == a_map().planes


@pytest.mark.parametrize("center", [None, [13, 40]])
def test_the_canvas_of_expanding_rotations(center: list[int] | None) -> None:
    rng = random.Random(0)
    angles = [0, 30, 45, 60, 90, 135, 180, 270, -90, 360, 450]
    for angle in angles + [rng.uniform(-400, 400) for _ in range(30)]:
        size = rng.randint(5, 150), rng.randint(5, 150)
        image = F.rotate(torch.zeros(1, *size), angle, expand=True, center=center)
        moved = F.rotate(a_map(size), angle, expand=True, center=center)
        assert moved.canvas_size == tuple(image.shape[-2:]), (angle, size)
        pil = F.rotate(PIL.Image.new("L", size[::-1]), angle, expand=True, center=center)
        assert moved.canvas_size == (pil.height, pil.width), (angle, size)


@pytest.mark.parametrize(
    ("size", "max_size"), [([50], None), (50, None), ([50], 60), (None, 77), ([31, 17], None)]
)
def test_the_canvas_of_resizes(size: Any, max_size: int | None) -> None:
    for canvas in ((120, 160), (161, 120), (333, 500), (7, 300), (50, 50)):
        image = F.resize(torch.zeros(1, *canvas), size, max_size=max_size)
        moved = F.resize(a_map(canvas), size, max_size=max_size)
        assert moved.canvas_size == tuple(image.shape[-2:])


def test_where_corners_come_from() -> None:
    made = a_map()
    assert corners(made) == [(0, 0), (160, 0), (160, 120), (0, 120)]
    assert corners(F.horizontal_flip(made)) == [(160, 0), (0, 0), (0, 120), (160, 120)]
    assert corners(F.vertical_flip(made)) == [(0, 120), (160, 120), (160, 0), (0, 0)]
    crop = F.resized_crop(made, 10, 20, 50, 60, [224, 224])
    assert corners(crop) == [(20, 10), (80, 10), (80, 60), (20, 60)]
    assert corners(F.pad(made, [5, 6, 7, 8])) == [(-5, -6), (167, -6), (167, 128), (-5, 128)]
    turned = F.rotate(made, 90, expand=True)
    assert corners(turned) == [(160, 0), (160, 120), (0, 120), (0, 0)]
    moved = [(38.5, 28), (118.5, 28), (118.5, 88), (38.5, 88)]
    assert corners(F.affine(made, 0, [3, 4], 2, [0])) == moved


def test_what_changes_pixels_only_leaves_the_map() -> None:
    made = a_map()
    for transform in (
        v2.RandomPhotometricDistort(p=1),
        v2.GaussianBlur(3),
        v2.RandomSolarize(10, 1),
        v2.ToDtype(torch.float32, scale=True),
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": torch.int64}),
    ):
        _, after = transform(an_image(), made)
        assert same(after, made)
    normalise = v2.Normalize([0.5] * 3, [0.5] * 3)
    assert same(normalise(an_image().float(), made)[1], made)
    assert F.erase(made, 1, 2, 3, 4, torch.zeros(1)) is made
    assert F.to_dtype(made, torch.uint8, scale=True) is made


@pytest.mark.parametrize(
    "image",
    [an_image(), PIL.Image.new("RGB", SIZE[::-1]), torch.zeros(3, *SIZE, dtype=torch.uint8)],
    ids=["image", "PIL", "plain tensor"],
)
def test_any_sample(image: Any) -> None:
    transform = v2.Compose([v2.RandomResizedCrop(48), v2.RandomHorizontalFlip()])
    one, other = a_map(label=1), a_map(seed=1, label=2)
    torch.manual_seed(1)
    expected = transform(one)
    assert expected.path != one.path and expected.canvas_size == (48, 48)
    torch.manual_seed(1)
    assert same(transform(image, one)[1], expected)
    torch.manual_seed(1)
    out = transform({"image": image, "maps": [one, {"second": (other, 5)}], "id": 3})
    second, number = out["maps"][1]["second"]
    assert same(out["maps"][0], expected) and (number, out["id"]) == (5, 3)
    assert second.path == expected.path
    assert (second.planes, second.label) == (other.planes, 2)


def test_composing_does_not_nest_what_fits_one_matrix() -> None:
    made = a_map()
    for _ in range(3):
        made = F.horizontal_flip(F.pad(F.resized_crop(made, 5, 6, 40, 50, [80, 80]), [3]))
        made = F.rotate(F.crop(made, -2, -3, 70, 80), 90, expand=True)
        made = F.affine(made, 0, [3, 4], 1.2, [0.0, 0.0])
    assert made.path.is_single
    assert not F.rotate(made, 10).path.is_single


# --- laws ------------------------------------------------------------------------------------

PLACES = st.floats(-30, 200, allow_nan=False)


def _same_points(one: TokenLabelMap, other: TokenLabelMap, x: float, y: float) -> None:
    found, expected = (m.path(np.array([x]), np.array([y])) for m in (one, other))
    np.testing.assert_allclose(found[:2], expected[:2], atol=1e-9)
    assert one.canvas_size == other.canvas_size


@settings(deadline=None, max_examples=50)
@given(x=PLACES, y=PLACES)
def test_a_flip_undoes_itself(x: float, y: float) -> None:
    made = F.resized_crop(a_map(), 3, 4, 50, 77, [64, 80])
    for flip in (F.horizontal_flip, F.vertical_flip):
        _same_points(flip(flip(made)), made, x, y)
    half = F.rotate(F.horizontal_flip(F.vertical_flip(made)), 180)
    _same_points(half, made, x, y)
    turns = made
    for _ in range(4):
        turns = F.rotate(turns, 90, expand=True)
    _same_points(turns, made, x, y)


BOX = st.tuples(*[st.integers(-40, 60)] * 2, *[st.integers(1, 150)] * 2)


@settings(deadline=None, max_examples=100)
@given(first=BOX, second=BOX, x=PLACES, y=PLACES)
def test_a_crop_of_a_crop_is_a_crop(first: Any, second: Any, x: float, y: float) -> None:
    twice = F.crop(F.crop(a_map(), *first), *second)
    once = F.crop(a_map(), first[0] + second[0], first[1] + second[1], *second[2:])
    _same_points(twice, once, x, y)


@settings(deadline=None, max_examples=50)
@given(size=st.tuples(st.integers(1, 400), st.integers(1, 400)), x=PLACES, y=PLACES)
def test_a_resize_keeps_relative_places(size: tuple[int, int], x: float, y: float) -> None:
    made = F.crop(a_map(), 10, 20, 60, 70)
    resized = F.resize(made, list(size))
    x, y = np.array([x]), np.array([y])
    found = resized.path(x * size[1] / 70, y * size[0] / 60)
    np.testing.assert_allclose(found[:2], made.path(x, y)[:2], atol=1e-9)


# --- mirrored --------------------------------------------------------------------------------


def turned(made: TokenLabelMap) -> TokenLabelMap:
    return F.affine(F.rotate(made, 30), 9, [1, 1], 1, [9])


def quarter(made: TokenLabelMap) -> TokenLabelMap:
    return F.rotate(made, 90, expand=True)


@pytest.mark.parametrize(
    ("steps", "view"),
    [
        ([], 0),
        ([F.horizontal_flip], 1),
        ([F.vertical_flip], 1),
        ([F.horizontal_flip, F.vertical_flip], 0),
        ([turned], 0),
        ([F.horizontal_flip, turned], 1),
        ([turned, F.horizontal_flip, turned], 1),
        ([lambda m: F.pad(m, 9, padding_mode="reflect"), F.horizontal_flip], 1),
        ([quarter], 0),
        ([quarter, F.vertical_flip], 1),
    ],
)
def test_the_view_matches_the_handedness(steps: list[Any], view: int) -> None:
    made = a_map(mirrored=a_view(seed=1))
    for step in steps:
        made = step(made)
    assert made.is_mirrored == view
    assert not F.horizontal_flip(a_map()).is_mirrored, "there is but one view"


# --- wrong canvas, and what would leave the map behind ----------------------------------------


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomResizedCrop(32),
        v2.RandomCrop(32),
        v2.RandomAffine(10),
        v2.RandomPerspective(p=1),
        v2.ElasticTransform(),
        v2.RandomZoomOut(p=1),
        v2.RandomShortestSize(32),
        v2.ScaleJitter((50, 50)),
        # These do not ask for sizes, and so cannot notice; ToTokenLabels does.
        v2.RandomHorizontalFlip(1),
        v2.Pad(3),
        v2.Resize(50),
        v2.RandomRotation((20, 20), expand=True),
        v2.Identity(),
    ],
    ids=lambda t: type(t).__name__,
)
def test_a_map_on_a_wrong_canvas_raises_at_the_end_at_the_latest(transform: Any) -> None:
    pipeline = v2.Compose([transform, ToTokenLabels(4)])
    for image in (an_image(), PIL.Image.new("RGB", SIZE[::-1]), an_image() + 0):
        with pytest.raises(ValueError, match=r"HxW dimensions|must lie on its image"):
            pipeline(image, a_map((SIZE[1], SIZE[0])))


def test_stock_transforms_that_cannot_move_a_map_raise() -> None:
    for transform in (v2.RandAugment(), v2.AutoAugment(), v2.TrivialAugmentWide(), v2.AugMix()):
        with pytest.raises(TypeError, match="TokenLabelMap"):
            transform(an_image(), a_map())
    for transform in (v2.FiveCrop(20), v2.TenCrop(20)):
        with pytest.raises(TypeError):
            transform(an_image(), a_map())
    for transform in (v2.MixUp(num_classes=9), v2.CutMix(num_classes=9)):
        with pytest.raises(ValueError):
            transform(an_image()[None], torch.tensor([1]), a_map())


def test_indexing_boxes_does_not_index_maps() -> None:
    boxes = tv_tensors.BoundingBoxes(torch.tensor([[1, 1, 1, 1]]), format="XYXY", canvas_size=SIZE)
    sample = {"image": an_image(), "boxes": boxes, "labels": torch.tensor([1]), "map": a_map()}
    sanitized = v2.SanitizeBoundingBoxes()(sample)
    assert len(sanitized["boxes"]) == 0
    assert same(sanitized["map"], a_map())


def test_an_unknown_functional_for_masks_raises() -> None:
    """What torchvision would do with a Mask kernel that we do not know."""
    with pytest.raises(TypeError, match="leave the map out"):
        tv_tensors.wrap(torch.zeros(2, 2), like=a_map())


@pytest.mark.parametrize("call", [torch.stack, default_collate])
def test_maps_do_not_stack(call: Any) -> None:
    with pytest.raises(TypeError, match="ToTokenLabels"):
        call([a_map(), a_map()])


# --- travels ---------------------------------------------------------------------------------

COPIES: dict[str, Any] = {
    "clone": lambda m: m.clone(),
    "detach": lambda m: m.detach(),
    "to a device": lambda m: m.to("cpu"),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "wrap": lambda m: tv_tensors.wrap(m.as_subclass(torch.Tensor), like=m),
    "deepcopy of a sample": lambda m: copy.deepcopy({"m": [m]})["m"][0],
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_keep_everything(name: str) -> None:
    made = F.rotate(F.horizontal_flip(a_map(mirrored=a_view(seed=1))), 20)
    assert same(COPIES[name](made), made)


def test_copies_keep_warps() -> None:
    made = F.pad(a_map(), 7, padding_mode="reflect")
    made = F.elastic(made, torch.randn(1, *made.canvas_size, 2) / 20)
    expected = TokenLabels.of(made)
    for call in COPIES.values():
        assert torch.equal(TokenLabels.of(call(made)), expected)


def test_a_map_never_comes_without_its_kernels(tmp_path: Path) -> None:
    """Also where it arrives pickled: torchvision would flip it as a Mask."""
    (tmp_path / "map").write_bytes(pickle.dumps(a_map()))
    code = (
        "import pickle, sys; from torchvision.transforms.v2 import functional as F\n"
        "made = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert F.horizontal_flip(made).path != made.path"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "map")], check=True)
