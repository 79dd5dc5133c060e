"""Several processes on one split: readers, jobs, repair, and builders of its index."""

import os
import random
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.faults.processes import Job
from tests.faults.readers import Readers, content, rebuilt
from tests.faults.table import Observed, Rounds
from tests.jobs import arguments, digests, repeat_images, run
from tests.maps import Rows, attrs, write_split
from tokenlabel.cli import main
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.format.shard import shard_name, write_shard
from tokenlabel.dataset.store import LabelStore
from tokenlabel.inspection.verify.verify import verify

IMAGES, SHARDS, READERS = 32, 8, 8
OPTIONS = {"shard_size": 4, "batch_size": 4}
LAYOUT = MapLayout(("identity", "hflip"), (3, 5), 4, 1000, residual=6)
KEYS = [f"class/{number:03d}.jpg" for number in range(24)]


@pytest.fixture(scope="module")
def data(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repeat_images(sample, tmp_path_factory.mktemp("many"), IMAGES)


def race(data: Path, out: Path) -> dict[str, str]:
    """Start two jobs on one folder in the same instant; digests of what the winner wrote."""
    winner, loser = sorted((Job(data, out, **OPTIONS) for _ in range(2)), key=lambda j: j.wait())
    assert (winner.wait(), loser.wait()) == (0, 1), (winner.output, loser.output)
    message = " ".join(loser.output.split())
    assert f"another job is writing to {out / 'train'}: host {os.uname().nodename}, pid " in message
    assert f"pid {winner.process.pid}. Remedy: wait for it" in message
    assert verify(out / "train").ok
    return digests(out / "train")


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A finished split, made by the winner of a race."""
    out = tmp_path_factory.mktemp("done")
    return out / "train", race(data, out)


def test_of_two_jobs_started_at_once_one_works(
    data: Path,
    done: tuple[Path, dict[str, str]],
    tmp_path: Path,
    rounds: Rounds,
    observed: Observed,
) -> None:
    count = rounds(1, 4)
    for number in range(1, count):
        assert race(data, tmp_path / str(number)) == done[1]
    observed(
        "two jobs started on one folder in the same instant",
        count,
        "one works, the other names it and refuses",
        f"{count} winners, {count} refusals by host and pid, equal bytes",
    )


def total(seen: list[dict[str, Any]]) -> Counter[str]:
    """How often the readers were refused, by kind; they must have seen nothing wrong."""
    assert [wrong for reader in seen for wrong in reader["wrong"]] == []
    return sum((Counter(reader["refusals"]) for reader in seen), Counter())


def shown(refusals: Counter[str]) -> str:
    return ", ".join(f"{times:,} “{kind}”" for kind, times in sorted(refusals.items()))


def test_readers_while_a_job_extends_the_split(
    data: Path,
    done: tuple[Path, dict[str, str]],
    tmp_path: Path,
    rounds: Rounds,
    observed: Observed,
) -> None:
    """Begun by an earlier job, extended by this one; then run again, with nothing left to do."""
    count, whole, refusals = rounds(1, 3), 0, Counter[str]()
    finished, want = done
    for number in range(count):
        folder = tmp_path / str(number) / "train"
        readers = Readers(folder, data / "train", READERS, pause=0.5)
        folder.mkdir(parents=True)
        for name in ("manifest", *(shard_name(n, SHARDS) for n in range(0, SHARDS, 2))):
            shutil.copy(finished / name, folder / name)
        readers.wait_for_refusal()
        job = Job(data, folder.parent, **OPTIONS)
        while not (folder / ".lock.json").exists():
            assert job.running, job.output
            time.sleep(0.02)
        late = run(*arguments(data, folder.parent, **OPTIONS))
        words = " ".join(late.stderr.split())
        assert late.returncode == 1 and f"pid {job.process.pid}. Remedy" in words
        assert job.wait() == 0, job.output
        again = run(*arguments(data, folder.parent, **OPTIONS))
        assert again.returncode == 0, again.stderr
        seen = readers.stop()
        assert digests(folder) == want
        refusals += total(seen)
        whole += sum(reader["whole"] for reader in seen)
        assert {text for reader in seen for text in reader["contents"]} == {
            content(LabelStore(folder))
        }
        assert all(reader["whole"] for reader in seen)
    assert refusals["incomplete"] and refusals.keys() <= {"no folder", "no shards", "incomplete"}
    observed(
        f"{READERS} readers while a job extends the split, a second job, the job run again",
        count,
        "whole and right, or refused as incomplete",
        f"{whole:,} times whole, all equal; refused {shown(refusals)}",
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_an_index_that_several_processes_build_at_once(
    tmp_path: Path, processes: int, rounds: Rounds, observed: Observed
) -> None:
    count = rounds(5, 40)
    write_split(tmp_path, KEYS, LAYOUT)
    result = rebuilt(tmp_path, processes, count)
    assert total(result["readers"]) == {}
    assert (result["different"], result["left"]) == (0, [])
    whole = [reader["whole"] for reader in result["readers"]]
    assert whole == [3 * count] * processes
    assert {text for reader in result["readers"] for text in reader["contents"]} == {
        content(LabelStore(tmp_path))
    }
    observed(
        f"index gone, {processes} processes open the split at once, half of them rebuild it thrice",
        count,
        "all succeed, same bytes",
        f"{sum(whole):,} openings read all maps; {count - result['different']:,} indexes equal, "
        f"{len(result['left'])} temporary files left",
    )


def restore(root: Path, number: int, rows: Rows) -> None:
    """Write a shard again, as `annotate` does."""
    shards = len(KEYS) // 4
    keys = KEYS[4 * number : 4 * number + 4]
    path = root / shard_name(number, shards)
    with write_shard(path, LAYOUT, keys, [0, 1, 2, 3], attrs(number, shards, 4 * number)) as shard:
        shard.append(*rows)


def test_readers_while_a_split_is_damaged_repaired_and_completed(
    tmp_path: Path, rounds: Rounds, observed: Observed
) -> None:
    count, rng = rounds(4, 20), random.Random(5)
    written = write_split(tmp_path, KEYS, LAYOUT)
    want = content(LabelStore(tmp_path))
    whole = digests(tmp_path)
    readers = Readers(tmp_path, None, READERS, pause=0.1)
    for _ in range(count):
        number = rng.randrange(len(written))
        path = tmp_path / shard_name(number, len(written))
        damaged = bytearray(path.read_bytes())
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        command = ["inspect-labels", str(tmp_path), "--repair", "--yes", "--workers", "1"]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1 and path.name in result.output, result.output
        assert not path.exists()
        readers.wait_for_refusal()
        restore(tmp_path, number, written[number])
    seen = readers.stop()
    refusals = total(seen)
    assert {text for reader in seen for text in reader["contents"]} == {want}, "never a wrong value"
    assert refusals["incomplete"] > 0
    assert digests(tmp_path) == whole
    observed(
        f"{READERS} readers while a bit of a shard flips, --repair deletes it, it is redone",
        count,
        "right values, or an error with remedy",
        f"{sum(reader['whole'] for reader in seen):,} times whole, all equal; refused "
        + shown(refusals),
    )


def test_a_read_only_file_system(tmp_path: Path, observed: Observed) -> None:
    root = tmp_path / "mount"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(root)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs a file system of its own: root and mount")
    try:
        write_split(root, KEYS, LAYOUT)
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        seen = Readers(root, None, READERS, pause=0.1).stop()
        assert total(seen) == {}
        assert {text for reader in seen for text in reader["contents"]} == {
            content(LabelStore(root))
        }
        assert not (root / "index").exists()
    finally:
        subprocess.run(["umount", str(root)], check=True)
    observed(
        f"{READERS} readers of a split without index on a read-only file system",
        1,
        "index in memory",
        f"{sum(reader['whole'] for reader in seen):,} times whole, all equal, no index written",
    )
