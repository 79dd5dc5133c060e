"""`SHA256SUMS`: the digests of a split's files, so that anybody can check a copy of it.

    cd OUT/SPLIT && sha256sum -c SHA256SUMS

It lists the shards, the manifest and the index.
"""

import hashlib
import re

from ...errors import FormatError
from ..storage.remote_path import AnyPath, RemotePath
from .files import replacing

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\0\r]+)")


def file_sha256(path: AnyPath) -> str:
    """Hex sha256 of the bytes of a file, or of an object."""
    if isinstance(path, RemotePath):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sums(folder: AnyPath) -> dict[str, str]:
    """Hex sha256 of each file that is listed, by name; empty where nothing is listed yet.

    Raises:
        FormatError: the list is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return {}
    remedy = "Remedy: delete it; the same `annotate` rewrites it"
    if not path.is_file():  # reading a named pipe would not end
        raise FormatError(f"{path} is not a regular file. {remedy}")
    sums = {}
    # Split at line feeds only: `splitlines` takes other characters for the end of a line, too.
    for number, line in enumerate(path.read_bytes().decode(errors="replace").split("\n"), 1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if not match:
            raise FormatError(
                f"{path}: line {number} must be a sha256, two spaces and the name of a file; it is "
                f"{line[:99]!r}. {remedy}"
            )
        sums[match[2]] = match[1]
    return sums


def write_sums(folder: AnyPath, sums: dict[str, str]) -> None:
    """List these digests, in order of the names, in place of what was listed.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(folder / NAME) as temporary:
        lines = (f"{sums[name]}  {name}\n" for name in sorted(sums))
        temporary.write_bytes("".join(lines).encode())
