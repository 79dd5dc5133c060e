"""LabelStore and its index: look-up, rebuilds, processes, threads, folders that are not right."""

import gc
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import unicodedata
import weakref
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.maps import Rows, attrs, manifest_of, random_rows, write_split
from tests.shards import digest, edit_directory
from tokenlabel.dataset.format import new_file
from tokenlabel.dataset.format.directory import StoredFile
from tokenlabel.dataset.format.index import VERSION as INDEX_VERSION
from tokenlabel.dataset.format.keys import KeyTable, KeyWriter, canonical_name
from tokenlabel.dataset.format.new_file import create
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.format.shard import HEADER, Shard, shard_name, write_shard
from tokenlabel.dataset.store import LabelStore
from tokenlabel.errors import FormatError, MissingMapError

LAYOUT = MapLayout(("identity", "hflip"), (3, 5), 4, 1000, residual=6)
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
    assert store.layout == LAYOUT
    assert store.attrs["teacher"] == "made up"
    for row, key in enumerate(KEYS):
        rows, local = written[row // 3], row % 3
        for entry in (store[key], store[row], store[row - 8]):
            for name, plane in rows.maps.items():
                np.testing.assert_array_equal(getattr(entry, name), plane[local])
            assert entry.size == tuple(rows.sizes[local].tolist())
            assert entry.label == local
            assert entry.extent == (0, 0, 1, 1)
        assert key in store
        with Shard(root / shard_name(row // 3, 3)) as shard:
            assert store.leaf(row).planes == store.leaf(row - 8).planes == shard.planes(local)
    assert "nope.jpg" not in store
    assert 3 not in store.keys


def test_missing_keys_are_named(split: tuple[Path, list[Rows]]) -> None:
    store = LabelStore(split[0])
    for row, key in enumerate(KEYS):
        assert store.row(key) == row
    with pytest.raises(MissingMapError):
        store.row("nope.jpg")
    with pytest.raises(KeyError, match=r"no score map for 'nope.jpg' .* such as 'a.b/z.png'"):
        store["nope.jpg"]
    for row in (8, -9):
        for read in (store.__getitem__, store.leaf):
            with pytest.raises(IndexError, match=rf"row {row} is outside 0..7"):
                read(row)


def test_images_with_errors_have_no_map(tmp_path: Path) -> None:
    write_split(tmp_path, KEYS, LAYOUT, errors={"c/d.jpg": "the file is empty"})
    store = LabelStore(tmp_path)
    assert "c/d.jpg" in store
    assert store.failed.sum() == 1
    assert store.error("c/d.jpg") == "the file is empty"
    assert store.error("b.jpg") == ""
    with pytest.raises(MissingMapError, match=r"'c/d.jpg' has no score map: the file is empty"):
        store["c/d.jpg"]


def test_errors_that_are_no_text_are_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = new_file.encode_texts
    monkeypatch.setattr(
        new_file, "encode_texts", lambda texts: np.char.replace(text(texts), b"?", b"\xff")
    )
    write_split(tmp_path, KEYS, LAYOUT, errors={"c/d.jpg": "why?"})
    store = LabelStore(tmp_path)
    for read in (store.error, store.__getitem__):
        with pytest.raises(FormatError, match="error: 'utf-8' codec can't decode"):
            read("c/d.jpg")


def test_index_is_rebuilt_when_absent_stale_or_damaged(split: tuple[Path, list[Rows]]) -> None:
    root, _ = split
    LabelStore(root)
    index = root / "index"
    first = index.read_bytes()
    index.unlink()
    LabelStore(root)
    assert index.read_bytes() == first, "derived from the shards alone"
    os.truncate(index, len(first) // 2)
    LabelStore(root)
    assert index.read_bytes() == first
    write_split(root, KEYS, LAYOUT._replace(k=2), shard_size=3, seed=7)
    assert LabelStore(root)["b.jpg"].codes.shape == (2, 2, 3, 5)
    assert index.read_bytes() != first


def test_a_read_only_folder_is_indexed_in_memory(
    split: tuple[Path, list[Rows]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, written = split

    def refuse(*_: object) -> None:  # what a read-only file system does; root ignores chmod
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("tokenlabel.dataset.format.index.build_index", refuse)
    store = LabelStore(root)
    assert not (root / "index").exists()
    np.testing.assert_array_equal(store[7].codes, written[2].maps["codes"][1])


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


@pytest.mark.parametrize(
    ("layout", "more", "message"),
    [
        (LAYOUT, {"fingerprint": "e" * 64}, f"fingerprint {'f' * 64}, .* has {'e' * 64}"),
        # Whatever their fingerprints say.
        (LAYOUT._replace(k=3), {}, r"has layout .*k=4.* has .*k=3.*Remedy: delete"),
    ],
)
def test_shards_of_two_runs_are_refused(
    split: tuple[Path, list[Rows]], tmp_path: Path, layout: MapLayout, more: Any, message: str
) -> None:
    root, _ = split
    write_split(tmp_path / "other", KEYS, layout, shard_size=3, **more)
    name = "shard-00002-of-00003.h5"
    shutil.copy(tmp_path / "other" / name, root / name)
    with pytest.raises(FormatError, match=message):
        LabelStore(root)


def test_swapped_shards_are_refused(split: tuple[Path, list[Rows]]) -> None:
    root, _ = split
    a, b = (root / shard_name(number, 3) for number in (0, 1))
    a.rename(root / "away"), b.rename(a), (root / "away").rename(b)
    with pytest.raises(FormatError, match="says it is shard 1 from row 3"):
        LabelStore(root)


def test_keys_keep_their_order_and_equal_ones_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path / "a", KEYS[::-1], LAYOUT)
    store = LabelStore(tmp_path / "a")
    assert list(store.keys) == KEYS[::-1]
    assert [store.row(key) for key in KEYS[::-1]] == list(range(len(KEYS)))
    write_split(tmp_path / "b", [*KEYS, KEYS[2]], LAYOUT, shard_size=3)
    with pytest.raises(FormatError, match=f"rows 2 and {len(KEYS)} both have {KEYS[2]!r}"):
        LabelStore(tmp_path / "b")


def _read(store: LabelStore, queue: "multiprocessing.Queue[bytes]") -> None:
    queue.put(b"".join(store[row].codes.tobytes() for row in range(len(store))))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_other_processes_read_the_same(split: tuple[Path, list[Rows]], method: str) -> None:
    root, written = split
    store = LabelStore(root)
    want = b"".join(rows.maps["codes"].tobytes() for rows in written)
    store[0]  # open handles must not be shared with the child
    context = multiprocessing.get_context(method)
    queue: multiprocessing.Queue[bytes] = context.Queue()
    child = context.Process(target=_read, args=(store, queue))
    child.start()
    assert queue.get(timeout=900) == want
    child.join(900)
    assert child.exitcode == 0
    assert store[7].label == 1


def test_threads_read_the_same(split: tuple[Path, list[Rows]]) -> None:
    root, written = split
    store = LabelStore(root)
    failures: list[object] = []

    def work(seed: int) -> None:
        for row in np.random.default_rng(seed).integers(0, 8, 200).tolist():
            if (store[row].codes != written[row // 3].maps["codes"][row % 3]).any():
                failures.append(row)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_files_close_with_the_store_and_not_at_some_later_time(
    split: tuple[Path, list[Rows]],
) -> None:
    store = LabelStore(split[0])
    assert len(store[KEYS[0]].probabilities()) == 3
    keys = weakref.ref(store.keys)  # holds the index's file
    gc.disable()
    try:
        del store
        assert keys() is None
    finally:
        gc.enable()


def test_few_open_files_suffice(tmp_path: Path) -> None:
    """Threads read 60 shards at random where 20 may be open at once; each reads what it should."""
    write_split(tmp_path, [f"{n:02}.jpg" for n in range(60)], LAYOUT, shard_size=1)
    want = "".join(digest(entry) for entry in map(LabelStore(tmp_path).__getitem__, range(60)))
    code = (
        "import random, resource, sys; from concurrent.futures import ThreadPoolExecutor\n"
        "from tests.shards import digest; from tokenlabel.dataset import LabelStore\n"
        "import numpy.random, h5py, torch  # what opens files of its own\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "store = LabelStore(sys.argv[1])\n"
        "order = list(range(60)) * 9; random.Random(0).shuffle(order)\n"
        "found = dict(zip(order, ThreadPoolExecutor(8).map(lambda n: digest(store[n]), order)))\n"
        "print(''.join(found[n] for n in range(60)), end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == want, done.stderr


def test_systems_without_pread_read_the_same(
    split: tuple[Path, list[Rows]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pread")  # as on Windows
    test_maps_by_key_and_row(split)
    test_threads_read_the_same(split)


def test_extents_of_their_own_come_with_the_map(tmp_path: Path) -> None:
    """In one of two shards only."""
    boxes = np.sort(np.random.default_rng(0).random((3, 2, 2)), 1).reshape(3, 4).astype("f4")
    for number, (keys, extents) in enumerate(((KEYS[:3], None), (KEYS[3:6], boxes))):
        path = tmp_path / shard_name(number, 2)
        with write_shard(path, LAYOUT, keys, [0] * 3, attrs(number, 2, 3 * number), extents) as new:
            new.append(*random_rows(LAYOUT, 3, number))
    store = LabelStore(tmp_path)
    for row in range(6):
        want = (0, 0, 1, 1) if row < 3 else tuple(boxes[row - 3])
        assert store[row].extent == store.leaf(row).extent == want
        with Shard(tmp_path / shard_name(row // 3, 2)) as shard:
            assert shard.extent(row % 3) == want
            assert ("extent" in shard) == (row >= 3)


@pytest.mark.parametrize(
    "box", [(0.5, 0, 0.5, 1), (0, 1, 1, 0), (0, 0, 1, 1.5), (-1, 0, 1, 1), (0, 0, np.nan, 1)]
)
@pytest.mark.parametrize("each", [True, False])
def test_extents_that_are_no_boxes_are_refused(tmp_path: Path, box: Any, each: bool) -> None:
    boxes = np.array([box] * len(KEYS), "f4") if each else None
    header = attrs(0, 1, 0) | ({} if each else {"extent": [float(side) for side in box]})
    labels = [0] * len(KEYS)
    with write_shard(tmp_path / shard_name(0, 1), LAYOUT, KEYS, labels, header, boxes) as new:
        new.append(*random_rows(LAYOUT, len(KEYS)))
    store = LabelStore(tmp_path)
    for read in (store.__getitem__, store.leaf):
        with pytest.raises(FormatError, match=r"row 1 cannot be read: it cannot cover \("):
            read(1)


def test_names_of_the_classes_come_from_the_manifest(split: tuple[Path, list[Rows]]) -> None:
    root, _ = split
    assert LabelStore(root).classes is None
    assert "class_names" not in LabelStore(root).attrs
    images = root.parent / "images"
    (images / "b").mkdir(parents=True)
    (images / "b" / "1.jpg").touch()
    manifest_of(images, root / "manifest", ["a", "b", "ü"], 3)
    store = LabelStore(root)
    assert store.classes == store.attrs["class_names"] == ["a", "b", "ü"]
    (root / "manifest").write_bytes(b"damaged")
    assert LabelStore(root).classes is None


def test_a_shard_truncated_while_it_is_open_is_named(split: tuple[Path, list[Rows]]) -> None:
    store = LabelStore(split[0])
    store[5]
    os.truncate(store.shards[1], 9000)
    with pytest.raises(FormatError, match=r"00001-of-00003.h5 is damaged.*cut short. Remedy: del"):
        store[5]
    store[0]


def test_a_replaced_shard_is_not_mixed_with_the_old_one(split: tuple[Path, list[Rows]]) -> None:
    root, written = split
    store = LabelStore(root)
    want = store[0].codes
    write_split(root, KEYS, LAYOUT, shard_size=3, seed=7)
    np.testing.assert_array_equal(store[1].codes, written[0].maps["codes"][1])  # still the old file
    np.testing.assert_array_equal(store[0].codes, want)
    with pytest.raises(FormatError, match="and the index do not agree"):
        store[3]
    assert (LabelStore(root)[0].codes != want).any()


def test_pickles_carry_no_handles(split: tuple[Path, list[Rows]]) -> None:
    store = LabelStore(split[0])
    store[0]
    data = pickle.dumps(store)
    assert len(data) < 4000
    assert pickle.loads(data)["b.jpg"].size == store["b.jpg"].size


@pytest.mark.parametrize("block", [1, 40, 1 << 22])
def test_columns_larger_than_a_block_are_stored_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("tokenlabel.dataset.format.new_file.BLOCK", block)
    monkeypatch.setattr("tokenlabel.dataset.format.directory.BLOCK", block)
    want = np.arange(30, dtype="<u8").reshape(10, 3)
    with create(tmp_path / "f", "test", 1, {}) as file:
        for rows in (slice(0, 7), slice(7, 7), slice(7, 10)):
            file.append("a", want[rows])
    with StoredFile(tmp_path / "f", "test", 1, "delete it") as stored:
        np.testing.assert_array_equal(stored.read("a"), want)
        np.testing.assert_array_equal(stored.read("a", 2, -3), want[2:-3])
        stored.check_bytes()


@given(
    st.sets(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=40)
)
def test_key_table_finds_what_is_there_and_nothing_else(keys: set[str]) -> None:
    keys = {unicodedata.normalize("NFC", key) for key in keys}
    ordered, names = sorted(keys), Counter(map(canonical_name, keys))
    with tempfile.TemporaryDirectory() as folder:
        with create(Path(folder) / "f", "test", 1, {}) as new:
            keys_of = KeyWriter(new)
            keys_of.append(ordered)
            keys_of.finish()
        table = KeyTable(StoredFile(Path(folder) / "f", "test", 1, "delete it"))
    assert list(table) == ordered
    assert table[:] == ordered
    for row, key in enumerate(ordered):
        assert table.find(key) == row
        assert table.index(key) == row
        for near in (key + "\0", key[:-1], key + "a", f"z/{key}.jpg"):
            near = unicodedata.normalize("NFC", near)
            assert (table.find(near, exact=True) >= 0) == (near in keys)
            name = canonical_name(near)
            assert (near in table) == (near in keys or (bool(name) and names[name] == 1))
    with pytest.raises(ValueError, match="is not among the keys"):
        table.index("nothing like these!")


@pytest.mark.parametrize("column", ["label", "size", "failed", "key_bytes", "key_offsets"])
def test_a_damaged_index_is_noticed_when_a_shard_is_opened(
    split: tuple[Path, list[Rows]], column: str
) -> None:
    root, _ = split
    LabelStore(root)
    with StoredFile(root / "index", "tokenlabel-index", INDEX_VERSION, "") as file:
        place = file.columns[column]
    # In the last row, whose key stays in order; the last offset is checked before.
    width = place.dtype.itemsize
    offset = place.offset + place.size - width * (2 if column == "key_offsets" else 1)
    content = bytearray((root / "index").read_bytes())
    content[offset] ^= 1
    (root / "index").write_bytes(content)
    store = LabelStore(root)
    store[0]
    with pytest.raises(FormatError, match=r"and the index do not agree: .* Remedy: delete"):
        store[6]


@pytest.mark.parametrize("column", ["key_lookup", "digest_lookup"])
def test_a_damaged_look_up_loses_nothing(split: tuple[Path, list[Rows]], column: str) -> None:
    root, _ = split
    LabelStore(root)
    with StoredFile(root / "index", "tokenlabel-index", INDEX_VERSION, "") as file:
        place = file.columns[column]
    content = (root / "index").read_bytes()
    for offset in range(place.offset, place.offset + place.size, 5):
        changed = bytearray(content)
        changed[offset] ^= 1
        (root / "index").write_bytes(changed)
        store = LabelStore(root)
        for row, key in enumerate(KEYS):
            with suppress(FormatError):
                assert store.row(key) == row
        with pytest.raises(FormatError, match=f"{column} has a wrong checksum"):
            store.row("nothing.jpg") if column == "key_lookup" else store.row_of_file(b"nothing")


def test_shards_without_a_whole_header_are_refused(split: tuple[Path, list[Rows]]) -> None:
    root, _ = split
    path = root / "shard-00000-of-00003.h5"
    content = path.read_bytes()
    for name in HEADER:
        path.write_bytes(content)
        edit_directory(path, lambda found, name=name: found["attrs"].pop(name))
        with pytest.raises(FormatError, match=f"the header lacks {name}"):
            LabelStore(root)


def test_reading_imports_neither_h5py_nor_torch(split: tuple[Path, list[Rows]]) -> None:
    root, _ = split
    LabelStore(root)
    code = (
        "import sys; from tokenlabel.dataset.store import LabelStore; LabelStore(sys.argv[1])[3]\n"
        "sys.exit(str({'h5py', 'torch', 'timm', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=False
    )
    assert done.stderr == "set()\n"
