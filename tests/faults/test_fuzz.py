"""Mutated shards, indexes and manifests: an error that says so, whatever is in the file."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.faults.fuzz import MEMORY
from tests.faults.table import Observed, Rounds

_QUICK, _LONG = 100_000, 10_000_000
#: Seconds of the long form, which reads as many files as it can.
_SECONDS = 700


def fuzz(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.faults.fuzz", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where the system has one."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_mutated_files_end_in_an_error_or_in_what_was_written(
    in_memory: Path,
    tmp_path: Path,
    soak: bool,
    rounds: Rounds,
    observed: Observed,
) -> None:
    # The same files in every quick run, others in the long one.
    options = ["--cases", str(rounds(_QUICK, _LONG)), "--start", str(int(soak))]
    result = fuzz(in_memory, *options, *(["--seconds", str(_SECONDS)] if soak else []))
    found = in_memory / "found"
    if found.is_dir():  # kept for whoever looks into it
        shutil.copytree(found, tmp_path / "found")
    verdicts = result["verdicts"]
    bad = {name: verdicts[name] for name in ("wrong", "crash", "hang", "memory")}
    assert not any(bad.values()) and not result["broken"], (bad, result["found"], result["broken"])
    assert result["files"] >= _QUICK if not soak else result["files"] > _QUICK
    assert result["peak"] < MEMORY
    assert verdicts["equal"] and verdicts["refused"] and verdicts["changed"]
    repaired = sum(sum(result["mutations"][m].values()) for m in ("text", "forged", "values"))
    observed(
        "mutated files: "
        + ", ".join(f"{count:,} {kind}" for kind, count in result["kinds"].items())
        + f"; {repaired:,} of them with the checksums made right again",
        result["files"],
        "FormatError or OSError, or what was written; no crash, hang, or memory beyond "
        f"{MEMORY >> 20} MB",
        f"{verdicts['refused']:,} refused, {verdicts['equal']:,} read as written, "
        f"{verdicts['changed']:,} forged and read; 0 crashes, 0 hangs, "
        f"{result['peak'] / (1 << 20):.0f} MB at most",
    )


def test_a_case_is_the_same_each_time(tmp_path: Path) -> None:
    """What is found can be reproduced from its number."""
    from tests.faults.fuzz import MUTATIONS, Fuzzer
    from tests.faults.targets import make_seeds

    fuzzer = Fuzzer(make_seeds(tmp_path / "seeds"), 3)
    cases = [fuzzer.case(number) for number in range(300)]
    assert {case.mutation for case in cases} == set(MUTATIONS)
    assert sum(case.data != case.seed.data for case in cases) > 250, "few changes change nothing"
    again = Fuzzer(make_seeds(tmp_path / "seeds"), 3)
    assert [again.case(number).data for number in range(300)] == [case.data for case in cases]
