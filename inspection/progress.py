"""A progress bar on stderr, only where a person looks at it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress as rp
from rich.console import Console


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, total); shows a bar if stderr is a terminal."""
    console = Console(stderr=True, emoji=False, highlight=False)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (
        rp.TextColumn(what),
        rp.BarColumn(),
        rp.MofNCompleteColumn(),
        rp.TimeRemainingColumn(),
    )
    with rp.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
