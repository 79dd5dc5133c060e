"""What a job does while it runs, and its end report: of the whole split, earlier runs included."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..dataset.format.files import replacing
from ..dataset.format.shard import Shard, shard_name
from .plan import Identity, Plan

NAME = "report.json"
#: Images with an error that a report lists by name; the shards name all of them.
LISTED_ERRORS = 100
#: Counts in a shard's header that a report adds up.
_COUNTS = ("errors", "labelled", "top1", "top5", "mass")


class Progress(NamedTuple):
    """What an actor has done since it started: images, error rows, and seconds of its teacher.

    `busy` is the time the teacher computed. `since` and `until` are when its first batch began and
    its last one ended, and `now` when it was asked, by the monotonic clock of its machine.
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
        busy: seconds that the teachers computed.
        span: seconds from each teacher's first batch to its last, summed over the teachers.
        rate: images per second, from the first batch to the last.
        teachers: actors that are ready.
        written: hex sha256 of each shard that was written, by number.
        failed: the reason of each shard that failed for good, by number.
        lost_actors: teacher actors that died.
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


@dataclass
class Report:
    """What a job did and what the split holds now.

    Attributes:
        folder: folder of the shards.
        teacher, fingerprint: of all shards.
        grid, k, views, num_classes: of the maps.
        images, errors: rows of the split, and those without a map.
        error_list: (key, reason) of the first 100 of these.
        shards: of the split; `written` by this run, `skipped` because they were there,
            `failed` as {number: reason}.
        labelled: images whose ground truth is a class of the teacher.
        top1, top5: fraction of these that the teacher gets right, from the pooled logits of its
            first pass; None without ground truth.
        mass: mean probability mass of the stored classes, over all patches.
        bytes_per_image: size of the shards divided by the number of rows.
        head_mode: how the teacher's map is derived.
        exact: whether the mean of the map's logits must equal the pooled logits, and `pooled_error`
            the largest difference on the first images.
        seconds: of this run; `images_per_second` from the teachers' first batch to their last.
        busy: fraction of that time that the teachers computed.
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
    head_mode: str
    exact: bool
    pooled_error: float
    seconds: float
    images_per_second: float | None
    busy: float | None
    lost_actors: int
    errors: int = 0
    error_list: list[tuple[str, str]] = field(default_factory=list)
    labelled: int = 0
    top1: float | None = None
    top5: float | None = None
    mass: float | None = None
    bytes_per_image: float | None = None
    max_errors_exceeded: bool = False
    libraries: list[dict[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all shards are there and errors are within the limit."""
        return not self.failed and not self.max_errors_exceeded

    def save(self) -> None:
        """Write report.json beside the shards."""
        with replacing(Path(self.folder) / NAME) as temporary:
            temporary.write_text(json.dumps({"ok": self.ok, **asdict(self)}, indent=2) + "\n")


def make_report(
    plan: Plan, identity: Identity, tally: Tally, skipped: int, seconds: float, max_errors: float
) -> Report:
    """Sum up the headers of all shards that are there."""
    report = Report(
        folder=str(plan.folder),
        teacher=identity.model,
        fingerprint=plan.fingerprint,
        grid=plan.layout.grid,
        k=plan.layout.k,
        views=list(plan.layout.views),
        num_classes=plan.layout.num_classes,
        images=plan.rows,
        shards=plan.shards,
        written=len(tally.written),
        skipped=skipped,
        failed=tally.failed,
        head_mode=identity.head_mode,
        exact=identity.exact,
        pooled_error=identity.pooled_error,
        seconds=round(seconds, 3),
        images_per_second=tally.rate,
        busy=tally.busy / tally.span if tally.span else None,
        lost_actors=tally.lost_actors,
    )
    rows, size, totals = 0, 0, dict[str, Any].fromkeys(_COUNTS, 0)
    for number in range(plan.shards):
        if number in tally.failed:
            continue
        path = plan.folder / shard_name(number, plan.shards)
        with Shard(path) as shard:
            rows += shard.rows
            size += path.stat().st_size
            for name in _COUNTS:
                totals[name] += shard.attrs[name]
            if shard.attrs["errors"] and len(report.error_list) < LISTED_ERRORS:
                pairs = zip(shard.texts("key"), shard.texts("error"), strict=True)
                report.error_list += [(key, error) for key, error in pairs if error]
                del report.error_list[LISTED_ERRORS:]
            libraries = json.loads(shard.attrs["libraries"])
            if libraries not in report.libraries:
                report.libraries.append(libraries)
    report.errors, report.labelled = totals["errors"], totals["labelled"]
    if report.labelled:
        report.top1 = totals["top1"] / report.labelled
        report.top5 = totals["top5"] / report.labelled
    if rows > report.errors:
        report.mass = totals["mass"] / (rows - report.errors)
    if rows:
        report.bytes_per_image = size / rows
    limit = max_errors if max_errors >= 1 else max_errors * plan.rows
    report.max_errors_exceeded = report.errors > limit
    return report
