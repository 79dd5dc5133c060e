"""Errors of the annotation job, each with the exit status the CLI gives it."""

from tokenlabel.dataset.errors import TokenLabelError


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


class JobError(TokenLabelError):
    """The job ran but did not reach its goal (exit status 1)."""
