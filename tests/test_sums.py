"""`SHA256SUMS`: what we write, `sha256sum` reads, and the other way round."""

import subprocess
from pathlib import Path

import pytest

from tokenlabel.dataset.format.sums import NAME, file_sha256, read_sums, write_sums
from tokenlabel.errors import FormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and the list of their digests."""
    for name in ("shard-00000-of-00001.h5", "index"):
        (tmp_path / name).write_bytes(name.encode())
    write_sums(tmp_path, {path.name: file_sha256(path) for path in sorted(tmp_path.iterdir())})
    return tmp_path


def sha256sum(folder: Path, *arguments: str) -> str:
    command = ["sha256sum", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout


def test_sha256sum_reads_and_writes_the_same_list(folder: Path) -> None:
    assert sha256sum(folder, "-c", NAME) == "index: OK\nshard-00000-of-00001.h5: OK\n"
    assert sha256sum(folder, "index", "shard-00000-of-00001.h5") == (folder / NAME).read_text()
    assert read_sums(folder) == {
        name: file_sha256(folder / name) for name in ("index", "shard-00000-of-00001.h5")
    }
    (folder / "index").write_bytes(b"other")
    assert "index: FAILED" in sha256sum(folder, "-c", NAME)


def test_without_a_file_nothing_is_listed(tmp_path: Path) -> None:
    assert read_sums(tmp_path) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"index",
        b"a" * 63 + b"  index\n",
        b"A" * 64 + b"  index\n",
        b"a" * 64 + b" index\n",
        b"a" * 64 + b"  ../index\n",
        b"a" * 64 + b"  index\r\n",
        b"a" * 64 + b"  \x00\n",
    ],
)
def test_other_lines_are_refused_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(FormatError, match="Remedy: delete it"):
        read_sums(tmp_path)
