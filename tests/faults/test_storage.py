"""Real jobs on storage that fills up, fails, slows down or goes away; then a run without the fault.

Faults of single calls come from shim.c, which Ray's processes inherit by LD_PRELOAD and which acts
on the data set and the labels only.
"""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.processes import ACTOR, Job, leftovers
from tests.faults.readers import content
from tests.faults.table import Observed, Rounds
from tests.jobs import arguments, digests, repeat_images, run
from tokenlabel.dataset.store import LabelStore

IMAGES = 80  # ten shards of eight
#: Counts of calls: for ever; and beyond those that look at the first images before the job.
EVER, LATER = 1 << 40, 40
SLOW = f"read *.jpg sleep:30 0 {EVER}"


class Shim:
    """Runs commands under shim.c; `hits` tells how often each rule of the last one struck."""

    def __init__(self, library: Path) -> None:
        self._library = library
        self.state = library.with_name("state")
        self._rules: Sequence[str] = ()

    def variables(self, rules: Sequence[str], clock: float = 0) -> dict[str, str]:
        self._rules = rules
        self.state.write_bytes(bytes(4096))
        return {
            "LD_PRELOAD": str(self._library),
            "FAULTS": "\n".join(rules),
            "FAULTS_STATE": str(self.state),
            "FAULTS_CLOCK": str(clock),
        }

    def hits(self) -> list[int]:
        """Calls that met the fault, a rule."""
        counts = struct.unpack(
            f"{2 * len(self._rules)}Q", self.state.read_bytes()[: 16 * len(self._rules)]
        )
        return list(counts[1::2])


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and LD_PRELOAD to make calls fail")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return Shim(library)


