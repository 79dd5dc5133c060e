"""Chunks: what is written is plain shuffle and gzip; what is damaged is refused."""

import importlib
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tokenlabel.dataset.format import chunks
from tokenlabel.dataset.format.chunks import STRATEGIES, encode_chunk, inflate, unshuffle


@pytest.fixture(params=["zlib", "deflate"])
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read by zlib, and by libdeflate."""
    if request.param == "zlib":
        monkeypatch.setattr(chunks, "_fast", None)
    else:
        pytest.importorskip("deflate", reason="the extra `fast` is not installed")
        monkeypatch.setattr(chunks, "_fast", importlib.import_module("deflate"))
    return str(request.param)


def ids(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 900, shape).astype("<u2")


def decode(data: bytes, like: np.ndarray) -> np.ndarray:
    return unshuffle(inflate(data, like.nbytes), like.dtype, like.shape)


@given(
    st.sampled_from(["<f2", "<u2", "<u4", "|u1"]).flatmap(
        lambda dtype: npst.arrays(dtype, npst.array_shapes(max_dims=4, max_side=9))
    ),
    st.sampled_from(sorted(set(STRATEGIES.values()))),
)
def test_round_trip(array: np.ndarray, strategies: tuple[int, int]) -> None:
    data = encode_chunk(array, strategies)
    planes = array.reshape(-1).view("u1").reshape(-1, array.dtype.itemsize).T
    assert zlib.decompress(data) == planes.tobytes()
    found = decode(data, array)
    assert found.dtype == array.dtype
    assert found.flags.writeable
    assert found.tobytes() == array.tobytes()


def test_bytes_of_unlike_kinds_are_compressed_apart() -> None:
    """Ids of many classes: the high bytes must not pay for the low ones."""
    array = ids((16, 18, 18)) | 256
    planes = array.reshape(-1).view("u1").reshape(-1, 2).T
    apart = encode_chunk(array, STRATEGIES["classes"])
    assert len(apart) < len(zlib.compress(planes.tobytes(), 4))


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_hdf5_reads_what_was_written(tmp_path: Path, name: str, inflater: str) -> None:
    array = ids((6, 2, 5, 7, 3))
    with h5py.File(tmp_path / "f.h5", "w", libver=("v110", "v110")) as file:
        dataset = file.create_dataset(
            "a", array.shape, "<u2", chunks=(1, 2, 5, 7, 3), compression="gzip", shuffle=True
        )
        for row in range(len(array)):
            data = encode_chunk(array[row], STRATEGIES[name])
            dataset.id.write_direct_chunk((row, 0, 0, 0, 0), data)
    with h5py.File(tmp_path / "f.h5") as file:
        np.testing.assert_array_equal(file["a"][:], array)
        for row in range(len(array)):
            data = file["a"].id.read_direct_chunk((row, 0, 0, 0, 0))[1]
            np.testing.assert_array_equal(decode(data, array[row]), array[row])


def test_damaged_chunks_are_refused(inflater: str) -> None:
    array = ids((1, 6, 6, 5))
    data = encode_chunk(array, STRATEGIES["classes"])
    for position in range(2, len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 4
        with pytest.raises(ValueError, match="must inflate to"):
            inflate(bytes(damaged), array.nbytes)
    for length in (0, 1, 7, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="must inflate to"):
            inflate(data[:length], array.nbytes)
    assert inflate(data + b"\0", array.nbytes) == inflate(data, array.nbytes), "passed over"
    for size in (array.nbytes - 1, array.nbytes + 1, 1 << 26):  # the last one fills 64 MB
        with pytest.raises(ValueError, match="must inflate to"):
            inflate(zlib.compress(bytes(size)), array.nbytes)
