"""The file format: round trip, byte identity, damage, versions, and reading it with h5py alone."""

import hashlib
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.maps import attrs, random_rows, write_split
from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.shard import (
    Shard,
    ShardLayout,
    parse_shard_name,
    quantise,
    shard_name,
    write_shard,
)

LAYOUT = ShardLayout(("identity",), (3, 5), 4, 1000)
KEYS = ["a/ü ber.JPEG", "b/c.d/e.png", "b/新.webp"]


def make(path: Path, layout: ShardLayout = LAYOUT, keys: list[str] | None = None, **more: object):
    keys = keys or KEYS
    rows = random_rows(layout, len(keys))
    with write_shard(path, layout, keys, list(range(len(keys))), attrs(0, 1, 0, **more)) as writer:
        # In two parts, as batches come.
        writer.append(*(column[:2] for column in rows))
        writer.append(*(column[2:] for column in rows))
    return rows


@pytest.mark.parametrize("num_classes", [1000, 65536, 65537])
@pytest.mark.parametrize("views", [("identity",), ("identity", "hflip")])
def test_round_trip(tmp_path: Path, num_classes: int, views: tuple[str, ...]) -> None:
    layout = ShardLayout(views, (3, 5), 4, num_classes)
    rows = make(tmp_path / "s.h5", layout)
    with Shard(tmp_path / "s.h5") as shard:
        assert shard.layout == layout
        assert shard.rows == 3
        assert shard.texts("key") == KEYS
        assert shard.read("label").tolist() == [0, 1, 2]
        assert (shard.read("size") == rows.sizes).all()
        assert (shard.read("digest") == rows.digests).all()
        for row in range(3):
            scores, classes, rest = shard.map(row)
            assert scores.dtype == np.float16
            assert classes.dtype == ("u2" if num_classes <= 65536 else "u4")
            np.testing.assert_array_equal(scores, rows.scores[row])
            np.testing.assert_array_equal(classes, rows.classes[row])
            np.testing.assert_array_equal(rest, rows.rest[row])
        assert shard.extent(0) == (0, 0, 1, 1)
        assert shard.attrs["sha256"] == shard.content_digest(block=2)
        assert shard.attrs["views"] == list(views)


def test_uint8_scores_are_within_half_a_step(tmp_path: Path) -> None:
    layout = LAYOUT._replace(score_dtype="uint8")
    rows = make(tmp_path / "s.h5", layout)
    with Shard(tmp_path / "s.h5") as shard:
        for row in range(3):
            want = rows.scores[row].astype("f4")
            got = shard.map(row)[0].astype("f4")
            assert (np.diff(got, axis=-1) <= 0).all(), "order is kept"
            half_step = (want.max() - want.min()) / 255 / 2
            # float16 can add half a unit in the last place at the size of the scores
            assert np.abs(got - want).max() <= half_step + np.abs(want).max() * 2**-11
        assert shard.attrs["sha256"] == shard.content_digest()


def test_equal_scores_survive_uint8() -> None:
    codes, score_range = quantise(np.full((2, 1, 2, 2, 3), 7, "f2"))
    assert (codes == 0).all()
    assert (score_range == 7).all()


