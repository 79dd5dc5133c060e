"""What the inspection commands print for people, from the facts that `--json` prints."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from ..terminal import console, escape, one_line
from .pictures.map_facts import COLOURS, LETTERS, OTHER, legend, letters_of
from .summary import TIMES

_BARS = " ▁▂▃▄▅▆▇█"
_LISTED = 10
_QUANTILES = {"mean": "mean", "p5": "5%", "p25": "25%", "p50": "50%", "p75": "75%", "p95": "95%"}
_DIVERGENCES = {
    "kl_a_b": "KL(A || B) of a patch",
    "kl_b_a": "KL(B || A) of a patch",
    "js": "JS of a patch",
    "js_of_images": "JS of an image",
}
_METRICS = {
    "kl": ("KL(teacher || target), nats", ".3f"),
    "tv": ("total variation", ".3f"),
    "top1": ("same top-1 class", ".1%"),
    "label_top1": ("label on top of the mean target", ".1%"),
}


def print_summary(facts: dict[str, Any]) -> None:
    """A summary of a split: what the labels are, their quality, and what to check."""
    out = console()
    out.print(f"[bold]{escape(facts['folder'])}[/bold]", soft_wrap=True)
    columns = Column(min_width=17), Column(overflow="fold")
    table = Table(*columns, show_header=False, box=None, pad_edge=False)
    for name, value in _overview(facts):
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    out.print(table)
    if facts["sampled"]:
        _print_statistics(facts)
    count, of = facts["images_without_their_label"], facts["sampled_with_label"]
    if of:
        out.print(
            f"[bold]likely mislabels[/bold] {count:,} of {of:,} images lack their label in every "
            f"patch's top {facts['k']}" + ": mislabelled, or too hard for the teacher" * (count > 0)
        )
    found = facts["images_without_their_label_list"]
    for entry in found[:_LISTED]:
        out.print(
            f"  [yellow]?[/yellow] {escape(repr(entry['key']))}: labelled "
            f"{escape(entry['label_name'])}, {entry['share']:.0%} of patches show "
            f"{escape(entry['name'])}"
        )
    if count > _LISTED:
        out.print(f"  … and {count - _LISTED:,} more; --json lists {len(found):,}")
    reasons = facts["error_reasons"]
    if len(reasons) > 1:
        for reason, number in list(reasons.items())[:_LISTED]:
            out.print(f"  [yellow]{number:>6,}[/yellow] errors: {escape(reason)}")
    for key, reason in facts["error_list"]:
        out.print(f"  [yellow]no map[/yellow] {escape(repr(key))}: {escape(reason)}")
    if facts["errors"] > len(facts["error_list"]):
        out.print(f"  … and {facts['errors'] - len(facts['error_list']):,} more errors")
    out.print()


def print_map(facts: dict[str, Any]) -> None:
    """One image's top-1 classes as a grid of coloured letters, the most frequent class first."""
    out = console()
    best, probs = np.array(facts["classes"]), np.array(facts["probs"])
    entries = legend(best, probs, len(LETTERS))
    styles = {
        entry.class_id: f"{'white' if entry.colour == COLOURS[-1] else 'black'} on {entry.colour}"
        for entry in entries
        if entry.colour != OTHER
    }
    width, height = facts["size"]
    name = facts["label_name"] or ("unknown" if facts["label"] < 0 else str(facts["label"]))
    out.print(
        f"[bold]{escape(repr(facts['key']))}[/bold] {width} x {height} px, label: {escape(name)}"
    )
    for letters, classes in zip(letters_of(best, probs, entries), best.tolist(), strict=True):
        line = Text("  ")
        for letter, class_id in zip(letters, classes, strict=True):
            line.append(f" {letter} ", styles.get(class_id))
        out.print(line, no_wrap=True, crop=False)
    for entry in entries:
        line = Text("  ").append(f" {entry.letter} ", styles.get(entry.class_id))
        line.append(
            f" {entry.class_id:>5}  {one_line(facts['names'][entry.class_id])}: {entry.patches} "
            f"patches, mean probability {entry.mean:.2f}"
        )
        out.print(line)
    others = len(facts["names"]) - len(entries)
    out.print(f"  upper case: probability of one half or more; dots: {others} other classes")


