"""Files of earlier releases: read for ever from version 2 on, as docs/format.md promises."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures.freeze import digest
from tests.shards import content_digest, edit_directory
from tokenlabel.dataset.format.index import VERSION as INDEX_VERSION
from tokenlabel.dataset.format.manifest import open_manifest
from tokenlabel.dataset.format.shard import VERSION, Shard, shard_name, write_shard
from tokenlabel.dataset.store import LabelStore
from tokenlabel.errors import FormatError, MissingMapError
from tokenlabel.inspection.verify.verify import verify

FIXTURES = Path(__file__).with_name("fixtures")
SHARD = shard_name(0, 1)
#: Digest of each folder. Never to be changed: a release that cannot read these files as they are
#: breaks the promise. Version 1 was never published; its folder shows how it is refused.
FROZEN = {
    "v1": "c3a0ed1023e1ceceea82b0ac08b981ff7c89d154107334330040e811a344eca7",
    "v2": "81e4720a12e80aad436dd34c642f44ad0230481cef85b3d9b1a4dd9195b94d8b",
}


@pytest.fixture(params=[name for name in FROZEN if name != "v1"])
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
    np.testing.assert_array_equal(store.ground_truth, want["label"])
    np.testing.assert_array_equal(store.sizes, want["size"])
    np.testing.assert_array_equal(store.failed, want["error"] != "")
    for row, key in enumerate(want["key"].tolist()):
        assert store.error(key) == want["error"][row]
        if store.failed[row]:
            with pytest.raises(MissingMapError, match="has no score map: cannot be decoded"):
                store[key]
            continue
        entry = store[key]
        for name in store.layout.planes():
            np.testing.assert_array_equal(getattr(entry, name), want[name][row], strict=True)
        assert (entry.label, entry.size) == (want["label"][row], tuple(want["size"][row]))
        assert entry.extent == tuple(want["extent"][row].tolist())


def test_nobody_has_changed_the_fixtures() -> None:
    assert {folder.name: digest(folder) for folder in FIXTURES.glob("v*")} == FROZEN


def test_every_version_has_a_fixture() -> None:
    versions = {name.partition("-")[0] for name in FROZEN}
    assert versions == {f"v{number}" for number in range(1, VERSION + 1)}


def test_version_1_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "v1", tmp_path / "v1"))
    message = "is of format version 1, .* Remedy: delete the files of this split"
    with pytest.raises(FormatError, match=message):
        LabelStore(folder)
    for name in ("index.h5", "manifest.h5"):
        with pytest.raises(FormatError, match=message):
            open_manifest(folder / name)
    (fault,) = verify(folder).faults
    assert fault.file == SHARD and "is of format version 1" in fault.text


def test_old_shards_are_read_to_the_exact_values(old: Path) -> None:
    check_maps(old)
    (old / "index").unlink()
    check_maps(old)


def test_old_manifests_are_read(old: Path) -> None:
    manifest = open_manifest(old / "manifest", verify=True)
    assert list(manifest.keys) == values(old)["key"].tolist()
    assert manifest.class_names == LabelStore(old).classes
    assert manifest.class_names is not None and manifest.class_names[-2:] == ["cat", "dog"]


def test_old_shards_pass_verification(old: Path) -> None:
    """With the index that lies beside them, whatever its version, and with that of this release."""
    assert verify(old).faults == []
    LabelStore(old)
    result = verify(old)
    assert result.ok and all("SHA256SUMS" in note for note in result.notes)


def test_old_digests_are_those_of_the_content(old: Path) -> None:
    want = values(old)
    with Shard(old / SHARD) as shard:
        assert content_digest(shard) == shard.attrs["sha256"]
        for name in ("digest", "thumbprint", "orientation"):
            np.testing.assert_array_equal(shard.read(name), want[name])


def test_content_written_by_this_release_has_the_old_digest(old: Path, tmp_path: Path) -> None:
    """So that a split that an older release began can be completed, and its shards compared."""
    want = values(old)
    with Shard(old / SHARD) as shard:
        extents = want["extent"] if "extent" in shard else None
        keys, labels = want["key"].tolist(), want["label"]
        maps = {name: want[name] for name in shard.layout.planes()}
        with write_shard(
            tmp_path / SHARD, shard.layout, keys, labels, shard.attrs, extents
        ) as writer:
            columns = (want[name] for name in ("size", "digest", "thumbprint", "orientation"))
            writer.append(maps, *columns, want["error"].tolist())
        with Shard(tmp_path / SHARD) as new:
            assert new.attrs["sha256"] == shard.attrs["sha256"]


@pytest.mark.parametrize("number", [INDEX_VERSION - 1, INDEX_VERSION + 1])
def test_an_index_of_another_version_is_rebuilt(old: Path, number: int) -> None:
    edit_directory(old / "index", lambda found: found["attrs"].update(version=number))
    result = verify(old)
    assert result.ok == (number > INDEX_VERSION), "what a newer release wrote is not damaged"
    check_maps(old)
    assert verify(old).ok


def test_a_later_version_is_refused_with_advice(old: Path) -> None:
    edit_directory(old / SHARD, lambda found: found["attrs"].update(version=VERSION + 1))
    message = f"is version {VERSION + 1} of tokenlabel-shard; .* Remedy: install a newer tokenlabel"
    with pytest.raises(FormatError, match=message):
        LabelStore(old)
    (fault,) = verify(old).faults
    assert "install a newer tokenlabel" in fault.text
    assert not fault.redone_by_annotate, "what a newer release wrote is not damaged"
