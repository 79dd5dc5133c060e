"""Texts of files in a terminal: neither markup nor control characters of theirs have an effect."""

import logging

from rich import markup

from tokenlabel.dataset.errors import visible


def one_line(text: str) -> str:
    """Text as it can be shown on a line."""
    return visible(text).replace("\n", r"\n")


def escape(text: str) -> str:
    """The same for rich's markup."""
    return markup.escape(one_line(text))


class VisibleFormatter(logging.Formatter):
    """Formats log records so that nothing in them steers a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text, with control characters as escapes."""
        return visible(super().format(record))