def print_comparison(facts: dict[str, Any]) -> None:
    """What two label sets are, how far they are apart, and the images that differ most."""
    out = console()
    for side in "ab":
        found = facts[side]
        height, width = found["grid"]
        out.print(
            f"[bold]{side.upper()}[/bold] {escape(found['folder'])}: {found['images']:,} images, "
            f"{escape(str(found['teacher']))}, {height} x {width} patches, top {found['k']}"
            + (f"; {found['only_here']:,} images only here" if found["only_here"] else ""),
            soft_wrap=True,
        )
    part = "all" if facts["sampled"] == facts["common"] else "a sample of"
    height, width = facts["grid"]
    out.print(
        f"compared: {part} {facts['sampled']:,} of {facts['common']:,} common images, "
        f"{facts['compared']:,} with both maps, on {height} x {width} patches"
    )
    if not facts["compared"]:
        return
    out.print(f"[bold]same top-1 class[/bold]: {facts['top1_agreement']:.2%} of patches")
    if facts["other_labels"]:
        out.print(f"[yellow]other ground truth[/yellow]: {facts['other_labels']:,} images")
    table = _table("nats", *_QUANTILES.values())
    for name, title in _DIVERGENCES.items():
        table.add_row(title, *(f"{facts[name][quantile]:.2g}" for quantile in _QUANTILES))
    out.print(table)
    if not facts["different"]:
        out.print("no image differs\n")
        return
    out.print("[bold]the images that differ most[/bold] (JS, same top-1)")
    for image in facts["different"]:
        out.print(
            f"  {image['js']:.3f} {image['top1_agreement']:>6.1%}  {escape(repr(image['key']))}: "
            f"mostly {escape(image['name_a'])} in A, {escape(image['name_b'])} in B",
            soft_wrap=True,
        )
    out.print()


def print_agreement(facts: dict[str, Any]) -> None:
    """How well crops of maps agree with the teacher run live: a column for each range of crops."""
    rows = {(row["target"], *row["scale"]): row for row in facts["rows"]}
    scales = sorted({tuple(row["scale"]) for row in facts["rows"]}, reverse=True)
    table = _table(
        "crop's fraction of the image",
        *("whole" if low == high else f"{low:.0%}-{high:.0%}" for low, high in scales),
        title=f"[bold]{escape(facts['folder'])}[/bold]: targets against "
        f"{escape(facts['teacher'])} run live at {' x '.join(map(str, facts['input_size']))} px "
        f"on crops of {facts['images']} images",
    )
    for metric, (title, style) in _METRICS.items():
        lines = {
            target: [rows.get((target, *scale), {}).get(metric) for scale in scales]
            for target in dict.fromkeys(row["target"] for row in facts["rows"])
            if target != "teacher" or metric == "label_top1"  # else it is perfect
        }
        if any(value is not None for line in lines.values() for value in line):
            table.add_row(f"[bold]{title}[/bold]")
            for target, line in lines.items():
                values = ("" if value is None else format(value, style) for value in line)
                table.add_row(f"  {target}", *values)
    out = console()
    out.print(table)
    if facts["labelled"]:
        out.print(
            f"  The teacher's top-1 on the whole images, prepared as by the job: "
            f"{facts['teacher_top1']:.1%} of {facts['labelled']}."
        )
    out.print(
        "  Stored: the whole map, cell by cell, against the teacher as it annotated: the cost of "
        f"storing the top {facts['k']}. Map: what a student gets. One label: the mean of the "
        "image's map for every patch. Teacher, mirrored and at another size: how far apart two "
        "equally good answers are, so a map nearer than that is as good as the teacher. Smaller "
        "crops are enlarged more for the teacher, so all divergences grow."
    )


def print_check(facts: dict[str, Any], repairs: bool = False) -> None:
    """What `--verify` found in a split; no advice where `repairs` is about to delete bad files."""
    out = console()
    out.print(f"[bold]{escape(facts['folder'])}[/bold]", soft_wrap=True)
    out.print(
        f"  read {facts['rows']:,} rows in {facts['shards']} shards, {facts['bytes']:,} bytes: "
        + ("[green]all is well[/green]" if facts["ok"] else "[red]not all is well[/red]")
    )
    lines = [
        f"[red]{escape(name)}[/red] is missing; the same `annotate` makes it"
        for name in facts["missing"]
    ]
    for fault in facts["faults"]:
        where = "" if fault["row"] is None else f" row {fault['row']}"
        where += "" if fault["key"] is None else f" {fault['key']!r}"
        lines.append(f"[red]{escape(fault['file'])}[/red]{escape(where)}: {escape(fault['text'])}")
    lines += [f"note: {escape(note)}" for note in facts["notes"]]
    if (bad := facts["bad_files"]) and not repairs:
        lines.append(
            "Remedy: `inspect-labels --verify --repair` deletes "
            f"{escape(', '.join(bad[:5]))}{', …' * (len(bad) > 5)}; the `annotate` that made them "
            "then redoes just these"
        )
    for line in lines:
        out.print(f"  {line}", soft_wrap=True)


