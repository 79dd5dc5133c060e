"""The commands `inspect-labels` and `compare-labels`."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from os import cpu_count
from pathlib import Path
from typing import Any

import click

from ..dataset.storage.remote_path import AnyPath, RemotePath, as_path
from ..errors import ConfigError, FormatError

_FOLDER = click.Path(path_type=Path)


@click.command("inspect-labels")
@click.argument("labels", default="labels")
@click.option("--all", "everything", is_flag=True, help="Read every map, not a sample.")
@click.option("--key", metavar="KEY", help="Show one image's map. KEY: its path in the split.")
@click.option("--png", type=_FOLDER, help="With --key: draw image, map and augmentations.")
@click.option("--html", type=_FOLDER, help="Write a page to browse the labels, in one file.")
@click.option("--limit", default=200, type=click.IntRange(1), help="Images on the page. [200]")
@click.option("--verify", "do_verify", is_flag=True, help="Check every byte of the shards.")
@click.option(
    "--repair",
    is_flag=True,
    help="As --verify, then delete bad shards after asking. The same `annotate` redoes only these.",
)
@click.option("--yes", is_flag=True, help="With --repair: do not ask.")
@click.option("--workers", type=click.IntRange(1), help="Processes for --verify. [one per core]")
@click.option(
    "--agreement",
    metavar="N",
    type=click.IntRange(1),
    help="Compare crops of the maps of N images with the teacher run live on the crop: KL, total "
    "variation, top-1. Smaller crops agree less, since the teacher sees them enlarged: expect 0.2 "
    "to 0.3 nats for the whole image and 1 to 3 for the smallest crops. Also printed: the noise "
    "floors, which compare the teacher with itself (mirrored, at another size: 0.5 to 0.7), and "
    "how often the crop's mean target has the image's label on top.",
)
@click.option(
    "--weights",
    help="Teacher's weights for --agreement, as in annotate; FILE.py:FUNCTION for a teacher of "
    "your own. [by its name]",
)
@click.option("--seed", default=0, help="Seed for the images and crops of --agreement. [0]")
@click.option(
    "--images",
    help="The images: the split's folder, the one above it, or another source as annotate takes it "
    "in `data` (tars, Parquet, a list, a URL). Needed by --html, --png and --agreement; --verify "
    "compares the images' digests too, and of a source that is no folder needs the split's own "
    "files. [the sample, if the labels are of it]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_labels(labels: str, key: str | None, as_json: bool, **options: Any) -> None:
    """Summarise the label maps in LABELS (default: labels), check them, or show single ones.

    \b
    Examples:
      python cli.py inspect-labels
      python cli.py inspect-labels --verify
      python cli.py inspect-labels --agreement 8
      python cli.py inspect-labels labels/train --key n02108422/imagenet_00_243.jpg
      python cli.py inspect-labels --html labels.html

    Exit status: 0 all is well, 1 something is wrong or could not be done, 2 bad usage.
    """
    # Here and below, what a command needs is imported when it runs: --help waits for none of it.
    from .label_sets import find_splits

    checks = options["do_verify"] or options["repair"]
    modes = {
        "--verify": checks,
        "--agreement": options["agreement"],
        "--html": options["html"],
        "--png": options["png"],
    }
    given = [name for name, value in modes.items() if value]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)}: use one at a time")
    if key is not None and (checks or options["agreement"]):
        raise click.UsageError("--key shows one image: leave it out to check a whole split")
    if options["png"] and key is None:
        raise click.UsageError("--png draws one image: name it with --key")
    if options["repair"] and as_json and not options["yes"]:
        raise click.UsageError("--repair asks before it deletes: add --yes to use it with --json")

    splits = find_splits(as_path(labels))
    if checks:
        _verify(splits, as_json, options)
    elif options["agreement"]:
        from .agreement import measure_agreement
        from .console import print_agreement

        count, chosen = options["agreement"], {k: options[k] for k in ("images", "weights", "seed")}
        measure = partial(measure_agreement, count=count, **chosen)
        _report(splits, measure, print_agreement, as_json)
    elif options["html"]:
        _page(splits, key, options)
    elif key is not None:
        from .console import print_map
        from .label_sets import find_key
        from .summary import summarise_map

        store = find_key(splits, key)
        if options["png"]:
            from .pictures.sheet import save_png

            save_png(store, key, options["png"], options["images"])
            click.echo(options["png"])
        elif as_json:
            click.echo(json.dumps(summarise_map(store, key)))
        else:
            print_map(summarise_map(store, key))
    else:
        from .console import print_summary
        from .summary import summarise

        measure = partial(summarise, everything=options["everything"])
        _report(splits, measure, print_summary, as_json)
        if not as_json:
            click.echo(
                "Every byte: --verify. One image: --key KEY. A page to browse: --html FILE. "
                "For programs: --json"
            )


def _report(
    folders: Sequence[AnyPath],
    measure: Callable[..., dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    as_json: bool,
) -> None:
    """Measure each folder under a progress bar, and print the facts.

    Damaged folders are reported last and end the command with status 1.
    """
    from ..terminal import progress_bar

    results, faults = [], []
    for folder in folders:
        try:
            with progress_bar(folder.name) as watch:
                results.append(measure(folder, watch=watch))
        except FormatError as error:
            faults.append(error)
            continue
        if not as_json:
            show(results[-1])
    if as_json:
        click.echo(json.dumps(results, indent=2))
    for fault in faults:
        click.echo(f"Error: {fault}", err=True)
    if faults:
        sys.exit(1)


def _page(splits: Sequence[AnyPath], key: str | None, options: dict[str, Any]) -> None:
    from ..dataset.store import LabelStore
    from ..terminal import progress_bar
    from .page.page import save_page

    with progress_bar("drawing") as watch:
        report = save_page(
            [LabelStore(split) for split in splits],
            options["html"],
            options["images"],
            limit=options["limit"],
            keys=None if key is None else [key],
            watch=watch,
        )
    click.echo(
        f"{report.path}: {report.shown} of {report.total} images, {report.size / 1e6:.1f} MB"
        + f"; {report.errors} in its list of errors" * (report.errors > 0)
    )


def _verify(splits: Sequence[AnyPath], as_json: bool, options: dict[str, Any]) -> None:
    from ..dataset.format.lock import folder_lock
    from ..terminal import progress_bar
    from .console import print_check
    from .label_sets import split_images
    from .verify.verify import repair, verify

    workers = options["workers"] or cpu_count() or 1
    checks = []
    for split in splits:
        if isinstance(split, RemotePath):
            raise ConfigError(
                f"--verify and --repair read every byte of a folder on a disk, and {split} is in a "
                "store. Remedy: copy it (rclone, aws s3 sync), and check the copy"
            )
        images = options["images"] and split_images(split, options["images"])
        with folder_lock(split) if options["repair"] else nullcontext():
            with progress_bar(split.name) as watch:
                check = verify(split, images, workers, watch)
            facts, removed = check.as_dict(), []
            if not as_json:
                print_check(facts, options["repair"])
            if options["repair"] and check.bad_files:
                question = f"Delete {', '.join(check.bad_files)} of {split}?"
                if options["yes"] or click.confirm(question, err=True):
                    removed = repair(split, check)
        checks.append(facts | {"removed": [path.name for path in removed]})
        if removed and not as_json:
            click.echo(
                f"Deleted {', '.join(path.name for path in removed)} of {shlex.quote(str(split))}. "
                "Next: run the `annotate` that made them; it redoes only what is missing"
            )
    if as_json:
        click.echo(json.dumps(checks, indent=2))
    if not all(check["ok"] for check in checks):
        sys.exit(1)


@click.command("compare-labels")
@click.argument("a")
@click.argument("b")
@click.option("--all", "everything", is_flag=True, help="Read every map, not a sample.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare_labels(a: str, b: str, everything: bool, as_json: bool) -> None:
    """Compare two label sets of the same images: two teachers, two sizes, two k.

    Each patch is a distribution over all classes, including the mass of those that are not stored.
    Printed are KL in nats both ways, their Jensen-Shannon divergence (0 equal, 0.69 nothing in
    common), how often the top class is the same, and the images that differ most. Maps of
    different grids are averaged over the cells of the coarser one.

    \b
    Examples:
      python cli.py compare-labels labels/train labels-compact/train
    """
    from .compare import compare, pair_splits
    from .console import print_comparison

    pairs = dict(pair_splits(as_path(a), as_path(b)))

    def measure(one: AnyPath, **options: Any) -> dict[str, Any]:
        return compare(one, pairs[one], everything, **options)

    _report(list(pairs), measure, print_comparison, as_json)
