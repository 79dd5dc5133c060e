"""Jobs that read from a real S3 server and write to it, through faults of all kinds."""

import hashlib
import itertools
import json
import random
import shutil
import signal
import socket
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.faults.processes import OPTIONS, Job
from tests.jobs import arguments, run
from tests.s3 import HANG, Proxy, s3_proxy
from tokenlabel.dataset import LabelStore, TokenLabelDataset
from tokenlabel.dataset.format import lock
from tokenlabel.dataset.format.lock import check_holder, folder_lock
from tokenlabel.dataset.storage.remote_path import RemotePath
from tokenlabel.errors import LockedError

#: A job that fails must have said so by then.
LIMIT = 60
_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with s3_proxy(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        RemotePath("s3://bucket/there").put(b"")  # this server makes the bucket then
        yield server


@pytest.fixture(autouse=True)
def _no_faults(proxy: Proxy) -> Iterator[None]:
    yield
    proxy.fault = None


@pytest.fixture(scope="module")
def tars(many_images: Path, proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The images of `many_images` in three tars on the server."""
    classes = sorted(path.name for path in (many_images / "train").iterdir())
    for number in range(3):
        path = tmp_path_factory.mktemp("tars") / "t.tar"
        with tarfile.open(path, "w") as tar:
            for name in classes[number::3]:
                tar.add(many_images / "train" / name, name)
        RemotePath(f"s3://bucket/images/images-train-{number}.tar").put(path)
    return "s3://bucket/images"


@pytest.fixture(scope="module")
def of_tars(tars: str, proxy: Proxy) -> dict[str, str]:
    """Objects of a job over the tars that nothing disturbs."""
    out = fresh()
    done = run(*arguments(tars, out, **OPTIONS))
    assert done.returncode == 0, done.stderr
    return objects(out)


def fresh() -> str:
    """A prefix that nobody has used."""
    return f"s3://bucket/out-{next(_NUMBERS)}"


def objects(out: str) -> dict[str, str]:
    """sha256 of the objects that must be equal from run to run."""
    return {
        name: hashlib.sha256((RemotePath(out) / "train" / name).read_bytes()).hexdigest()
        for name in RemotePath(f"{out}/train").objects()
        if name != "report.json"
    }


def shards(out: str) -> list[str]:
    return [name for name in RemotePath(f"{out}/train").objects() if name.startswith("shard-")]


def wait_for_shard(job: Job, out: str, count: int = 1) -> None:
    end = time.monotonic() + 240
    while len(shards(out)) < count:
        assert job.running and time.monotonic() < end, job.output
        time.sleep(0.05)


def test_objects_are_the_files_of_a_local_job(
    many_images: Path, undisturbed: dict[str, str], proxy: Proxy, tmp_path: Path
) -> None:
    out = fresh()
    command = arguments(many_images, out, **OPTIONS)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert objects(out) == undisturbed, "not even a lock is left"
    assert json.loads((RemotePath(out) / "train/report.json").read_bytes())["ok"]
    puts: list[str] = []
    proxy.fault = lambda method, path: puts.append(path) if method == "PUT" else None
    assert run(*command).returncode == 0
    names = {path.rpartition("/")[2].partition("?")[0] for path in puts}
    assert not [name for name in names if name.startswith(("shard", "index"))], names
    (RemotePath(out) / "train" / shards(out)[3]).unlink()
    puts.clear()
    assert run(*command).returncode == 0
    assert len([path for path in puts if "/shard-" in path]) == 1
    assert objects(out) == undisturbed
    store = LabelStore(f"{out}/train", tmp_path)
    assert len(store) == 300 and not store.failed.any() and store[7].codes.size
    records = {
        labels.as_subclass(torch.Tensor).numpy().tobytes()
        for where in (store, LabelStore(f"{out}/train", None))
        for _, labels in TokenLabelDataset(many_images / "train", where).__getitems__([9, 250])
    }
    assert len(records) == 2, "the same two, whichever way they came"
    shown = run(*command[:2], "tokenlabel.cli", "inspect-labels", out)
    assert shown.returncode == 0 and "300" in shown.stdout, shown.stderr


def test_images_of_a_prefix_give_the_same_shards(
    many_images: Path, undisturbed: dict[str, str], proxy: Proxy
) -> None:
    data = fresh()
    for path in (many_images / "train").rglob("*.*"):
        (RemotePath(f"{data}/train") / path.relative_to(many_images / "train").as_posix()).put(path)
    out = fresh()
    done = run(*arguments(data, out, **OPTIONS))
    assert done.returncode == 0, done.stderr
    found = objects(out)
    for name in shards(out):
        assert found[name] == undisturbed[name]


def test_a_quarter_of_all_requests_fails(
    tars: str, of_tars: dict[str, str], proxy: Proxy, soak: bool
) -> None:
    chance, out = random.Random(0), fresh()
    kinds = ["500", "503", "reset", "cut"] * 5 + ["hang"] * soak
    seen: list[str] = []

    def fault(_: str, __: str) -> str | None:
        if chance.random() < 0.75:
            return None
        seen.append(chance.choice(kinds))
        return seen[-1]

    proxy.fault = fault
    done = run(*arguments(tars, out, **OPTIONS))
    proxy.fault = None
    assert done.returncode == 0, done.stderr
    assert objects(out) == of_tars
    assert set(seen) == set(kinds), f"hangs take {HANG} s each, so that only the long form has some"


REFUSALS = {"403": "ExpiredToken", "404": "NoSuchBucket", "503": "SlowDown"}


def test_a_store_that_goes_on_refusing_ends_the_job(
    tars: str, of_tars: dict[str, str], proxy: Proxy, soak: bool
) -> None:
    """The images' requests, or those of the labels."""
    quick = [("images", "403"), ("labels", "503")]
    for what, status in itertools.product(("images", "labels"), REFUSALS) if soak else quick:
        refuse(tars, of_tars, proxy, what, status)


def refuse(tars: str, of_tars: dict[str, str], proxy: Proxy, what: str, status: str) -> None:
    out = fresh()
    begun: list[float] = []

    def fault(method: str, path: str) -> str | None:
        if begun and (what == "labels") == (out[5:] in path):
            return status
        return None

    proxy.fault = fault
    with Job(tars, out, **OPTIONS) as job:
        wait_for_shard(job, out, 2)
        begun.append(time.monotonic())
        assert job.wait() == 1, job.output
    seconds = time.monotonic() - begun[0]
    proxy.fault = None
    assert seconds < LIMIT, job.output
    assert (
        REFUSALS[status] in job.output and "Remedy:" in job.output and "Traceback" not in job.output
    )
    for name in shards(out):
        assert objects(out)[name] == of_tars[name], "finished shards are whole, without errors"
    assert len(shards(out)) < len([name for name in of_tars if name.startswith("shard-")])
    again = run(*arguments(tars, out, **OPTIONS))
    assert again.returncode == 0, again.stderr
    assert objects(out) == of_tars


def test_a_killed_job_and_its_re_run_leave_the_same_objects(
    many_images: Path, undisturbed: dict[str, str], proxy: Proxy, rounds: Callable[[int, int], int]
) -> None:
    chance = random.Random(1)
    for _ in range(rounds(1, 20)):
        out = fresh()
        with Job(many_images, out, **OPTIONS) as job:
            wait_for_shard(job, out, chance.randint(1, 6))
            time.sleep(chance.random() / 3)
            job.process.kill()
            assert job.wait() == -signal.SIGKILL
        for name, digest in objects(out).items():
            if name.startswith("shard-"):
                assert digest == undisturbed[name], "no partial object"
        done = run(*arguments(many_images, out, **OPTIONS))
        assert done.returncode == 0, done.stderr
        assert objects(out) == undisturbed


def test_of_two_jobs_one_writes(
    many_images: Path, undisturbed: dict[str, str], proxy: Proxy
) -> None:
    out, puts = fresh(), list[str]()
    proxy.fault = lambda method, path: puts.append(path) if method == "PUT" else None
    with Job(many_images, out, **OPTIONS) as one, Job(many_images, out, **OPTIONS) as two:
        assert sorted((one.wait(), two.wait())) == [0, 1], one.output + two.output
    won, lost = sorted((one, two), key=lambda job: job.wait())
    text = " ".join(lost.output.split())
    assert f"another job is writing to {out}/train: host {socket.gethostname()}" in text
    assert f"pid {won.process.pid}, which renewed its lock" in text
    written = [path.rpartition("/")[2] for path in puts if "/shard-" in path]
    assert len(written) == len(set(written)), "no shard twice"
    assert objects(out) == undisturbed


def test_a_lock_is_renewed_kept_and_taken_over(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "RENEWED", 0.5)
    monkeypatch.setattr(lock, "STALE", 4.0)
    folder = RemotePath(fresh())
    with folder_lock(folder) as run_id:
        time.sleep(6)
        with pytest.raises(LockedError, match=r"host .*, pid \d+, which renewed its lock"):
            folder_lock(folder).__enter__()
        check_holder(folder, run_id)
    assert not folder.objects()
    # Renewals that are stored although their answers are lost are the job's own.
    lost = iter([None, "late", None])
    proxy.fault = lambda method, path: next(lost, "late") if method == "PUT" else None
    with folder_lock(folder) as run_id:
        time.sleep(6)
        proxy.fault = None
        time.sleep(2)
        check_holder(folder, run_id)
        with pytest.raises(LockedError, match=r"renewed its lock [0-3] seconds ago"):
            folder_lock(folder).__enter__()
    # A job on another machine, which has been killed.
    owner = {"host": "elsewhere", "pid": 1, "run": "x"}
    (folder / lock.HOLDER).put(json.dumps(owner).encode())
    with pytest.raises(LockedError, match=r"host elsewhere, pid 1.*taken over in [1-4] seconds"):
        folder_lock(folder).__enter__()
    time.sleep(6)
    with folder_lock(folder) as run_id:
        (folder / lock.HOLDER).put(json.dumps(owner).encode())  # it was asleep
        with pytest.raises(LockedError, match="belongs to another job now"):
            check_holder(folder, run_id)
    assert json.loads((folder / lock.HOLDER).read_bytes()) == owner, "the other's is left alone"


def test_names_of_a_store_that_are_wrong(many_images: Path, proxy: Proxy) -> None:
    begin = time.monotonic()
    wrong = {"AWS_SECRET_ACCESS_KEY": "wrong"}
    for data, out in ((str(many_images), fresh()), ("s3://bucket/images", "unused")):
        done = run(*arguments(data, out, **OPTIONS), variables=wrong)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "SignatureDoesNotMatch" in done.stderr and "check the credentials" in done.stderr
    assert time.monotonic() - begin < LIMIT
    with suppress(FileNotFoundError):
        shutil.rmtree("unused")
