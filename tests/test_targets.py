"""TokenTargets: what the numbers mean, exactly."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.ops import roi_align
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tests.oracle import dense
from tokenlabel.dataset import native
from tokenlabel.dataset.label_map import TokenLabelMap
from tokenlabel.dataset.targets import TokenTargets, ToTokenTargets

CLASSES = 60
SIZE = (90, 120)


@pytest.fixture(autouse=True, scope="module", params=["compiled", "NumPy"])
def _implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything holds with the compiled module and, where that could not be built, without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "NumPy":
            patch.setattr(native, "compiled", None)
        elif native.compiled is None:
            pytest.skip("tokenlabel was installed without a C compiler")
        yield


class Raw:
    """A map of random logits over CLASSES classes, and what is stored of it."""

    def __init__(self, cells: tuple[int, int] = (6, 8), k: int = 5, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = 3 * torch.randn(*cells, CLASSES, generator=generator)
        best = self.logits.topk(k)
        self.scores, self.classes = best.values, best.indices
        others = self.logits.scatter(-1, self.classes, -math.inf)
        self.rest = others.logsumexp(-1)

    def map(self, **options: Any) -> TokenLabelMap:
        options = {"canvas_size": SIZE} | options
        return TokenLabelMap.from_scores(self.scores, self.classes, self.rest, **options)

    def truth(self) -> Tensor:
        """Probabilities [H, W, CLASSES] that are stored; those of other classes as 0."""
        probs = self.logits.double().softmax(-1)
        kept = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, self.classes, True)
        return probs * kept


def conserved(targets: TokenTargets, k: int) -> None:
    """Everything that must hold for any targets."""
    patches = len(targets.rest)
    shapes = [(), *[(patches, k)] * 2, *[(patches,)] * 2, *[(k,)] * 2, ()]
    dtypes = [torch.int64, torch.int32, *[torch.float32] * 3, torch.int32, *[torch.float32] * 2]
    assert [tuple(t.shape) for t in targets] == shapes
    assert [t.dtype for t in targets] == dtypes
    assert all(type(t) is Tensor and t.is_contiguous() for t in targets)
    for probs, rest, classes in (
        (targets.probs, targets.rest, targets.classes),
        (targets.crop_probs, targets.crop_rest, targets.crop_classes),
    ):
        assert torch.isfinite(probs).all()
        assert (probs >= 0).all()
        assert (rest >= 0).all()
        torch.testing.assert_close(probs.sum(-1) + rest, torch.ones_like(rest), atol=1e-5, rtol=0)
        assert (probs.diff(dim=-1) <= 0).all()
        assert (classes[probs == 0] == 0).all()
        distinct = classes.masked_fill(probs == 0, -1).reshape(-1, k).tolist()
        assert all(len({*row} - {-1}) == sum(c >= 0 for c in row) for row in distinct)
    outside = targets.weight == 0
    assert ((targets.weight >= 0) & (targets.weight <= 1 + 1e-6)).all()
    assert (targets.rest[outside] == 1).all()


# --- exact -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [(6, 8), (1, 5), (4, 1), (1, 1)], ids=str)
def test_an_untouched_picture_on_the_maps_own_grid(cells: tuple[int, int]) -> None:
    raw = Raw(cells)
    found = ToTokenTargets(cells, 5, interpolation="nearest")(raw.map(label=3))
    torch.testing.assert_close(found.classes.long(), raw.classes.flatten(0, 1))
    expected = raw.truth().gather(-1, raw.classes).flatten(0, 1)
    torch.testing.assert_close(found.probs.double(), expected, atol=1e-6, rtol=1e-5)
    assert found.label == 3
    assert (found.weight == 1).all()
    bilinear = ToTokenTargets(cells, CLASSES)(raw.map())
    # A hat's integral over its own cell is 3/4, over a neighbour's 1/8.
    eighths = torch.nn.functional.pad(raw.truth().permute(2, 0, 1)[None], [1] * 4, "replicate")
    kernel = torch.tensor([1, 6, 1]).double() / 8
    blurred = torch.nn.functional.conv2d(
        eighths, (kernel[:, None] * kernel).expand(CLASSES, 1, 3, 3), groups=CLASSES
    )
    torch.testing.assert_close(
        dense(bilinear, CLASSES), blurred[0].flatten(1).T, atol=1e-6, rtol=1e-5
    )


def by_quadrature(raw: Raw, box: tuple[float, ...], grid: tuple[int, int], mode: str) -> Tensor:
    """Average [N, CLASSES] over each patch of a box (x0, y0, x1, y1), by very many points."""
    fine = 200
    x0, y0, x1, y1 = box
    x = x0 + (x1 - x0) * (torch.arange(grid[1] * fine).double() + 0.5) / (grid[1] * fine)
    y = y0 + (y1 - y0) * (torch.arange(grid[0] * fine).double() + 0.5) / (grid[0] * fine)
    truth = raw.truth().numpy()
    averages = []
    for at, axis in ((y, 0), (x, 1)):
        cells = truth.shape[axis]
        position = at.numpy() * cells - (0.5 if mode == "bilinear" else 0)
        if mode == "bilinear":
            position = position.clip(0, cells - 1)
            share = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells)))
        else:
            share = np.floor(position)[:, None] == np.arange(cells)
        averages.append(share.reshape(-1, fine, cells).mean(1))
    return torch.from_numpy(np.einsum("ir,jc,rck->ijk", *averages, truth).reshape(-1, CLASSES))


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("grid", [(7, 7), (3, 5), (1, 1), (20, 17)], ids=str)
def test_exact_weights_are_integrals(grid: tuple[int, int], interpolation: str) -> None:
    raw = Raw()
    crop = F.resized_crop(raw.map(), 11, 17, 61, 83, [64, 48])
    found = ToTokenTargets(grid, CLASSES, interpolation=interpolation)(crop)
    conserved(found, CLASSES)
    box = (17 / 120, 11 / 90, 100 / 120, 72 / 90)
    expected = by_quadrature(raw, box, grid, interpolation)
    # The quadrature itself cuts cells a two-hundredth of a patch off their borders.
    limit = 1e-4 if interpolation == "bilinear" else 0.02
    torch.testing.assert_close(dense(found, CLASSES), expected, atol=limit, rtol=0)
    whole = torch.zeros(CLASSES, dtype=torch.float64)
    whole.index_add_(0, found.crop_classes.long(), found.crop_probs.double())
    torch.testing.assert_close(whole, expected.mean(0), atol=limit, rtol=0)


@pytest.mark.parametrize("grid", [(14, 14), (7, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_sub_points_come_close_to_the_integrals(grid: tuple[int, int], interpolation: str) -> None:
    """The same geometry, once as one matrix and once through a rotation by nearly nothing."""
    to_targets = ToTokenTargets(grid, CLASSES, interpolation=interpolation)
    crop = F.horizontal_flip(F.resized_crop(Raw().map(), -9, 17, 71, 83, [64, 48]))
    nearly = F.resized_crop(F.affine(Raw().map(), 1e-9, [0, 0], 1, [0]), -9, 17, 71, 83, [64, 48])
    nearly = F.horizontal_flip(nearly)
    assert crop.path.is_single
    assert not nearly.path.is_single
    exact, found = to_targets(crop), to_targets(nearly)
    conserved(found, CLASSES)
    far = 0.5 * (dense(exact, CLASSES) - dense(found, CLASSES)).abs().sum(1)[exact.weight > 0.3]
    assert far.mean() < (0.006 if interpolation == "bilinear" else 0.02)
    assert (exact.weight - found.weight).abs().mean() < 0.02
    torch.testing.assert_close(exact.crop_rest, found.crop_rest, atol=2e-3, rtol=0)


@settings(deadline=None, max_examples=40)
@given(
    box=st.tuples(*[st.integers(-30, 60)] * 2, *[st.integers(1, 100)] * 2),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    flip=st.booleans(),
    interpolation=st.sampled_from(["bilinear", "nearest"]),
)
def test_a_finer_grid_pools_to_the_coarser(
    box: Any, grid: tuple[int, int], flip: bool, interpolation: str
) -> None:
    crop = F.resize(F.crop(Raw().map(), *box), [56, 48])
    crop = F.horizontal_flip(crop) if flip else crop
    coarse, fine = (
        ToTokenTargets(g, CLASSES, interpolation=interpolation)(crop)
        for g in (grid, (2 * grid[0], 2 * grid[1]))
    )
    conserved(coarse, CLASSES)
    conserved(fine, CLASSES)

    def pooled(values: Tensor) -> Tensor:
        return values.reshape(grid[0], 2, grid[1], 2, -1).mean((1, 3)).flatten(0, 1)

    weight = pooled(fine.weight)
    torch.testing.assert_close(weight[:, 0], coarse.weight, atol=5e-6, rtol=0)
    mass = pooled(dense(fine, CLASSES) * fine.weight[:, None])
    expected = dense(coarse, CLASSES) * coarse.weight[:, None]
    torch.testing.assert_close(mass, expected, atol=5e-6, rtol=0)
    torch.testing.assert_close(coarse.crop_probs, fine.crop_probs, atol=5e-6, rtol=0)


@settings(deadline=None, max_examples=30)
@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_a_resize_changes_nothing(size: tuple[int, int]) -> None:
    to_targets = ToTokenTargets((5, 4), 7)
    crop = F.crop(Raw().map(), 10, 20, 60, 70)
    before, after = to_targets(crop), to_targets(F.resize(crop, list(size)))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=0)


def test_flips_and_quarter_turns_permute_patches() -> None:
    to_targets = ToTokenTargets((4, 6), 7)
    grid = torch.arange(24).reshape(4, 6)
    crop = F.crop(Raw().map(), 10, 20, 60, 70)
    plain = to_targets(crop)
    turned = ToTokenTargets((6, 4), 7)(F.rotate(crop, 90, expand=True))
    for order, moved in (
        (grid.flip(1), to_targets(F.horizontal_flip(crop))),
        (grid.flip(0), to_targets(F.vertical_flip(crop))),
        (grid.rot90(2), to_targets(F.rotate(crop, 180))),
        (grid.rot90(1), turned),
    ):
        assert torch.equal(plain.classes[order.flatten()], moved.classes)
        torch.testing.assert_close(plain.probs[order.flatten()], moved.probs, atol=5e-6, rtol=0)


def test_weight_is_the_share_inside() -> None:
    padded = F.pad(Raw().map(canvas_size=(80, 80)), [40, 0, 0, 20])
    found = ToTokenTargets((5, 6), 3)(padded)  # patches of 20 x 20 pixels
    conserved(found, 3)
    expected = torch.ones(5, 6)
    expected[:, :2] = 0
    expected[4:] = 0
    assert torch.equal(found.weight.reshape(5, 6), expected)
    half = ToTokenTargets((2, 2), 3)(F.pad(Raw().map(canvas_size=(80, 80)), [20, 0, 20, 0]))
    torch.testing.assert_close(half.weight, torch.full((4,), 2 / 3))


@pytest.mark.parametrize("turn", [0, 20])
def test_outside_the_extent_there_is_no_label(turn: int) -> None:
    score_map = Raw().map(extent=(0.25, 0.0, 0.75, 1.0), canvas_size=(80, 80))
    found = ToTokenTargets((4, 4), 4, interpolation="nearest")(
        F.rotate(score_map, 180 if turn else 0)
    )
    assert found.weight.reshape(4, 4).tolist() == [[0, 1, 1, 0]] * 4
    conserved(found, 4)
    whole = ToTokenTargets((4, 2), 4, interpolation="nearest")(F.crop(score_map, 0, 20, 80, 40))
    same = ToTokenTargets((4, 2), 4, interpolation="nearest")(Raw().map())
    torch.testing.assert_close(whole.probs, same.probs)
    turned = ToTokenTargets((4, 4), 4)(F.rotate(score_map, turn))
    conserved(turned, 4)
    assert turned.weight.sum() < 9


@pytest.mark.parametrize(
    "nothing",
    [
        lambda m: F.crop(m, 500, 500, 20, 20),
        lambda m: F.affine(m, 0, [1000, 0], 1.0, [0]),
        lambda m: F.affine(m, 30, [1000, 0], 1.0, [0]),
        lambda m: F.rotate(F.crop(m, 500, 500, 20, 20), 10),
    ],
)
def test_nothing_of_the_picture_is_left(nothing: Any) -> None:
    found = ToTokenTargets(3, 4)(nothing(Raw().map()))
    conserved(found, 4)
    assert (found.weight == 0).all()
    assert (found.probs == 0).all()
    assert found.crop_rest == 1


def test_what_was_cropped_away_does_not_come_back() -> None:
    cropped = F.pad(F.crop(Raw().map(canvas_size=(80, 80)), 20, 20, 40, 40), [20])
    for moved in (cropped, F.rotate(cropped, 1e-9)):
        found = ToTokenTargets(4, 3)(moved)
        assert found.weight.reshape(4, 4)[1:3, 1:3].min() > 0.99
        assert found.weight.sum() < 4.01


@pytest.mark.parametrize("k", [1, 3, 5, 100])
def test_the_k_largest(k: int) -> None:
    crop = F.resized_crop(Raw().map(), 11, 17, 61, 83, [64, 48])
    every, found = ToTokenTargets(6, CLASSES)(crop), ToTokenTargets(6, k)(crop)
    conserved(found, k)
    wide = torch.nn.functional.pad(every.probs, (0, 100))[:, :k]
    torch.testing.assert_close(found.probs, wide)
    torch.testing.assert_close(found.rest, 1 - wide.sum(1), atol=5e-6, rtol=0)


def test_the_mirrored_view() -> None:
    """Its cells lie as in the mirrored picture; so flipping it back gives the same as the first."""
    one, other = Raw(), Raw(seed=1)
    views = (other.scores, other.classes, other.rest)
    box = {"extent": (0.1, 0.0, 0.6, 0.9)}
    score_map = one.map(mirrored=views, **box)
    mirror = {"extent": (0.4, 0.0, 0.9, 0.9)}
    for moves in (
        [],
        [lambda m: F.rotate(m, 25)],
        [lambda m: F.resized_crop(m, 5, 9, 70, 66, [50])],
    ):
        there, alone = F.horizontal_flip(score_map), other.map(**mirror)
        for move in moves:
            there, alone = move(there), move(alone)
        for found, expected in zip(
            ToTokenTargets(5, 6)(there), ToTokenTargets(5, 6)(alone), strict=True
        ):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    plain, first = ToTokenTargets(5, 6)(score_map), ToTokenTargets(5, 6)(one.map(**box))
    assert torch.equal(plain.probs, first.probs)


# --- stable ----------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [0.0, 17.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_any_size(dtype: torch.dtype, turn: float) -> None:
    extreme = torch.tensor([65504.0, 60000.0, 0.0, -65504.0, 1e-7])
    scores = extreme[torch.randint(5, (6, 8, 5))].to(dtype)
    rest = extreme[torch.randint(5, (6, 8))].to(dtype)
    score_map = TokenLabelMap.from_scores(scores, Raw().classes, rest, canvas_size=SIZE)
    conserved(ToTokenTargets(7, 5)(F.rotate(score_map, turn)), 5)


@pytest.mark.parametrize("turn", [0.0, 17.0])
def test_one_hot_maps(turn: float) -> None:
    classes = torch.randint(5, (6, 8, 1))
    score_map = TokenLabelMap.from_scores(
        torch.zeros(6, 8, 1), classes, torch.full((6, 8), -torch.inf), canvas_size=SIZE
    )
    found = ToTokenTargets(7, 5)(F.rotate(score_map, turn))
    conserved(found, 5)
    assert (found.rest[found.weight > 0] < 1e-5).all()
    assert (found.crop_probs.sum() + found.crop_rest).sub(1).abs() < 1e-5


def test_entries_without_a_class_do_not_count() -> None:
    """Padding of a ragged map: class 0 at -inf, also in cells that hold class 0 for real."""
    scores = torch.tensor([[[1.0, 0.0, -torch.inf], [2.0, -torch.inf, -torch.inf]]])
    classes = torch.tensor([[[0, 4, 0], [7, 0, 0]]])
    padded = TokenLabelMap.from_scores(scores, classes, torch.zeros(1, 2), canvas_size=SIZE)
    found = ToTokenTargets((1, 2), 3, interpolation="nearest")(padded)
    conserved(found, 3)
    total = math.e + 2
    assert found.classes.tolist() == [[0, 4, 0], [7, 0, 0]]
    expected = torch.tensor([[math.e / total, 1 / total, 0], [math.e**2 / (1 + math.e**2), 0, 0]])
    torch.testing.assert_close(found.probs, expected)


def test_repeated_classes_add_up() -> None:
    scores, classes = torch.zeros(2, 2, 4), torch.tensor([3, 3, 5, 5]).expand(2, 2, 4)
    score_map = TokenLabelMap.from_scores(scores, classes, torch.zeros(2, 2), canvas_size=SIZE)
    found = ToTokenTargets(2, 4)(score_map)
    conserved(found, 4)
    torch.testing.assert_close(found.probs[0], torch.tensor([0.4, 0.4, 0, 0]))


def test_very_many_classes() -> None:
    raw = Raw()
    for offset in (21_000, 5_000_000):
        far = TokenLabelMap.from_scores(
            raw.scores, raw.classes + offset, raw.rest, canvas_size=SIZE
        )
        found, plain = ToTokenTargets(5, 6)(far), ToTokenTargets(5, 6)(raw.map())
        assert torch.equal(found.classes, plain.classes + offset)
        assert torch.equal(found.probs, plain.probs)


# --- published -------------------------------------------------------------------------------


def published(raw: Raw, box: list[float], grid: tuple[int, int]) -> Tensor:
    """The rule, dense: scatter, RoIAlign of the box, softmax. [N, CLASSES]."""
    full = torch.zeros(CLASSES, 6, 8).scatter(
        0, raw.classes.permute(2, 0, 1), raw.scores.permute(2, 0, 1)
    )
    region = torch.tensor(box) * torch.tensor([8, 6, 8, 6]) - 0.5
    return roi_align(full[None], [region[None]], grid)[0].flatten(1).T.softmax(1)


@pytest.mark.parametrize("grid", [(14, 14), (3, 5)], ids=str)
def test_the_published_rule(grid: tuple[int, int]) -> None:
    raw = Raw()
    raw.scores = raw.scores - 6  # so that absent classes, at 0, come before some that are there
    box = [17 / 120, 11 / 90, 100 / 120, 72 / 90]
    crop = F.resized_crop(raw.map(), 11, 17, 61, 83, [64, 48])
    order = torch.arange(grid[0] * grid[1]).reshape(grid)
    for moved, patches in (
        (crop, order),
        (F.horizontal_flip(crop), order.flip(1)),
        (F.vertical_flip(F.horizontal_flip(crop)), order.flip(0, 1)),
    ):
        truth = published(raw, box, grid)[patches.flatten()]
        every = ToTokenTargets(grid, CLASSES, "published", num_classes=CLASSES)(moved)
        conserved(every, CLASSES)
        torch.testing.assert_close(dense(every, CLASSES).float(), truth, atol=1e-5, rtol=1e-4)
        few = ToTokenTargets(grid, 4, "published", num_classes=CLASSES)(moved)
        conserved(few, 4)
        torch.testing.assert_close(few.probs, truth.topk(4).values, atol=1e-5, rtol=1e-4)
        whole = published(raw, box, (1, 1))[0].topk(4).values
        torch.testing.assert_close(few.crop_probs, whole, atol=1e-5, rtol=1e-4)
        assert (few.weight == 1).all()


def test_the_published_rule_on_the_mirrored_view_and_in_an_extent() -> None:
    one, other = Raw(), Raw(seed=1)
    options: dict[str, Any] = {"rule": "published", "num_classes": CLASSES}
    both = one.map(mirrored=(other.scores, other.classes, other.rest))
    there = F.crop(F.horizontal_flip(both), 5, 6, 70, 60)
    alone = F.crop(other.map(), 5, 6, 70, 60)
    found, expected = (ToTokenTargets(4, 6, **options)(m) for m in (there, alone))
    torch.testing.assert_close(found.probs, expected.probs, atol=1e-5, rtol=1e-4)
    part = one.map(extent=(0.25, 0.0, 0.75, 1.0), canvas_size=(90, 240))
    inner = ToTokenTargets(4, 6, **options)(F.crop(part, 5, 66, 70, 60))
    plain = ToTokenTargets(4, 6, **options)(F.crop(one.map(), 5, 6, 70, 60))
    torch.testing.assert_close(inner.probs, plain.probs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: F.rotate(m, 10),
        lambda m: F.rotate(m, 90, expand=True),
        lambda m: F.pad(m, 5),
        lambda m: F.crop(m, -5, 0, 50, 50),
        lambda m: F.pad(m, 5, padding_mode="reflect"),
        lambda m: F.affine(m, 0, [5, 0], 1, [0]),
    ],
)
def test_the_published_rule_knows_crops_only(move: Any) -> None:
    to_targets = ToTokenTargets(4, 6, "published", num_classes=CLASSES)
    with pytest.raises(ValueError, match="crops, flips and resizes"):
        to_targets(move(Raw().map()))


def test_the_published_rule_needs_all_class_ids() -> None:
    with pytest.raises(ValueError, match="num_classes=20"):
        ToTokenTargets(4, 6, "published", num_classes=20)(Raw().map())


# --- the transform ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 0}, "grid"),
        ({"grid": (3, -1)}, "grid"),
        ({"k": 0}, "k must"),
        ({"rule": "dense"}, "rule"),
        ({"interpolation": "bicubic"}, "interpolation"),
        ({"rule": "published"}, "num_classes"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToTokenTargets(**options)


def test_it_leaves_the_rest_of_a_sample_alone() -> None:
    picture = tv_tensors.Image(torch.zeros(3, *SIZE))
    sample = {"image": picture, "maps": [Raw().map(), Raw(seed=1).map()], "name": "x"}
    out = ToTokenTargets((2, 3), 4)(sample)
    assert out["image"] is picture
    assert out["name"] == "x"
    assert all(type(targets) is TokenTargets for targets in out["maps"])
    assert not torch.equal(out["maps"][0].probs, out["maps"][1].probs)
    assert "grid=(2, 3)" in repr(ToTokenTargets((2, 3)))


class Samples(Dataset[Any]):
    transform = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(), ToTokenTargets(4)])

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        torch.manual_seed(index)
        picture = tv_tensors.Image(torch.zeros(3, *SIZE))
        return self.transform(picture, Raw(seed=index).map(label=index))


@pytest.mark.parametrize("workers", [0, 1])
def test_default_collate_suffices(workers: int) -> None:
    loader = DataLoader(
        Samples(),
        batch_size=4,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    (pictures, targets), *_ = loader
    assert pictures.shape == (4, 3, 32, 32)
    assert type(targets) is TokenTargets
    assert targets.label.tolist() == [0, 1, 2, 3]
    assert targets.probs.shape == (4, 16, 10)
    assert targets.crop_rest.shape == (4,)
    expected = default_collate([Samples()[i] for i in range(4)])[1]
    assert all(torch.equal(a, b) for a, b in zip(targets, expected, strict=True))
    moved = TokenTargets(*(field.to("cpu", non_blocking=True) for field in targets))
    assert torch.equal(moved.probs, targets.probs)
