"""Errors that a user can act on: each message gives the rule, the value met and the remedy."""

import re

#: Control characters but tab and newline, what turns the direction of text, lone surrogates.
_INVISIBLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)


def visible(text: str) -> str:
    """Text with control characters as escapes: what a file holds must not steer a terminal."""
    return _INVISIBLE.sub(lambda match: ascii(match[0])[1:-1], text)


class TokenLabelError(Exception):
    """Base of what tokenlabel raises on purpose; the CLI prints it without a traceback."""

    def __str__(self) -> str:
        return visible(str(self.args[0]) if len(self.args) == 1 else super().__str__())


class FormatError(TokenLabelError):
    """A file is not a tokenlabel file, is damaged, or is of a version this release cannot read."""


class NewerVersionError(FormatError):
    """A file is of a version that a later release wrote: nothing is wrong with it."""
