"""LabelStore and its index: look-up, rebuilds, processes, threads, folders that are not right."""

import multiprocessing
import os
import pickle
import shutil
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.maps import Rows, write_split
from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.keys import KeyTable
from tokenlabel.dataset.shard import ShardLayout
from tokenlabel.dataset.store import LabelStore, MissingMapError

LAYOUT = ShardLayout(("identity", "hflip"), (3, 5), 4, 1000)
KEYS = sorted(
    ["b.jpg", "a/1.JPEG", "a/x y.jpg", "a.b/z.png", "ü/新.webp", "a/2.jpg", "c/d/e.jpg", "c/d.jpg"],
    key=str.encode,
)


@pytest.fixture
def split(tmp_path: Path) -> tuple[Path, list[Rows]]:
    return tmp_path / "train", write_split(tmp_path / "train", KEYS, LAYOUT, shard_size=3)


def test_maps_by_key_and_row(split: tuple[Path, list[Rows]]) -> None:
    root, written = split
    store = LabelStore(root)
    assert len(store) == 8
    assert list(store.keys) == KEYS
    assert (store.grid, store.k, store.num_classes) == ((3, 5), 4, 1000)
    assert store.views == ("identity", "hflip")
    assert store.attrs["teacher"] == "made up"
    for row, key in enumerate(KEYS):
        for entry in (store[key], store[row], store[row - 8]):
            rows, local = written[row // 3], row % 3
            np.testing.assert_array_equal(entry.scores, rows.scores[local])
            np.testing.assert_array_equal(entry.classes, rows.classes[local])
            np.testing.assert_array_equal(entry.rest, rows.rest[local])
            assert entry.size == tuple(rows.sizes[local].tolist())
            assert entry.label == local
            assert entry.extent == (0, 0, 1, 1)
        assert key in store
    assert "nope.jpg" not in store
    assert 3 not in store.keys


def test_missing_keys_are_named(split: tuple[Path, list[Rows]]) -> None:
    store = LabelStore(split[0])
    with pytest.raises(KeyError, match=r"no score map for 'nope.jpg' .* such as 'a.b/z.png'"):
        store["nope.jpg"]
    with pytest.raises(IndexError, match=r"row 8 is outside 0..7"):
        store[8]


def test_images_with_errors_have_no_map(tmp_path: Path) -> None:
    write_split(tmp_path, KEYS, LAYOUT, errors={"c/d.jpg": "the file is empty"})
    store = LabelStore(tmp_path)
    assert "c/d.jpg" in store
    assert store.failed.sum() == 1
    assert store.error("c/d.jpg") == "the file is empty"
    assert store.error("b.jpg") == ""
    with pytest.raises(MissingMapError, match=r"'c/d.jpg' has no score map: the file is empty"):
        store["c/d.jpg"]


def test_index_is_rebuilt_when_absent_stale_or_damaged(split: tuple[Path, list[Rows]]) -> None:
    root, _ = split
    LabelStore(root)
    index = root / "index.h5"
    first = index.read_bytes()
    index.unlink()
    LabelStore(root)
    assert index.read_bytes() == first, "derived from the shards alone"
    index.write_bytes(first[: len(first) // 2])
    LabelStore(root)
    assert index.read_bytes() == first
    write_split(root, KEYS, LAYOUT._replace(k=2), shard_size=3, seed=7)
    assert LabelStore(root)["b.jpg"].scores.shape == (2, 3, 5, 2)
    assert index.read_bytes() != first


def test_a_shard_swapped_under_a_matching_index_is_noticed(split: tuple[Path, list[Rows]]) -> None:
    root, _ = split
    LabelStore(root)
    path = root / "shard-00001-of-00003.h5"
    with h5py.File(path, "a") as file:
        digest = file.attrs["sha256"]
        file.attrs.modify("sha256", digest[::-1])
    index = root / "index.h5"
    with h5py.File(index, "a") as file:
        file["shard_size"][1] = path.stat().st_size
    with pytest.raises(FormatError, match="and the index do not agree"):
        LabelStore(root)[4]


def test_a_read_only_folder_is_indexed_in_memory(
    split: tuple[Path, list[Rows]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, written = split

    def refuse(*_: object) -> None:  # what a read-only file system does; root ignores chmod
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("tokenlabel.dataset.index.build_index", refuse)
    store = LabelStore(root)
    assert not (root / "index.h5").exists()
    np.testing.assert_array_equal(store[7].scores, written[2].scores[1])


def test_incomplete_mixed_and_empty_splits_are_refused(split: tuple[Path, list[Rows]]) -> None:
    root, _ = split
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        LabelStore(root / "nope")
    (root / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no shards"):
        LabelStore(root / "empty")
    shutil.copy(root / "shard-00000-of-00003.h5", root / "shard-00000-of-00004.h5")
    with pytest.raises(FormatError, match="mixes shards of splits of 3 and 4 shards"):
        LabelStore(root)
    (root / "shard-00000-of-00004.h5").unlink()
    (root / "shard-00001-of-00003.h5").unlink()
    with pytest.raises(FormatError, match=r"1 of 3 shards are missing \(shard-00001-of-00003.h5\)"):
        LabelStore(root)


def test_shards_of_two_runs_are_refused(split: tuple[Path, list[Rows]], tmp_path: Path) -> None:
    root, _ = split
    write_split(tmp_path / "other", KEYS, LAYOUT, shard_size=3, fingerprint="e" * 64)
    name = "shard-00002-of-00003.h5"
    shutil.copy(tmp_path / "other" / name, root / name)
    with pytest.raises(FormatError, match=f"fingerprint {'f' * 64}, {name} has {'e' * 64}"):
        LabelStore(root)


def test_swapped_shards_are_refused(split: tuple[Path, list[Rows]]) -> None:
    root, _ = split
    a, b = root / "shard-00000-of-00003.h5", root / "shard-00001-of-00003.h5"
    c = root / "away"
    a.rename(c), b.rename(a), c.rename(b)
    with pytest.raises(FormatError, match="says it is shard 1 from row 3"):
        LabelStore(root)


def test_unsorted_keys_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path, KEYS[::-1], LAYOUT)
    with pytest.raises(FormatError, match="unique and sorted"):
        LabelStore(tmp_path)


def _read(store: LabelStore, queue: "multiprocessing.Queue[bytes]") -> None:
    queue.put(b"".join(store[row].scores.tobytes() for row in range(len(store))))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_other_processes_read_the_same(split: tuple[Path, list[Rows]], method: str) -> None:
    root, written = split
    store = LabelStore(root)
    want = b"".join(rows.scores.tobytes() for rows in written)
    store[0]  # open handles must not be shared with the child
    context = multiprocessing.get_context(method)
    queue: multiprocessing.Queue[bytes] = context.Queue()
    child = context.Process(target=_read, args=(store, queue))
    child.start()
    assert queue.get(timeout=60) == want
    child.join(60)
    assert child.exitcode == 0
    assert store[7].label == 1


def test_threads_read_the_same(split: tuple[Path, list[Rows]]) -> None:
    root, written = split
    store = LabelStore(root)
    failures: list[object] = []

    def work(seed: int) -> None:
        for row in np.random.default_rng(seed).integers(0, 8, 200).tolist():
            if (store[row].scores != written[row // 3].scores[row % 3]).any():
                failures.append(row)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_few_open_files_suffice(
    split: tuple[Path, list[Rows]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenlabel.dataset.store._open_files_limit", lambda: 1)
    store = LabelStore(split[0])
    before = len(os.listdir("/proc/self/fd"))
    for row in [0, 7, 3, 0, 7, 3]:
        store[row]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_pickles_carry_no_handles(split: tuple[Path, list[Rows]]) -> None:
    store = LabelStore(split[0])
    store[0]
    data = pickle.dumps(store)
    assert len(data) < 4000
    assert pickle.loads(data)["b.jpg"].size == store["b.jpg"].size


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=40))
def test_key_table_finds_what_is_there_and_nothing_else(keys: set[str]) -> None:
    ordered = sorted(keys, key=str.encode)
    table = KeyTable.from_keys(ordered)
    assert list(table) == ordered
    assert table[:] == ordered
    for row, key in enumerate(ordered):
        assert table.find(key) == row
        assert table.index(key) == row
        for near in (key + "\0", key[:-1], key + "a"):
            assert (near in table) == (near in keys)
    with pytest.raises(ValueError, match="is not among the keys"):
        table.index("seven!!")


@pytest.mark.parametrize("column", ["label", "size", "failed", "key_bytes"])
def test_a_damaged_index_is_noticed_when_a_shard_is_opened(
    split: tuple[Path, list[Rows]], column: str
) -> None:
    root, _ = split
    LabelStore(root)
    with h5py.File(root / "index.h5", "a") as file:
        data = file[column][:]
        data.flat[-1] ^= 1  # of the last row, whose key stays in order
        file[column][:] = data
    store = LabelStore(root)
    store[0]
    with pytest.raises(FormatError, match=r"and the index do not agree: .* Remedy: delete"):
        store[6]


@pytest.mark.parametrize("name", ["fingerprint", "sha256", "first_row", "views", "extent"])
def test_shards_without_a_whole_header_are_refused(
    split: tuple[Path, list[Rows]], name: str
) -> None:
    root, _ = split
    with h5py.File(root / "shard-00000-of-00003.h5", "a") as file:
        del file.attrs[name]
    with pytest.raises(FormatError, match=f"the header lacks {name}"):
        LabelStore(root)


def test_a_group_in_place_of_a_dataset_is_refused(split: tuple[Path, list[Rows]]) -> None:
    root, _ = split
    with h5py.File(root / "shard-00000-of-00003.h5", "a") as file:
        del file["scores"]
        file.create_group("scores")
    with pytest.raises(FormatError, match="damaged shard"):
        LabelStore(root)
