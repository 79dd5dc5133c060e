"""Processes that read a split all the while, or all at once, and say what they saw.

`python -m tests.faults.readers watch ROOT IMAGES COUNT PAUSE`: until its standard input ends; for
each line of it, answers when a reader has been refused as incomplete.
`python -m tests.faults.readers rebuild ROOT COUNT ROUNDS`: open it at once, without an index.
"""

import hashlib
import json
import multiprocessing
import subprocess
import sys
import time
import traceback
from collections import Counter
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

from tests.jobs import environment, run
from tests.shards import digest
from tokenlabel.dataset import LabelStore, TokenLabelDataset
from tokenlabel.dataset.format.index import build_index
from tokenlabel.errors import FormatError, MissingMapError

#: What a split that is not whole may say. Every other FormatError counts as "damaged".
CLEAR = {
    "no folder": "is not a folder",
    "no shards": "holds no shards",
    "incomplete": "is incomplete: ",
    "deleted": "has been deleted meanwhile",
    "disagreeing": "and the index do not agree",
}
COMMAND = [sys.executable, "-m", "tests.faults.readers"]
_FORK = multiprocessing.get_context("fork")


def content(store: LabelStore) -> str:
    """Digest of everything that a store gives."""
    total = hashlib.sha256()
    for key in store.keys:
        total.update(key.encode())
        try:
            entry = store[key]
        except MissingMapError as error:
            total.update(str(error).encode())
            continue
        total.update(digest(entry).encode())
    return total.hexdigest()


class Seen:
    """What one reader saw.

    Attributes:
        whole: how often it read every map.
        contents: digests of what it then read: one, if all is well.
        refusals: how often it was refused, by kind of message.
        wrong: anything else.
    """

    def __init__(self) -> None:
        self.whole = 0
        self.contents: set[str] = set()
        self.refusals: Counter[str] = Counter()
        self.wrong: list[str] = []

    def read(self, root: Path, images: Path | None) -> None:
        """Reopen the split and read all of it."""
        try:
            store = LabelStore(root)
            found = content(store)
            if images is not None:
                dataset = TokenLabelDataset(images, store, grid=2)
                dataset[self.whole % len(dataset)]
        except (FileNotFoundError, FormatError) as error:
            text = str(error)
            kind = next((kind for kind, words in CLEAR.items() if words in text), "damaged")
            if ". Remedy: " in text:
                self.refusals[kind] += 1
            else:
                self.wrong.append(traceback.format_exc())
        except Exception:
            self.wrong.append(traceback.format_exc())
        else:
            self.whole += 1
            self.contents.add(found)

    def as_dict(self) -> dict[str, Any]:
        return {
            "whole": self.whole,
            "contents": sorted(self.contents),
            "refusals": self.refusals,
            "wrong": self.wrong[:3],
        }


def _watch(
    root: Path,
    images: Path | None,
    pause: float,
    stop: Event,
    refused: Event,
    results: "SimpleQueue[Any]",
) -> None:
    seen = Seen()
    while not stop.is_set():
        before = seen.refusals["incomplete"]
        seen.read(root, images)
        if seen.refusals["incomplete"] > before:
            refused.set()
        time.sleep(pause)
    seen.read(root, images)
    results.put(seen.as_dict())


def watch(root: Path, images: Path | None, count: int, pause: float) -> list[dict[str, Any]]:
    """Read with `count` processes until the standard input ends."""
    stop, refused, results = _FORK.Event(), _FORK.Event(), _FORK.SimpleQueue()
    readers = [
        _FORK.Process(target=_watch, args=(root, images, pause, stop, refused, results))
        for _ in range(count)
    ]
    for reader in readers:
        reader.start()
    print("ready", flush=True)
    for _ in sys.stdin:
        refused.clear()
        refused.wait()
        print("refused", flush=True)
    stop.set()
    found = [results.get() for _ in readers]
    for reader in readers:
        reader.join()
    return found


def _rebuild(
    root: Path, number: int, rounds: int, gate: Barrier, results: "SimpleQueue[Any]"
) -> None:
    seen = Seen()
    for _ in range(rounds):
        gate.wait()
        try:
            for _ in range(3):
                if number % 2:
                    build_index(root)
                seen.read(root, None)
        except Exception:
            seen.wrong.append(traceback.format_exc())
        gate.wait()
    results.put(seen.as_dict())


def rebuild(root: Path, count: int, rounds: int) -> dict[str, Any]:
    """Round by round, open the split with `count` processes at once, its index gone.

    Half of them build the index again and again while the others open it.
    """
    index = root / "index"
    build_index(root)
    want, files = index.read_bytes(), sorted(path.name for path in root.iterdir())
    gate, results = _FORK.Barrier(count + 1), _FORK.SimpleQueue()
    children = [
        _FORK.Process(target=_rebuild, args=(root, number, rounds, gate, results))
        for number in range(count)
    ]
    for child in children:
        child.start()
    different, left = 0, set()
    for _ in range(rounds):
        index.unlink()
        gate.wait(120)
        gate.wait(120)
        different += index.read_bytes() != want
        left |= {path.name for path in root.iterdir()} - {*files}
    found = [results.get() for _ in children]
    for child in children:
        child.join()
    return {"readers": found, "different": different, "left": sorted(left)}


class Readers:
    """`watch` in a process of its own, which shares nothing with this one."""

    def __init__(self, root: Path, images: Path | None, count: int, pause: float) -> None:
        command = [*COMMAND, "watch", root, images or "", count, pause]
        self._process = subprocess.Popen(
            [*map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert self._process.stdin and self._process.stdout
        self._ask, self._answers = self._process.stdin, self._process.stdout
        assert self._answers.readline() == "ready\n"

    def wait_for_refusal(self) -> None:
        """Until one of them has found the split incomplete."""
        self._ask.write("\n")
        self._ask.flush()
        assert self._answers.readline() == "refused\n"

    def stop(self) -> list[dict[str, Any]]:
        """End the readers after one more look; what each of them saw."""
        output, _ = self._process.communicate()
        assert self._process.returncode == 0
        return list(json.loads(output))


def rebuilt(root: Path, count: int, rounds: int) -> dict[str, Any]:
    """`rebuild` in a process of its own."""
    done = run(*map(str, (*COMMAND, "rebuild", root, count, rounds)))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "watch":
        images = Path(rest[0]) if rest[0] else None
        print(json.dumps(watch(Path(where), images, int(rest[1]), float(rest[2]))))
    else:
        print(json.dumps(rebuild(Path(where), int(rest[0]), int(rest[1]))))
