"""Files that a user names for output: whole or not there, and errors that say which file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...dataset.format.files import replacing
from ...errors import OutputError


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` unless an error comes out.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Remedy: name a file in a folder that "
            "is there, can be written and has room"
        ) from error
