"""Encoding against the definition in score_map, and what a decoded map may lose."""

import itertools

import numpy as np
import pytest
import torch

from tokenlabel.annotate.teacher.encode import encode
from tokenlabel.dataset.format.score_map import DROPPED, MapLayout, ScoreMap

LAYOUT = MapLayout(("identity",), (3, 2), 8, 40, residual=10)


def logits(seed: int = 0, count: int = 2, classes: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, 3, 2, classes, generator=generator)


def score_map(planes: dict[str, torch.Tensor], layout: MapLayout, row: int = 0) -> ScoreMap:
    empty = np.zeros((1, 0), np.uint8)
    stored = {"residual_classes": empty, "residual_codes": empty, "level": None}
    stored |= {name: plane[row, None].numpy() for name, plane in planes.items()}
    return ScoreMap(layout, **stored, label=0, size=(9, 9), extent=(0.0, 0.0, 1.0, 1.0))


def divergence(truth: torch.Tensor, stored: np.ndarray) -> np.ndarray:
    """KL of a cell's true distribution to the stored one, float64 [...]."""
    p = truth.double().softmax(-1).numpy()
    return (p * (np.log(p) - np.log(np.maximum(stored, 1e-30)))).sum(-1)


@pytest.mark.parametrize(
    "layout",
    [
        LAYOUT,
        LAYOUT._replace(residual=0, level=False),
        LAYOUT._replace(step=0.0),
        MapLayout(("identity",), (3, 2), 1, 70_000, residual=1),
        MapLayout(("identity",), (3, 2), 40, 40, residual=40),
    ],
)
def test_planes_have_the_layout_s_names_shapes_and_dtypes(layout: MapLayout) -> None:
    planes = encode(logits(classes=layout.num_classes), layout, 0.003)
    for (name, (dtype, shape)), (got, plane) in zip(
        layout.planes().items(), planes.items(), strict=True
    ):
        assert got == name and plane.is_contiguous()
        assert (plane.numpy().dtype, plane.shape[1:]) == (dtype, shape[1:])


def test_codes_are_rounded_steps_of_minus_log_p() -> None:
    """By hand, cell by cell."""
    truth = logits()
    planes = encode(truth, LAYOUT, 0.01)
    for b, r, c in itertools.product(range(2), range(3), range(2)):
        p = truth[b, r, c].double().softmax(0)
        order = p.argsort(descending=True)[:8].tolist()
        for rank, label in enumerate(order):
            code, stored = (planes[name][b, rank, r, c].item() for name in ("codes", "classes"))
            if rank and p[label] < 0.01:
                assert (code, stored) == (DROPPED, 0)
            else:
                assert (code, stored) == (round(float(-p[label].log()) * 4), label)
        level = planes["level"][b, r, c].float()
        torch.testing.assert_close(level, truth[b, r, c].logsumexp(0), rtol=2**-11, atol=0)


def test_the_residual_is_the_mean_of_what_cells_leave_out() -> None:
    truth = logits()
    planes = encode(truth, LAYOUT, 0.01)
    left = truth.double().softmax(-1)
    for b, k, r, c in itertools.product(range(2), range(8), range(3), range(2)):
        if planes["codes"][b, k, r, c] != DROPPED:
            left[b, r, c, planes["classes"][b, k, r, c].item()] = 0
    left = left.mean((1, 2))
    left /= left.sum(1, keepdim=True)
    for b in range(2):
        classes = planes["residual_classes"][b].long()
        assert classes.tolist() == sorted(left[b].argsort(descending=True)[:10].tolist())
        want = (-16 * left[b, classes].log()).round()
        assert (planes["residual_codes"][b] - want).abs().max() == 0


def test_decoding_gives_the_distribution_back() -> None:
    truth = logits(1)
    spread = [LAYOUT, LAYOUT._replace(residual=0), LAYOUT._replace(k=40, residual=40, step=0.0)]
    even, named, none = (
        divergence(truth[0], score_map(encode(truth, layout, floor), layout).dense()).mean()
        for layout, floor in zip((spread[1], spread[0], spread[2]), (0.003, 0.003, 0), strict=True)
    )
    assert none < 1e-3 < named < even < 0.2
    exact = score_map(encode(truth, LAYOUT._replace(step=0.0)), LAYOUT._replace(step=0.0))
    classes, raw = exact.logits()
    want = np.take_along_axis(truth[0].numpy(), classes.astype(np.int64), -1)
    np.testing.assert_allclose(raw, want, atol=0.02)


def test_ties_take_the_lower_class_id() -> None:
    truth = torch.zeros(1, 3, 2, 40)
    truth[..., :8] = 2
    planes = encode(truth, LAYOUT, 0.003)
    assert planes["residual_classes"][0].tolist() == list(range(8, 18))
    assert planes["residual_codes"][0].unique().tolist() == [round(16 * np.log(32))]


def test_where_every_class_is_stored_the_residual_names_none() -> None:
    layout = LAYOUT._replace(k=40, residual=40, step=0.0)
    planes = encode(logits(), layout)
    assert (planes["residual_codes"] == DROPPED).all()
    np.testing.assert_allclose(score_map(planes, layout).dense().sum(-1), 1, atol=2e-3)


def test_the_first_class_stays_unless_it_is_not_finite() -> None:
    truth = logits()
    truth[1, 2, 1, 7] = torch.nan
    truth[1, 0, 0, 7] = torch.inf
    truth[1, 1, 1, 7] = -torch.inf
    for layout in (LAYOUT, LAYOUT._replace(step=0.0)):
        codes = encode(truth, layout, 0.9)["codes"][:, 0]
        dropped = codes == DROPPED if layout.step else codes == torch.inf
        assert dropped.nonzero().tolist() == [[1, 0, 0], [1, 2, 1]]


@pytest.mark.parametrize("scale", [0.0, 1e3, 1e30])
def test_logits_of_any_size(scale: float) -> None:
    for step in (0.0, 0.25):
        layout = LAYOUT._replace(step=step)
        planes = encode(logits() * scale, layout)
        dense = score_map(planes, layout).dense()
        assert np.isfinite(dense).all()
        np.testing.assert_allclose(dense.sum(-1), 1, atol=1e-5)
        assert planes["level"].isfinite().all()
