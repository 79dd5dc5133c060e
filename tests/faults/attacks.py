"""Shards that HDF5 itself makes, and that no reader may follow, swallow, or crash on."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Attack = Callable[[h5py.File, Path], None]


def _replace(file: h5py.File, name: str, **storage: Any) -> h5py.Dataset:
    del file[name]
    return file.create_dataset(name, **storage)


def _external_link(file: h5py.File, secret: Path) -> None:
    del file["label"]
    file["label"] = h5py.ExternalLink(str(secret), "label")


def _soft_link(file: h5py.File, _: Path) -> None:
    del file["label"]
    file["label"] = h5py.SoftLink("/classes")


def _dangling_link(file: h5py.File, _: Path) -> None:
    file["more"] = h5py.SoftLink("/nothing")


def _external_storage(file: h5py.File, secret: Path) -> None:
    _replace(file, "label", shape=(3,), dtype="<i4", external=[(str(secret), 0, 12)])


def _virtual(file: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout((3,), "<i4")
    layout[:] = h5py.VirtualSource(str(secret), "label", (3,))
    del file["label"]
    file.create_virtual_dataset("label", layout)


def _references(file: h5py.File, _: Path) -> None:
    del file["label"]
    data = np.array([file["scores"].ref] * 3, h5py.ref_dtype)
    file.create_dataset("label", data=data, dtype=h5py.ref_dtype)


def _reference_attribute(file: h5py.File, _: Path) -> None:
    file.attrs["k"] = file["scores"].ref


def _region_attribute(file: h5py.File, _: Path) -> None:
    file.attrs["k"] = file["scores"].regionref[0]


def _vlen_texts(file: h5py.File, _: Path) -> None:
    _replace(file, "key", data=["a", "b", "c"], dtype=h5py.string_dtype())


def _vlen_numbers(file: h5py.File, _: Path) -> None:
    _replace(file, "label", shape=(3,), dtype=h5py.vlen_dtype(np.dtype("i4")))


def _named_type(file: h5py.File, _: Path) -> None:
    file["kind"] = np.dtype("<i4")
    _replace(file, "label", shape=(3,), dtype=file["kind"])


def _compound(file: h5py.File, _: Path) -> None:
    _replace(file, "label", data=np.zeros(3, [("a", "<i4"), ("b", "<i4")]))


def _enumeration(file: h5py.File, _: Path) -> None:
    _replace(file, "label", shape=(3,), dtype=h5py.enum_dtype({"a": 1}, "i4"))


def _big_endian(file: h5py.File, _: Path) -> None:
    _replace(file, "label", data=np.zeros(3, ">i4"))


def _group(file: h5py.File, _: Path) -> None:
    del file["scores"]
    file.create_group("scores")


def _scalar(file: h5py.File, _: Path) -> None:
    _replace(file, "label", data=np.int32(1))


def _no_value(file: h5py.File, _: Path) -> None:
    _replace(file, "label", data=h5py.Empty("<i4"))


def _never_written(file: h5py.File, _: Path) -> None:
    """A terabyte that takes no room in the file."""
    _replace(file, "label", shape=(1 << 40,), dtype="<i4", chunks=(1024,), compression="gzip")


def _huge_contiguous(file: h5py.File, _: Path) -> None:
    _replace(file, "label", shape=(1 << 40,), dtype="<i4")


def _huge_map(file: h5py.File, _: Path) -> None:
    """One chunk that claims 4 GB in no bytes."""
    shape = (1, 1, 1 << 15, 1 << 15, 1)
    data = _replace(
        file, "scores", shape=shape, dtype="<f2", chunks=shape, compression="gzip", shuffle=True
    )
    data.id.write_direct_chunk((0,) * 5, zlib.compress(b""))


def _huge_text(file: h5py.File, _: Path) -> None:
    data = _replace(
        file, "key", shape=(3,), dtype="S1000000", chunks=(3,), compression="gzip", shuffle=True
    )
    data.id.write_direct_chunk((0,), zlib.compress(b"a"))


def _growing(file: h5py.File, _: Path) -> None:
    _replace(file, "label", data=np.zeros(3, "<i4"), chunks=(1,), maxshape=(None,))


def _growing_twice(file: h5py.File, _: Path) -> None:
    _replace(file, "size", data=np.zeros((3, 2), "<i4"), chunks=(1, 1), maxshape=(None, None))


def _short_chunk(file: h5py.File, _: Path) -> None:
    """HDF5 itself reads what lies behind the chunk in memory, and dies."""
    data = _replace(
        file, "label", shape=(3,), dtype="<i4", chunks=(3,), compression="gzip", shuffle=True
    )
    data.id.write_direct_chunk((0,), zlib.compress(b"a"))


def _bomb(file: h5py.File, _: Path) -> None:
    """12 bytes are declared, 100 MB come out."""
    data = _replace(file, "label", shape=(3,), dtype="<i4", chunks=(3,), compression="gzip")
    data.id.write_direct_chunk((0,), zlib.compress(bytes(100 << 20)))


def _lzf(file: h5py.File, _: Path) -> None:
    _replace(file, "label", data=np.zeros(3, "<i4"), chunks=(3,), compression="lzf")


def _scale_offset(file: h5py.File, _: Path) -> None:
    _replace(file, "label", data=np.zeros(3, "<i4"), chunks=(3,), scaleoffset=0)


def _skipped_filters(file: h5py.File, _: Path) -> None:
    data = _replace(
        file, "label", shape=(3,), dtype="<i4", chunks=(3,), compression="gzip", shuffle=True
    )
    data.id.write_direct_chunk((0,), b"abc", filter_mask=0xFFFFFFFF)


def _transposed_chunks(file: h5py.File, _: Path) -> None:
    """The right values in chunks across the rows are no attack: they are read."""
    data = file["scores"][:]
    _replace(file, "scores", data=data, chunks=(3, 1, 1, 1, 1), compression="gzip", shuffle=True)


def _other_shape(file: h5py.File, _: Path) -> None:
    _replace(file, "classes", data=np.zeros((3, 1, 2, 3), "<u2"))


def _vlen_attribute(file: h5py.File, _: Path) -> None:
    file.attrs["sha256"] = "a" * 64


def _huge_number(file: h5py.File, _: Path) -> None:
    file.attrs["num_classes"] = float("inf")


def _no_number(file: h5py.File, _: Path) -> None:
    file.attrs["num_classes"] = [1, 2]


def _nested_views(file: h5py.File, _: Path) -> None:
    file.attrs["views"] = np.zeros((1, 2, 3))


def _large_attribute(file: h5py.File, _: Path) -> None:
    """What a later release may add is no attack: it is read."""
    file.attrs["more"] = np.zeros(100_000)


#: By name, and whether the file still is a shard.
ATTACKS: dict[str, tuple[Attack, bool]] = {
    attack.__name__.strip("_"): (attack, attack in (_transposed_chunks, _large_attribute))
    for attack in (
        *(_external_link, _soft_link, _dangling_link, _external_storage, _virtual, _references),
        *(_reference_attribute, _region_attribute, _vlen_texts, _vlen_numbers, _named_type),
        *(_compound, _enumeration, _big_endian, _group, _scalar, _no_value, _never_written),
        *(_huge_contiguous, _huge_map, _huge_text, _growing, _growing_twice, _short_chunk, _bomb),
        *(_lzf, _scale_offset, _skipped_filters, _transposed_chunks, _other_shape),
        *(_vlen_attribute, _huge_number, _no_number, _nested_views, _large_attribute),
    )
}


def attack(path: Path, name: str, secret: Path) -> None:
    """Turn the shard at `path` into the attack `name`; `secret` is another file, which it names."""
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        ATTACKS[name][0](file, secret)
