"""Targets of patches: what the numbers mean, exactly."""

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as F

from tests.jobs import config
from tests.leaves import CLASSES, LAYOUT, LAYOUTS, SIZE, by_points, dense, made_up, record, stored
from tokenlabel.annotate import annotate
from tokenlabel.dataset import LabelStore, TokenLabelMap, TokenLabels, TokenTargets, ToTokenLabels
from tokenlabel.dataset.format.chunks import shuffle
from tokenlabel.dataset.label_map.path import PixelPath
from tokenlabel.dataset.targets.record import word

Move = Callable[[TokenLabelMap], TokenLabelMap]
TWO_VIEWS = LAYOUTS["two views"]


@pytest.fixture(scope="module")
def store(sample: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> LabelStore:
    """Real maps, 5 x 5, of both views of the sample's training images."""
    out = tmp_path_factory.mktemp("targets")
    annotate(config(sample, out, input_size=160, views=["identity", "hflip"]))
    return LabelStore(out / "train")


def sound(labels: TokenLabels, grid: Any) -> None:
    """Everything that must hold for any targets."""
    found = labels.targets(grid)
    whole = found.dense()
    maps = labels.record_layout.maps
    cells, (batch, patches) = math.prod(maps.grid), found.weight.shape
    assert found.classes.shape == found.values.shape == (batch, cells, maps.k)
    assert found.window.shape == (batch, patches, len(found.offsets))
    assert whole.shape == (batch, patches, labels.num_classes)
    assert [part.dtype for part in found] == [
        *(torch.int64, torch.float32, torch.int64, torch.int64),
        *[torch.float32] * 4,
    ]
    assert found.origin.min() >= 0
    assert (found.origin[..., None] + found.offsets).max() < cells
    assert torch.isfinite(whole).all()
    assert whole.min() > -1e-6
    assert ((found.weight >= 0) & (found.weight <= 1 + 1e-5)).all()
    there = (found.weight > 0).float()
    torch.testing.assert_close(whole.sum(-1), there, atol=1e-5, rtol=0)
    basis = found.basis[labels.has_map].sum(-1)
    torch.testing.assert_close(basis, torch.ones_like(basis))
    assert (found.window.sum(-1) == 0)[there == 0].all()
    assert (found.share == 0)[there == 0].all()


# --- the definition --------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_untouched_image_on_the_maps_own_grid(name: str) -> None:
    """A hat's integral over its own cell is 3/4, over a neighbour's 1/8."""
    layout = LAYOUTS[name]
    leaf, score_map = made_up(layout, label=3)
    cells = torch.from_numpy(score_map.dense()).movedim(-1, 0)[:, None]
    kernel = torch.tensor([1, 6, 1]) / 8
    padded = torch.nn.functional.pad(cells, [1] * 4, "replicate")
    blurred = torch.nn.functional.conv2d(padded, (kernel[:, None] * kernel)[None, None])
    expected = blurred[:, 0].flatten(1).T
    torch.testing.assert_close(dense(leaf, layout.grid), expected, atol=1e-6, rtol=1e-4)
    assert record(leaf).label.tolist() == [3]
    sound(record(leaf), layout.grid)


@pytest.mark.parametrize("grid", [(7, 7), (3, 5), (1, 1), (20, 17)], ids=str)
def test_upright_windows_are_integrals(grid: tuple[int, int]) -> None:
    leaf, score_map = made_up()
    crop = F.horizontal_flip(F.resized_crop(leaf, 11, 17, 61, 83, [64, 48]))
    expected, weight = by_points(crop, score_map, grid, 48)
    torch.testing.assert_close(dense(crop, grid).double(), expected, atol=1e-4, rtol=0)
    assert (record(crop).targets(grid).weight[0] - weight).abs().max() < 1e-5
    sound(record(crop), grid)


CORNERS = [(0, 0), (119, 0), (119, 89), (0, 89)]
BENT = 0.06 * torch.sin(torch.linspace(0, 6, 90 * 120 * 2)).reshape(1, 90, 120, 2)


def turned_and_cropped(leaf: TokenLabelMap, times: int) -> TokenLabelMap:
    for _ in range(times):
        leaf = F.rotate(F.resized_crop(leaf, 2, 3, 84, 114, [90, 120]), 7)
    return leaf


#: Paths of every kind, and how far (mean total variation) sub-points may be from the integral.
PATHS: dict[str, tuple[Move, float]] = {
    "crop": (lambda m: F.resized_crop(m, 8, 5, 70, 90, [64, 80]), 1e-3),
    "crop beyond the image": (lambda m: F.crop(m, -20, 30, 90, 120), 2e-3),
    "quarter turn": (lambda m: F.rotate(m, 90, expand=True), 1e-3),
    "rotation": (lambda m: F.rotate(m, 33), 0.02),
    "expanding rotation": (lambda m: F.rotate(F.horizontal_flip(m), -20, expand=True), 0.02),
    "affine": (lambda m: F.affine(m, 12, [5, -9], 1.3, [10.0, 4.0]), 0.02),
    "perspective": (
        lambda m: F.perspective(m, CORNERS, [(9, 4), (100, 0), (119, 80), (3, 89)]),
        0.02,
    ),
    "reflection": (lambda m: F.pad(m, [30, 20], padding_mode="reflect"), 0.02),
    "edge": (lambda m: F.pad(m, [30, 20], padding_mode="edge"), 0.02),
    "symmetric": (lambda m: F.pad(m, [100, 20], padding_mode="symmetric"), 0.02),
    "elastic": (lambda m: F.elastic(m, BENT), 0.02),
    "a chain of nine": (lambda m: turned_and_cropped(m, 9), 0.02),
}


@pytest.mark.parametrize("name", PATHS)
def test_every_path_on_real_maps(name: str, store: LabelStore) -> None:
    move, limit = PATHS[name]
    height, width = SIZE
    for row, grid in ((0, (4, 4)), (5, (7, 5))):
        leaf, score_map = stored(store, row)
        leaf = move(leaf.with_path(PixelPath.of(SIZE), (height, width)))
        expected, weight = by_points(leaf, score_map, grid, 40)
        found = record(leaf).targets(grid)
        far = 0.5 * (found.dense()[0] - expected).abs().sum(1)[weight > 0.3]
        assert len(far) and far.mean() < limit
        assert (found.weight[0] - weight).abs().mean() < 0.03
        sound(record(leaf), grid)


# --- laws ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    box=st.tuples(*[st.integers(-30, 60)] * 2, *[st.integers(1, 100)] * 2),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    flip=st.booleans(),
)
def test_a_finer_grid_pools_to_the_coarser(box: Any, grid: tuple[int, int], flip: bool) -> None:
    crop = F.resize(F.crop(made_up()[0], *box), [56, 48])
    crop = F.horizontal_flip(crop) if flip else crop
    coarse, fine = (record(crop).targets(g) for g in (grid, (2 * grid[0], 2 * grid[1])))

    def pooled(values: Tensor) -> Tensor:
        return values.reshape(grid[0], 2, grid[1], 2, -1).mean((1, 3)).flatten(0, 1)

    torch.testing.assert_close(pooled(fine.weight)[:, 0], coarse.weight[0], atol=2e-5, rtol=0)
    mass = pooled(fine.dense() * fine.weight[..., None])
    expected = coarse.dense()[0] * coarse.weight[0, :, None]
    torch.testing.assert_close(mass, expected, atol=2e-5, rtol=0)


