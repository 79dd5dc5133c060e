"""Chunks: what is written is plain shuffle and gzip; what is damaged is refused."""

import importlib
import os
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tokenlabel.dataset import chunks
from tokenlabel.dataset.chunks import STRATEGIES, ChunkCodec, ChunkFile, encode_chunk
from tokenlabel.dataset.hdf5_file import InputFile


@pytest.fixture(params=["zlib", "isal.isal_zlib"])
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "zlib":
        pytest.importorskip("isal", reason="the extra `fast` is not installed")
    monkeypatch.setattr(chunks, "_inflate", importlib.import_module(request.param))
    return str(request.param)


def codec(array: np.ndarray) -> ChunkCodec:
    return ChunkCodec(array.shape, array.dtype, array.nbytes, array.dtype.itemsize > 1)


def logits(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(3, 4, shape).astype("<f2")


@given(
    st.sampled_from(["<f2", "<u2", "<u4", "|u1"]).flatmap(
        lambda dtype: npst.arrays(dtype, npst.array_shapes(max_dims=4, max_side=9))
    ),
    st.sampled_from(sorted(set(STRATEGIES.values()))),
)
def test_round_trip(array: np.ndarray, strategy: int) -> None:
    data = encode_chunk(array, strategy)
    planes = array.reshape(-1).view("u1").reshape(-1, array.dtype.itemsize).T
    assert zlib.decompress(data) == planes.tobytes()
    found = codec(array).decode(data)
    assert found.dtype == array.dtype
    assert found.flags.writeable
    assert found.tobytes() == array.tobytes()


def test_low_bytes_are_stored_where_they_do_not_compress(inflater: str) -> None:
    array = logits((1, 300, 300, 2))  # more low bytes than fit two stored blocks
    data = encode_chunk(array, STRATEGIES["scores"])
    low = array.view("u1").reshape(-1, 2)[:, 0].tobytes()
    assert data[7 : 7 + 65535] == low[:65535]
    assert len(low) < len(data) < 2 * len(low)
    np.testing.assert_array_equal(codec(array).decode(data), array)
    for array in (np.full(5000, np.nan, "<f2"), np.arange(5000, dtype="<u2") % 9):
        assert len(encode_chunk(array, STRATEGIES["classes"])) < 5000 * 0.7


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_hdf5_reads_what_was_written(tmp_path: Path, name: str, inflater: str) -> None:
    array = logits((6, 2, 5, 7, 3))
    with h5py.File(tmp_path / "f.h5", "w", libver=("v110", "v110")) as file:
        dataset = file.create_dataset(
            "a", array.shape, "<f2", chunks=(1, 2, 5, 7, 3), compression="gzip", shuffle=True
        )
        for row in range(len(array)):
            data = encode_chunk(array[row], STRATEGIES[name])
            dataset.id.write_direct_chunk((row, 0, 0, 0, 0), data)
    with h5py.File(tmp_path / "f.h5") as file:
        np.testing.assert_array_equal(file["a"][:], array)
    with InputFile(tmp_path / "f.h5") as inside:
        offsets, sizes, _ = inside["a"].places
        found = inside["a"].codec
        np.testing.assert_array_equal(inside["a"].read(), array)
    assert found == codec(array[0])
    opened = ChunkFile(os.open(tmp_path / "f.h5", os.O_RDONLY), [found, found])
    for a, b in ((0, 1), (1, 0), (0, 5), (3, 3)):  # in order, in reverse, far apart
        both = opened.read(offsets[[a, b]].tolist(), sizes[[a, b]].tolist())
        np.testing.assert_array_equal(both, array[[a, b]])


def test_damaged_chunks_are_refused(inflater: str) -> None:
    array = logits((1, 6, 6, 5))
    data, decode = encode_chunk(array, STRATEGIES["scores"]), codec(array).decode
    for position in range(2, len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 4
        with pytest.raises(ValueError, match=r"."):
            decode(bytes(damaged))
    for length in (0, 1, 7, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=r"."):
            decode(data[:length])
    for size in (array.nbytes - 1, array.nbytes + 1, 1 << 26):  # the last one fills 64 MB
        with pytest.raises(ValueError, match=f"must inflate to {array.nbytes} bytes"):
            decode(zlib.compress(bytes(size)))


def test_places_outside_the_file_are_refused(tmp_path: Path) -> None:
    array = logits((4, 4))
    data = encode_chunk(array, STRATEGIES["scores"])
    (tmp_path / "f").write_bytes(data)
    opened = ChunkFile(os.open(tmp_path / "f", os.O_RDONLY), [codec(array)])
    np.testing.assert_array_equal(opened.read([0], [len(data)])[0], array)
    for place in ((1, len(data)), (1 << 40, len(data)), (0, len(data) + 1)):
        with pytest.raises(ValueError, match="cut short"):
            opened.read(*([number] for number in place))
    with pytest.raises(ValueError, match="larger than uncompressed ones"):
        opened.read([0], [1 << 31])


def test_a_file_closes_with_its_last_user(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    before = sorted(os.listdir("/proc/self/fd"))
    opened = ChunkFile(os.open(tmp_path / "f", os.O_RDONLY), [])
    read = opened.read
    del opened
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    del read
    assert sorted(os.listdir("/proc/self/fd")) == before
