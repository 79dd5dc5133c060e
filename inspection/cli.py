"""The commands `inspect-labels` and `compare-labels`."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from os import cpu_count
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..errors import FormatError

_FOLDER = click.Path(path_type=Path)


@click.command("inspect-labels")
@click.argument("labels", default="labels", type=_FOLDER)
@click.option("--all", "everything", is_flag=True, help="Read every map, not a sample.")
@click.option("--key", help="Show the map of one image: its path relative to the split.")
@click.option("--png", type=_FOLDER, help="With --key: draw image, map and augmentations.")
@click.option("--html", type=_FOLDER, help="Write a page to browse the labels, in one file.")
@click.option("--limit", default=200, type=click.IntRange(1), help="Images of the page. [200]")
@click.option("--verify", "do_verify", is_flag=True, help="Check every byte of the shards.")
@click.option(
    "--repair",
    is_flag=True,
    help="As --verify, then delete bad shards after asking: the same `annotate` redoes just them.",
)
@click.option("--yes", is_flag=True, help="With --repair: do not ask.")
@click.option("--workers", type=click.IntRange(1), help="Processes of --verify. [one a core]")
@click.option(
    "--agreement",
    metavar="N",
    type=click.IntRange(1),
    help="Compare crops of N images' maps with the teacher run live on the crop: KL, total "
    "variation, top-1. Smaller crops agree less, for the teacher sees them enlarged: expect 0.2 to "
    "0.3 nats for the whole image and 1 to 3 for the smallest crops. Beside them stand the noise "
    "floors, the teacher against itself (mirrored, at another size: 0.5 to 0.7), and how often the "
    "crop's mean target has the image's label on top.",
)
@click.option("--weights", help="Of the teacher for --agreement, as for annotate. [found by name]")
@click.option("--seed", default=0, help="Of the images and crops of --agreement. [0]")
@click.option(
    "--images",
    type=_FOLDER,
    help="Folder of the images, of the split or above it. --verify then compares their digests, "
    "--html, --png and --agreement need it. [the embedded sample, where the labels are of it]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_labels(labels: Path, key: str | None, as_json: bool, **options: Any) -> None:
    """Summarise the label maps in LABELS (default: labels), check them, or look at single ones.

    \b
    Examples:
      python cli.py inspect-labels
      python cli.py inspect-labels --verify
      python cli.py inspect-labels --agreement 8
      python cli.py inspect-labels labels/train --key n02108422/imagenet_00_243.jpg
      python cli.py inspect-labels --html labels.html

    Exit status: 0 all is well, 1 something is wrong or could not be done, 2 bad usage.
    """
    from .splits import find_splits

    _check_usage(key, as_json, options)
    splits = find_splits(labels)
    if options["do_verify"] or options["repair"]:
        _verify(splits, as_json, options)
    elif options["agreement"]:
        _agreement(splits, as_json, options)
    elif options["html"]:
        _page(splits, key, options)
    elif key is not None:
        _one_map(splits, key, as_json, options)
    else:
        _summary(splits, options["everything"], as_json)


def _check_usage(key: str | None, as_json: bool, options: dict[str, Any]) -> None:
    given = [
        name
        for name, flag in (
            ("--verify", options["do_verify"] or options["repair"]),
            ("--agreement", options["agreement"]),
            ("--html", options["html"]),
            ("--png", options["png"]),
        )
        if flag
    ]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)}: one at a time")
    if key is not None and (options["do_verify"] or options["repair"] or options["agreement"]):
        raise click.UsageError("--key looks at one image: leave it out to check a whole split")
    if options["png"] and key is None:
        raise click.UsageError("--png draws one image: name it with --key")
    if options["repair"] and as_json and not options["yes"]:
        raise click.UsageError("--repair asks before it deletes; with --json say --yes")


def _console() -> Console:
    return Console(emoji=False, highlight=False)


def _one_map(splits: Sequence[Path], key: str, as_json: bool, options: dict[str, Any]) -> None:
    from .single import map_facts, print_map
    from .splits import find_key

    store = find_key(splits, key)
    if options["png"]:
        from .pictures.sheet import save_png

        save_png(store, key, options["png"], options["images"])
        click.echo(options["png"])
        return
    facts = map_facts(store, key)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        print_map(facts, _console())


def _page(splits: Sequence[Path], key: str | None, options: dict[str, Any]) -> None:
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


def _summary(splits: Sequence[Path], everything: bool, as_json: bool) -> None:
    from ..terminal import progress_bar
    from .summary import summarise
    from .terminal import print_summary

    console, summaries = _console(), []
    with _faults() as faults:
        for split in splits:
            try:
                with progress_bar(split.name) as watch:
                    summaries.append(summarise(split, everything, watch))
            except FormatError as error:  # of one split; the others are worth a look all the same
                faults.append(str(error))
        if as_json:
            click.echo(json.dumps(summaries, indent=2))
        else:
            for facts in summaries:
                print_summary(facts, console)
            if summaries:
                click.echo(
                    "Every byte: --verify. One image: --key KEY. A page to browse: --html FILE. "
                    "For programs: --json"
                )


@contextmanager
def _faults() -> Iterator[list[str]]:
    """Texts to print at the end, with exit status 1 if there are any."""
    texts: list[str] = []
    yield texts
    for text in texts:
        click.echo(f"Error: {text}", err=True)
    if texts:
        sys.exit(1)


def _verify(splits: Sequence[Path], as_json: bool, options: dict[str, Any]) -> None:
    from ..dataset.format.lock import folder_lock
    from ..terminal import progress_bar
    from .splits import split_images
    from .verify.verify import repair, verify
    from .verify.verify_terminal import print_check

    workers = options["workers"] if options["workers"] is not None else cpu_count() or 1
    checks = []
    for split in splits:
        images = options["images"] and split_images(split, options["images"])
        with folder_lock(split) if options["repair"] else nullcontext():
            with progress_bar(split.name) as watch:
                check = verify(split, images, workers, watch)
            removed = []
            if not as_json:
                print_check(check, _console(), options["repair"])
            if options["repair"] and check.bad_files:
                question = f"Delete {', '.join(check.bad_files)} of {split}?"
                if options["yes"] or click.confirm(question, err=True):
                    removed = repair(split, check)
        checks.append(check.as_dict() | {"removed": [path.name for path in removed]})
        if removed and not as_json:
            click.echo(
                f"Deleted {', '.join(path.name for path in removed)} of {shlex.quote(str(split))}. "
                "Next: run the `annotate` that made them; it makes just what is missing"
            )
    if as_json:
        click.echo(json.dumps(checks, indent=2))
    if not all(check["ok"] for check in checks):
        sys.exit(1)


def _agreement(splits: Sequence[Path], as_json: bool, options: dict[str, Any]) -> None:
    from ..terminal import progress_bar
    from .agreement import measure_agreement
    from .agreement_terminal import print_agreement

    results = []
    for split in splits:
        with progress_bar(f"{split.name}: the teacher runs") as watch:
            result = measure_agreement(
                split,
                options["agreement"],
                options["images"],
                weights=options["weights"],
                seed=options["seed"],
                watch=watch,
            )
        results.append(result)
        if not as_json:
            print_agreement(result, _console())
    if as_json:
        click.echo(json.dumps(results, indent=2))


@click.command("compare-labels")
@click.argument("a", type=_FOLDER)
@click.argument("b", type=_FOLDER)
@click.option("--all", "everything", is_flag=True, help="Read every map, not a sample.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare_labels(a: Path, b: Path, everything: bool, as_json: bool) -> None:
    """Compare two label sets of the same images: two teachers, two sizes, two k.

    Each patch is a distribution over all classes, the mass of those that are not stored included.
    KL in nats both ways, their Jensen-Shannon divergence (0 equal, 0.69 nothing in common), how
    often the top class is the same, and the images that differ most. Maps of different grids are
    averaged over the cells of the coarser one.

    \b
    Examples:
      python cli.py compare-labels labels/train labels-compact/train
    """
    from ..terminal import progress_bar
    from .compare import compare, pair_splits
    from .compare_terminal import print_comparison

    results = []
    for one, two in pair_splits(a, b):
        with progress_bar(one.name) as watch:
            results.append(compare(one, two, everything, watch))
        if not as_json:
            print_comparison(results[-1], _console())
    if as_json:
        click.echo(json.dumps(results, indent=2))
