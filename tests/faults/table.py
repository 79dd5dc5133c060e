"""The table of docs/reliability.md: what each fault test saw, written as it ran."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

HEAD = "| fault | rounds | expected | observed | command |\n|---|---|---|---|---|\n"


#: The fixtures `observed` and `rounds` of conftest.py.
Observed = Callable[[str, int, str, str], None]
Rounds = Callable[[int, int], int]


class Row(NamedTuple):
    """One fault, how often it was tried, and what came of it."""

    fault: str
    rounds: int
    expected: str
    observed: str
    command: str


ROWS = pytest.StashKey[list[Row]]()


def command(nodeid: str, soak: bool) -> str:
    """What runs one test again, from the repository."""
    words = ["python", "-m", "pytest", *(["--soak"] if soak else []), nodeid]
    return shlex.join(words)


def write_table(rows: list[Row], path: Path) -> None:
    """Write rows as a Markdown table, sorted by command, replacing what is there."""
    lines = [
        f"| {row.fault} | {row.rounds:,} | {row.expected} | {row.observed} | `{row.command}` |\n"
        for row in sorted(rows, key=lambda row: row.command)
    ]
    path.write_text(HEAD + "".join(lines), encoding="utf-8")