def _overview(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of what the labels are and how good they are."""
    attrs, (height, width) = facts["attrs"], facts["grid"]
    weights = str(attrs.get("weights_digest", "unknown"))[:12]
    yield "teacher", f"{attrs.get('teacher', 'unknown')} (weights {weights})"
    if rule := attrs.get("dense_rule"):
        yield "patch logits", str(rule)
    if preprocessing := facts["preprocessing"]:
        texts = (
            f"{name} {'/'.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in preprocessing.items()
        )
        yield "preprocessing", ", ".join(texts)
    if versions := facts["libraries"]:
        yield "written by", ", ".join(f"{name} {number}" for name, number in versions.items())
    yield "fingerprint", str(attrs["fingerprint"])
    yield "images", f"{facts['images']:,} in {facts['shards']} shards, {facts['errors']:,} errors"
    yield (
        "maps",
        f"{height} x {width} patches, top {facts['k']} of {facts['num_classes']} classes, "
        f"views {' + '.join(facts['views'])}",
    )
    codes = f"steps of {attrs['step']:g} nat" if attrs["step"] else "float16"
    yield "stored", f"{codes}, below {attrs['floor']:g} dropped, residual of {attrs['residual']}"
    yield "size", f"{decimal(facts['bytes'])}, {facts['bytes_per_image']:,.0f} bytes an image"
    if folders := facts["folders"]:
        whose = "the teacher's" if attrs["label_space"] == "teacher" else "the folders' own numbers"
        shown = [
            f"{name} -> {number if number >= 0 else 'none'}"
            for name, number in list(folders.items())[:_LISTED]
        ]
        more = f", and {len(folders) - _LISTED:,} more in --json" * (len(folders) > _LISTED)
        yield "classes", f"{whose}, by numbering {attrs['numbering']}: {', '.join(shown)}{more}"
    accuracy = "unknown: no ground truth among the teacher's classes"
    if facts["labelled"]:
        accuracy = f"top-1 {facts['teacher_top1']:.1%}, top-5 {facts['teacher_top5']:.1%} of "
        accuracy += f"{facts['labelled']:,} images with ground truth"
    yield "teacher accuracy", accuracy
    if facts["topk_mass"] is not None:
        yield "top-k mass", f"{facts['topk_mass']:.3f} of the probability, mean of all images"
    if (fraction := facts["patches_with_label_on_top"]) is not None:
        yield "patches", f"{fraction:.1%} have the image's label on top ({_basis(facts)})"


def _basis(facts: dict[str, Any]) -> str:
    """Which images the statistics of patches are of."""
    if facts["sampled"] == facts["images"] - facts["errors"]:
        return f"all {facts['sampled']:,} images"
    return f"a sample of {facts['sampled']:,} images; --all reads every one"


def _print_statistics(facts: dict[str, Any]) -> None:
    """Of the patches: distributions, and the classes on top."""
    out, basis = console(), _basis(facts)
    table = _table("", *_QUANTILES.values(), title=f"[bold]Distributions[/bold] ({basis})")
    table.add_column("from 0 to", no_wrap=True)
    for title, name, histogram, decimals in (
        ("patch: top-k mass", "topk_mass_of_patches", "topk_mass_histogram", 2),
        ("patch: entropy", "entropy", "entropy_histogram", 2),
        ("image: top classes", "distinct_classes", "distinct_classes_histogram", 0),
    ):
        mean, *quantiles = (facts[name][quantile] for quantile in _QUANTILES)
        counts, edges = facts[histogram]["counts"], facts[histogram]["edges"]
        highest = max(counts) or 1
        # Rounded up: a bin with few values is not one with none.
        bars = "".join(_BARS[-(-count * (len(_BARS) - 1) // highest)] for count in counts)
        texts = [f"{mean:.{decimals or 1}f}", *(f"{value:.{decimals}f}" for value in quantiles)]
        table.add_row(title, *texts, f"{bars} {edges[-1]:.3g}")
    out.print(table)
    out.print("[bold]most frequent top-1 classes of patches[/bold] (of the labels)")
    _print_classes(facts["frequent_classes"])
    out.print(
        f"[bold]classes[/bold] {facts['never_on_top']:,} of {facts['num_classes']:,} are on top of "
        f"no patch, {facts['never_listed']:,} are in no top {facts['k']} ({basis})"
    )
    if facts["overpredicted_classes"]:
        out.print(
            f"[bold]over-predicted[/bold] on top more than {TIMES:.0f} times as often as labelled"
        )
        _print_classes(facts["overpredicted_classes"])


def _print_classes(entries: Sequence[dict[str, Any]]) -> None:
    for entry in entries:
        truth = f" ({entry['label_share']:.1%})" if "label_share" in entry else ""
        name = escape(entry["name"])
        console().print(f"  {entry['share']:6.1%}  {entry['class']:>5}  {name}{truth}")


def _table(*columns: str, title: str | None = None) -> Table:
    """A table without lines: one column of names, then columns of numbers."""
    first, *others = columns
    numbers = (Column(column, justify="right", no_wrap=True) for column in others)
    return Table(first, *numbers, title=title, title_justify="left", box=None, pad_edge=False)
