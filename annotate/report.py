"""The end report of a job: of the whole split, shards of earlier runs included."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..dataset.format.files import replacing
from ..dataset.format.shard import Shard, shard_name
from .cluster.pool import Tally
from .plan import Identity, Plan

NAME = "report.json"
#: Images with an error that a report lists by name; the shards name all of them.
LISTED_ERRORS = 100


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
        bytes_per_image: size of the shards over the number of rows.
        dense_rule, dense_exact, dense_error: the teacher's per-patch form, whether the mean of
            its logits must be the pooled ones, and the largest difference on the first images.
        seconds: of this run; `images_per_second` from the teachers' first batch to their last.
        busy: fraction of that time the teachers computed.
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
    dense_rule: str
    dense_exact: bool
    dense_error: float
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

    def save(self) -> Path:
        """Write report.json beside the shards."""
        path = Path(self.folder) / NAME
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"ok": self.ok, **asdict(self)}, indent=2) + "\n")
        return path


def make_report(
    plan: Plan, identity: Identity, tally: Tally, skipped: int, seconds: float, max_errors: float
) -> Report:
    """Add up the headers of all shards that are there."""
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
        dense_rule=identity.head_mode,
        dense_exact=identity.dense_exact,
        dense_error=identity.dense_error,
        seconds=round(seconds, 3),
        images_per_second=tally.rate,
        busy=tally.busy / tally.span if tally.span else None,
        lost_actors=tally.lost_actors,
    )
    totals: dict[str, Any] = dict.fromkeys(("labelled", "top1", "top5", "mass", "rows", "bytes"), 0)
    for number in range(plan.shards):
        if number not in tally.failed:
            _add(report, totals, plan.folder / shard_name(number, plan.shards))
    good = totals["rows"] - report.errors
    report.labelled = totals["labelled"]
    if report.labelled:
        report.top1 = totals["top1"] / report.labelled
        report.top5 = totals["top5"] / report.labelled
    report.mass = totals["mass"] / good if good else None
    report.bytes_per_image = totals["bytes"] / totals["rows"] if totals["rows"] else None
    limit = max_errors if max_errors >= 1 else max_errors * plan.rows
    report.max_errors_exceeded = report.errors > limit
    return report


def _add(report: Report, totals: dict[str, Any], path: Path) -> None:
    with Shard(path) as shard:
        for name in ("labelled", "top1", "top5", "mass"):
            totals[name] += shard.attrs[name]
        totals["rows"] += shard.rows
        totals["bytes"] += path.stat().st_size
        report.errors += shard.attrs["errors"]
        if shard.attrs["errors"] and len(report.error_list) < LISTED_ERRORS:
            bad = [pair for pair in zip(shard.texts("key"), shard.texts("error"), strict=True)]
            report.error_list += [pair for pair in bad if pair[1]]
            del report.error_list[LISTED_ERRORS:]
        libraries = json.loads(shard.attrs["libraries"])
        if libraries not in report.libraries:
            report.libraries.append(libraries)
