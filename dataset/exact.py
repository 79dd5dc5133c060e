"""The rule "exact": area averages of a map's probabilities, in C where it was compiled.

`averages` is the definition, in NumPy. The compiled module gives the same to float rounding (tests
compare the two), several times as fast: a patch shows a few cells with a few classes each.
"""

from types import ModuleType

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from tokenlabel.dataset import native
from tokenlabel.dataset.label_map import TokenLabelMap
from tokenlabel.dataset.merging import (
    Floats32,
    Ids,
    TokenTargets,
    arrays,
    probabilities,
    sparse_targets,
    spread,
    token_targets,
)
from tokenlabel.dataset.sampling import Floats, Grid, scattered_weights, separable_weights, spans


def exact_targets(
    score_map: TokenLabelMap, grid: Grid, k: int, interpolation: str = "bilinear"
) -> TokenTargets:
    """Area average of a map's probabilities over each patch, as `ToTokenTargets` describes it.

    Args:
        score_map: the map.
        grid: (h, w) of the student's patches.
        k: classes kept for each patch.
        interpolation: "bilinear" or "nearest".
    """
    if native.compiled is not None:
        return _compiled_targets(native.compiled, score_map, grid, k, interpolation)
    ids, dense, share = averages(score_map, grid, interpolation)
    return sparse_targets(score_map.label, ids, dense, share, k)


def _compiled_targets(
    merge: ModuleType, score_map: TokenLabelMap, grid: Grid, k: int, interpolation: str
) -> TokenTargets:
    patches = grid[0] * grid[1]
    kept = np.empty((patches + 1, k), np.int32)
    probs = np.empty((patches + 1, k), np.float32)
    others = np.empty(patches + 1, np.float32)
    weight = np.empty(patches, np.float32)
    whole = score_map.arrays()
    _, rows, columns = whole[2].shape
    common = (*whole, score_map.view, rows, columns, kept, probs, others, weight, k)
    path = score_map.path
    if path.is_single:
        canvas, nearest = score_map.canvas_size, interpolation == "nearest"
        merge.upright(*common, path.matrix, path.box, score_map.extent, canvas, grid, nearest)
    else:
        cells, entries, weights, offsets, share = scattered_weights(score_map, grid, interpolation)
        merge.scattered(*common, cells[entries], weights, offsets, share)
    return token_targets(score_map.label, kept, probs, others, weight)


def averages(
    score_map: TokenLabelMap, grid: Grid, interpolation: str
) -> tuple[Ids, Floats32, Floats]:
    """Average of a map's probabilities over each patch, and over the whole crop.

    Args:
        score_map: the map.
        grid: (h, w) of the student's patches.
        interpolation: "bilinear" or "nearest".

    Returns:
        Class ids [U]; probabilities of them, float32 [N + 1, U], of each patch and, last, of the
        crop; and the share of each patch inside the picture, float64 [N].
    """
    average = _upright_average if score_map.path.is_single else _average
    ids, dense, share = average(score_map, grid, interpolation)
    part = (share * (1 / (share.sum() or 1))).astype(np.float32)
    np.einsum("n,nu->u", part, dense[:-1], out=dense[-1])
    return ids, dense, share


def _average(
    score_map: TokenLabelMap, grid: Grid, interpolation: str
) -> tuple[Ids, Floats32, Floats]:
    """Average over the sub-points of each patch; the last row of the probabilities is free."""
    scores, classes, rest = arrays(score_map)
    scattered = scattered_weights(score_map, grid, interpolation)
    # With nothing of the map left in the picture: any cell, with no weight.
    cells = scattered.cells if len(scattered.cells) else np.zeros(1, np.int64)
    shown = np.divmod(cells, rest.shape[1])
    ids, mass = spread(classes[shown], probabilities(scores[shown], rest[shown]))
    dense = np.empty((len(scattered.share) + 1, len(ids)), np.float32)
    dense[:-1] = embedding_bag(
        torch.from_numpy(scattered.entries),
        torch.from_numpy(mass),
        torch.from_numpy(scattered.offsets),
        mode="sum",
        per_sample_weights=torch.from_numpy(scattered.weights),
    ).numpy()
    return ids, dense, scattered.share


def _upright_average(
    score_map: TokenLabelMap, grid: Grid, interpolation: str
) -> tuple[Ids, Floats32, Floats]:
    """The same, exact, where the weights are a product of one for rows and one for columns."""
    span_y, span_x, transposed = spans(score_map, grid)
    along_y, along_x = separable_weights(span_y, span_x, interpolation)
    scores, classes, rest = arrays(score_map)
    shown = (along_y.cells, along_x.cells)
    ids, mass = spread(classes[shown], probabilities(scores[shown], rest[shown]))
    height, width = along_y.weights.shape[1], along_x.weights.shape[1]
    # Stacks of products small enough that BLAS does not split them over threads: NumPy's BLAS does
    # not know that a DataLoader's worker should use one only.
    columns = np.matmul(along_y.weights, mass.reshape(height, width, -1).transpose(1, 0, 2))
    rows = columns.transpose(1, 0, 2)
    dense = np.empty((grid[0] * grid[1] + 1, len(ids)), np.float32)
    patches = dense[:-1].reshape(*grid, -1)
    share = np.multiply.outer(along_y.share, along_x.share)
    if transposed:
        patches, share = patches.transpose(1, 0, 2), share.T
    np.matmul(along_x.weights, rows, out=patches)
    return ids, dense, share.ravel()
