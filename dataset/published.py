"""The published token-labeling target, with its crop boxes the right way round."""

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from tokenlabel.dataset.label_map import TokenLabelMap
from tokenlabel.dataset.merging import Ids, TokenTargets, arrays, sparse_targets, spread
from tokenlabel.dataset.path import Box, intersection, transform_box
from tokenlabel.dataset.sampling import Grid

#: How far rounding may put a crop's box outside the map, as a share of the picture.
_ROUNDING = 1e-6


def published_targets(
    score_map: TokenLabelMap, grid: Grid, k: int, num_classes: int
) -> TokenTargets:
    """Targets by the rule of TokenLabeling and LV-ViT; `ToTokenTargets` describes it.

    Args:
        score_map: the map; its path must be made of crops, flips and resizes alone.
        grid: (h, w) of the student's patches.
        k: classes to keep.
        num_classes: number of the teacher's classes.

    Raises:
        ValueError: the path has another geometry, or a class id is not below `num_classes`.
    """
    box, flips = _crop_box(score_map)
    scores, classes, _ = arrays(score_map)
    rows, columns, _ = scores.shape
    logits = scores.astype(np.float32).reshape(rows * columns, -1).T
    # An entry without a class (-inf) is absent like all other classes: logit 0.
    ids, dense = spread(classes, np.where(np.isneginf(logits), np.float32(0), logits))
    if ids[-1] >= num_classes:
        raise ValueError(f"class ids must be below num_classes={num_classes}, got {ids[-1]}")
    maps = torch.from_numpy(dense.T.reshape(1, len(ids), rows, columns))
    # roi_align measures from the centre of the first cell, as the published code has it.
    corners = np.array(box) * [columns, rows, columns, rows] - 0.5
    region = torch.tensor([[0.0, *corners.tolist()]])
    patches = roi_align(maps, region, grid)[0].flip([axis + 1 for axis in (0, 1) if flips[axis]])
    crop = roi_align(maps, region, (1, 1))[0]
    averages = torch.cat([patches.flatten(1), crop.flatten(1)], 1).T
    ids, probs = _softmax(ids, averages, k, num_classes)
    return sparse_targets(score_map.label, ids, probs.numpy(), np.ones(grid[0] * grid[1]), k)


def _crop_box(score_map: TokenLabelMap) -> tuple[Box, tuple[bool, bool]]:
    """The crop (x0, y0, x1, y1), normalised to the view's extent, and its flips along y and x."""
    path = score_map.path
    h, w = score_map.canvas_size
    x0, y0, x1, y1 = transform_box(path.matrix, (0.0, 0.0, w, h))
    p, q, r, s = intersection(path.box, score_map.extent)
    e = _ROUNDING
    outside = x0 < p - e or y0 < q - e or x1 > r + e or y1 > s + e
    if not path.is_single or path.matrix[0] == 0 or outside:
        raise ValueError(
            'rule "published" takes the average over an upright box inside the map: it knows '
            f"crops, flips and resizes, but this picture's path is {path}. "
            'Remedy: use rule "exact", or leave rotation, shear, padding and the like out'
        )
    left, top, right, bottom = score_map.extent
    x0, x1 = (x0 - left) / (right - left), (x1 - left) / (right - left)
    y0, y1 = (y0 - top) / (bottom - top), (y1 - top) / (bottom - top)
    flips = (path.matrix[4] < 0, path.matrix[0] < 0)
    if score_map.view == 1:  # of the mirrored picture
        return (1 - x1, y0, 1 - x0, y1), (flips[0], not flips[1])
    return (x0, y0, x1, y1), flips


def _softmax(ids: Ids, logits: Tensor, k: int, num_classes: int) -> tuple[Ids, Tensor]:
    """Softmax over all classes, of which those not in `ids` have logit 0.

    Returns:
        `ids` and as many other ids as could be among the k most probable; and the probabilities
        [N, U] of them all.
    """
    absent = num_classes - len(ids)
    others = np.setdiff1d(np.arange(min(num_classes, len(ids) + k)), ids)[: min(k, absent)]
    wide = torch.cat([logits, logits.new_zeros(len(logits), len(others))], 1)
    top = wide.amax(1, keepdim=True)
    mass = (wide - top).exp()
    total = mass.sum(1, keepdim=True) + (absent - len(others)) * (-top).exp()
    return np.concatenate([ids, others]), mass / total
