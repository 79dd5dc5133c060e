"""A summary as tables in a terminal."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from ..terminal import escape
from .summary import TIMES

_BARS = " ▁▂▃▄▅▆▇█"
_LISTED = 10


def print_summary(facts: dict[str, Any], console: Console) -> None:
    """A summary: what the labels are, their quality, and what to check."""
    console.print(f"[bold]{escape(facts['folder'])}[/bold]", soft_wrap=True)
    _print_pairs((*_provenance(facts), *_counts(facts), *_teacher(facts)), console)
    if facts["sampled"]:
        _print_distributions(facts, console)
        _print_classes(facts, console)
    _print_suspects(facts, console)
    _print_errors(facts, console)
    console.print()


def _print_pairs(rows: Iterable[tuple[str, str]], console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(min_width=17)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)


def _provenance(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    attrs = facts["attrs"]
    weights = str(attrs.get("weights_digest", "unknown"))[:12]
    yield "teacher", f"{attrs.get('teacher', 'unknown')} (weights {weights})"
    if rule := attrs.get("dense_rule"):
        yield "patch logits", str(rule)
    if made := facts["preprocessing"]:
        yield "preprocessing", ", ".join(f"{name} {_plain(value)}" for name, value in made.items())
    if facts["libraries"]:
        versions = (f"{name} {number}" for name, number in facts["libraries"].items())
        yield "written by", ", ".join(versions)
    yield "fingerprint", str(attrs["fingerprint"])


def _plain(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return (" x " if all(isinstance(item, int) for item in value) else "/").join(map(str, value))


def _counts(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "images", f"{facts['images']:,} in {facts['shards']} shards, {facts['errors']:,} errors"
    (height, width), attrs = facts["grid"], facts["attrs"]
    yield (
        "maps",
        f"{height} x {width} patches, top {facts['k']} of {facts['num_classes']} classes, "
        f"views {' + '.join(facts['views'])}",
    )
    codes = f"steps of {attrs['step']:g} nat" if attrs["step"] else "float16"
    yield "stored", f"{codes}, below {attrs['floor']:g} dropped, residual of {attrs['residual']}"
    yield "size", f"{_size(facts['bytes'])}, {facts['bytes_per_image']:,.0f} bytes an image"


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def _teacher(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if facts["teacher_top1"] is not None:
        yield (
            "teacher accuracy",
            f"top-1 {facts['teacher_top1']:.1%}, top-5 {facts['teacher_top5']:.1%} of "
            f"{facts['labelled']:,} images with ground truth",
        )
    else:
        yield "teacher accuracy", "unknown: no ground truth among the teacher's classes"
    if facts["topk_mass"] is not None:
        yield "top-k mass", f"{facts['topk_mass']:.3f} of the probability, mean of all images"
    if facts["patches_with_label_on_top"] is not None:
        yield (
            "patches",
            f"{facts['patches_with_label_on_top']:.1%} have the image's label on top "
            f"({_basis(facts)})",
        )


def _basis(facts: dict[str, Any]) -> str:
    everything = facts["sampled"] == facts["images"] - facts["errors"]
    if everything:
        return f"all {facts['sampled']:,} images"
    return f"a sample of {facts['sampled']:,} images; --all reads every one"


def _print_distributions(facts: dict[str, Any], console: Console) -> None:
    table = Table(
        title=f"[bold]Distributions[/bold] ({_basis(facts)})",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for name in ("mean", "5%", "25%", "50%", "75%", "95%"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("from 0 to", no_wrap=True)
    rows = (
        ("patch: top-k mass", "topk_mass_of_patches", "topk_mass_histogram", ".2f"),
        ("patch: entropy", "entropy", "entropy_histogram", ".2f"),
        ("image: top classes", "distinct_classes", "distinct_classes_histogram", ".0f"),
    )
    for title, name, histogram, style in rows:
        if found := facts[name]:
            values = [format(found["mean"], ".2f" if style == ".2f" else ".1f")]
            values += [format(found[q], style) for q in ("p5", "p25", "p50", "p75", "p95")]
            chart = facts[histogram]
            table.add_row(title, *values, f"{_bars(chart['counts'])} {chart['edges'][-1]:.3g}")
    console.print(table)


def _bars(counts: list[int]) -> str:
    highest = max(counts) or 1
    steps = len(_BARS) - 1
    # A bin with few is not one with none.
    return "".join(_BARS[-(-count * steps // highest)] for count in counts)


def _print_classes(facts: dict[str, Any], console: Console) -> None:
    console.print("[bold]most frequent top-1 classes of patches[/bold] (of the labels)")
    for entry in facts["frequent_classes"]:
        console.print(_class_line(entry))
    total = facts["num_classes"]
    console.print(
        f"[bold]classes[/bold] {facts['never_on_top']:,} of {total:,} are on top of no patch, "
        f"{facts['never_listed']:,} are in no top {facts['k']} ({_basis(facts)})"
    )
    if facts["overpredicted_classes"]:
        console.print(
            f"[bold]over-predicted[/bold] on top more than {TIMES:.0f} times as often as labelled"
        )
        for entry in facts["overpredicted_classes"]:
            console.print(_class_line(entry))


def _class_line(entry: dict[str, Any]) -> str:
    truth = f" ({entry['label_share']:.1%})" if "label_share" in entry else ""
    return f"  {entry['share']:6.1%}  {entry['class']:>5}  {escape(entry['name'])}{truth}"


def _print_suspects(facts: dict[str, Any], console: Console) -> None:
    count, of = facts["images_without_their_label"], facts["sampled_with_label"]
    if not of:
        return
    console.print(
        f"[bold]likely mislabels[/bold] {count:,} of {of:,} images lack their label in every "
        f"patch's top {facts['k']}" + (": mislabelled, or too hard for the teacher" * (count > 0))
    )
    found = facts["images_without_their_label_list"]
    for entry in found[:_LISTED]:
        console.print(
            f"  [yellow]?[/yellow] {escape(repr(entry['key']))}: labelled "
            f"{escape(entry['label_name'])}, {entry['share']:.0%} of patches say "
            f"{escape(entry['name'])}"
        )
    if count > _LISTED:
        console.print(f"  … and {count - _LISTED:,} more; --json lists {len(found):,}")


def _print_errors(facts: dict[str, Any], console: Console) -> None:
    reasons = facts["error_reasons"]
    if len(reasons) > 1:
        for reason, count in list(reasons.items())[:_LISTED]:
            console.print(f"  [yellow]{count:>6,}[/yellow] errors: {escape(reason)}")
    for key, reason in facts["error_list"]:
        console.print(f"  [yellow]no map[/yellow] {escape(repr(key))}: {escape(reason)}")
    if facts["errors"] > len(facts["error_list"]):
        console.print(f"  … and {facts['errors'] - len(facts['error_list']):,} more errors")
