"""The published token-labeling target, with its crop boxes the right way round."""

import torch
from torchvision.ops import roi_align

from ..format.score_map import DROPPED
from .record import HAS_MAP, MIRRORED, Grid, Records
from .windows import TokenTargets

#: How far rounding may put a crop's box outside the map, as a fraction of the image.
_ROUNDING = 1e-5


def published_targets(records: Records, grid: Grid, k: int) -> TokenTargets:
    """Targets by the rule of TokenLabeling and LV-ViT; `TokenLabels.sparse` describes it.

    Raises:
        ValueError: a path of other geometry than crops, flips and resizes, or maps without `level`.
    """
    layout = records.layout.maps
    if not layout.level:
        raise ValueError(
            'rule "published" averages raw logits, and these maps were stored without `level`. '
            'Remedy: annotate with level: true, or use rule "exact"'
        )
    boxes, flip_y, flip_x = _crop_boxes(records)
    codes, classes = records.plane("codes"), records.plane("classes")
    nats = codes * layout.step if layout.step else codes
    stored = codes != DROPPED if layout.step else codes.isfinite()
    # A class that is not stored is absent like all others: logit 0.
    logits = torch.where(stored, records.plane("level")[:, None] - nats, 0.0)
    batch = len(logits)
    maps = logits.new_zeros(batch, layout.num_classes, *layout.grid)
    maps.scatter_add_(1, classes.long(), logits)
    # roi_align measures from the centre of the first cell, as the published code has it.
    sides = boxes.new_tensor([layout.grid[1], layout.grid[0]] * 2)
    regions = torch.cat([torch.arange(batch, device=boxes.device)[:, None], boxes * sides - 0.5], 1)
    patches = roi_align(maps, regions, grid)
    patches = torch.where(flip_y.view(-1, 1, 1, 1), patches.flip(2), patches)
    patches = torch.where(flip_x.view(-1, 1, 1, 1), patches.flip(3), patches)
    crop = roi_align(maps, regions, (1, 1)).flatten(1).softmax(-1)
    dense = patches.flatten(2).mT.softmax(-1)
    weight = records.has(HAS_MAP)[:, None].expand(-1, dense.shape[1]).float()
    dense = dense * weight[..., None]
    return TokenTargets.of(records.word("label").long(), weight, dense, crop * weight[:, :1], k)


def _crop_boxes(records: Records) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The crops [B, 4], normalised to the view's extent, and which are flipped in y and x."""
    error = ValueError(
        'rule "published" takes the average over an upright box inside the map: it knows '
        "crops, flips and resizes, but an image of this batch went through something else. "
        'Remedy: use rule "exact", or leave rotation, shear, padding and the like out'
    )
    if records.layout.tilted:
        raise error
    path = records.paths()[:, 0]
    a, c, e, f = path[:, 0], path[:, 2], path[:, 4], path[:, 5]
    height, width = records.word("canvas_h"), records.word("canvas_w")
    ends = [torch.stack([c, c + a * width]), torch.stack([f, f + e * height])]
    (x0, x1), (y0, y1) = (end.sort(0).values for end in ends)
    left, top, right, bottom = (records.word(name) for name in ("x0", "y0", "x1", "y1"))
    low = torch.maximum(path[:, 9:11], torch.stack([left, top], 1)) - _ROUNDING
    high = torch.minimum(path[:, 11:13], torch.stack([right, bottom], 1)) + _ROUNDING
    outside = (x0 < low[:, 0]) | (y0 < low[:, 1]) | (x1 > high[:, 0]) | (y1 > high[:, 1])
    if bool(((outside | (a == 0)) & records.has(HAS_MAP)).any()):
        raise error
    mirrored = records.has(MIRRORED)
    x0, x1 = (x0 - left) / (right - left), (x1 - left) / (right - left)
    x0, x1 = torch.where(mirrored, 1 - x1, x0), torch.where(mirrored, 1 - x0, x1)
    y0, y1 = (y0 - top) / (bottom - top), (y1 - top) / (bottom - top)
    return torch.stack([x0, y0, x1, y1], 1), e < 0, (a < 0) ^ mirrored
