"""Mutated shards, indexes and manifests, and the processes that read them.

`python -m tests.faults.fuzz --help`. Each case is a number: what is in its file, and how it is
read, follow from that number and the seed alone, so that whatever is found can be reproduced.
"""

import argparse
import copy
import faulthandler
import json
import multiprocessing
import random
import resource
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.faults.attacks import parsed, with_directory, with_text
from tests.faults.targets import KINDS, VERDICTS, Seed, Wrong, make_seeds, read

_FORK = multiprocessing.get_context("fork")
#: Bytes that a process may take for a hostile file of some kilobytes, beyond what it has.
MEMORY = 128 << 20
#: Seconds of computing time after which a file hangs its reader, and of waiting.
HANG, STALL = 10, 600
OUTCOMES = (*VERDICTS, "wrong", "crash", "hang", "memory")
_NUMBERS = (0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
_LONG = (*_NUMBERS, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)


def _bytes(rng: random.Random, data: bytearray, first: int, last: int) -> None:
    """A bit that flips, or another byte."""
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(first, last)
        flipped = data[place] ^ 1 << rng.randrange(8)
        data[place] = rng.choice((flipped, flipped, 0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _run(rng: random.Random, data: bytearray, first: int, last: int) -> None:
    start = rng.randrange(first, last)
    size = min(rng.choice((2, 4, 8, 16, 64, 512)), last - start)
    fill = rng.choice((b"\0", b"\xff", b"\x41", None))
    data[start : start + size] = rng.randbytes(size) if fill is None else fill * size


def _splice(rng: random.Random, data: bytearray, first: int, last: int) -> None:
    """Copy a part over another one."""
    size = rng.randrange(1, min(last - first, 512) + 1)
    start, to = rng.randrange(len(data) - size + 1), rng.randrange(first, last - size + 1)
    data[to : to + size] = data[start : start + size]


def _number(rng: random.Random, data: bytearray, first: int, last: int) -> None:
    """A length, an offset or a count that cannot be."""
    width = rng.choice((1, 2, 4, 8))
    if last - first < width:
        return
    place = rng.randrange(first, last - width + 1)
    old = int.from_bytes(data[place : place + width], "little")
    near = (old + 1, old - 1, old * 2, old + len(data), len(data), len(data) - place, place)
    value = rng.choice((*_LONG, *near)) % (1 << 8 * width)
    data[place : place + width] = value.to_bytes(width, "little")


_CHANGES: dict[str, Callable[[random.Random, bytearray, int, int], None]] = {
    "bytes": _bytes,
    "run": _run,
    "splice": _splice,
    "number": _number,
}
#: How a file is changed. Of the last three the checksums are made right again, so that the change
#: reaches the code behind them: the directory's text, what it says, and the values behind it.
MUTATIONS = (*_CHANGES, "cut", "text", "forged", "values")
_WEIGHTS = (5, 2, 2, 4, 1, 5, 12, 5)
_VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 255, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**40, 0.25, -0.5, 1e308),
    *(float("nan"), float("inf"), True, False, None, "", "|u1", "|S1", "|S999999", "<u8", "<f8"),
    *("identity", "f" * 64, [], {}, [0], [[]], [-1], [3], [3, 2], [1 << 40], {"": 1}),
)


def _forged(rng: random.Random, data: bytes) -> bytes:
    """The file with some other values in its directory."""
    found: Any = parsed(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = found
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = rng.choice(keys)
            inner = place[key]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.9:
                place = inner
                continue
            if rng.random() < 0.1:
                del place[key]
            elif type(inner) is int and rng.random() < 0.6:
                near = (inner + 1, inner - 1, 2 * inner, inner + 8, -inner, inner + len(data))
                place[key] = rng.choice(near)
            elif rng.random() < 0.3:
                place[key] = place[rng.choice(keys)]
            else:
                place[key] = copy.deepcopy(rng.choice(_VALUES))
            break
    return with_directory(data, found)


def _text(rng: random.Random, data: bytes) -> bytes:
    """The file with some other bytes in its directory."""
    text = bytearray(json.dumps(parsed(data)).encode())
    for _ in range(rng.choice((1, 1, 2, 4))):
        change = rng.choice((_bytes, _run, _splice))
        change(rng, text, 0, len(text))
    if rng.random() < 0.1:
        del text[rng.randrange(len(text)) :]
    return with_text(data, bytes(text))


def _forged_values(rng: random.Random, data: bytearray) -> bytes:
    """The file with other values in its columns, or with streams that inflate to another size."""
    found = parsed(bytes(data))
    columns, maps = list(found["columns"].values()), found.get("maps")
    if maps and rng.random() < 0.4:
        place, most = maps["offset"], maps["offset"] + maps["size"]
        starts = [at for at in range(place, most) if data[at : at + 2] == b"\x78\x5e"]
        place, limit = rng.choice(starts), 400
    else:
        column = rng.choice(columns)
        place, limit = column["offset"], max(column["size"], 1)
    if rng.random() < 0.5:
        packed = zlib.compress(bytes(rng.choice((0, 1, 11, 12, 13, 24, 200, 1 << 20))))
        data[place : place + len(packed)] = packed
    else:
        change = rng.choice((_bytes, _run, _number, _splice))
        change(rng, data, place, min(place + limit, len(data)))
    del data[found["size"] :]
    for column in columns:
        column["crc"] = zlib.crc32(data[column["offset"] : column["offset"] + column["size"]])
    found["crc"] = zlib.crc32(data[found["block"] :])
    return with_directory(bytes(data), found)


class Case(NamedTuple):
    """One mutated file."""

    seed: Seed
    mutation: str
    data: bytes


class Fuzzer:
    """Makes cases from their numbers."""

    def __init__(self, seeds: list[Seed], start: int) -> None:
        self._seeds, self._start = seeds, start
        self._weights = [seed.weight for seed in seeds]

    def case(self, number: int) -> Case:
        """Case `number`, always the same."""
        rng = random.Random(self._start << 40 | number)
        seed = rng.choices(self._seeds, self._weights)[0]
        mutation = rng.choices(MUTATIONS, _WEIGHTS)[0]
        data = bytearray(seed.data)
        if mutation == "cut":
            place = rng.randrange(len(data))
            del data[place:]
            more = rng.randrange(4096)
            data += rng.choice((b"", bytes(more), seed.data[:more]))
        elif mutation == "text":
            data = bytearray(_text(rng, seed.data))
        elif mutation == "forged":
            data = bytearray(_forged(rng, seed.data))
        elif mutation == "values":
            data = bytearray(_forged_values(rng, data) if seed.truth else _text(rng, seed.data))
        else:
            _CHANGES[mutation](rng, data, 0, len(data))
        return Case(seed, mutation, bytes(data))


def _work(
    fuzzer: Fuzzer, folder: Path, first: int, last: int, step: int, tally: np.ndarray
) -> None:
    """Read cases `first`, `first + step` … in this process, one file after the other."""
    faulthandler.disable()
    limit = _mapped() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts
    before = _peak()
    for number in range(first, last, step):
        tally["at"] = number
        case = fuzzer.case(number)
        signal.setitimer(signal.ITIMER_PROF, HANG)
        try:
            verdict = read(case.seed, folder, case.data, case.mutation)
        except (Wrong, MemoryError) as error:
            verdict = "wrong" if isinstance(error, Wrong) else "memory"
            _keep(folder, case, number, verdict, str(error))
        _count(tally, case, verdict)
        peak = _peak() - before
        if peak > tally["peak"]:
            tally["peak"], tally["peak_at"] = peak, number
    tally["at"] = last


def _count(tally: np.ndarray, case: Case, verdict: str) -> None:
    counts = tally["count"][MUTATIONS.index(case.mutation), KINDS.index(case.seed.kind)]
    counts[OUTCOMES.index(verdict)] += 1


def _mapped() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _peak() -> int:
    """Bytes of the largest resident size; by getrusage, as it costs a microsecond."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _keep(folder: Path, case: Case, number: int, verdict: str, text: str) -> None:
    found = folder.parent / "found"
    found.mkdir(exist_ok=True)
    name = f"{number}-{verdict}-{case.seed.name}-{case.mutation}"
    (found / f"{name}.file").write_bytes(case.data)
    (found / f"{name}.txt").write_text(text)


def run(folder: Path, cases: int, start: int, workers: int, seconds: float) -> dict[str, Any]:
    """Read `cases` mutated files, or as many as fit in `seconds`; what came of them."""
    layout = np.dtype(
        [
            ("count", "i8", (len(MUTATIONS), len(KINDS), len(OUTCOMES))),
            ("at", "i8"),
            ("peak", "i8"),
            ("peak_at", "i8"),
        ]
    )
    tallies = np.memmap(folder / "tallies", layout, "w+", shape=(workers,))
    seeds = make_seeds(folder / "seeds")
    fuzzer = Fuzzer(seeds, start)
    running: dict[int, BaseProcess] = {}
    seen: dict[int, tuple[int, float]] = {}  # the last case of each worker, and since when

    def begin(worker: int, first: int) -> None:
        own = folder / f"worker-{worker}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        for seed in seeds:
            seed.place(own)
        given = (fuzzer, own, first, cases, workers, tallies[worker])
        running[worker] = _FORK.Process(target=_work, args=given)
        running[worker].start()
        seen[worker] = (-1, time.monotonic())

    began = time.monotonic()
    for worker in range(workers):
        begin(worker, worker)
    broken: list[str] = []
    while running:
        time.sleep(0.02)
        now = time.monotonic()
        over = now - began > seconds
        for worker, process in list(running.items()):
            code = process.exitcode
            number = int(tallies[worker]["at"])  # its last one, where it has ended
            if seen[worker][0] != number:
                seen[worker] = (number, now)
            if code is None:
                if over or now - seen[worker][1] > STALL:
                    process.kill()
                continue
            del running[worker]
            if code == 0 or (over and code == -signal.SIGKILL):
                continue
            if code > 0:
                broken.append(f"case {number}: the reader's process raised")
            verdict = "hang" if code in (-signal.SIGPROF, -signal.SIGKILL) else "crash"
            case = fuzzer.case(number)
            _keep(folder / f"worker-{worker}", case, number, verdict, f"status {code}")
            _count(tallies[worker], case, verdict)
            if number + workers < cases and not over:
                begin(worker, number + workers)
    total = tallies["count"].sum(0)
    return {
        "files": int(total.sum()),
        "seconds": round(time.monotonic() - began, 1),
        "verdicts": dict(zip(OUTCOMES, total.sum((0, 1)).tolist(), strict=True)),
        "kinds": dict(zip(KINDS, total.sum((0, 2)).tolist(), strict=True)),
        "mutations": {
            name: {v: n for v, n in zip(OUTCOMES, row, strict=True) if n}
            for name, row in zip(MUTATIONS, total.sum(1).tolist(), strict=True)
        },
        "peak": int(tallies["peak"].max()),
        "peak_at": int(tallies[tallies["peak"].argmax()]["peak_at"]),
        "found": sorted(path.name for path in folder.glob("found/*.file")),
        "broken": broken,
    }


def main() -> None:
    """Read mutated files, and print what came of them as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where files are made; best in memory")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0, help="the seed of all cases")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = run(given.folder, given.cases, given.start, given.workers, given.seconds)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
