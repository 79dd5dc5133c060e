"""The file format: round trip, byte identity, damage, versions, and reading it with h5py alone."""

import json
import os
import pickle
import re
import struct
import time
import zlib
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.maps import attrs, random_rows, write_split
from tests.shards import content_digest, digest, edit_directory
from tokenlabel.dataset.format import new_file
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.format.shard import Shard, parse_shard_name, shard_name, write_shard
from tokenlabel.errors import FormatError

LAYOUT = MapLayout(("identity",), (3, 5), 4, 1000, residual=6)
#: Every plane in every form that there is.
LAYOUTS = [
    LAYOUT,
    LAYOUT._replace(num_classes=65536, views=("identity", "hflip")),
    LAYOUT._replace(num_classes=65537, views=("identity", "hflip")),
    LAYOUT._replace(residual=0, level=False),
    LAYOUT._replace(step=0.0, num_classes=70000),
]
KEYS = ["a/ü ber.JPEG", "b/c.d/e.png", "b/新.webp"]


def make(path: Path, layout: MapLayout = LAYOUT, keys: list[str] | None = None, **more: object):
    keys = keys or KEYS
    rows = random_rows(layout, len(keys))
    with write_shard(path, layout, keys, list(range(len(keys))), attrs(0, 1, 0, **more)) as writer:
        # In two parts, as batches come.
        for part in (slice(2), slice(2, None)):
            maps = {name: plane[part] for name, plane in rows.maps.items()}
            writer.append(maps, *(column[part] for column in rows[1:]))
    return rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(tmp_path: Path, layout: MapLayout) -> None:
    rows = make(tmp_path / "s.h5", layout)
    with Shard(tmp_path / "s.h5") as shard:
        assert shard.layout == layout
        assert shard.rows == 3
        assert shard.texts("key") == KEYS
        assert shard.read("label").tolist() == [0, 1, 2]
        assert (shard.read("size") == rows.sizes).all()
        assert (shard.read("digest") == rows.digests).all()
        assert (shard.read("thumbprint") == rows.thumbprints).all()
        assert (shard.read("orientation") == rows.orientations).all()
        for row in range(3):
            found = shard.map(row)
            for name, (dtype, shape) in layout.planes().items():
                plane = getattr(found, name)
                assert (plane.dtype, plane.shape) == (dtype, shape)
                np.testing.assert_array_equal(plane, rows.maps[name][row])
                np.testing.assert_array_equal(shard.read(name, row), rows.maps[name][row:])
            assert (found.layout, found.label) == (layout, row)
            assert found.size == tuple(rows.sizes[row].tolist())
            assert found.extent == shard.extent(row) == (0, 0, 1, 1)
            assert found.residual_codes.shape == (len(layout.views), layout.residual)
            assert (found.level is None) == (not layout.level)
        assert shard.attrs["sha256"] == content_digest(shard, block=2)
        assert shard.attrs["views"] == list(layout.views)


def test_planes_of_another_layout_are_refused(tmp_path: Path) -> None:
    rows = random_rows(LAYOUT._replace(k=3), 3)
    with pytest.raises(ValueError, match=r"codes must be uint8 \(3, 1, 4, 3, 5\), got uint8 \(3"):
        with write_shard(tmp_path / "s.h5", LAYOUT, KEYS, [0, 1, 2], attrs(0, 1, 0)) as writer:
            writer.append(*rows)


