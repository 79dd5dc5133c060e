"""What `--agreement` measured, in a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ..terminal import escape

_METRICS = {
    "kl": ("KL(teacher || target), nats", ".3f"),
    "tv": ("total variation", ".3f"),
    "top1": ("same top-1 class", ".1%"),
    "label_top1": ("label on top of the mean target", ".1%"),
}


def print_agreement(result: dict[str, Any], console: Console) -> None:
    """The result as a table: a block for each metric, a column for each range of crops."""
    rows = {(row["target"], *row["scale"]): row for row in result["rows"]}
    scales = sorted({tuple(row["scale"]) for row in result["rows"]}, reverse=True)
    targets = list(dict.fromkeys(row["target"] for row in result["rows"]))
    size = " x ".join(map(str, result["input_size"]))
    table = Table(
        title=f"[bold]{escape(result['folder'])}[/bold]: targets against "
        f"{escape(result['teacher'])} run live at {size} px on crops of {result['images']} images",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("crop's fraction of the image")
    for low, high in scales:
        table.add_column("whole" if low == high else f"{low:.0%}-{high:.0%}", justify="right")
    for metric, (title, style) in _METRICS.items():
        lines = {
            target: [rows.get((target, *scale), {}).get(metric) for scale in scales]
            for target in targets
            if target != "teacher" or metric == "label_top1"  # else it is perfect
        }
        if not any(value is not None for line in lines.values() for value in line):
            continue
        table.add_row(f"[bold]{title}[/bold]")
        for target, line in lines.items():
            values = ("" if value is None else format(value, style) for value in line)
            table.add_row(f"  {target}", *values)
    console.print(table)
    console.print(
        "  Stored: the whole map, cell by cell, against the teacher as it annotated: the cost of "
        f"storing the top {result['k']}. Map: what a student gets. One label: the mean of the "
        "image's map for every patch. Teacher, mirrored and at another size: how far apart two "
        "equally good answers are, so a map nearer than that is as good as the teacher. Smaller "
        "crops are enlarged more for the teacher, so all divergences grow."
    )
