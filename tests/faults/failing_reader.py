"""Reads label maps under shim.c, whose first rules fail one read each, and says what came of it.

Arguments: the folder, a copy that is not touched, the shim's state file, and a step: of how many
reads one is to fail.
"""

import json
import mmap
import struct
import sys
from collections import Counter
from pathlib import Path

from tests.shards import digest
from tokenlabel.dataset.store import LabelStore
from tokenlabel.errors import FormatError

INDEX, SHARD, SHORT = range(3)


class Rules:
    """The shim's counters: says which of the next calls of a rule is to fail."""

    def __init__(self, state: Path) -> None:
        with state.open("r+b") as file:
            self._counts = mmap.mmap(file.fileno(), 0)

    def after(self, rule: int, calls: int) -> None:
        """Let so many calls go well, and the one after them fail."""
        self._counts[16 * rule : 16 * rule + 16] = struct.pack("<qQ", -calls, 0)

    def never(self, rule: int) -> None:
        self.after(rule, 1 << 40)

    def struck(self, rule: int) -> int:
        return int(struct.unpack_from("<Q", self._counts, 16 * rule + 8)[0])


def read_all(folder: Path, right: list[str], found: Counter[str]) -> None:
    """Reopen all files and read every map."""
    try:
        store = LabelStore(folder)
    except OSError as error:
        check(error, folder, found)
        return
    for row, want in enumerate(right):
        try:
            got = store[row]
        except (FormatError, OSError) as error:
            check(error, folder, found)
            continue
        assert digest(got) == want
        found["maps"] += 1


def check(error: Exception, folder: Path, found: Counter[str]) -> None:
    """A disk that fails must not be taken for a damaged file, which one deletes."""
    assert isinstance(error, OSError) and "Input/output error" in str(error), error
    assert str(folder / "shard-00001-") in str(error) or str(folder / "index") in str(error), error
    found["named"] += 1


def main() -> None:
    folder, copy, state = map(Path, sys.argv[1:4])
    step = int(sys.argv[4])
    rules, found = Rules(state), Counter[str]()
    for rule in (INDEX, SHARD, SHORT):
        rules.never(rule)
    store = LabelStore(copy)
    right = [digest(store[row]) for row in range(len(store))]
    for rule, name in ((INDEX, "index"), (SHARD, "shard")):
        calls = 0
        while True:
            rules.after(rule, calls)
            read_all(folder, right, found)
            if not rules.struck(rule):
                break
            found[name] += 1
            calls += step
        rules.never(rule)
    rules.after(SHORT, 0)
    read_all(folder, right, found)
    found["short"] = rules.struck(SHORT)
    json.dump(found, sys.stdout)


main()
