"""Agreement of a crop of the map with the teacher run live on that crop.

Token labeling takes the targets of a crop from the map of the whole (Jiang et al., "All Tokens
Matter", NeurIPS 2021; the idea is ReLabel's, Yun et al., CVPR 2021). The live teacher differs from
a perfect map too: it sees the crop enlarged, and without the surroundings. Hence the noise floors,
the teacher against itself, and how often the mean target has the image's label on top.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..annotate.teacher.annotator import Annotator
from ..annotate.teacher.passes import onto
from ..annotate.teacher.rebuild import rebuild_teachers
from ..dataset.label_map.path import UNIT_BOX, Box
from ..dataset.storage.remote_path import AnyPath
from ..dataset.store import LabelStore
from ..terminal import Watch
from .label_sets import patch_map
from .pictures.image_files import ImageFiles
from .statistics import divergence

#: Fractions of the image's area: the whole, then what RandomResizedCrop takes, in four parts.
SCALES = ((1.0, 1.0), (0.7, 1.0), (0.4, 0.7), (0.2, 0.4), (0.08, 0.2))
#: RandomResizedCrop's aspect ratios.
_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10


class Score(NamedTuple):
    """Of a crop's target against the live teacher, means over the patches that show the map.

    Attributes:
        kl: KL(teacher || target) in nats.
        tv: total variation, between 0 and 1.
        top1: fraction of patches with the teacher's best class on top.
        label_top1: 1 where the mean target has the image's label on top, else 0; NaN without label.
    """

    kl: float
    tv: float
    top1: float
    label_top1: float


class Live(NamedTuple):
    """A teacher's probabilities for B crops of an image, on its grid of N patches.

    Attributes:
        direct: float32 [B, N, C].
        mirrored: of the mirrored crops, mirrored back.
        other: at another input size, on the same grid; None where the teacher has one size only.
    """

    direct: Tensor
    mirrored: Tensor
    other: Tensor | None


def measure_agreement(
    root: AnyPath,
    count: int,
    images: str | None = None,
    *,
    weights: str | None = None,
    seed: int = 0,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Compare crops of maps with the teacher's own view of the crops.

    Of each image: the whole and one crop of each range of `SCALES`.

    Args:
        root: folder of a split.
        count: number of images, drawn at random.
        images: their folder or other source; None for the embedded sample.
        weights: of the teacher; None finds them by its name.
        seed: of images and crops.
        watch: called with (images done, images).

    Returns:
        JSON-able. `rows` holds, for each range of scales and each `target`, the number of crops and
        the means of a `Score` over them. `teacher_top1` is the fraction of the `labelled` whole
        images that the teacher gets right, in the job's own preprocessing. "stored" is the whole
        map cell by cell, against the teacher as it annotated; `print_agreement` says what the
        others are.

    Raises:
        ConfigError: images or weights are not found; TeacherError for the teacher.
        ImageError: an image is not the one that was annotated.
        FormatError: the labels are damaged.
    """
    store = LabelStore(root)
    teachers = rebuild_teachers(store.attrs, weights)
    files, grid = ImageFiles(store, images), teachers.judge.grid
    rng = np.random.default_rng(seed)
    good = np.flatnonzero(~store.failed)
    rows = np.sort(rng.permutation(good)[:count]).tolist()
    found: dict[tuple[tuple[float, float], str], list[Score]] = defaultdict(list)
    asked = right = 0
    for done, row in enumerate(rows, 1):
        image = files.read(store.keys[row])
        boxes = [random_box(image.size, scale, rng) for scale in SCALES]
        live = look(teachers.judge, teachers.other, image, boxes)
        patches = patch_map(store, row)
        stored = torch.from_numpy(patches.entry.dense()).flatten(0, 1)
        truth = probabilities(teachers.annotator, image, [patches.entry.extent])[0]
        if patches.label >= 0:
            asked += 1
            right += int(top_class(teachers.annotator, image) == patches.label)
        everywhere = torch.ones(len(stored), dtype=torch.bool)
        found[SCALES[0], "stored"].append(score(truth, stored, everywhere, patches.label))
        crops = store.labels([row] * len(boxes), boxes).targets(grid)
        mirrored = store.labels([row] * len(boxes), boxes, [True] * len(boxes)).targets(grid)
        one = store.labels([row], [UNIT_BOX]).targets(1).dense()
        targets = {
            "map": (live.direct, crops.dense()),
            "map, mirrored": (live.mirrored, flipped(mirrored.dense(), grid)),
            "one label": (live.direct, one.expand_as(live.direct)),
            "teacher": (live.direct, live.direct),
            "teacher, mirrored": (live.direct, live.mirrored),
        }
        if live.other is not None:
            targets["teacher, other size"] = live.direct, live.other
        for name, (truths, target) in targets.items():
            parts = zip(SCALES, truths, target, crops.weight > 0, strict=True)
            for scale, truth, part, inside in parts:
                found[scale, name].append(score(truth, part, inside, patches.label))
        watch(done, len(rows))
    return {
        "folder": str(root),
        "teacher": teachers.judge.name,
        "input_size": list(teachers.judge.input_sizes[0]),
        "other_size": list(teachers.other.input_sizes[0]) if teachers.other else None,
        "k": store.k,
        "images": len(rows),
        "seed": seed,
        "labelled": asked,
        "teacher_top1": right / asked if asked else None,
        "rows": [
            {"scale": list(scale), "target": target, "crops": len(scores)} | mean(scores)
            for (scale, target), scores in found.items()
        ],
    }


