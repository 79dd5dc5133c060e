"""`--verify`: is a split complete, undamaged, of one run and in order?"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ...dataset.format.index import NAME as INDEX
from ...dataset.format.manifest import NAME as MANIFEST
from ...dataset.format.manifest import Manifest, open_manifest
from ...dataset.format.shard import parse_shard_name, shard_name
from ...errors import FormatError, NewerVersionError
from .header_check import settings_of
from .index_check import index_difference
from .shard_check import Fault, ShardCheck, check_shard, crashed

Watch = Callable[[int, int], None]


@dataclass
class SplitCheck:
    """What `verify` found.

    Attributes:
        folder: of the split.
        shards: files that were checked, and `rows` and `nbytes` in them.
        missing: names of shards that are not there.
        faults: everything wrong; `more` were left out, all of shards with other faults.
        notes: what could not be checked, and why that is no fault.
    """

    folder: str
    shards: int = 0
    rows: int = 0
    nbytes: int = 0
    missing: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    more: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is missing and nothing wrong."""
        return not self.missing and not self.faults

    @property
    def bad_files(self) -> list[str]:
        """Names of the files that `annotate` can make again."""
        return sorted({fault.file for fault in self.faults if fault.redone_by_annotate})

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "folder": self.folder,
            "ok": self.ok,
            "shards": self.shards,
            "rows": self.rows,
            "bytes": self.nbytes,
            "missing": self.missing,
            "bad_files": self.bad_files,
            "faults": [fault._asdict() for fault in self.faults],
            "more_faults": self.more,
            "notes": self.notes,
        }


def verify(
    root: Path, images: Path | None = None, workers: int = 0, watch: Watch = lambda *_: None
) -> SplitCheck:
    """Check every byte of a split's shards, and that shards, manifest and index belong together.

    Args:
        root: folder of the split.
        images: folder of its images, whose digests are then compared.
        workers: processes; 0 checks in this one.
        watch: called with (shards checked, shards).
    """
    paths = sorted(path for path in root.iterdir() if parse_shard_name(path.name))
    result = SplitCheck(str(root), shards=len(paths))
    manifest = _manifest(root, result)
    manifest_path = root / MANIFEST if manifest else None
    checks = list(_checked(paths, manifest_path, images, workers, watch))
    checks.sort(key=lambda check: check.name)
    for check in checks:
        result.faults += check.faults
        result.more += check.more
        result.rows += check.rows
        result.nbytes += check.nbytes
    opened = [check for check in checks if check.header]
    run = _run(opened)
    result.faults += _strangers(opened, run)
    own = [check for check in opened if check.header["fingerprint"] == run]
    _find_missing(result, checks, own)
    result.faults += _order_faults(own)
    if manifest and own:
        _compare_manifest(result, manifest, own)
    _check_index(root, paths, result)
    return result


def _manifest(root: Path, result: SplitCheck) -> Manifest | None:
    try:
        return open_manifest(root / MANIFEST, verify=True)
    except FileNotFoundError:
        result.notes.append(f"there is no {MANIFEST}: the order of the images was not compared")
    except FormatError as error:
        result.faults.append(Fault(MANIFEST, None, None, _short(root / MANIFEST, error)))
    return None


def _checked(
    paths: Sequence[Path], manifest: Path | None, images: Path | None, workers: int, watch: Watch
) -> Iterator[ShardCheck]:
    if workers == 0:
        for done, path in enumerate(paths, 1):
            yield check_shard(path, manifest, images)
            watch(done, len(paths))
        return
    left, done, alone = set(paths), 0, False
    while left:
        # Spawned: the progress bar's thread does not survive a fork.
        count = 1 if alone else min(workers, len(left))
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            tasks: dict[Future[ShardCheck], Path] = {
                pool.submit(check_shard, path, manifest, images): path
                for path in (sorted(left)[:1] if alone else sorted(left))
            }
            try:
                for task in as_completed(tasks):
                    try:
                        check = task.result()
                    except BrokenProcessPool:
                        if not alone:
                            raise
                        check = crashed(tasks[task])
                    yield check
                    left.discard(tasks[task])
                    done += 1
                    watch(done, len(paths))
            except BrokenProcessPool:
                # Nobody knows which file did it: the rest one by one, each in its own process.
                alone = True
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _run(checks: list[ShardCheck]) -> str:
    """The fingerprint that most shards have; of equally many, that of the first shard."""
    counts = Counter(check.header["fingerprint"] for check in checks)
    return counts.most_common(1)[0][0] if counts else ""