@pytest.mark.parametrize("step", [0.25, 0.0])
def test_rows_with_an_error_hold_no_labels(tmp_path: Path, step: float) -> None:
    rows = write_split(tmp_path, KEYS, LAYOUT._replace(step=step), errors={KEYS[1]: "truncated"})
    with Shard(tmp_path / shard_name(0, 1)) as shard:
        assert shard.texts("error") == ["", "truncated", ""]
        found = shard.map(1)
        assert (found.codes == (255 if step else np.inf)).all()
        assert (found.classes == 0).all()
        assert (found.residual_codes == 255).all()
        assert np.isnan(found.level).all()
        np.testing.assert_array_equal(shard.map(2).codes, rows[0].maps["codes"][2])
        assert shard.attrs["errors"] == 1
        assert shard.attrs["sha256"] == content_digest(shard)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    make(tmp_path / "one.h5")
    time.sleep(1.1)  # HDF5 can store times in whole seconds
    make(tmp_path / "two.h5")
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        with write_shard(tmp_path / "s.h5", LAYOUT, KEYS, [0, 1, 2], attrs(0, 1, 0)) as writer:
            writer.append(*random_rows(LAYOUT, 3))
            raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_row_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 rows were promised, 2 written"):
        with write_shard(tmp_path / "s.h5", LAYOUT, KEYS, [0, 1, 2], attrs(0, 1, 0)) as writer:
            writer.append(*random_rows(LAYOUT, 2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("version", 3, "version 3 .* reads up to version 2. Remedy: install a newer tokenlabel"),
        ("version", 1, "no release reads version 1 of tokenlabel-shard. Remedy: delete"),
        ("version", "2", "no release reads version '2'"),
        ("format", "cooler", "expected format 'tokenlabel-shard', found 'cooler'"),
        ("views", ["hflip"], "views must be"),
        ("extent", [0, 1], "extent must be a box of 4 numbers"),
        ("k", 5, "its planes must be"),
        ("residual", None, "residual must be int, got None"),
    ],
)
def test_other_versions_formats_and_headers_are_refused(
    tmp_path: Path, name: str, value: object, message: str
) -> None:
    make(tmp_path / "s.h5")
    edit_directory(tmp_path / "s.h5", lambda found: found["attrs"].update({name: value}))
    with pytest.raises(FormatError, match=message):
        Shard(tmp_path / "s.h5")


@pytest.mark.parametrize(
    "name", ["key", "label", "size", "digest", "thumbprint", "orientation", "error", "bounds"]
)
def test_missing_or_misshapen_columns_are_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path / "s.h5")
    content = (tmp_path / "s.h5").read_bytes()
    edit_directory(tmp_path / "s.h5", lambda found: found["columns"].pop(name))
    with pytest.raises(FormatError, match=name):
        Shard(tmp_path / "s.h5")
    (tmp_path / "s.h5").write_bytes(content)
    edit_directory(tmp_path / "s.h5", lambda found: found["columns"][name].update(shape=[1, 1]))
    with pytest.raises(FormatError, match=r"must be|cannot be"):
        Shard(tmp_path / "s.h5")


