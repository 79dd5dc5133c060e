"""What an annotation job prints: a bar in a terminal, plain lines in a log, a report at the end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from ..terminal import escape, progress_bar
from .report import Report, Tally

#: Seconds between two lines in a log.
LOG_SECONDS = 10.0
_MOST_LISTED = 10  # errors and failed shards


@contextmanager
def progress_display(console: Console) -> Iterator[Callable[[Tally, int, int], None]]:
    """A function to call with the run's tally, its number of images and the split's."""
    printed = time.monotonic()

    def show(tally: Tally, images: int, split: int) -> None:
        nonlocal printed
        done = min(tally.images, images)  # a retried shard counts twice
        state = (
            f"{tally.teachers} teacher{'s' * (tally.teachers != 1)}, "
            f"{tally.rate or 0:.1f} images/s, {tally.errors} errors"
        )
        update(done, images, state)
        if not console.is_terminal and time.monotonic() - printed >= LOG_SECONDS:
            printed = time.monotonic()
            left = f"{(images - done) / tally.rate:.0f} s left" if tally.rate else "…"
            console.print(
                f"{done}/{images} images of this run ({split} in the split), {state}, {left}",
                soft_wrap=True,
            )

    with progress_bar("starting") as update:
        yield show


def print_report(report: Report, console: Console) -> None:
    """The end report as a table, with the errors and failed shards below it."""
    height, width = report.grid
    rows = {
        "shards": f"{report.folder} ({report.shards}: {report.written} new, {report.skipped} kept)",
        "images": f"{report.images}, {report.errors} of them without a map",
        "maps": f"{height} x {width} patches, top {report.k} of {report.num_classes}, "
        + " + ".join(report.views),
        "teacher": f"{report.teacher}; patch logits: {report.head_mode}",
    }
    if report.pooled_error is not None:
        how = "0 up to rounding, as it must be" if report.exact else "not expected to be 0"
        rows["teacher"] += (
            f"; their mean differs from the pooled logits by {report.pooled_error:.1e} ({how})"
        )
    by_origin: dict[str, list[str]] = {}
    for name in sorted(report.origins.keys() & report.preprocessing.keys()):
        text = report.preprocessing[name]
        if name == "input_size":
            text = f"squashed to {', '.join(f'{h} x {w}' for h, w in text)} px"
        elif isinstance(text, list):
            text = f"{name} " + " ".join(map("{:g}".format, text))
        by_origin.setdefault(report.origins[name], []).append(text)
    rows["preprocessing"] = "; ".join(
        f"{', '.join(texts)} ({origin})" for origin, texts in by_origin.items()
    )
    if report.top1 is not None and report.top5 is not None:
        rows["teacher accuracy"] = (
            f"top-1 {report.top1:.1%}, top-5 {report.top5:.1%} of {report.labelled} images with a "
            "known class"
        )
    if report.numbering:
        fits = (f"{rule} {hits} of {count}" for rule, (hits, count) in report.class_fits.items())
        asked = f"; the teacher is right on {', '.join(fits)} sampled images"
        rows["classes"] = f"by numbering {report.numbering}{asked * bool(report.class_fits)}"
    if report.mass is not None:
        rows["top-k mass"] = f"{report.mass:.3f} of the probability, mean over patches"
    if report.bytes_per_image is not None:
        rows["size"] = f"{report.bytes_per_image:,.0f} bytes per image"
    rows["time"] = f"{report.seconds:.1f} s"
    if report.images_per_second and report.busy:
        rows["time"] += (
            f", {report.images_per_second:.1f} images/s, teachers busy {report.busy:.1%}"
        )
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)
    for key, reason in report.error_list[:_MOST_LISTED]:
        console.print(f"  [yellow]no map[/yellow] {escape(repr(key))}: {escape(reason)}")
    if (more := report.errors - _MOST_LISTED) > 0:
        console.print(f"  … and {more} more: see `inspect-labels --json`")
    for shard, reason in list(report.failed.items())[:_MOST_LISTED]:
        console.print(f"  [red]failed[/red] shard {shard}: {escape(reason)}")
    if (more := len(report.failed) - _MOST_LISTED) > 0:
        console.print(f"  … and {more} more: see report.json")
    if report.failed:
        console.print("[red]Some shards failed.[/red] Run the same command again to redo them.")
    if report.max_errors_exceeded:
        console.print(
            f"[red]Too many images have no map[/red] ({report.errors} of {report.images}); "
            "the limit is the option max_errors."
        )
