"""Files that earlier releases wrote are read for ever, as docs/format.md promises."""

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.fixtures.freeze import digest
from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.files import create_h5
from tokenlabel.dataset.index_writer import VERSION as INDEX_VERSION
from tokenlabel.dataset.shard import VERSION, Shard, ShardWriter, shard_name
from tokenlabel.dataset.store import LabelStore, MissingMapError
from tokenlabel.inspection.verify import verify

FIXTURES = Path(__file__).with_name("fixtures")
SHARD = shard_name(0, 1)
LIBVER = ("v110", "v110")  # as releases write
#: Digest of each folder. Never to be changed: a release that cannot read these files as they are
#: breaks the promise.
FROZEN = {
    "v1-error-row": "1bae9182c55cf26c141606878b1861d691cf12160f176d98a7c8ed5377a10c6a",
    "v1-hdf5-filters": "d233be33341d426939bf38eb296197ffdff6ae98c7bdc6f68e0f8c853355a709",
    "v1-uint8-two-views": "30da8136e7215aaf34c32e9de527c67190279b9386bb403e2644aa018b824c9f",
    "v1-wide-ids-extents": "eee1715a969d0964031241d0268ea74045208facac9bd6672b84e4c11e940423",
}


@pytest.fixture(params=FROZEN)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a fixture: reading a split may write its index."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param))


def values(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "values.npz", allow_pickle=False) as file:
        return dict(file)


def check_maps(folder: Path) -> None:
    """What LabelStore reads is exactly what was written."""
    want = values(folder)
    store = LabelStore(folder)
    assert list(store.keys) == want["key"].tolist()
    np.testing.assert_array_equal(store.labels, want["label"])
    np.testing.assert_array_equal(store.sizes, want["size"])
    np.testing.assert_array_equal(store.failed, want["error"] != "")
    for row, key in enumerate(want["key"].tolist()):
        assert store.error(key) == want["error"][row]
        if store.failed[row]:
            with pytest.raises(MissingMapError, match="has no score map: cannot be decoded"):
                store[key]
            continue
        entry = store[key]
        assert entry.classes.dtype == want["classes"].dtype
        np.testing.assert_array_equal(entry.scores, want["float_scores"][row], strict=True)
        np.testing.assert_array_equal(entry.classes, want["classes"][row])
        np.testing.assert_array_equal(entry.rest, want["rest"][row], strict=True)
        assert (entry.label, entry.size) == (want["label"][row], tuple(want["size"][row]))
        assert entry.extent == tuple(want["extent"][row].tolist())


def test_nobody_has_changed_the_fixtures() -> None:
    assert {folder.name: digest(folder) for folder in FIXTURES.glob("v*")} == FROZEN


def test_every_version_has_a_fixture() -> None:
    versions = {name.partition("-")[0] for name in FROZEN}
    assert versions == {f"v{number}" for number in range(1, VERSION + 1)}


def test_old_shards_are_read_to_the_exact_values(old: Path) -> None:
    check_maps(old)
    (old / "index.h5").unlink()
    check_maps(old)


def test_old_shards_pass_verification(old: Path) -> None:
    """With the index that lies beside them, whatever its version, and with that of this release."""
    assert verify(old).faults == []
    LabelStore(old)
    result = verify(old)
    assert result.faults == [] and result.missing == []
    assert not any("version" in note and "index" in note for note in result.notes)


def test_old_digests_are_those_of_the_content(old: Path) -> None:
    want = values(old)
    with Shard(old / SHARD) as shard:
        assert shard.content_digest() == shard.attrs["sha256"]
        np.testing.assert_array_equal(shard.read("digest"), want["digest"])


def test_content_written_by_this_release_has_the_old_digest(old: Path, tmp_path: Path) -> None:
    """So that a split that an older release began can be completed, and its shards compared."""
    with Shard(old / SHARD) as shard, create_h5(tmp_path / "new.h5") as file:
        want = values(old)
        extents = want["extent"] if "extent" in shard else None
        attrs = {"extent": shard.attrs["extent"], "fingerprint": "f"}
        writer = ShardWriter(
            file, shard.layout, want["key"].tolist(), want["label"], attrs, extents
        )
        maps = want["float_scores"], want["classes"], want["rest"]
        writer.append(*maps, want["size"], want["digest"], want["error"].tolist())
        writer.finish()
        assert file.attrs["sha256"].decode() == shard.attrs["sha256"]


def test_the_first_writer_and_index_are_among_them() -> None:
    """Gzip by HDF5 itself, class ids without shuffle, an index without the chunks' places."""
    folder = FIXTURES / "v1-hdf5-filters"
    with h5py.File(folder / "index.h5") as file:
        assert file.attrs["version"] == 1 and "chunk" not in file
    with h5py.File(folder / SHARD) as file:
        assert file["scores"].shuffle and not file["classes"].shuffle


@pytest.mark.parametrize("number", [1, INDEX_VERSION + 1])
def test_an_index_of_another_version_is_built_anew(old: Path, number: int) -> None:
    with h5py.File(old / "index.h5", "r+", libver=LIBVER) as file:
        file.attrs["version"] = number
    result = verify(old)
    assert result.ok
    assert any(f"index.h5 is of version {number}" in note for note in result.notes)
    check_maps(old)
    with h5py.File(old / "index.h5") as file:
        assert file.attrs["version"] == INDEX_VERSION


def test_a_later_version_is_refused_with_advice(old: Path) -> None:
    with h5py.File(old / SHARD, "r+", libver=LIBVER) as file:
        file.attrs["version"] = VERSION + 1
    message = f"is version {VERSION + 1} of tokenlabel-shard; .* Remedy: install a newer tokenlabel"
    with pytest.raises(FormatError, match=message):
        LabelStore(old)
    (fault,) = verify(old).faults
    assert "install a newer tokenlabel" in fault.text
    assert not fault.mended_by_annotate, "what a newer release wrote is not damaged"


@pytest.mark.parametrize("extra", ["attribute", "dataset", "group"])
def test_what_a_later_release_may_add_is_ignored(old: Path, extra: str) -> None:
    with h5py.File(old / SHARD, "r+", libver=LIBVER) as file:
        added: Any = file.attrs if extra == "attribute" else file
        if extra == "group":
            file.create_group("notes").attrs["by"] = "a later release"
        else:
            added["notes"] = np.arange(3)
    check_maps(old)
    assert verify(old).faults == []