def test_what_is_not_known_is_ignored(tmp_path: Path) -> None:
    rows = make(tmp_path / "s.h5", later=[1, 2], note="x")

    def add(found: dict[str, Any]) -> None:
        found["columns"]["later"] = {**found["columns"]["label"], "more": {}}
        found["columns"]["label"]["more"] = 1
        found["more"] = None

    edit_directory(tmp_path / "s.h5", add)
    with Shard(tmp_path / "s.h5") as shard:
        assert shard.attrs["later"] == [1, 2]
        assert "later" not in shard
        assert content_digest(shard) == shard.attrs["sha256"]
        np.testing.assert_array_equal(shard.map(1).codes, rows.maps["codes"][1])


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    with pytest.raises(FileNotFoundError):
        Shard(path)
    for content in (b"", b"JFIF" * 999, pickle.dumps(1)):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="damaged, cut short or not of this format"):
            Shard(path)
    make(path)
    for length in (path.stat().st_size - 1, path.stat().st_size // 2, 100):
        os.truncate(path, length)
        with pytest.raises(FormatError):
            Shard(path)


def test_a_flipped_bit_in_a_map_is_noticed(tmp_path: Path) -> None:
    """But for the few that mean nothing: those that fill a byte up."""
    path = tmp_path / "s.h5"
    make(path)
    with Shard(path) as shard:
        first, last = (shard.read("bounds")[[5, 10]] + shard.maps.offset).tolist()
        want = [digest(shard.map(row)) for row in (0, 1)]
    content, refused = path.read_bytes(), 0
    for offset in range(first, last):
        damaged = bytearray(content)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        with Shard(path) as shard:
            try:
                assert digest(shard.map(1)) == want[1]
            except FormatError as error:
                assert "row 1 cannot be read" in str(error)
                refused += 1
            assert digest(shard.map(0)) == want[0]
    assert refused > 0.95 * (last - first)


@given(st.integers(0, 10**7), st.integers(1, 10**7))
def test_shard_names_round_trip(shard: int, shards: int) -> None:
    assert parse_shard_name(shard_name(shard, shards)) == (shard, shards)


@pytest.mark.parametrize("name", ["shard-1-of-2.h5", "shard-00001-of-00002.h5.tmp", "index"])
def test_other_names_are_no_shards(name: str) -> None:
    assert parse_shard_name(name) is None


@pytest.mark.parametrize("layout", [*LAYOUTS[:4], LAYOUT._replace(step=0.0, num_classes=300)])
def test_the_spec_reads_a_shard_with_h5py_alone(tmp_path: Path, layout: MapLayout) -> None:
    """By the block of docs/format.md, which knows nothing of this package."""
    spec = Path(__file__).parents[1] / "docs" / "format.md"
    block, _ = re.findall(r"^```python\n(.*?)^```$", spec.read_text(), re.MULTILINE | re.DOTALL)
    reader: dict[str, Any] = {}
    exec(block, reader)
    rows = make(tmp_path / "s.h5", layout)
    computed, stored = reader["content_digest"](tmp_path / "s.h5")
    assert computed == stored
    with Shard(tmp_path / "s.h5") as shard:
        for view in range(len(layout.views)):
            found = reader["probabilities"](tmp_path / "s.h5", 1, view)
            np.testing.assert_allclose(found, shard.map(1).dense(view), rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    with h5py.File(tmp_path / "s.h5") as file:
        assert file["key"].asstr()[:].tolist() == KEYS
        for name, (dtype, shape) in layout.planes().items():
            np.testing.assert_array_equal(file[name][:], rows.maps[name])
            assert file[name].chunks == (1, *shape)
            assert file[name].compression == "gzip"
            assert file[name].shuffle == (dtype.itemsize > 1)


def test_the_directory_is_where_the_spec_says(tmp_path: Path) -> None:
    """Byte by byte, without this package's reader."""
    rows = make(tmp_path / "s.h5")
    data = (tmp_path / "s.h5").read_bytes()
    assert data[:16] == bytes.fromhex("89544f4b454e4c4142454c0d0a1a0a00")
    size, crc = struct.unpack("<II", data[16:24])
    text = data[24 : 24 + size]
    assert zlib.crc32(text) == crc
    found = json.loads(text)
    block = found["block"]
    assert found["size"] == len(data) and zlib.crc32(data[block:]) == found["crc"]
    assert data[block : block + 8] == b"\x89HDF\r\n\x1a\n" and not any(data[24 + size : block])
    with h5py.File(tmp_path / "s.h5") as file:
        assert file.userblock_size == block
        assert set(file.attrs) == set(found["attrs"])
        assert set(file) == set(found["columns"]) | {plane[0] for plane in found["maps"]["planes"]}
        for name, column in found["columns"].items():
            stored = data[column["offset"] : column["offset"] + column["size"]]
            assert zlib.crc32(stored) == column["crc"]
            plain = zlib.decompress(stored) if column.get("gzip") else stored
            array = np.frombuffer(plain, column["dtype"]).reshape(column["shape"])
            np.testing.assert_array_equal(array, file[name][:])
            assert file[name].dtype == array.dtype
        bounds = file["bounds"][:].tolist()
    maps, planes = data[found["maps"]["offset"] :], found["maps"]["planes"]
    assert bounds[-1] == found["maps"]["size"]
    for row in range(3):
        for number, (name, dtype, shape) in enumerate(planes):
            first, last = bounds[row * len(planes) + number :][:2]
            items = np.frombuffer(zlib.decompress(maps[first:last]), "u1")
            array = items.reshape(np.dtype(dtype).itemsize, -1).T.copy().view(dtype)
            np.testing.assert_array_equal(array.reshape(shape), rows.maps[name][row])


@pytest.mark.parametrize("added", [True, False])
def test_offsets_are_right_whatever_hdf5_counts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added: bool
) -> None:
    """Some versions of HDF5 leave out the user block in some calls; this one adds it in all."""
    rows = make(tmp_path / "s.h5")
    want = (tmp_path / "s.h5").read_bytes()
    real = new_file.find_bytes

    def shifted(file: IO[bytes], block: int, offset: int, size: int, crc: int) -> int:
        return real(file, block, offset - (0 if added else block), size, crc)

    monkeypatch.setattr(new_file, "find_bytes", shifted)
    make(tmp_path / "t.h5")
    assert (tmp_path / "t.h5").read_bytes() == want
    with Shard(tmp_path / "t.h5") as shard:
        np.testing.assert_array_equal(shard.map(2).classes, rows.maps["classes"][2])


def test_a_directory_that_outgrows_its_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Remedy: give large attributes at the start"):
        with write_shard(tmp_path / "s.h5", LAYOUT, KEYS, [0, 1, 2], attrs(0, 1, 0)) as writer:
            writer.append(*random_rows(LAYOUT, 3))
            writer.attrs["note"] = "x" * 4096
    assert list(tmp_path.iterdir()) == []
    make(tmp_path / "s.h5", note="x" * 9000)
    with Shard(tmp_path / "s.h5") as shard:
        assert len(shard.attrs["note"]) == 9000
