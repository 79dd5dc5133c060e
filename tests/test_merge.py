"""The compiled averages against those in NumPy, which define them."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tokenlabel.dataset import exact, native
from tokenlabel.dataset.label_map import TokenLabelMap, _usable
from tokenlabel.dataset.merging import sparse_targets

SIZE = (90, 120)
#: What happens to the picture, one after the other; each gets random numbers from 0 to 1.
MOVES = {
    "crop": lambda m, a, b, c: F.resized_crop(
        m, int(80 * a), int(110 * b), 1 + int(89 * c), 1 + int(100 * a), [60, 44]
    ),
    "flip": lambda m, *_: F.horizontal_flip(m),
    "turn": lambda m, *_: F.rotate(m, 90, expand=True),
    "pad": lambda m, a, b, c: F.pad(m, [int(40 * a), int(60 * b), int(30 * c), 0]),
    "tilt": lambda m, a, *_: F.rotate(m, 360 * a),
    "slide": lambda m, a, b, _: F.affine(m, 0, [int(100 * a), int(-80 * b)], 1, [0.0]),
    "outside": lambda m, *_: F.crop(m, -500, -500, 60, 40),
}


def test_it_is_compiled_where_it_can_be() -> None:
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    assert native.compiled is not None


def dense_of(ids: Tensor, probs: Tensor, classes: int) -> np.ndarray:
    out = torch.zeros(*ids.shape[:-1], classes)
    return out.scatter_add_(-1, ids.long(), probs).numpy()


@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 7)),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.lists(st.sampled_from(sorted(MOVES)), max_size=3),
    st.sampled_from(["bilinear", "nearest"]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=300)
def test_equal_to_numpy(
    seed: int,
    shape: tuple[int, int, int],
    grid: tuple[int, int],
    moves: list[str],
    interpolation: str,
    half: bool,
    mirrored: bool,
) -> None:
    rng = np.random.default_rng(seed)
    views = []
    for _ in range(1 + mirrored):
        scores = rng.normal(0, 4, shape).astype("f2" if half else "f4")
        scores[rng.random(shape) < 0.1] = -np.inf
        views.append((scores, rng.integers(0, 40, shape), rng.normal(0, 2, shape[:2])))
    extent = (0.1, 0.0, 0.9, 0.75) if seed % 2 else (0, 0, 1, 1)
    score_map = TokenLabelMap.from_scores(
        *views[0],
        canvas_size=SIZE,
        extent=extent,
        label=7,
        mirrored=views[1] if mirrored else None,
    )
    if half and seed % 3:  # as a store gives them
        score_map = TokenLabelMap.stored(
            np.stack([view[0] for view in views]),
            np.stack([view[1] for view in views]).astype("u2" if seed % 3 == 1 else "u4"),
            np.stack([view[2] for view in views]).astype("f2"),
            canvas_size=SIZE,
            extent=extent,
            label=7,
        )
    for move in moves:
        score_map = MOVES[move](score_map, *rng.random(3))
    # So many that all classes are kept, and the order of equals does not matter.
    ids, dense, share = exact.averages(score_map, grid, interpolation)
    expected = sparse_targets(7, ids, dense, share, 40)
    assert native.compiled is not None
    got = exact._compiled_targets(native.compiled, score_map, grid, 40, interpolation)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]
    assert got.label == 7
    for ours, theirs in ((got[1:3], expected[1:3]), (got[5:7], expected[5:7])):
        np.testing.assert_allclose(dense_of(*ours, 40), dense_of(*theirs, 40), atol=3e-6)
        assert (ours[1].diff() <= 0).all()
    for i in (3, 4, 7):
        np.testing.assert_allclose(got[i], expected[i], atol=3e-6)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_the_k_largest_and_the_smaller_id_first(k: int) -> None:
    scores = torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0]).expand(3, 3, 5)
    classes = torch.tensor([9, 4, 70_000, 2, 3]).expand(3, 3, 5)
    score_map = TokenLabelMap.from_scores(
        scores, classes, torch.full((3, 3), -np.inf), canvas_size=SIZE
    )
    assert native.compiled is not None
    got = exact._compiled_targets(native.compiled, score_map, (2, 2), k, "bilinear")
    order = [3, 9, 70_000, 2, 4]
    assert got.crop_classes.tolist() == (order + [0] * 40)[:k]
    assert got.classes.tolist() == [(order + [0] * 40)[:k]] * 4
    mass = torch.tensor(2.0).exp() * 3 + torch.tensor(1.0).exp() * 2
    assert torch.allclose(got.probs[:, 0], torch.tensor(2.0).exp() / mass)


def test_arrays_that_do_not_fit_are_refused() -> None:
    merge = native.compiled
    assert merge is not None
    scores, rest = np.zeros((2, 4, 4, 3), "f2"), np.zeros((2, 4, 4), "f4")
    out = [np.zeros((5, 2), "i4"), np.zeros((5, 2), "f4"), np.zeros(5, "f4"), np.zeros(4, "f4")]
    ids = np.zeros((2, 4, 4, 3), "i4")
    path = ((0.1, 0, 0, 0, 0.1, 0, 0, 0, 1), (0, 0, 1, 1), (0, 0, 1, 1), (10, 10))
    common, more = (scores, ids, rest, 1, 4, 4, *out), (*path, (2, 2), False)
    merge.upright(*common, 2, *more)
    runs = (np.zeros(4, "i8"), np.ones(4, "f4"), np.arange(4), np.ones(4))
    merge.scattered(*common, 2, *runs)
    for wrong in (
        (scores[:1], ids, rest, 1, 4, 4, *out, 2),
        (scores, ids[:1], rest, 1, 4, 4, *out, 2),
        (scores, ids, rest[:1], 1, 4, 4, *out, 2),
        (scores, ids.astype("i8"), rest, 1, 4, 4, *out, 2),
        (scores.astype("f8"), ids, rest, 1, 4, 4, *out, 2),
        (scores, ids, rest, 2, 4, 4, *out, 2),
        (scores, ids, rest, -1, 4, 4, *out, 2),
        (scores, ids, rest, 1, 4, 5, *out, 2),
        (scores, ids, rest, 1, -4, -4, *out, 2),
        (scores, ids, rest, 1, 0, 4, *out, 2),
        (scores, ids, rest, 1, 1 << 40, 1 << 40, *out, 2),
        (*common, 3),
        (*common, 0),
        (*common, 1 << 62),
        (scores, ids, rest, 1, 4, 4, out[0][:4], *out[1:], 2),
        (scores, ids, rest, 1, 4, 4, out[0], out[1][:4], *out[2:], 2),
        (scores, ids, rest, 1, 4, 4, *out[:2], out[2][:4], out[3], 2),
        (scores, ids, rest, 1, 4, 4, *out[:3], out[3][:3], 2),
    ):
        with pytest.raises(ValueError, match="fit"):
            merge.upright(*wrong, *more)
        with pytest.raises(ValueError, match="fit"):
            merge.scattered(*wrong, *runs)
    for grid in ((2, 3), (0, 2), (2, 0), (-2, -2), (1 << 62, 4)):
        with pytest.raises(ValueError, match="fit"):
            merge.upright(*common, 2, *path, grid, False)
    cells, weights, offsets, share = runs
    for wrong_runs in (
        (cells + 16, weights, offsets, share),
        (cells - 1, weights, offsets, share),
        (cells, weights[:3], offsets, share),
        (cells, weights, offsets[::-1].copy(), share),
        (cells, weights, offsets + 3, share),
        (cells, weights, offsets[:3], share),
    ):
        with pytest.raises(ValueError, match="fit"):
            merge.scattered(*common, 2, *wrong_runs)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e300, -1e300, 0.0])
def test_no_geometry_reads_beyond_the_map(number: float) -> None:
    scores, rest = np.zeros((4, 4, 3), "f2"), np.zeros((4, 4), "f2")
    ids = np.arange(48, dtype="u2").reshape(4, 4, 3)
    out = [np.zeros((5, 9), "i4"), np.zeros((5, 9), "f4"), np.zeros(5, "f4"), np.zeros(4, "f4")]
    numbers = [0.1, 0, 0, 0, 0.1, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 1, 10, 10]
    assert native.compiled is not None
    for place in range(len(numbers)):
        wild = [*numbers[:place], number, *numbers[place + 1 :]]
        parts = (wild[:9], wild[9:13], wild[13:17], wild[17:])
        native.compiled.upright(
            scores, ids, rest, 0, 4, 4, *out, 9, *map(tuple, parts), (2, 2), place % 2 == 0
        )
        assert ((out[0] >= 0) & (out[0] < 48)).all()


def test_without_a_compiler_it_still_works() -> None:
    code = (
        "import sys; sys.modules['tokenlabel.dataset._merge'] = None\n"
        "from tokenlabel.dataset import ToTokenTargets, TokenLabelMap, native\n"
        "import torch; assert native.compiled is None\n"
        "m = TokenLabelMap.from_scores(torch.zeros(2, 2, 1), torch.ones(2, 2, 1).int(),"
        " torch.zeros(2, 2), canvas_size=(4, 4))\n"
        "assert torch.equal(ToTokenTargets(2, 1)(m).probs, torch.full((4, 1), 0.5))"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("dtype", ["f2", "f4"])
@pytest.mark.parametrize("score", [0.0, -np.inf, np.inf, np.nan])
@pytest.mark.parametrize("other", [0.0, -np.inf, np.inf, np.nan])
@pytest.mark.parametrize("other_dtype", ["f2", "f4"])
def test_what_is_usable(dtype: str, score: float, other: float, other_dtype: str) -> None:
    scores, rest = np.zeros((2, 3, 4), dtype), np.zeros((2, 3), other_dtype)
    scores[1, 2] = score
    scores[0, 0, :3] = -np.inf
    rest[1, 2] = other
    usable = np.isfinite([score, other]).any() and not {np.inf, np.nan} & {score, other}
    with pytest.MonkeyPatch.context() as patch:
        assert _usable(scores, rest) == usable
        patch.setattr(native, "compiled", None)
        assert _usable(scores, rest) == usable


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<u8"])
@pytest.mark.parametrize("count", [0, 1, 2, 77])
def test_unshuffle(dtype: str, count: int) -> None:
    items = np.random.default_rng(0).integers(0, 255, (count, np.dtype(dtype).itemsize), "u1")
    out = bytearray(items.size)
    assert native.compiled is not None
    native.compiled.unshuffle(items.T.tobytes(), out, items.shape[1])
    assert out == items.tobytes()
    for width in (0, 3, 5):
        with pytest.raises(ValueError, match="fit"):
            native.compiled.unshuffle(bytes(8), bytearray(8), width)
    with pytest.raises(ValueError, match="fit"):
        native.compiled.unshuffle(bytes(8), bytearray(6), 2)
