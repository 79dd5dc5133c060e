"""Errors that a user can act on: each message gives the rule, the value met and the remedy."""


class TokenLabelError(Exception):
    """Base of what tokenlabel raises on purpose; the CLI prints it without a traceback."""


class FormatError(TokenLabelError):
    """A file is not a tokenlabel file, is damaged, or is of a version this release cannot read."""
