"""What `--verify` found, in a terminal."""

from rich.console import Console

from ...terminal import escape
from .verify import SplitCheck


def print_check(check: SplitCheck, console: Console, repairs: bool = False) -> None:
    """One split: a line of what was read, then each fault with its file and row.

    Args:
        check: what was found.
        console: where to print.
        repairs: whether bad files are about to be deleted, so that no advice is needed.
    """
    console.print(f"[bold]{escape(check.folder)}[/bold]", soft_wrap=True)
    console.print(
        f"  read {check.rows:,} rows in {check.shards} shards, {check.nbytes:,} bytes: "
        + ("[green]all is well[/green]" if check.ok else "[red]not all is well[/red]")
    )
    for name in check.missing:
        console.print(
            f"  [red]{escape(name)}[/red] is missing; the same `annotate` makes it", soft_wrap=True
        )
    for fault in check.faults:
        where = "" if fault.row is None else f" row {fault.row}"
        where += "" if fault.key is None else f" {fault.key!r}"
        console.print(
            f"  [red]{escape(fault.file)}[/red]{escape(where)}: {escape(fault.text)}",
            soft_wrap=True,
        )
    for note in check.notes:
        console.print(f"  note: {escape(note)}", soft_wrap=True)
    if check.bad_files and not repairs:
        console.print(
            "  Remedy: `inspect-labels --verify --repair` deletes "
            f"{escape(', '.join(check.bad_files[:5]))}{', …' * (len(check.bad_files) > 5)}; the "
            "`annotate` that made them then redoes just these",
            soft_wrap=True,
        )