def mean(scores: Sequence[Score]) -> dict[str, float | None]:
    """Means over crops by name, those of unknown labels left out; None of nothing."""
    found = {}
    for name, values in zip(Score._fields, np.array(scores).T, strict=True):
        known = values[~np.isnan(values)]
        found[name] = float(known.mean()) if len(known) else None
    return found


def random_box(size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """A box as RandomResizedCrop draws it, of whole pixels, normalised (x0, y0, x1, y1).

    Args:
        size: (width, height) of the image in pixels.
        scale: range of the box's area, as fractions of the image's.
        rng: where the draws come from.
    """
    width, height = size
    if scale == (1.0, 1.0):
        return UNIT_BOX
    for _ in range(_TRIES):
        area = rng.uniform(*scale) * width * height
        ratio = math.exp(rng.uniform(math.log(_RATIOS[0]), math.log(_RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # a long, thin image: the crop keeps its shape
        side = math.sqrt(rng.uniform(*scale))
        w, h = max(round(width * side), 1), max(round(height * side), 1)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left / width, top / height, (left + w) / width, (top + h) / height


def look(
    teacher: Annotator, other: Annotator | None, image: Image.Image, boxes: Sequence[Box]
) -> Live:
    """Run the teacher live on crops of an image, given as boxes (x0, y0, x1, y1), normalised."""
    mirrored = probabilities(teacher, image, boxes, mirrored=True)
    return Live(
        probabilities(teacher, image, boxes),
        flipped(mirrored, teacher.grid),
        None if other is None else probabilities(other, image, boxes, grid=teacher.grid),
    )


def probabilities(
    teacher: Annotator,
    image: Image.Image,
    boxes: Sequence[Box],
    *,
    mirrored: bool = False,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """The teacher's softmax of crops, float32 [B, N, C], on its own grid or another."""
    resample = Image.Resampling[teacher.interpolation.upper()]
    corners = np.rint(np.array(boxes) * (image.size * 2)).astype(int).tolist()
    crops = [image.crop(box) for box in corners]
    if mirrored:
        crops = [crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for crop in crops]
    logits = teacher.logits(
        [
            np.stack([np.asarray(crop.resize((width, height), resample)) for crop in crops])
            for height, width in teacher.input_sizes
        ]
    )
    if grid is not None:
        logits = onto(logits, grid)
    probs: Tensor = logits.softmax(-1).flatten(1, 2).cpu()
    return probs


def top_class(teacher: Annotator, image: Image.Image) -> int:
    """What the teacher finds most probable for a whole image, prepared as the job prepared it."""
    resample = Image.Resampling[teacher.interpolation.upper()]
    squashed = [
        np.asarray(image.resize((width, height), resample))[None]
        for height, width in teacher.input_sizes
    ]
    return int(teacher.top_classes(squashed))


def flipped(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Values of patches [B, N, ...], mirrored on their grid."""
    turned: Tensor = patches.unflatten(1, grid).flip(2)
    return turned.flatten(1, 2)


def score(truth: Tensor, target: Tensor, inside: Tensor, label: int) -> Score:
    """Score a crop's target.

    Args:
        truth: the teacher's probabilities, float32 [N, C].
        target: float32 [N, C].
        inside: bool [N], patches to count.
        label: class of the image, or -1.
    """
    truth, target = truth[inside], target[inside]
    best = truth.argmax(1, keepdim=True)
    return Score(
        kl=float(torch.from_numpy(divergence(truth.numpy(), target.numpy()).kl).mean()),
        tv=float((truth - target).abs().sum(1).mean() / 2),
        # Rounded to codes, a target can have several best classes.
        top1=float((target.gather(1, best)[:, 0] == target.amax(1)).float().mean()),
        label_top1=float(target.mean(0).argmax() == label) if label >= 0 else math.nan,
    )
