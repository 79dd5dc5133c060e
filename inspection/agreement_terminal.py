"""What `--agreement` measured, in a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from tokenlabel.annotate.markup import escape


def print_agreement(result: dict[str, Any], console: Console) -> None:
    """The result as a table."""
    table = Table(
        title=f"[bold]{escape(result['folder'])}[/bold]: the map's crop against "
        f"{escape(result['teacher'])}'s own view of {result['images']} images",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("share of the picture", "", "crops", "KL, nats", "same top-1", "KL of one label"):
        table.add_column(name, justify="left" if name in ("share of the picture", "") else "right")
    for row in result["rows"]:
        low, high = row["scale"]
        table.add_row(
            "the whole" if low == high else f"{low:.0%} to {high:.0%}",
            row["view"],
            str(row["crops"]),
            f"{row['kl']:.3f}",
            f"{row['top1']:.1%}",
            f"{row['kl_whole']:.3f}",
        )
    console.print(table)
    console.print(
        "  KL(teacher's view || map's crop), mean over patches. Stored: the cost of keeping the "
        f"top {result['k']} alone; equal top-1 but for ties. Direct: also of averaging between "
        "cells. Smaller crops are seen enlarged, so KL grows. One label: the average of the whole "
        "map for every patch, as a label without a map would be."
    )