@pytest.fixture(scope="module")
def data(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repeat_images(sample, tmp_path_factory.mktemp("data"), IMAGES)


@pytest.fixture(scope="module")
def labels(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a job makes when nothing is wrong."""
    out = tmp_path_factory.mktemp("labels")
    done = run(*arguments(data, out))
    assert done.returncode == 0, done.stderr
    return out / "train"


class Fault(NamedTuple):
    """What goes wrong during a job, and what the job must say of it.

    Attributes:
        name: for the table.
        says: texts that its output must hold.
        rules: of the shim.
        act: done when the run has finished its first shard, and undone after the run; gets the
            data set and the folder of the shards.
        tidy: whether the job can still delete its temporary file and its lock.
    """

    name: str
    says: tuple[str, ...]
    rules: tuple[str, ...] = ()
    act: Callable[[Path, Path], AbstractContextManager[None]] | None = None
    tidy: bool = True


def suffer(fault: Fault, shim: Shim, data: Path, out: Path, labels: Path) -> str:
    """Run a job that meets the fault; what it did, after checks that hold for all faults."""
    folder = out / "train"
    before = set(shards(folder))
    rules = (*fault.rules, SLOW) if fault.act else fault.rules
    with Job(data, out, shim.variables(rules)) as job, ExitStack() as stack:
        if fault.act:
            job.wait_for_shard()
            teachers = job.find(ACTOR)
            for teacher in teachers:
                teacher.suspend()  # or a busy machine might finish the job before the fault
            stack.enter_context(fault.act(data / "train", folder))
            for teacher in teachers:
                teacher.resume()
        status, words = job.wait(), " ".join(job.output.split())
        assert status == 1, (fault.name, words)
        assert all(shim.hits()), (fault.name, "did not strike", shim.hits())
        for text in fault.says:
            assert text in words, (fault.name, text, words)
        assert "Traceback" not in words, (fault.name, words)
    whole = digests(labels)
    found = shards(folder)
    for name in found:
        assert digests(folder)[name] == whole[name], (fault.name, name)
    if fault.tidy and folder.exists():
        assert not leftovers(folder), fault.name
    return f"{fault.name}: {len(found) - len(before)} shards more"


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard-*.h5"))


def finish(data: Path, out: Path, labels: Path, so_far: str) -> None:
    """Run without a fault: the folder is then as if there had been none."""
    done = run(*arguments(data, out))
    assert done.returncode == 0, (so_far, done.stdout, done.stderr)
    assert digests(out / "train") == digests(labels), so_far


@contextmanager
def images_gone(data: Path, _: Path) -> Iterator[None]:
    """What an unmounted file system leaves: the folder, with nothing in it."""
    away = data.with_name("away")
    data.rename(away)
    data.mkdir()
    try:
        yield
    finally:
        data.rmdir()
        away.rename(data)


FULL = ("cannot write: the disk is full", "Remedy: free space", "Finished shards are kept")
LOST = ("That is the storage's fault", "Remedy: fix the disk", "Some shards failed")
FAILED = ("Some shards failed. Run the same command again",)
BROKEN = ("storage failed: ", "Remedy: fix the disk or the mount")
#: Each list goes through one folder, which is then finished; `make test-faults` tries the first.
STAYING = [
    [
        Fault("EIO at one image", LOST, (f"read */00017.jpg {errno.EIO} 0 {EVER}",)),
        Fault("ENOSPC at index", FULL, (f"write */.index* {errno.ENOSPC} 0 {EVER}",)),
    ],
    [
        Fault(
            "ENOSPC at lock",
            ("cannot write to the output folder", "Remedy: choose another"),
            (f"fsync */..lock.json.* {errno.ENOSPC} 0 {EVER}",),
        ),
        Fault("EIO at manifest's fsync", BROKEN, (f"fsync *manifest* {errno.EIO} 0 {EVER}",)),
        Fault("ENOSPC at fsync", FULL, (f"fsync */.shard-* {errno.ENOSPC} 2 {EVER}",)),
        Fault(
            "EDQUOT at write",
            ("the quota is used up",),
            (f"write */.shard-* {errno.EDQUOT} 99 {EVER}",),
        ),
        Fault("images unmounted", LOST, act=images_gone),
        Fault(
            "EIO at all images after some", LOST, (f"read *.jpg {errno.EIO} {LATER + 20} {EVER}",)
        ),
        Fault("ESTALE at index's rename", BROKEN, (f"rename */index {errno.ESTALE} 0 {EVER}",)),
    ],
    [
        Fault(
            "EIO at first images",
            ("no teacher could be started", "Remedy: fix the disk"),
            (f"read *.jpg {errno.EIO} 0 {EVER}",),
        ),
        Fault("ESTALE at rename", FAILED, (f"rename */shard-00002* {errno.ESTALE} 0 {EVER}",)),
        Fault("EXDEV at rename", FAILED, (f"rename */shard-00002* {errno.EXDEV} 0 {EVER}",)),
        Fault("EIO at rename", FAILED, (f"rename */shard-00002* {errno.EIO} 0 {EVER}",)),
        Fault("EIO at fsync", FAILED, (f"fsync */.shard-00002* {errno.EIO} 0 {EVER}",)),
        Fault("EIO at write", FAILED, (f"write */.shard-00002* {errno.EIO} 30 {EVER}",)),
        Fault("EIO at report", BROKEN, (f"write */.report* {errno.EIO} 0 {EVER}",)),
    ],
]


def test_faults_that_stay_are_reported_and_a_run_without_completes_the_split(
    data: Path, labels: Path, shim: Shim, tmp_path: Path, soak: bool, observed: Observed
) -> None:
    for number, faults in enumerate(STAYING if soak else STAYING[:1]):
        seen = ""
        out = tmp_path / str(number)
        for fault in faults:
            seen += suffer(fault, shim, data, out, labels) + "; "
        finish(data, out, labels, seen)
        observed(
            "storage fails: " + "; ".join(fault.name for fault in faults),
            len(faults),
            "reported, exit 1, no temporary files; equal bytes after a run without it",
            seen + "then equal bytes",
        )


#: What a job gets over by itself. Where the n-th call fails, n is the fourth number.
PASSING = {
    "EIO at rename": [f"rename */shard-*.h5 {errno.EIO} 1 1"],
    "EIO at fsync": [f"fsync */.shard-* {errno.EIO} 3 1"],
    "EIO at folder's fsync": [f"fsync */train {errno.EIO} 6 1"],
    "EIO at write": [f"write */.shard-* {errno.EIO} 200 1"],
    "EIO at image": [f"read *.jpg {errno.EIO} {LATER} 1"],
    "ESTALE at image": [f"open *.jpg {errno.ESTALE} {LATER} 1"],
    "ESTALE at rename": [f"rename */shard-*.h5 {errno.ESTALE} 4 1"],
    "EXDEV at rename": [f"rename */shard-*.h5 {errno.EXDEV} 8 1"],
    "short reads and writes": [f"write */train/* short 0 {EVER}", f"read */train/* short 0 {EVER}"],
    "slow disk": [
        "read */train/* sleep:10 0 200",
        "write */train/* sleep:20 0 100",
        "fsync */train* sleep:50 0 20",
    ],
}


def test_faults_that_pass_change_nothing(
    data: Path, labels: Path, shim: Shim, tmp_path: Path, soak: bool, observed: Observed
) -> None:
    together = [rule for rules in PASSING.values() for rule in rules]
    tries = {"all of these at once": together} | (PASSING if soak else {})
    for number, (name, rules) in enumerate(tries.items()):
        out = tmp_path / str(number)
        done = run(*arguments(data, out), variables=shim.variables(rules))
        assert done.returncode == 0, (name, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert all(shim.hits()), (name, shim.hits())
        assert digests(out / "train") == digests(labels), name
    observed(
        f"storage fails once, is slow or does half: {'; '.join(PASSING)}",
        len(tries),
        "exit 0, equal bytes",
        f"{len(tries)} of {len(tries)} jobs ended well with equal bytes",
    )


@contextmanager
def full(_: Path, folder: Path) -> Iterator[None]:
    """Somebody else fills the disk."""
    filler = folder.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            for size in (1 << 16, 1 << 12, 1 << 8):
                while True:
                    file.write(bytes(size))
                    os.fsync(file.fileno())
        except OSError as error:
            assert error.errno == errno.ENOSPC
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def aborted(_: Path, folder: Path) -> Iterator[None]:
    """The kernel meets a fault of ext4 and makes it read-only, open files and all."""
    mount = folder.parent
    subprocess.run(["mount", "-o", "remount,abort", mount], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", mount], check=True)
        mount_image(mount)


@contextmanager
def immutable(_: Path, folder: Path) -> Iterator[None]:
    """Nobody, not even root, may make, rename or delete a file here any more."""
    subprocess.run(["chattr", "+i", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)


def mount_image(mount: Path, *options: str) -> None:
    image = mount.with_name("disk.img")
    flags = ",".join(("loop", "errors=remount-ro", *options))
    subprocess.run(["mount", "-o", flags, image, mount], check=True, capture_output=True)


DENIED = ("cannot write: permission was denied", "Remedy: free space or fix the permissions")
READ_ONLY = (
    "cannot write: the file system is read-only",
    "Remedy: free space or fix the permissions",
)
REAL = [
    Fault("disk full", FULL, act=full),
    Fault("permission lost", DENIED, act=immutable, tidy=False),
    Fault("read-only after a fault of ext4", READ_ONLY, act=aborted, tidy=False),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of its own."""
    if os.geteuid() or not all(map(shutil.which, ("mkfs.ext4", "mount", "chattr"))):
        pytest.skip("needs root, mkfs.ext4 and chattr")
    mount, image = tmp_path / "disk", tmp_path / "disk.img"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    # No blocks kept back for root, or only others would find the disk full.
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    try:
        mount_image(mount)
    except subprocess.CalledProcessError:
        pytest.skip("needs a loop device")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_disk_that_turns_bad_during_a_job(
    data: Path,
    labels: Path,
    shim: Shim,
    disk: Path,
    soak: bool,
    rounds: Rounds,
    observed: Observed,
) -> None:
    faults = REAL if soak else REAL[:1]
    tries, seen = rounds(1, 2), ""
    for _ in range(tries):
        shutil.rmtree(disk / "train", ignore_errors=True)
        seen = ""
        for fault in faults:
            seen += suffer(fault, shim, data, disk, labels) + "; "
        finish(data, disk, labels, seen)
    (disk / "train" / "index").unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert content(LabelStore(disk / "train")) == content(LabelStore(labels))
    refused = run(*arguments(data, disk))
    assert refused.returncode == 1
    assert "cannot write to the output folder" in refused.stderr
    assert "Traceback" not in refused.stderr
    observed(
        "real disk (ext4): " + "; ".join(fault.name for fault in faults),
        tries * len(faults),
        "reported, exit 1; equal bytes after a run without it; readable when read-only",
        f"last round: {seen}then equal bytes, all {IMAGES} maps read when mounted read-only",
    )


def test_clocks_that_jump_a_day(
    data: Path,
    labels: Path,
    shim: Shim,
    tmp_path: Path,
    rounds: Rounds,
    observed: Observed,
) -> None:
    """Every second by a day, forwards and backwards, for all processes of the job.

    Ray's too: one job in eight was seen to hang. Then it is stopped and run again.
    """
    tries, reports, hung = rounds(1, 3), [], 0
    for number in range(tries):
        out = tmp_path / str(number)
        rules, jumping = [f"read *.jpg sleep:20 0 {EVER}"], 1.0
        for clock in (jumping, 0.0):
            try:
                variables = shim.variables(rules, clock)
                done = run(*arguments(data, out), variables=variables, timeout=400)
                break
            except subprocess.TimeoutExpired:
                assert clock, "it hangs without jumps, too"
                hung += 1
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert digests(out / "train") == digests(labels)
        reports.append(json.loads((out / "train" / "report.json").read_text()))
        assert 0 < reports[-1]["seconds"] < 1000
        assert 0 < reports[-1]["images_per_second"] < 10_000
        assert 0 < reports[-1]["busy"] <= 1
    observed(
        "the clock jumps by a day, back and forth",
        tries,
        "exit 0, equal bytes, no negative time in the report",
        f"equal bytes; {min(report['seconds'] for report in reports):.0f} to "
        f"{max(report['seconds'] for report in reports):.0f} s by the reports; {hung} hung and "
        "run again",
    )


def test_readers_of_failing_storage_get_the_right_map_or_the_file_s_name(
    labels: Path, shim: Shim, tmp_path: Path, soak: bool, observed: Observed
) -> None:
    """One call to read fails, each in turn: of the index, then of a shard; then all do half."""
    folder = Path(shutil.copytree(labels, tmp_path / "train"))
    rules = [
        f"read */index {errno.EIO} 0 1",
        f"read */shard-00001-* {errno.EIO} 0 1",
        f"read */train/* short 0 {EVER}",
    ]
    command = [sys.executable, "-m", "tests.faults.failing_reader", folder, labels, shim.state]
    step = "1" if soak else "7"
    done = run(*map(str, command), step, variables=shim.variables(rules))
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["index"] and seen["shard"] and seen["named"] and seen["short"]
    assert digests(folder) == digests(labels), "readers change nothing but the index"
    observed(
        "EIO at the n-th read of the index or a shard; reads that give half",
        seen["index"] + seen["shard"],
        "the right map, or an error that names the file",
        f"{seen['maps']:,} maps right, none wrong, {seen['named']} errors that name the file; "
        f"{seen['short']:,} short reads completed",
    )


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_labels_are_written_and_verified_where_no_file_can_be_locked(
    shim: Shim, sample: Path, tmp_path: Path, number: int
) -> None:
    """NFS without its lock daemon, Lustre mounted without `flock`."""
    rules = [f"flock */labels/* {number} 0 {EVER}"]
    command = arguments(sample, tmp_path / "labels")
    (tmp_path / "labels").mkdir()
    plain = f"import h5py; h5py.File({str(tmp_path / 'labels' / 'plain.h5')!r}, 'w')"
    refused = run(sys.executable, "-c", plain, variables=shim.variables(rules))
    assert "unable to lock file" in refused.stderr, "as HDF5 does unless it is told not to"
    for said in ("2 new, 0 kept", "0 new, 2 kept"):
        done = run(*command, variables=shim.variables(rules))
        assert done.returncode == 0 and said in " ".join(done.stdout.split()), done.stderr
        assert shim.hits()[0] > 0
    verify = [sys.executable, "-m", "tokenlabel.cli", "inspect-labels", "--verify"]
    done = run(*verify, str(tmp_path / "labels"), variables=shim.variables(rules))
    assert done.returncode == 0, done.stdout + done.stderr
