"""How good is the promise that a crop of the map is what the teacher says of the crop?

Token labeling annotates each picture once, and takes the targets of a crop from the map of the
whole (Jiang et al., "All Tokens Matter", NeurIPS 2021; the idea is ReLabel's, Yun et al., CVPR
2021). Here the teacher itself looks at the cropped picture, resized to its input as the whole was,
and its answer is compared with the crop of the map, patch by patch.

The two are not equal even for a perfect map: the teacher sees the crop enlarged, more so the
smaller it is, and without the surroundings. For the whole picture, the cells as they are stored
differ by what storing the top k costs; the targets of the whole, also by what averaging between
cells costs; those of its mirror image, also by what the teacher is not symmetric.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tokenlabel.annotate.teacher import Teacher
from tokenlabel.dataset.label_map import TokenLabelMap
from tokenlabel.dataset.store import LabelStore
from tokenlabel.dataset.targets import TokenTargets, ToTokenTargets
from tokenlabel.inspection.picture_files import PictureFiles
from tokenlabel.inspection.teacher import rebuild_teacher

#: Shares of the picture's area: the whole, then what RandomResizedCrop takes, in four parts.
SCALES = ((1.0, 1.0), (0.7, 1.0), (0.4, 0.7), (0.2, 0.4), (0.08, 0.2))
VIEWS = ("stored", "direct", "mirrored")
#: RandomResizedCrop's aspect ratios.
_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10
_FLOOR = 1e-12  # of a probability, so that KL stays finite where `rest` is nothing
Watch = Callable[[int, int], None]


class _Crop(NamedTuple):
    """Box in pixels, and whether it is looked at mirrored, direct or cell by cell as stored."""

    scale: tuple[float, float]
    left: int
    top: int
    width: int
    height: int
    view: str


def measure_agreement(
    root: Path,
    count: int,
    images: Path | None = None,
    *,
    weights: str | None = None,
    seed: int = 0,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Compare crops of maps with the teacher's own view of the cropped pictures.

    Of each image: the whole and one crop of each range of `SCALES`, direct and mirrored; and the
    whole as it is stored, without interpolation between cells.

    Args:
        root: folder of a split.
        count: number of images, drawn at random.
        images: their folder; None for the embedded sample.
        weights: of the teacher; None finds them by its name.
        seed: of images and crops.
        watch: called with (images done, images).

    Returns:
        JSON-able: for each range of scales and each of `VIEWS`, the number of crops and the means
        over their patches of `kl`, KL(teacher's view || map's crop) in nats; `top1`, how often both
        have the same class on top; and `kl_whole`, the same KL for one label for the whole picture
        (the average of its map), which is what labels without a map would give.

    Raises:
        ConfigError: images or weights are not found; TeacherError for the teacher.
        PictureError: an image is not the one that was annotated.
        FormatError: the labels are damaged.
    """
    store = LabelStore(root)
    teacher = rebuild_teacher(store.attrs, weights)
    files = PictureFiles(store, images)
    rng = np.random.default_rng(seed)
    good = np.flatnonzero(~store.failed)
    rows = np.sort(rng.permutation(good)[:count]).tolist()
    sums: dict[tuple[tuple[float, float], str], list[np.ndarray]] = {}
    for done, row in enumerate(rows, 1):
        picture = files.read(store.keys[row])
        label_map = _label_map(store, row, picture)
        crops = list(_crops(picture.size, rng))
        seen = _seen(teacher, picture, crops)
        for crop, (classes, logs) in zip(crops, seen, strict=True):
            found = _compare(label_map, crop, teacher.grid, classes, logs)
            sums.setdefault((crop.scale, crop.view), []).append(found)
        watch(done, len(rows))
    lines = []
    for (scale, view), parts in sums.items():
        kl, kl_whole, top1 = (float(value) for value in np.mean(parts, 0))
        lines.append(
            {
                "scale": list(scale),
                "view": view,
                "crops": len(parts),
                "kl": kl,
                "kl_whole": kl_whole,
                "top1": top1,
            }
        )
    return {
        "folder": str(root),
        "teacher": teacher.name,
        "k": store.k,
        "images": len(rows),
        "seed": seed,
        "rows": lines,
    }