BOX = st.tuples(*[st.integers(-30, 50)] * 2, *[st.integers(4, 120)] * 2)


@settings(deadline=None, max_examples=25)
@given(first=BOX, second=BOX)
def test_a_crop_of_a_crop_is_a_crop(first: Any, second: Any) -> None:
    leaf, _ = made_up()
    twice = record(F.crop(F.crop(leaf, *first), *second)).targets((3, 4))
    once = F.crop(leaf, first[0] + second[0], first[1] + second[1], *second[2:])
    once = record(once).targets((3, 4))
    # The same image, but that all outside the first crop is fill.
    assert (twice.weight <= once.weight + 1e-5).all()
    same = (twice.weight - once.weight).abs()[0] < 1e-6
    torch.testing.assert_close(twice.dense()[0][same], once.dense()[0][same], atol=2e-5, rtol=0)


@settings(deadline=None, max_examples=15)
@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_a_resize_changes_nothing(size: tuple[int, int]) -> None:
    crop = F.crop(made_up()[0], 10, 20, 60, 70)
    before, after = record(crop), record(F.resize(crop, list(size)))
    torch.testing.assert_close(
        before.targets((5, 4)).dense(), after.targets((5, 4)).dense(), atol=1e-5, rtol=0
    )
    for pool in ("logits", "probs"):
        torch.testing.assert_close(before.crop(pool), after.crop(pool), atol=1e-5, rtol=0)