def _strangers(checks: list[ShardCheck], run: str) -> Iterator[Fault]:
    for check in checks:
        if (found := check.header["fingerprint"]) != run:
            text = f"it is of another run: its fingerprint is {found}, most shards have {run}"
            yield Fault(check.name, None, None, text)


def _find_missing(result: SplitCheck, checks: list[ShardCheck], own: list[ShardCheck]) -> None:
    """Name the shards that are not there, and those that belong to a split of another length."""
    totals = [parse_shard_name(check.name) for check in (own or checks)]
    counts = Counter(parsed[1] for parsed in totals if parsed)
    if not counts:
        return
    total = counts.most_common(1)[0][0]
    there = {check.name for check in checks}
    names = (shard_name(number, total) for number in range(total))
    result.missing = [name for name in names if name not in there]
    for check in checks:
        parsed = parse_shard_name(check.name)
        if parsed and parsed[1] != total:
            text = f"it is of a split of {parsed[1]} shards, most here are of one of {total}"
            result.faults.append(Fault(check.name, None, None, text))


def _order_faults(own: list[ShardCheck]) -> Iterator[Fault]:
    """Shards that do not begin where the one before them ends."""
    ordered = [(parse_shard_name(check.name), check) for check in own if not check.faults]
    for (before, first), (number, second) in pairwise(ordered):
        if not before or not number or number[0] != before[0] + 1:
            continue
        end = first.header["first_row"] + first.rows
        if second.header["first_row"] != end:
            text = (
                f"it must begin at row {end}, where {first.name} ends; it begins at "
                f"{second.header['first_row']}"
            )
            yield Fault(second.name, None, None, text)
        if second.first_key.encode() <= first.last_key.encode():
            text = f"keys must ascend; {first.name} ends with {first.last_key!r}"
            yield Fault(second.name, 0, second.first_key, text)


def _compare_manifest(result: SplitCheck, manifest: Manifest, own: list[ShardCheck]) -> None:
    for check in own:
        settings = settings_of(check.header)
        if "manifest" not in settings:
            continue
        text = ""
        if (wanted := settings["manifest"]) != manifest.digest:
            text = f"it is not the shards' manifest: its digest is {manifest.digest}, not {wanted}"
        elif (wanted := settings.get("class_names")) not in (None, _sha256(manifest.class_names)):
            text = f"its class_names must have the sha256 {wanted} that the shards' settings say"
        if text:
            result.faults.append(Fault(MANIFEST, None, None, text))
        return


def _sha256(names: list[str] | None) -> str:
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()


def _check_index(root: Path, paths: Sequence[Path], result: SplitCheck) -> None:
    path = root / INDEX
    if not path.exists():
        result.notes.append(f"there is no {INDEX}: it is built when it is needed")
        return
    if not result.ok and (result.missing or any(map(parse_shard_name, result.bad_files))):
        result.notes.append(f"{INDEX} was not compared with the shards, as these have faults")
        return
    try:
        difference = index_difference(path, paths)
    except NewerVersionError as error:
        result.notes.append(f"{INDEX} was not compared with the shards: {error}")
        return
    except FormatError as error:
        difference = _short(path, error)
    if difference:
        result.faults.append(Fault(INDEX, None, None, f"stale or damaged: {difference}"))


def _short(path: Path, error: Exception) -> str:
    """An error's text without the file's name, which stands before it, and the advice."""
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ").partition(". Remedy")[0]
