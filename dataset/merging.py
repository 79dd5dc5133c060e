"""Sparse soft targets: probabilities of a map's cells, and the largest of a mixture of them."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenlabel.dataset.label_map import TokenLabelMap

Ids = npt.NDArray[np.int64]
Floats32 = npt.NDArray[np.float32]
#: Class ids below this are looked up in a table; it costs less than sorting them.
_TABLE = 1 << 20


class TokenTargets(NamedTuple):
    """Soft targets of one crop, sparse; of a batch, once collated, with B in front.

    `probs` and `rest` sum to 1 for each patch and for the crop. Entries without a class have
    probability 0 (and class id 0). Where `weight` is 0 there is no target: `probs` is 0, `rest` 1.

    Attributes:
        label: int64 [], the image's ground-truth class, -1 if unknown.
        classes: int32 [N, K], class ids of each patch's target, most probable first; N is
            grid_h * grid_w, row by row.
        probs: float32 [N, K], their probabilities.
        rest: float32 [N], mass on all other classes.
        weight: float32 [N], share of the patch inside the picture and the map: 0 in padding. The
            target is the average over that part.
        crop_classes: int32 [K], the same for the whole crop: ReLabel's localized label.
        crop_probs: float32 [K].
        crop_rest: float32 [].
    """

    label: Tensor
    classes: Tensor
    probs: Tensor
    rest: Tensor
    weight: Tensor
    crop_classes: Tensor
    crop_probs: Tensor
    crop_rest: Tensor


def arrays(score_map: TokenLabelMap) -> tuple[npt.NDArray[Any], Ids, Floats32]:
    """Scores [H, W, K], class ids [H, W, K] and rest [H, W] of the view that matches the crop."""
    view = score_map.view
    scores, classes, rest = score_map.arrays()
    return scores[view], classes[view], rest[view].astype(np.float32)


def probabilities(scores: npt.NDArray[Any], rest: Floats32) -> Floats32:
    """Softmax of each cell's scores [..., K] and the rest [...], as float32 [K, n] (rest left off).

    Stable for logits of any size; -inf has probability 0.
    """
    k = scores.shape[-1]
    # Cells last: NumPy reduces many rows of k slowly.
    mass = np.empty((k + 1, rest.size), np.float32)
    mass[:k] = scores.reshape(-1, k).T
    mass[k] = rest.ravel()
    mass -= mass.max(0)
    np.exp(mass, out=mass)
    mass /= mass.sum(0)
    return mass[:k]


def spread(classes: Ids, values: Floats32) -> tuple[Ids, Floats32]:
    """Columns for the classes that occur.

    Args:
        classes: class ids [..., K] of n cells.
        values: float32 [K, n].

    Returns:
        The ids [U] that occur in any cell, ascending, and each cell's values, float32 [n, U].
    """
    k, n = values.shape
    flat = classes.reshape(n, k).T.astype(np.int64)
    top = int(flat.max()) + 1
    if top <= _TABLE:
        occurs = np.zeros(top, np.bool_)
        occurs[flat] = True
        ids = np.flatnonzero(occurs)
        position = np.empty(top, np.int64)
        position[ids] = np.arange(len(ids))
        index = position[flat]
    else:
        ids, index = np.unique(flat, return_inverse=True)
        index = index.reshape(flat.shape)
    index += np.arange(0, n * len(ids), len(ids))
    dense = np.zeros(n * len(ids), np.float32)
    # Added, not assigned: entries without a class may repeat a class of the cell.
    np.add.at(dense, index.ravel(), values.ravel())
    return ids, dense.reshape(n, -1)


def sparse_targets(
    label: int, ids: Ids, dense: Floats32, share: npt.NDArray[np.float64], k: int
) -> TokenTargets:
    """Targets of the k most probable classes.

    Args:
        label: ground-truth class.
        ids: class ids [U].
        dense: their probabilities, float32 [N + 1, U]; the last row is the crop's. Is used up.
        share: share [N] of each patch inside the picture.
        k: classes to keep.
    """
    rows, columns = dense.shape
    flat = dense.ravel()
    start = np.arange(0, rows * columns, columns)
    best = np.zeros((k, rows), np.int64)
    mass = np.zeros((k, rows), np.float32)
    for place, largest in zip(best[:columns], mass, strict=False):
        # The largest, k times: on rows this sparse it beats topk and argpartition.
        dense.argmax(1, out=place)
        place += start
        flat.take(place, out=largest, mode="clip")  # a mode that needs no buffer
        flat[place] = 0
    best[:columns] -= start
    classes = ids[best].astype(np.int32)
    classes[mass == 0] = 0
    rest = np.maximum(1 - mass.sum(0), 0)
    by_patch = np.ascontiguousarray(classes.T), np.ascontiguousarray(mass.T)
    return token_targets(label, *by_patch, rest, share)


def token_targets(
    label: int,
    classes: npt.NDArray[np.int32],
    probs: Floats32,
    rest: Floats32,
    share: npt.NDArray[np.floating[Any]],
) -> TokenTargets:
    """Targets from arrays [N + 1, ...] whose last row is the crop's, and the patches' shares."""
    weight = share.astype(np.float32, copy=False)
    patches = (classes[:-1], probs[:-1], rest[:-1], weight)
    crop = (classes[-1], probs[-1], rest[-1:].reshape(()))
    return TokenTargets(*map(torch.from_numpy, (np.array(label, np.int64), *patches, *crop)))
