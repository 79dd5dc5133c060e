"""Reading maps of other sizes, and of tiles, onto one grid."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tokenlabel.annotate.teacher.passes import Pass, onto

CPU = torch.device("cpu")


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (10, 10), (4, 14), (23, 2)])
def test_a_map_is_read_by_area_averages_of_its_bilinear_surface(grid: tuple[int, int]) -> None:
    """The same surface, sampled densely by torch's own bilinear interpolation."""
    logits = torch.randn(2, 7, 6, 3, generator=torch.Generator().manual_seed(0))
    per = 60
    fine = (grid[0] * per, grid[1] * per)
    surface = F.interpolate(logits.movedim(-1, 1), fine, mode="bilinear", align_corners=False)
    want = F.avg_pool2d(surface, per).movedim(1, -1)
    torch.testing.assert_close(onto(logits, grid), want, rtol=0, atol=2e-3)


def test_a_map_of_one_cell_is_the_same_everywhere() -> None:
    assert torch.equal(onto(torch.ones(1, 1, 1, 2), (2, 3)), torch.ones(1, 2, 3, 2))


@pytest.mark.parametrize("size", [(20, 30), (25, 31), (40, 60), (47, 30), (20, 75)])
def test_tiles_read_a_plane_as_the_whole_does(size: tuple[int, int]) -> None:
    """Of x and y, which a bilinear map holds exactly between its centres."""
    tile, cells, grid = (20, 30), (10, 15), (4, 5)
    y = (torch.arange(size[0]) + 0.5) / size[0]
    x = (torch.arange(size[1]) + 0.5) / size[1]
    pixels = torch.stack([x.expand(*size), y[:, None].expand(*size), torch.ones(size)])[None]

    def look(part: torch.Tensor) -> torch.Tensor:
        return F.interpolate(part, cells, mode="area").movedim(1, -1)

    one = Pass(look, size, tile, cells, grid, CPU)
    assert one.tiles == (-(-size[0] // 20), -(-size[1] // 30))
    seen = one(pixels)
    want = torch.stack(
        [
            ((torch.arange(5) + 0.5) / 5).expand(4, 5),
            ((torch.arange(4) + 0.5) / 4)[:, None].expand(4, 5),
            torch.ones(4, 5),
        ],
        -1,
    )
    # Beyond its outermost centres a map goes on flat: half a cell at each edge of a tile.
    torch.testing.assert_close(seen[0], want, rtol=0, atol=0.012)
    torch.testing.assert_close(seen[0, ..., 2], want[..., 2], rtol=0, atol=1e-6)


def test_where_tiles_overlap_the_one_that_sees_further_counts_more() -> None:
    answers = iter([torch.zeros(1, 10, 10, 1), torch.ones(1, 10, 10, 1)])
    whole = Pass(lambda _: next(answers), (30, 20), (20, 20), (10, 10), (15, 1), CPU)
    assert whole.tiles == (2, 1)
    second = whole(torch.zeros(1, 3, 30, 20))[0, :, 0, 0].numpy()
    assert (np.diff(second) >= -1e-6).all()
    assert second[0] == 0 and second[-1] == 1 and abs(second[7] - 0.5) < 1e-6
    assert (second[:5] == 0).all() and 0 < second[5] < 0.2
