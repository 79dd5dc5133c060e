"""What a job does while it runs, and its end report: of the whole split, earlier runs included."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..dataset.format.files import replacing
from ..dataset.format.index import in_order, open_shard
from ..dataset.format.score_map import MapLayout, decode
from ..dataset.format.shard import shard_name
from ..dataset.storage.remote_path import AnyPath, as_path
from .plan import Identity, Plan

NAME = "report.json"
#: Images with an error that a report lists by name; the shards name all of them.
LISTED_ERRORS = 100
#: Counts in a shard's header that a report adds up.
_COUNTS = ("errors", "labelled", "top1", "top5", "mass")


class Progress(NamedTuple):
    """What an actor has done since it started: images, error rows, and seconds of its teacher.

    `since` and `until` are when its first batch began and its last one ended, and `now` when it was
    asked, by the monotonic clock of its machine.
    """

    images: int
    errors: int
    busy: float
    since: float
    until: float
    now: float = 0.0


@dataclass
class Tally:
    """What a run has done so far; updated while it runs.

    Attributes:
        images, errors: annotated rows, and those of them without a map.
        busy, span: seconds that the teachers computed, and from each one's first batch to its last.
        rate: images per second, from the first batch to the last.
        teachers, lost_actors: actors that are ready, and those that died.
        written, failed: by number of the shard, its sha256, or why it failed for good.
        class_fits: (right answers of the teacher, images asked) by numbering of the folders.
    """

    images: int = 0
    errors: int = 0
    busy: float = 0.0
    span: float = 0.0
    rate: float | None = None
    teachers: int = 0
    written: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    lost_actors: int = 0
    class_fits: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Report:
    """What a job did and what the split holds now.

    Attributes:
        images, errors: rows of the split, and those without a map; `error_list` has (key, reason)
            of the first 100.
        shards: of the split; `written` by this run, `skipped` because they were there, `failed` as
            {number: reason}.
        labelled: images whose ground truth is a class of the teacher. `top1`, `top5`: fraction of
            these that the teacher gets right, from the pooled logits of its first pass; of imported
            labels, from the mean of the map.
        numbering: how the class of each folder was found, see `AnnotateConfig.numbering`, and
            `class_fits` how well the teacher's answers on some images fit it and its alternatives:
            (right, images) by numbering. Empty where they were not asked for in this run.
        mass: mean probability mass of the stored classes, over all patches.
        bytes_per_image: size of the shards divided by the number of rows.
        preprocessing: how images were resized and normalised, and `origins` where each of these
            settings comes from.
        exact: whether the mean of the map's logits must equal the pooled logits, and `pooled_error`
            the largest difference on the first images; None of imported labels.
        seconds: of this run; `images_per_second` from the teachers' first batch to their last, and
            `busy` the fraction of that time that they computed.
        lost_actors: teacher actors that died and were replaced.
        max_errors_exceeded: whether the errors are too many for the job to be a success.
        libraries: the different `libraries` of the shards: versions and processors that made them.
    """

    folder: str
    teacher: str
    fingerprint: str
    grid: tuple[int, int]
    k: int
    views: list[str]
    num_classes: int
    images: int
    shards: int
    written: int
    skipped: int
    failed: dict[int, str]
    preprocessing: dict[str, Any]
    origins: dict[str, str]
    head_mode: str
    exact: bool
    pooled_error: float | None
    seconds: float
    images_per_second: float | None
    busy: float | None
    lost_actors: int
    errors: int
    error_list: list[tuple[str, str]]
    labelled: int
    numbering: str
    class_fits: dict[str, tuple[int, int]]
    top1: float | None
    top5: float | None
    mass: float | None
    bytes_per_image: float | None
    max_errors_exceeded: bool
    libraries: list[dict[str, str]]

    @property
    def ok(self) -> bool:
        """Whether all shards are there and errors are within the limit."""
        return not self.failed and not self.max_errors_exceeded

    def save(self) -> None:
        """Write report.json beside the shards."""
        with replacing(as_path(self.folder) / NAME) as temporary:
            temporary.write_text(json.dumps({"ok": self.ok, **asdict(self)}, indent=2) + "\n")


def count_maps(
    counts: dict[str, Any],
    truth: np.ndarray,
    good: np.ndarray,
    codes: np.ndarray,
    top5: np.ndarray,
    layout: MapLayout,
) -> None:
    """Add a batch of B rows to what a shard's header counts, so that a report reads no maps.

    Args:
        counts: `labelled`, `top1`, `top5` and `mass`, changed in place.
        truth: int [B], ground truth; -1 where there is none, or no class of the teacher.
        good: bool [B], False where a row has an error: it does not count.
        codes: of the layout, [B, V, K, H, W].
        top5: int [B, 5 or fewer], best classes of the image as a whole.
        layout: of the maps.
    """
    hits, known = top5 == truth[:, None], good & (truth >= 0)
    counts["labelled"] += int(known.sum())
    counts["top1"] += int(hits[known, 0].sum())
    counts["top5"] += int(hits[known].any(1).sum())
    _, rest = decode(codes[good], layout)
    counts["mass"] += float((1 - rest).mean((1, 2, 3)).sum(dtype=np.float64))


def make_report(
    plan: Plan, identity: Identity, tally: Tally, skipped: int, seconds: float, max_errors: float
) -> Report:
    """Sum up the headers of all shards that are there."""
    rows, size, total = 0, 0, dict[str, Any].fromkeys(_COUNTS, 0)
    error_list: list[tuple[str, str]] = []
    libraries: list[dict[str, str]] = []
    there = [number for number in range(plan.shards) if number not in tally.failed]
    paths = [plan.folder / shard_name(number, plan.shards) for number in there]
    for count, end, attrs, shard_errors in in_order(_summary, paths):
        rows += count
        size += end
        for name in _COUNTS:
            total[name] += attrs[name]
        if len(error_list) < LISTED_ERRORS:
            error_list += shard_errors
        if (made_with := json.loads(attrs["libraries"])) not in libraries:
            libraries.append(made_with)
    errors, labelled = total["errors"], total["labelled"]
    return Report(
        folder=str(plan.folder),
        teacher=identity.model,
        fingerprint=plan.attrs["fingerprint"],
        grid=plan.layout.grid,
        k=plan.layout.k,
        views=list(plan.layout.views),
        num_classes=plan.layout.num_classes,
        images=plan.rows,
        shards=plan.shards,
        written=len(tally.written),
        skipped=skipped,
        failed=tally.failed,
        preprocessing=identity.preprocessing,
        origins=identity.origins,
        head_mode=identity.head_mode,
        exact=identity.exact,
        pooled_error=identity.pooled_error,
        seconds=round(seconds, 3),
        images_per_second=tally.rate,
        busy=tally.busy / tally.span if tally.span else None,
        lost_actors=tally.lost_actors,
        errors=errors,
        error_list=error_list[:LISTED_ERRORS],
        labelled=labelled,
        numbering=plan.attrs["numbering"],
        class_fits=tally.class_fits,
        top1=total["top1"] / labelled if labelled else None,
        top5=total["top5"] / labelled if labelled else None,
        mass=total["mass"] / (rows - errors) if rows > errors else None,
        bytes_per_image=size / rows if rows else None,
        max_errors_exceeded=errors > (max_errors if max_errors >= 1 else max_errors * plan.rows),
        libraries=libraries,
    )


def _summary(path: AnyPath) -> tuple[int, int, dict[str, Any], list[tuple[str, str]]]:
    """Rows, bytes and header of a shard, and the keys and reasons of its errors."""
    with open_shard(path) as shard:
        pairs: list[tuple[str, str]] = []
        if shard.attrs["errors"]:
            pairs = [*zip(shard.texts("key"), shard.texts("error"), strict=True)]
        return shard.rows, shard.end, shard.attrs, [pair for pair in pairs if pair[1]]