def _label_map(store: LabelStore, row: int, picture: Image.Image) -> TokenLabelMap:
    entry = store[row]
    return TokenLabelMap.stored(
        entry.scores,
        entry.classes,
        entry.rest,
        canvas_size=(picture.height, picture.width),
        extent=entry.extent,
        label=entry.label,
    )


def _crops(size: tuple[int, int], rng: np.random.Generator) -> Iterator[_Crop]:
    """Of each range of scales one box, as RandomResizedCrop draws them; direct and mirrored."""
    for scale in SCALES:
        box = _box(size, scale, rng)
        for view in VIEWS if scale == (1.0, 1.0) else VIEWS[1:]:
            yield _Crop(scale, *box, view)


def _box(
    size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    width, height = size
    if scale == (1.0, 1.0):
        return 0, 0, width, height
    for _ in range(_TRIES):
        area = rng.uniform(*scale) * width * height
        ratio = math.exp(rng.uniform(math.log(_RATIOS[0]), math.log(_RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # a long, thin picture: the crop keeps its shape
        side = math.sqrt(rng.uniform(*scale))
        w, h = max(round(width * side), 1), max(round(height * side), 1)
    return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h


def _seen(
    teacher: Teacher, picture: Image.Image, crops: list[_Crop]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the teacher says of each crop: classes by probability [N, C], log-probabilities."""
    height, width = teacher.input_size
    resample = Image.Resampling[teacher.interpolation.upper()]
    pixels = np.empty((len(crops), height, width, 3), np.uint8)
    for row, crop in enumerate(crops):
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        part = picture.crop(box)
        if crop.view == "mirrored":
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels[row] = np.asarray(part.resize((width, height), resample))
    output = teacher.annotate(pixels)
    for scores, classes in zip(output.scores[:, 0], output.classes[:, 0], strict=True):
        logs = scores.flatten(0, 1).float().cpu().log_softmax(-1)
        yield classes.flatten(0, 1).long().cpu(), logs


def _compare(
    label_map: TokenLabelMap, crop: _Crop, grid: tuple[int, int], classes: Tensor, logs: Tensor
) -> np.ndarray:
    """KL to the map's crop, KL to the whole map's average, share of equal top classes."""
    moved = F.crop(label_map, crop.top, crop.left, crop.height, crop.width)
    moved = F.horizontal_flip(moved) if crop.view == "mirrored" else moved
    count = classes.shape[-1]
    between = "nearest" if crop.view == "stored" else "bilinear"
    targets: TokenTargets = ToTokenTargets(grid, k=count, interpolation=between)(moved)
    inside = targets.weight > 0
    truth = logs.exp()
    ours = dense(targets.classes, targets.probs, targets.rest, count)
    whole = ToTokenTargets(1, k=count)(label_map)
    one = dense(whole.crop_classes[None], whole.crop_probs[None], whole.crop_rest[None], count)
    values = []
    for target in (ours, one.expand_as(ours)):
        divergence = truth * (logs - target.gather(1, classes).clamp(min=_FLOOR).log())
        values.append(float(divergence.sum(1)[inside].mean()))
    same = classes[:, 0] == ours.argmax(1)
    return np.array([*values, float(same[inside].float().mean())])


def dense(classes: Tensor, probs: Tensor, rest: Tensor, num_classes: int) -> Tensor:
    """Sparse targets as probabilities of all classes.

    Args:
        classes: int [N, K].
        probs: float32 [N, K], 0 where there is no class.
        rest: float32 [N], spread evenly over the classes that are not listed.
        num_classes: of the teacher.

    Returns:
        float32 [N, num_classes].
    """
    listed = torch.zeros(len(classes), num_classes).scatter_add_(1, classes.long(), probs)
    absent = (listed == 0).sum(1).clamp(min=1)
    return torch.where(listed > 0, listed, (rest / absent)[:, None])