def test_flips_and_quarter_turns_permute_patches() -> None:
    grid = torch.arange(24).reshape(4, 6)
    crop = F.crop(made_up()[0], 10, 20, 60, 70)
    plain = dense(crop, (4, 6))
    for order, moved in (
        (grid.flip(1), F.horizontal_flip(crop)),
        (grid.flip(0), F.vertical_flip(crop)),
        (grid.rot90(2), F.rotate(crop, 180)),
        (grid.rot90(1), F.rotate(crop, 90, expand=True)),
    ):
        found = dense(moved, tuple(order.shape))
        torch.testing.assert_close(plain[order.flatten()], found, atol=1e-5, rtol=0)


def test_weight_is_the_fraction_inside() -> None:
    leaf, _ = made_up(canvas_size=(80, 80))
    padded = record(F.pad(leaf, [40, 0, 0, 20]))
    expected = torch.ones(5, 6)  # patches of 20 x 20 pixels
    expected[:, :2] = 0
    expected[4:] = 0
    found = padded.targets((5, 6)).weight.reshape(5, 6)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.equal(found == 0, expected == 0)
    sound(padded, (5, 6))
    half = record(F.pad(leaf, [20, 0, 20, 0])).targets(2).weight
    torch.testing.assert_close(half, torch.full((1, 4), 2 / 3))


@pytest.mark.parametrize("turn", [0, 20])
def test_outside_the_extent_there_is_no_label(turn: int) -> None:
    box = (0.25, 0.0, 0.75, 1.0)
    leaf, _ = made_up(extent=box, canvas_size=(80, 80))
    labels = record(F.rotate(leaf, 180 if turn else 0))
    weight = labels.targets(4).weight.reshape(4, 4)
    torch.testing.assert_close(weight, torch.tensor([[0.0, 1, 1, 0]] * 4), atol=1e-5, rtol=0)
    sound(labels, 4)
    part = dense(F.crop(leaf, 0, 20, 80, 40), (4, 2))
    torch.testing.assert_close(part, dense(made_up()[0], (4, 2)), atol=1e-5, rtol=0)
    turned = record(F.rotate(leaf, turn))
    sound(turned, 4)
    assert turned.targets(4).weight.sum() < 9


