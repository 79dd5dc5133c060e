"""`LabelStore` on a URL: copies once a machine, ranges without them, forked processes."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from tests.maps import manifest_of, write_split
from tests.s3 import Proxy, s3_proxy
from tokenlabel.dataset import LabelStore
from tokenlabel.dataset.format.index import build_index
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.storage.remote_path import RemotePath
from tokenlabel.errors import StorageError, StoreError

LAYOUT = MapLayout(("identity",), (7, 7), 5, 1000, residual=6)
KEYS = [f"n{n % 5:08d}/{n:03d}.jpg" for n in range(60)]
SHARDS = 12


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A counting proxy before a real S3 server, which the environment names."""
    with s3_proxy(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A label set on disk, with the images beside it."""
    root = tmp_path_factory.mktemp("local")
    for key in KEYS:
        path = root / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    write_split(root / "train", sorted(KEYS), LAYOUT, shard_size=len(KEYS) // SHARDS)
    manifest_of(root / "images", root / "train" / "manifest")
    build_index(root / "train")
    return root / "train"


@pytest.fixture
def stored(proxy: Proxy, local: Path, request: pytest.FixtureRequest) -> str:
    """The same set in a bucket, under a prefix of the test's own."""
    url = f"s3://cached/{request.node.name}/train"
    for path in local.iterdir():
        (RemotePath(url) / path.name).put(path)
    proxy.gets.clear()
    proxy.bytes, proxy.fault = 0, None
    return url


def maps(store: LabelStore) -> list[bytes]:
    return [store[row].codes.tobytes() for row in range(len(store))]


def shard_gets(proxy: Proxy) -> dict[str, int]:
    return {name: n for name, n in proxy.gets.items() if name.startswith("shard-")}


def test_each_shard_is_fetched_once_and_then_never(
    proxy: Proxy, stored: str, local: Path, tmp_path: Path
) -> None:
    want, store = maps(LabelStore(local)), LabelStore(stored, tmp_path)
    assert [store.row(key) for key in store.keys] == list(range(60))
    assert shard_gets(proxy) == {"shard-00000-of-00012.h5": 1}, "opening needs one shard"
    assert maps(store) == want
    assert set(shard_gets(proxy).values()) == {1} and len(shard_gets(proxy)) == SHARDS
    before = dict(proxy.gets)
    assert maps(LabelStore(stored, tmp_path)) == want
    assert proxy.gets - Counter(before) == {"list": 1}
    assert store.classes == LabelStore(local).classes and store.folders == LabelStore(local).folders
    assert store.nbytes == sum(path.stat().st_size for path in local.glob("shard-*"))


READ = """
import sys
from tokenlabel.dataset import LabelStore
store = LabelStore(sys.argv[1], sys.argv[2])
print(sum(int(store[row].codes.sum()) for row in range(len(store))))
"""


def test_processes_at_once_fetch_a_shard_once(
    proxy: Proxy, stored: str, local: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", READ, stored, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {int(process.communicate(timeout=300)[0]) for process in running}
    store = LabelStore(local)
    assert found == {sum(int(store[row].codes.sum()) for row in range(len(store)))}
    assert set(shard_gets(proxy).values()) == {1} and len(shard_gets(proxy)) == SHARDS
    assert proxy.gets["index"] == 1 and proxy.gets["manifest"] == 1
    assert not [path for path in (tmp_path / "labels").iterdir() if path.name[0] == "."]


class Maps:
    """The rows of a store, as a data set."""

    def __init__(self, store: LabelStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> int:
        return int(self.store[row].codes.sum())


def read_by_workers(store: LabelStore) -> list[int]:
    return [int(n) for batch in DataLoader(Maps(store), 5, num_workers=2) for n in batch]


def test_epochs_of_forked_workers(proxy: Proxy, stored: str, local: Path, tmp_path: Path) -> None:
    """In which the main process, too, has read from the store before."""
    want = [Maps(LabelStore(local))[row] for row in range(60)]
    store = LabelStore(stored, tmp_path)
    store[59]
    assert read_by_workers(store) == want
    assert set(shard_gets(proxy).values()) == {1} and len(shard_gets(proxy)) == SHARDS
    before = dict(proxy.gets)
    assert read_by_workers(store) == want
    assert proxy.gets == before, "a second epoch asks the store nothing"


def test_the_least_recently_used_copies_go_first(
    proxy: Proxy, stored: str, local: Path, tmp_path: Path
) -> None:
    largest = max(path.stat().st_size for path in local.glob("shard-*"))
    others = sum((local / name).stat().st_size for name in ("index", "manifest"))
    limit = 3 * largest + others
    store = LabelStore(stored, tmp_path, cache_bytes=limit)
    assert maps(store) == maps(LabelStore(local))
    kept = [path for path in (tmp_path / "labels").iterdir()]
    assert sum(path.stat().st_size for path in kept) <= limit
    assert sorted(path.name[33:] for path in kept)[-1] == "shard-00011-of-00012.h5"
    assert "index" not in {path.name[33:] for path in kept}, "it was used before all shards"
    proxy.gets.clear()
    store[59]
    assert not shard_gets(proxy)
    assert maps(LabelStore(stored, tmp_path, cache_bytes=limit)) == maps(LabelStore(local))


def test_labels_that_were_made_again_are_not_mixed_with_the_old_copies(
    proxy: Proxy, stored: str, local: Path, tmp_path: Path
) -> None:
    old = LabelStore(stored, tmp_path / "cache")
    want = old[0].codes.tobytes()
    write_split(tmp_path / "new", sorted(KEYS), LAYOUT, len(KEYS) // SHARDS, seed=99)
    for path in (tmp_path / "new").iterdir():
        (RemotePath(stored) / path.name).put(path)
    new = LabelStore(stored, tmp_path / "cache")
    assert maps(new) == maps(LabelStore(tmp_path / "new")) and new[0].codes.tobytes() != want
    assert old[0].codes.tobytes() == want
    with pytest.raises(StorageError, match=r"has changed since it was listed.*Remedy: wait"):
        old[59]


def test_without_an_index_in_the_store_one_is_built_beside_the_copies(
    proxy: Proxy, stored: str, local: Path, tmp_path: Path
) -> None:
    (RemotePath(stored) / "index").unlink()
    for cache in (tmp_path, tmp_path, None):
        assert maps(LabelStore(stored, cache)) == maps(LabelStore(local))
    assert not (RemotePath(stored) / "index").is_file(), "reading writes nothing to the store"


def test_answers_cut_short_are_asked_for_again_and_refusals_leave_no_copy(
    proxy: Proxy, stored: str, local: Path, tmp_path: Path
) -> None:
    store = LabelStore(stored, tmp_path)
    proxy.fault = lambda *_: "403"
    with pytest.raises(StoreError, match=r"cannot be used.*403.*Remedy: check the credentials"):
        store[59]
    cut = iter([None, "cut"] * 1000)
    proxy.fault = lambda *_: next(cut)
    assert not [path for path in (tmp_path / "labels").iterdir() if "part" in path.name]
    assert maps(store) == maps(LabelStore(local))


def test_without_a_cache_a_batch_is_few_requests(proxy: Proxy, stored: str, local: Path) -> None:
    store, want = LabelStore(stored, None), LabelStore(local)
    for row in range(0, 60, 5):  # opens all shards
        assert store[row].codes.tobytes() == want[row].codes.tobytes()
    proxy.gets.clear()
    proxy.bytes = 0
    rows = np.random.default_rng(0).permutation(60)[:32].tolist()
    store.prefetch(rows)
    asked, size = sum(proxy.gets.values()), proxy.bytes
    assert asked <= SHARDS
    assert [store[row].codes.tobytes() for row in rows] == [
        want[row].codes.tobytes() for row in rows
    ]
    assert sum(proxy.gets.values()) == asked, "all of them were here"
    assert size < sum(path.stat().st_size for path in local.glob("shard-*"))
    assert read_by_workers(store) == [Maps(want)[row] for row in range(60)]


def test_a_killed_worker_leaves_no_process(stored: str, tmp_path: Path) -> None:
    path = RemotePath(stored) / "index"
    size, (reader, writer) = path.size(), os.pipe()
    if not (child := os.fork()):
        found = path.size()
        from tokenlabel.dataset.storage import forked

        server = forked._server(os.getpid())._process.pid
        os.write(writer, f"{found} {server}".encode())
        signal.pause()
    answer = os.read(reader, 99).split()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert int(answer[0]) == size
    for _ in range(100):
        if not Path(f"/proc/{int(answer[1])}").exists():
            return
        threading.Event().wait(0.1)
    raise AssertionError("the process outlives the one that it served")


def test_what_is_not_there(proxy: Proxy, stored: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no shards"):
        LabelStore("s3://cached/nothing/train", tmp_path)
    for url, message in (
        ("s3://", "names no store"),
        ("https://127.0.0.1/labels", "a web server lists nothing and keeps nothing"),
    ):
        with pytest.raises(StoreError, match=message):
            RemotePath(url).put(b"x", create=True)
    (RemotePath(stored) / "shard-00003-of-00012.h5").unlink()
    with pytest.raises(Exception, match="is incomplete: 1 of 12"):
        LabelStore(stored, tmp_path)
