"""Errors of the annotation job, each with the exit status the CLI gives it."""

import errno

from tokenlabel.dataset.errors import TokenLabelError

#: What no second try mends.
_FATAL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission was denied",
    errno.EPERM: "permission was denied",
}


class ConfigError(TokenLabelError):
    """A configuration, an option or an input folder is wrong (exit status 2)."""


class TeacherError(ConfigError):
    """The teacher cannot be built, or has no faithful per-patch form (exit status 2)."""


class OutputError(TokenLabelError):
    """The output folder cannot be written, or holds something the job must not touch."""


class FingerprintError(OutputError):
    """Finished shards were made from other input or with other settings."""


class LockedError(OutputError):
    """Another job is writing to the same output folder."""


class StorageError(TokenLabelError):
    """Storage did not give an image that is there: another try may get it (exit status 1)."""


class JobError(TokenLabelError):
    """The job ran but did not reach its goal (exit status 1)."""


def output_error(error: BaseException) -> OutputError | None:
    """What to tell a user of a failed write that no second try mends; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in _FATAL:
        return None
    return OutputError(
        f"cannot write: {_FATAL[error.errno]} ({error}). Finished shards are kept. Remedy: make "
        "room or mend the permissions, and run the same command again"
    )
