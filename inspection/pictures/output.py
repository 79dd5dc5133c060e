"""Output files that a user names: written atomically, with errors that name the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...dataset.format.files import replacing
from ...errors import OutputError


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` unless an error is raised.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Remedy: name a file in a folder that "
            "exists, is writable and has space"
        ) from error
