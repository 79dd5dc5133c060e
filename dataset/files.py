"""Files that are whole or not there: written beside their place, flushed, then renamed."""

import errno
import os
import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import numpy as np

from tokenlabel.dataset.errors import FormatError, NewerVersionError
from tokenlabel.dataset.hdf5_file import InputFile

#: Ending of unfinished files. A job removes those that it finds when it starts.
TEMPORARY = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` unless an error comes out.

    The file and its folder are fsynced, so that after a power failure `path` is the old file or
    the new one. On any exception the temporary file is removed and `path` is left as it was.

    Raises OSError, naming the file, when the system cannot do it.
    """
    temporary = path.with_name(
        f".{path.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{TEMPORARY}"
    )
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # fsync, write and close name none
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # it must not hide what went wrong before
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system can (Windows cannot open folders)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no such thing
            raise
    finally:
        os.close(handle)


@contextmanager
def create_h5(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file, readable by HDF5 1.10 and later; half-written it refuses to open.

    Raises OSError with the system's own number when a write fails, where h5py may raise
    RuntimeError with the number in its text (as it does when closing a file on a full disk).
    """
    try:
        with h5py.File(path, "w", libver=("v110", "v110"), rdcc_nbytes=0) as file:
            yield file
    except (OSError, RuntimeError) as error:
        if number := re.search(r"errno = (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def system_error(error: Exception, path: Path) -> OSError | None:
    """The error, naming the file, if it is the system's; None where the data are at fault."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    return OSError(error.errno, os.strerror(error.errno), str(path))


def open_h5(path: Path) -> InputFile:
    """Open for reading.

    Raises OSError as the system does, and FormatError for a file that is no HDF5 file, was cut
    short, or holds what docs/format.md does not allow.
    """
    try:
        return InputFile(path)
    except (OSError, ValueError) as error:
        # The system's own errors tell nothing of the file: it may be whole.
        raise system_error(error, path) or FormatError(
            f"{path} is damaged, cut short or not of this format: {error}. "
            "Remedy: delete it; the next `annotate` makes it again"
        ) from error


def set_text(attrs: h5py.AttributeManager, name: str, text: str) -> None:
    """Store a string attribute with a fixed length.

    Variable-length strings live in HDF5's global heap, which has no checksum; fixed ones lie in
    the object header, which has.
    """
    data = text.encode()
    attrs.create(name, data, dtype=h5py.string_dtype("utf-8", max(len(data), 1)))


def set_texts(attrs: h5py.AttributeManager, name: str, texts: list[str]) -> None:
    """Store a list of strings as one attribute of fixed length."""
    attrs.create(name, encode_texts(texts))


def encode_texts(texts: list[str]) -> np.ndarray:
    """Strings as an array of fixed-length, NUL-padded UTF-8."""
    data = [text.encode() for text in texts]
    width = max(map(len, data), default=0) or 1
    return np.array(data, dtype=h5py.string_dtype("utf-8", width))


def check_identity(file: InputFile, name: str, version: int, remedy: str) -> None:
    """Raise FormatError unless the root attributes name this format, in a version we read."""
    path = file.filename
    found, number = file.attrs.get("format"), file.attrs.get("version")
    if found != name:
        raise FormatError(f"{path}: expected format {name!r}, found {found!r}. {remedy}")
    if not isinstance(number, int) or number < 1:
        raise FormatError(f"{path}: the format version must be 1 or more, got {number!r}. {remedy}")
    if number > version:
        raise NewerVersionError(
            f"{path} is version {number} of {name}; this release of tokenlabel reads up to version "
            f"{version}. Remedy: install a newer tokenlabel"
        )