NOTHING: dict[str, Move] = {
    "crop elsewhere": lambda m: F.crop(m, 500, 500, 20, 20),
    "translation": lambda m: F.affine(m, 0, [1000, 0], 1.0, [0]),
    "turned translation": lambda m: F.affine(m, 30, [1000, 0], 1.0, [0]),
    "crop elsewhere, turned": lambda m: F.rotate(F.crop(m, 500, 500, 20, 20), 10),
    "no map": lambda m: TokenLabelMap(b"", LAYOUT, canvas_size=(30, 40)),
    "no map, turned": lambda m: F.rotate(TokenLabelMap(b"", LAYOUT, canvas_size=(30, 40)), 9),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_of_the_image_is_left(name: str) -> None:
    labels = record(NOTHING[name](made_up()[0]), made_up()[0])
    sound(labels, 3)
    found = labels.targets(3)
    assert (found.weight[0] == 0).all() and (found.weight[1] > 0.9).all()
    assert (found.dense()[0] == 0).all()
    for pool in ("logits", "probs"):
        assert (labels.crop(pool)[0] == 0).all()
        torch.testing.assert_close(labels.crop(pool)[1].sum(), torch.tensor(1.0))
    sparse = labels.sparse(3, 4)
    assert (sparse.rest[0] == 1).all() and sparse.crop_rest[0] == 1
    assert (sparse.probs[0] == 0).all() and (sparse.crop_probs[0] == 0).all()


@pytest.mark.filterwarnings("error")
def test_points_on_the_horizon_have_no_source() -> None:
    leaf = made_up(canvas_size=(170, 170))[0]
    # Column 95 of the image, where sub-points and the points of a record lie, is the horizon.
    far = F.perspective(leaf, None, None, coefficients=[1, 0, 0, 0, 1, 0, -1 / 95, 0])
    labels = record(far, shrink=0.3)
    assert np.isfinite(labels.record_layout.reach).all() and word(labels, "shrink").isfinite()
    targets = labels.targets(17)
    there = targets.weight[0] > 0
    assert 0 < there.sum() < 17**2
    torch.testing.assert_close(targets.dense()[0].sum(1), there.float(), atol=1e-5, rtol=0)


def test_what_was_cropped_away_does_not_come_back() -> None:
    leaf, _ = made_up(canvas_size=(80, 80))
    cropped = F.pad(F.crop(leaf, 20, 20, 40, 40), [20])
    for moved in (cropped, F.rotate(cropped, 1e-9)):
        weight = record(moved).targets(4).weight.reshape(4, 4)
        assert weight[1:3, 1:3].min() > 0.99
        assert weight.sum() < 4.01


def test_the_mirrored_view() -> None:
    """Its cells lie as in the mirrored image; so flipping it back gives the same as the first."""
    both, score_map = made_up(TWO_VIEWS, extent=(0.1, 0.0, 0.6, 0.9))
    planes = b"".join(shuffle(getattr(score_map, name)[1:]) for name in TWO_VIEWS.planes())
    second = TokenLabelMap(planes, LAYOUT, canvas_size=SIZE, extent=(0.4, 0.0, 0.9, 0.9))
    moves: list[Move] = [
        lambda m: m,
        lambda m: F.rotate(m, 25),
        lambda m: F.resized_crop(m, 5, 9, 70, 66, [50, 60]),
        lambda m: F.pad(m, 20, padding_mode="reflect"),
    ]
    for move in moves:
        there = record(move(F.horizontal_flip(both))).targets(5)
        alone = record(move(second)).targets(5)
        torch.testing.assert_close(there.dense(), alone.dense(), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(there.weight, alone.weight, atol=2e-5, rtol=0)
    assert not torch.equal(dense(both, 5), dense(F.horizontal_flip(both), 5).flip(0))


# --- a batch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", [0.0, 0.3])
def test_a_batch_is_its_images(shrink: float) -> None:
    """Upright and tilted paths, a lattice, a fold, an image without a map and a mirrored one."""
    torch.manual_seed(0)
    leaves = []
    for seed, name in enumerate([*PATHS, "elastic"]):
        leaf, _ = made_up(TWO_VIEWS, seed, label=seed)
        leaf = F.horizontal_flip(leaf) if seed % 3 == 0 else leaf
        leaves.append(PATHS[name][0](leaf))
    leaves.append(TokenLabelMap(b"", TWO_VIEWS, canvas_size=(30, 40), label=99))
    random.Random(0).shuffle(leaves)
    batch = record(*leaves, shrink=shrink)
    assert batch.label.tolist() == [leaf.label for leaf in leaves]
    assert batch.has_map.tolist() == [bool(leaf.planes) for leaf in leaves]
    found, crops = batch.targets((5, 4)), batch.crop()
    sound(batch, (5, 4))
    for position, leaf in enumerate(leaves):
        single = record(leaf, shrink=shrink)
        alone = single.targets((5, 4))
        torch.testing.assert_close(found.dense()[position], alone.dense()[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.weight[position], alone.weight[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(crops[position], single.crop()[0], atol=1e-5, rtol=0)
    order = torch.tensor([3, 0, 3])
    taken = found.take(order)
    assert torch.equal(taken.dense(), found.dense()[order])


def test_shrinking_draws_small_crops_towards_the_mean() -> None:
    leaf, score_map = made_up()
    mean = torch.from_numpy(score_map.dense()).mean((0, 1))
    for box, part in (((0, 0, 90, 120), 0.0), ((10, 20, 45, 60), 0.3), ((3, 5, 9, 12), 0.5)):
        crop = F.resized_crop(leaf, *box, [64, 80])
        for moved in (crop, F.rotate(crop, 1e-7)):
            labels = record(moved, shrink=0.3)
            expected = (1 - part) * dense(moved, 4) + part * mean
            torch.testing.assert_close(labels.targets(4).dense()[0], expected, atol=2e-3, rtol=0)
            sound(labels, 4)
    edge = record(
        F.pad(leaf, [120, 0, 0, 0]), F.resized_crop(leaf, 3, 5, 9, 12, [9, 9]), shrink=0.3
    )
    assert (edge.targets((1, 2)).dense()[0, 0] == 0).all(), "padding has no target"
    with pytest.raises(ValueError, match=r"shrink must be 0 or more.*-1"):
        ToTokenLabels(4, shrink=-1)


# --- merged and cut, and the whole crop -------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 10, CLASSES, 100])
def test_the_k_largest(k: int) -> None:
    crop = F.resized_crop(made_up()[0], 11, 17, 61, 83, [64, 48])
    labels = record(crop, NOTHING["no map"](crop))
    whole, found = labels.targets(6), labels.sparse(6, k)
    assert type(found) is TokenTargets
    expected = whole.dense().topk(min(k, CLASSES))
    torch.testing.assert_close(found.probs, expected.values)
    assert torch.equal(found.classes, expected.indices.where(found.probs > 0, 0))
    for probs, rest in ((found.probs, found.rest), (found.crop_probs, found.crop_rest)):
        assert (probs.diff(dim=-1) <= 0).all() and (rest >= 0).all()
        torch.testing.assert_close(probs.sum(-1) + rest, torch.ones_like(rest), atol=1e-5, rtol=0)
    assert torch.equal(found.weight, whole.weight)
    torch.testing.assert_close(found.crop_probs, labels.crop().topk(min(k, CLASSES)).values)


def test_sparse_targets_as_windows() -> None:
    sparse = record(made_up()[0], NOTHING["no map"](made_up()[0])).sparse(6, 4)
    again = sparse.windows(CLASSES)
    expected = torch.zeros(2, 36, CLASSES)
    expected[0] = sparse.rest[0, :, None] / (CLASSES - 4)
    expected[0].scatter_(1, sparse.classes[0], sparse.probs[0])
    torch.testing.assert_close(again.dense(), expected, atol=1e-6, rtol=0)
    assert torch.equal(again.weight, sparse.weight)


@pytest.mark.parametrize("name", ["as annotated", "float16", "all classes stored", "two views"])
@pytest.mark.parametrize("turn", [0.0, 17.0])
def test_the_crops_target(name: str, turn: float) -> None:
    layout = LAYOUTS[name]
    leaf, score_map = made_up(layout)
    crop = F.rotate(F.horizontal_flip(F.resized_crop(leaf, 11, 17, 61, 83, [64, 48])), turn)
    cells = score_map.dense(int(crop.is_mirrored)).astype(float)
    # Of all patches together: as one patch.
    mean, _ = by_points(crop, score_map, (1, 1), 400)
    found = record(crop).crop("probs")[0].double()
    torch.testing.assert_close(found, mean[0], atol=5e-4, rtol=0)
    logs, _ = by_points(crop, score_map, (1, 1), 400, np.log(np.maximum(cells, 1e-12)))
    found = record(crop).crop()[0].double()
    torch.testing.assert_close(found, logs[0].softmax(-1), atol=2e-3, rtol=0)
    # Shrinking is for patches.
    for pool in ("logits", "probs"):
        drawn = record(crop, shrink=0.3).crop(pool)
        torch.testing.assert_close(drawn, record(crop).crop(pool), atol=1e-6, rtol=1e-4)


# --- hostile maps ----------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [0.0, 17.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_any_size(dtype: torch.dtype, turn: float) -> None:
    torch.manual_seed(0)
    extreme = torch.tensor([65504.0, 60000.0, 0.0, -65504.0, 1e-7])
    scores = extreme[torch.randint(5, (6, 8, 5))].to(dtype)
    classes = torch.rand(6, 8, CLASSES).argsort(-1)[..., :5]
    rest = extreme[torch.randint(5, (6, 8))].to(dtype)
    leaf = TokenLabelMap.from_scores(scores, classes, rest, canvas_size=SIZE, num_classes=CLASSES)
    labels = record(F.rotate(leaf, turn))
    sound(labels, 7)
    for pool in ("logits", "probs"):
        torch.testing.assert_close(labels.crop(pool).sum(), torch.tensor(1.0))


def test_entries_without_a_class_do_not_count() -> None:
    """Padding of a ragged map: class 0 at -inf, also in cells that hold class 0 for real."""
    scores = torch.tensor([[[1.0, 0.0, -torch.inf], [2.0, -torch.inf, -torch.inf]]])
    classes = torch.tensor([[[0, 4, 0], [7, 0, 0]]])
    leaf = TokenLabelMap.from_scores(
        scores, classes, torch.zeros(1, 2), canvas_size=SIZE, num_classes=9
    )
    left = dense(F.crop(leaf, 0, 0, 90, 20), 1)[0]  # within the first half of the first cell
    right = dense(F.crop(leaf, 0, 100, 90, 20), 1)[0]
    total = math.e + 2
    expected = torch.full((2, 9), 1 / total / 7)
    expected[0, [0, 4]] = torch.tensor([math.e / total, 1 / total])
    expected[1] = 1 / (1 + math.e**2) / 8
    expected[1, 7] = math.e**2 / (1 + math.e**2)
    torch.testing.assert_close(torch.stack([left, right]), expected, atol=1e-3, rtol=0)
    sound(record(leaf), (2, 3))


# --- boxes -----------------------------------------------------------------------------------


def test_boxes_are_crops(store: LabelStore) -> None:
    rows, flips = [3, 0, 3], [False, True, True]
    boxes = [(0.25, 0.125, 0.75, 1.0), (0.0, 0.5, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0)]
    labels = store.labels([3, store.keys[0], 3], boxes, flips, (4, 4), 0.3)
    assert labels.grid == (4, 4)
    assert labels.label.tolist() == [store.ground_truth[row] for row in rows]
    leaves = []
    for row, (x0, y0, x1, y1), flip in zip(rows, boxes, flips, strict=True):
        leaf = store.leaf(row, (80, 160))
        top, left = round(y0 * 80), round(x0 * 160)
        leaf = F.crop(leaf, top, left, round(y1 * 80) - top, round(x1 * 160) - left)
        leaves.append(F.horizontal_flip(leaf) if flip else leaf)
    expected = record(*leaves, shrink=0.3)
    torch.testing.assert_close(
        labels.targets().dense(), expected.targets(4).dense(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(labels.crop(), expected.crop(), atol=1e-5, rtol=0)
    padded = store.labels([0], np.array([[-0.5, 0.0, 0.5, 1.0]])).targets((1, 2)).weight
    torch.testing.assert_close(padded, torch.tensor([[0.0, 1.0]]))
    for box in ((0.5, 0, 0.5, 1), (0, 0, 100, 80)):
        with pytest.raises(ValueError, match="Remedy: divide pixels by the image's"):
            store.labels([0], [box])
    for wrong in (([0, 1], boxes[:1]), ([0], boxes[:1], [True, True]), ([0], boxes[:1], [0.5])):
        with pytest.raises(ValueError, match="each row needs a box"):
            store.labels(*wrong)
    tensors = store.labels(torch.tensor(rows), torch.tensor(boxes), torch.tensor(flips), 4, 0.3)
    assert torch.equal(tensors, labels)
    with pytest.raises(IndexError):
        store.labels([99], boxes[:1])


# --- compiled --------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles C++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_targets_are_the_same() -> None:
    leaves = [move(made_up(LAYOUT, seed)[0]) for seed, (move, _) in enumerate(PATHS.values())]
    labels = record(*leaves)

    def step(labels: TokenLabels) -> tuple[Tensor, ...]:
        return tuple(labels.targets((3, 4)))

    compiled = torch.compile(step, fullgraph=True)
    for mine, eager in zip(compiled(labels), step(labels), strict=True):
        torch.testing.assert_close(mine, eager, atol=1e-5, rtol=0)


def test_autocast_rounds_nothing() -> None:
    labels = record(made_up()[0], F.rotate(made_up(seed=1)[0], 17.0), shrink=0.3)

    def found() -> list[Tensor]:
        targets = labels.targets(4)
        return [*targets, targets.dense(), *labels.sparse(4), labels.crop(), labels.crop("probs")]

    with torch.autocast("cpu", torch.bfloat16):
        rounded = found()
    for one, other in zip(rounded, found(), strict=True):
        assert torch.equal(one, other)


# --- published -------------------------------------------------------------------------------


class Raw:
    """Logits of which the best k are stored, as float16 -log p."""

    def __init__(self, seed: int = 0, k: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(6, 8, CLASSES, generator=generator) - 6
        # So that absent classes, at 0, come before some that are there.
        self.scores, self.classes = logits.topk(k)
        self.rest = logits.scatter(-1, self.classes, -math.inf).logsumexp(-1)

    def leaf(self, **options: Any) -> TokenLabelMap:
        options = {"canvas_size": SIZE, "num_classes": CLASSES} | options
        return TokenLabelMap.from_scores(self.scores, self.classes, self.rest, **options)

    def published(self, box: list[float], grid: tuple[int, int]) -> Tensor:
        """The rule, dense: scatter, RoIAlign of the box, softmax. [N, CLASSES]."""
        maps = torch.zeros(CLASSES, 6, 8)
        maps.scatter_(0, self.classes.permute(2, 0, 1), self.scores.permute(2, 0, 1))
        region = torch.tensor(box) * torch.tensor([8, 6, 8, 6]) - 0.5
        return roi_align(maps[None], [region[None]], grid)[0].flatten(1).T.softmax(1)


def published(leaf: TokenLabelMap, grid: Any, k: int = CLASSES) -> TokenTargets:
    return record(leaf).sparse(grid, k, rule="published")


@pytest.mark.parametrize("grid", [(14, 14), (3, 5)], ids=str)
def test_the_published_rule(grid: tuple[int, int]) -> None:
    raw = Raw()
    box = [17 / 120, 11 / 90, 100 / 120, 72 / 90]
    crop = F.resized_crop(raw.leaf(), 11, 17, 61, 83, [64, 48])
    order = torch.arange(grid[0] * grid[1]).reshape(grid)
    for moved, patches in (
        (crop, order),
        (F.horizontal_flip(crop), order.flip(1)),
        (F.vertical_flip(F.horizontal_flip(crop)), order.flip(0, 1)),
    ):
        truth = raw.published(box, grid)[patches.flatten()]
        every = published(moved, grid)
        found = torch.zeros_like(truth).scatter_(1, every.classes[0], every.probs[0])
        torch.testing.assert_close(found, truth, atol=2e-3, rtol=0)
        few = published(moved, grid, 4)
        torch.testing.assert_close(few.probs[0], truth.topk(4).values, atol=2e-3, rtol=0)
        whole = raw.published(box, (1, 1))[0].topk(4).values
        torch.testing.assert_close(few.crop_probs[0], whole, atol=2e-3, rtol=0)
        assert (few.weight == 1).all()


def test_the_published_rule_on_the_mirrored_view_and_in_an_extent() -> None:
    one, other = Raw(), Raw(seed=1)
    both = one.leaf(mirrored=(other.scores, other.classes, other.rest))
    there, alone = (F.crop(m, 5, 6, 70, 60) for m in (F.horizontal_flip(both), other.leaf()))
    torch.testing.assert_close(published(there, 4).probs, published(alone, 4).probs)
    part = one.leaf(extent=(0.25, 0.0, 0.75, 1.0), canvas_size=(90, 240))
    inner, plain = F.crop(part, 5, 66, 70, 60), F.crop(one.leaf(), 5, 6, 70, 60)
    torch.testing.assert_close(published(inner, 4).probs, published(plain, 4).probs)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: F.rotate(m, 10),
        lambda m: F.rotate(m, 90, expand=True),
        lambda m: F.pad(m, 5),
        lambda m: F.crop(m, -5, 0, 50, 50),
        lambda m: F.pad(m, 5, padding_mode="reflect"),
        lambda m: F.affine(m, 0, [5, 0], 1, [0]),
        lambda m: F.elastic(m, torch.zeros(1, *SIZE, 2)),
    ],
)
def test_the_published_rule_knows_crops_only(move: Any) -> None:
    with pytest.raises(ValueError, match="crops, flips and resizes"):
        published(move(Raw().leaf()), 4)


def test_the_published_rule_of_a_batch_with_missing_maps() -> None:
    leaf = Raw().leaf()
    missing = TokenLabelMap(b"", leaf.map_layout, canvas_size=(30, 40))
    both = record(leaf, missing).sparse(4, 6, rule="published")
    torch.testing.assert_close(both.probs[:1], published(leaf, 4, 6).probs)
    assert (both.weight[1] == 0).all() and (both.rest[1] == 1).all()


@pytest.mark.parametrize("residual", [8, 9])
def test_the_published_rule_of_one_cell_and_of_no_image(residual: int) -> None:
    layout = LAYOUTS["one cell"]._replace(k=4, residual=residual)
    one = record(made_up(layout)[0])
    found = one.sparse(2, 3, rule="published")
    torch.testing.assert_close(found.probs, found.crop_probs[:, None].expand(-1, 4, -1))
    assert one[:0].sparse(2, 3, rule="published").probs.shape == (0, 4, 3)


# --- options ---------------------------------------------------------------------------------


def test_bad_options() -> None:
    labels = record(made_up()[0])
    for call, message in (
        (lambda: labels.targets(0), "grid"),
        (lambda: labels.targets((3, -1)), "grid"),
        (lambda: labels.targets(), r"do not say it. Remedy: TokenLabelDataset\(..., grid=14\)"),
        (lambda: labels.sparse(4, 0), "k must"),
        (lambda: labels.sparse(4, rule="dense"), "rule"),
        (lambda: published(made_up(LAYOUTS["no level"])[0], 4), r"without `level`.*Remedy"),
        (lambda: labels.crop("max"), "pool"),
        (lambda: ToTokenLabels((0, 3)), "grid"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_end_of_a_pipeline_leaves_the_rest_of_a_sample_alone() -> None:
    image = tv_tensors.Image(torch.zeros(3, *SIZE))
    maps = [made_up(seed=0)[0], made_up(seed=1)[0]]
    out = ToTokenLabels((2, 3))({"image": image, "maps": maps, "name": "x"})
    assert out["image"] is image
    assert out["name"] == "x"
    assert all(type(labels) is TokenLabels and labels.grid == (2, 3) for labels in out["maps"])
    assert not torch.equal(*out["maps"])
    assert "grid=(2, 3)" in repr(ToTokenLabels((2, 3)))
