"""Errors that a user can act on: each message gives the rule, the value met and the remedy.

The command line prints them without a traceback and ends with status 1, or 2 for `ConfigError`.
"""

import errno
import re

#: Control characters but tab and newline, what turns the direction of text, lone surrogates.
_INVISIBLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
#: Failures of the system that no retry fixes.
_FATAL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission was denied",
    errno.EPERM: "permission was denied",
}


def visible(text: str) -> str:
    """Text with control characters as escapes: what a file holds must not steer a terminal."""
    return _INVISIBLE.sub(lambda match: ascii(match[0])[1:-1], text)


class TokenLabelError(Exception):
    """Base of what tokenlabel raises on purpose."""

    def __str__(self) -> str:
        return visible(str(self.args[0]) if len(self.args) == 1 else super().__str__())


class FormatError(TokenLabelError):
    """A file is not a tokenlabel file, is damaged, or is of a version this release cannot read."""


class NewerVersionError(FormatError):
    """A file is of a version that a later release wrote: nothing is wrong with it."""


class MissingMapError(TokenLabelError, KeyError):
    """A key has no score map: unknown, or its image could not be annotated."""


class ImageError(TokenLabelError):
    """An image is not there, cannot be decoded, or is not the one that was annotated."""


class StorageError(TokenLabelError):
    """Storage failed to deliver an image that exists: a retry may succeed."""


class ConfigError(TokenLabelError):
    """A configuration, an option or an input folder is wrong (exit status 2)."""


class TeacherError(ConfigError):
    """The teacher cannot be built, or has no well-defined per-patch form (exit status 2)."""


class OutputError(TokenLabelError):
    """The output folder cannot be written, or holds something the job must not touch."""


class FingerprintError(OutputError):
    """Finished shards were made from other input or with other settings."""


class LockedError(OutputError):
    """Another job is writing to the same output folder."""


class JobError(TokenLabelError):
    """The job ran but did not reach its goal."""


class StoreError(JobError):
    """An object store refuses a request, or fails for longer than retries last."""


def output_error(error: BaseException) -> OutputError | None:
    """The error to raise for a failed write that no retry fixes; None for all others."""
    if not isinstance(error, OSError) or error.errno not in _FATAL:
        return None
    return OutputError(
        f"cannot write: {_FATAL[error.errno]} ({error}). Finished shards are kept. Remedy: free "
        "space or fix the permissions, and run the same command again"
    )
