"""`compare-labels`: divergences against dense NumPy, and sets that cannot be compared."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.maps import attrs, random_rows, write_split
from tests.painted import invoke, write_class_names
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.format.shard import shard_name, write_shard
from tokenlabel.inspection.compare import compare
from tokenlabel.inspection.statistics import divergence

LAYOUT = MapLayout(("identity",), (4, 6), 5, 50, residual=8)
KEYS = [f"a/{n:02d}.jpg" for n in range(14)]


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.maximum(q, 1e-12)), 0).sum(1)


@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_divergences_are_their_definitions(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(classes, 0.3), (2, 8))
    p[0] = np.eye(classes)[0]  # no mass at all in some classes
    found = divergence(p, q)
    np.testing.assert_allclose(found.kl, kl(p, q), atol=1e-9)
    np.testing.assert_allclose(found.reverse, kl(q, p), atol=1e-9)
    middle = (p + q) / 2
    np.testing.assert_allclose(found.js, (kl(p, middle) + kl(q, middle)) / 2, atol=1e-9)
    assert (found.js <= np.log(2) + 1e-9).all()
    own = divergence(p, p)
    assert np.allclose(own.kl, 0) and np.allclose(own.js, 0)


def test_equal_sets_do_not_differ(tmp_path: Path) -> None:
    write_split(tmp_path, KEYS, LAYOUT)
    facts = compare(tmp_path, tmp_path)
    assert facts["top1_agreement"] == 1 and facts["kl_a_b"]["mean"] < 1e-12
    assert facts["different"] == [] and facts["common"] == facts["compared"] == 14
    assert "no image differs" in invoke("compare-labels", tmp_path, tmp_path)


def test_the_images_that_differ_most_are_named(tmp_path: Path) -> None:
    """Shard 1 of b is of another seed; all other shards are equal."""
    for folder, seed in (("a", 0), ("b", 0), ("c", 9)):
        write_split(tmp_path / folder, KEYS, LAYOUT, 4, seed)
    name = "shard-00001-of-00004.h5"
    (tmp_path / "c" / name).replace(tmp_path / "b" / name)
    facts = compare(tmp_path / "a", tmp_path / "b")
    assert {image["key"] for image in facts["different"]} == {*KEYS[4:8]}
    shares = [image["js"] for image in facts["different"]]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.1
    text = invoke("compare-labels", tmp_path / "a", tmp_path / "b")
    assert f"'{facts['different'][0]['key']}'" in text


def test_other_k_grid_and_missing_images(tmp_path: Path) -> None:
    write_split(tmp_path / "a", KEYS, LAYOUT, errors={KEYS[3]: "truncated"})
    write_split(tmp_path / "b", [*KEYS[2:], "b.jpg"], LAYOUT._replace(k=9, grid=(2, 3)))
    facts = compare(tmp_path / "a", tmp_path / "b")
    assert (facts["common"], facts["compared"], facts["grid"]) == (12, 11, [2, 3])
    assert (facts["a"]["only_here"], facts["b"]["only_here"]) == (2, 1)
    assert 0 < facts["js"]["mean"] < np.log(2)
    text = invoke("compare-labels", tmp_path / "a", tmp_path / "b")
    assert "2 images only here" in text and "11 with both maps" in text


def test_a_coarser_grid_is_an_average(tmp_path: Path) -> None:
    """Maps with the same cell everywhere are the same on any grid."""
    one = random_rows(LAYOUT._replace(grid=(1, 1)), 1)
    for name, grid in (("a", (4, 6)), ("b", (2, 5))):
        layout = LAYOUT._replace(grid=grid)
        maps = {
            plane: np.broadcast_to(one.maps[plane], (1, *shape)).astype(dtype)
            for plane, (dtype, shape) in layout.planes().items()
        }
        (tmp_path / name).mkdir()
        path = tmp_path / name / shard_name(0, 1)
        with write_shard(path, layout, ["x.jpg"], [0], attrs(0, 1, 0)) as writer:
            writer.append(maps, *one[1:])
    facts = compare(tmp_path / "a", tmp_path / "b")
    assert facts["grid"] == [2, 5]
    assert facts["js"]["mean"] < 1e-6 and facts["top1_agreement"] == 1


def test_splits_are_paired_by_name_and_json_is_whole(tmp_path: Path) -> None:
    for root in ("one", "two"):
        for split in ("train", "val"):
            write_split(tmp_path / root / split, KEYS, LAYOUT, seed=len(root + split))
    facts = json.loads(invoke("compare-labels", tmp_path / "one", tmp_path / "two", "--json"))
    assert [Path(pair["a"]["folder"]).name for pair in facts] == ["train", "val"]
    write_split(tmp_path / "three" / "test", KEYS, LAYOUT)
    text = invoke("compare-labels", tmp_path / "one", tmp_path / "three", code=2)
    assert "no split of the same name" in text


@pytest.mark.parametrize(
    ("keys", "layout", "letter", "message"),
    [
        (KEYS, LAYOUT._replace(num_classes=51), "n", "of the same classes"),
        (["z.jpg"], LAYOUT, "n", "no image in common"),
        (KEYS, LAYOUT, "c", "name their classes alike"),
    ],
)
def test_sets_that_cannot_be_compared(
    tmp_path: Path, keys: list[str], layout: MapLayout, letter: str, message: str
) -> None:
    write_split(tmp_path / "a", KEYS, LAYOUT)
    write_split(tmp_path / "b", keys, layout)
    for name, first in (("a", "n"), ("b", letter)):
        write_class_names(tmp_path / name, [f"{first}{number}" for number in range(50)])
    assert message in invoke("compare-labels", tmp_path / "a", tmp_path / "b", code=2)
