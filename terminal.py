"""Shared by all terminal output: consoles, progress bars, and escaping of text from files."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress as rp
from rich import markup
from rich.console import Console

from .errors import visible

#: Called with (done, total) as work goes on.
Watch = Callable[[int, int], None]


def console(stderr: bool = False) -> Console:
    """A console that prints text as it is: no emoji codes, no highlighting."""
    return Console(stderr=stderr, emoji=False, highlight=False)


def one_line(text: str) -> str:
    """Text on one line, with control characters as escapes."""
    return visible(text).replace("\n", r"\n")


def escape(text: str) -> str:
    """The same, with rich's markup escaped."""
    return markup.escape(one_line(text))


class VisibleFormatter(logging.Formatter):
    """Formats log records so that nothing in them steers a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text, with control characters as escapes."""
        return visible(super().format(record))


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """A function to call with (done, total, what=what); a bar on stderr if that is a terminal."""
    stderr = console(stderr=True)
    if not stderr.is_terminal:
        yield lambda done, total, what=what: None
        return
    columns = (
        rp.TextColumn("{task.description}", markup=False),
        rp.BarColumn(),
        rp.MofNCompleteColumn(),
        rp.TimeRemainingColumn(),
    )
    with rp.Progress(*columns, console=stderr, transient=True, speed_estimate_period=120) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, what=what: bar.update(
            task, completed=done, total=total, description=what
        )