def test_rows_with_an_error_hold_nan(tmp_path: Path) -> None:
    for dtype in ("float16", "uint8"):
        layout = LAYOUT._replace(score_dtype=dtype)
        write_split(tmp_path / dtype, KEYS, layout, errors={KEYS[1]: "truncated"})
        with Shard(tmp_path / dtype / shard_name(0, 1)) as shard:
            assert shard.texts("error") == ["", "truncated", ""]
            scores, _, rest = shard.map(1)
            assert np.isnan(scores).all()
            assert np.isnan(rest).all()
            assert np.isfinite(shard.map(2)[0]).all()
            assert shard.attrs["errors"] == 1


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    make(tmp_path / "one.h5")
    time.sleep(1.1)  # HDF5 can store times in whole seconds
    make(tmp_path / "two.h5")
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    rows = random_rows(LAYOUT, 3)
    with pytest.raises(RuntimeError, match="stop"):
        with write_shard(tmp_path / "s.h5", LAYOUT, KEYS, [0, 1, 2], attrs(0, 1, 0)) as writer:
            writer.append(*rows)
            raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_row_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 rows were promised, 2 written"):
        with write_shard(tmp_path / "s.h5", LAYOUT, KEYS, [0, 1, 2], attrs(0, 1, 0)) as writer:
            writer.append(*random_rows(LAYOUT, 2))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_shard(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tests.maps import *; from tests.test_shard import LAYOUT, KEYS\n"
        "path = Path(sys.argv[1]) / 's.h5'\n"
        "with write_shard(path, LAYOUT, KEYS, [0, 1, 2], attrs(0, 1, 0)) as w:\n"
        "    w.append(*random_rows(LAYOUT, 3)); os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), os.getcwd()], check=False)
    assert done.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".tmp")
    with pytest.raises(FormatError):
        Shard(left)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("version", 2, "version 2 .* reads up to version 1. Remedy: install a newer tokenlabel"),
        ("version", 0, "must be 1 or more, got 0"),
        ("version", "1", "must be 1 or more, got '1'"),
        ("format", "cooler", "expected format 'tokenlabel-shard', found 'cooler'"),
    ],
)
def test_other_versions_and_formats_are_refused(
    tmp_path: Path, name: str, value: object, message: str
) -> None:
    make(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "a") as file:
        file.attrs[name] = np.bytes_(value) if isinstance(value, str) else value
    with pytest.raises(FormatError, match=message):
        Shard(tmp_path / "s.h5")


@pytest.mark.parametrize("name", ["scores", "classes", "rest", "key", "label", "size", "error"])
def test_missing_or_misshapen_data_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "a") as file:
        del file[name]
    with pytest.raises(FormatError, match=name):
        Shard(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "a") as file:
        file[name] = np.zeros((3, 7), "f8")
    with pytest.raises(FormatError, match="must be"):
        Shard(tmp_path / "s.h5")


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with pytest.raises(FileNotFoundError):
        Shard(path)
    for content in (b"", b"\x89HDF\r\n\x1a\n", b"JFIF" * 999, pickle.dumps(1)):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="damaged, cut short or not of this format"):
            Shard(path)
    make(path)
    content = path.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError):
            Shard(path)


def test_a_flipped_bit_in_a_map_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    make(path)
    with h5py.File(path) as file:
        chunk = file["scores"].id.get_chunk_info(1)
    content = bytearray(path.read_bytes())
    for offset in range(chunk.byte_offset + 2, chunk.byte_offset + chunk.size, 7):
        damaged = bytearray(content)
        damaged[offset] ^= 1
        path.write_bytes(damaged)
        with Shard(path) as shard:
            with pytest.raises(FormatError, match="row 1 cannot be read"):
                shard.map(1)
            shard.map(0)


@given(st.integers(0, 10**7), st.integers(1, 10**7))
def test_shard_names_round_trip(shard: int, shards: int) -> None:
    assert parse_shard_name(shard_name(shard, shards)) == (shard, shards)


@pytest.mark.parametrize("name", ["shard-1-of-2.h5", "shard-00001-of-00002.h5.tmp", "index.h5"])
def test_other_names_are_no_shards(name: str) -> None:
    assert parse_shard_name(name) is None


def test_the_spec_reads_a_shard_with_h5py_alone(tmp_path: Path) -> None:
    """Follows docs/format.md with h5py and NumPy only, digest included."""
    rows = make(tmp_path / "s.h5", class_names=["n01440764", "n01443537"])
    with h5py.File(tmp_path / "s.h5") as file:
        assert file.attrs["format"].decode() == "tokenlabel-shard"
        assert file.attrs["version"] == 1
        assert file.attrs["class_names"].astype(str).tolist() == ["n01440764", "n01443537"]
        assert file["key"].asstr()[:].tolist() == KEYS
        np.testing.assert_array_equal(file["scores"][:], rows.scores)
        assert file["scores"].chunks == (1, 1, 3, 5, 4)
        assert file["scores"].compression == "gzip"
        assert (file["scores"].shuffle, file["classes"].shuffle) == (True, True)
        total = hashlib.sha256()
        for name in sorted(file):
            array = file[name][:]
            total.update(f"{name} {array.dtype.str} {array.shape[1:]} {len(array)}\n".encode())
            total.update(hashlib.sha256(array.tobytes()).digest())
        assert total.hexdigest() == file.attrs["sha256"].decode()
