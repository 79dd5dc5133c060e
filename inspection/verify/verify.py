"""`--verify` and `--repair`: is a split complete, undamaged, of one run and in order?"""

import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...dataset.format.directory import StoredFile
from ...dataset.format.files import sync_folder
from ...dataset.format.index import FORMAT, VERSION, write_index
from ...dataset.format.index import NAME as INDEX
from ...dataset.format.manifest import NAME as MANIFEST
from ...dataset.format.manifest import Manifest, open_manifest
from ...dataset.format.shard import parse_shard_name, shard_name
from ...dataset.format.sums import NAME as SUMS
from ...dataset.format.sums import read_sums
from ...errors import FormatError, NewerVersionError, OutputError
from .shard_check import Fault, ShardCheck, check_alone, reason, wrong_sum

Watch = Callable[[int, int], None]

_log = logging.getLogger(__name__)


@dataclass
class SplitCheck:
    """What `verify` found.

    Attributes:
        folder: of the split.
        shards: files that were checked, and `rows` and `nbytes` in them.
        missing: names of files that are not there.
        faults: everything wrong.
        notes: what could not be checked, and why that is no fault.
    """

    folder: str
    shards: int = 0
    rows: int = 0
    nbytes: int = 0
    missing: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is missing and nothing wrong."""
        return not self.missing and not self.faults

    @property
    def bad_files(self) -> list[str]:
        """Names of the files that `annotate` can redo."""
        return sorted({fault.file for fault in self.faults if fault.redone_by_annotate})

    def add(self, file: str, text: str) -> None:
        """Note a fault of a whole file."""
        self.faults.append(Fault(file, None, None, text))

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        facts = vars(self) | {"ok": self.ok, "bad_files": self.bad_files}
        facts["faults"] = [fault._asdict() for fault in self.faults]
        return facts | {"bytes": facts.pop("nbytes")}


def verify(
    root: Path, images: Path | None = None, workers: int = 1, watch: Watch = lambda *_: None
) -> SplitCheck:
    """Check every byte of a split's shards, and that shards, manifest and index belong together.

    Args:
        root: folder of the split.
        images: folder of its images, whose digests are then compared.
        workers: how many shards to check at a time, each in a process of its own.
        watch: called with (shards checked, shards).
    """
    paths = sorted(path for path in root.iterdir() if parse_shard_name(path.name))
    result = SplitCheck(str(root), shards=len(paths))
    sums = _read_sums(root, paths, result)
    manifest = _read_manifest(root / MANIFEST, sums, result)
    arguments = root / MANIFEST if manifest else None, images
    checks: list[ShardCheck] = []
    # Threads: each waits for the process that checks its shard.
    with ThreadPoolExecutor(workers) as pool:
        tasks = [
            pool.submit(check_alone, path, sums.get(path.name, ""), *arguments) for path in paths
        ]
        try:
            for task in as_completed(tasks):
                checks.append(task.result())
                watch(len(checks), len(paths))
        except BaseException:  # Ctrl-C, too, must not wait for all that have not begun
            pool.shutdown(cancel_futures=True)
            raise
    checks.sort(key=lambda check: check.name)
    for check in checks:
        result.faults += check.faults
        result.rows += check.rows
        result.nbytes += check.nbytes
    own = _compare_shards(checks, result)
    lost = {name for name in sums if name != INDEX and not (root / name).exists()}
    result.missing = sorted(lost.union(result.missing))
    if manifest and own:
        _compare_manifest(manifest, own[0].settings, result)
    _compare_index(root / INDEX, paths, sums, result)
    return result


def repair(root: Path, check: SplitCheck) -> list[Path]:
    """Delete the files that `check` found bad, and the index, which is of the shards as they were.

    To be called while a `folder_lock` keeps jobs off the split, from its check on. The shards that
    stay are not touched; `annotate` with the options that made them redoes the others, byte for
    byte, and the index.

    Raises:
        OutputError: a file cannot be deleted.
    """
    removed = []
    for name in (*check.bad_files, INDEX) if check.bad_files else ():
        path = root / name
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            what = "remove it by hand" if path.is_dir() else "fix the folder's permissions"
            raise OutputError(f"cannot delete {path}: {error.strerror}. Remedy: {what}") from error
        _log.info("deleted %s", path)
        removed.append(path)
    sync_folder(root)
    return removed


def _read_sums(root: Path, paths: Sequence[Path], result: SplitCheck) -> dict[str, str]:
    """What SHA256SUMS lists; the digests are compared where the files are read."""
    try:
        sums = read_sums(root)
    except FormatError as error:
        result.add(SUMS, reason(error, root / SUMS))
        return {}
    if not sums:
        result.notes.append(f"there is no {SUMS}: the checksums inside the files were compared")
        return {}
    files = [path for path in (*paths, root / MANIFEST, root / INDEX) if path.exists()]
    if unlisted := [path.name for path in files if path.name not in sums]:
        result.add(SUMS, f"it lacks {len(unlisted)} files, {unlisted[0]} the first of them")
    for name in sums:
        if name not in (MANIFEST, INDEX) and not parse_shard_name(name):
            result.add(SUMS, f"it lists {name!r}, which is no file of a split")
    return sums


def _read_manifest(path: Path, sums: dict[str, str], result: SplitCheck) -> Manifest | None:
    try:
        manifest = open_manifest(path, verify=True)
    except FileNotFoundError:
        result.notes.append(f"there is no {MANIFEST}: the order of the images was not compared")
        return None
    except FormatError as error:
        result.add(MANIFEST, reason(error, path))
        return None
    if text := wrong_sum(path, sums.get(MANIFEST, "")):
        result.add(MANIFEST, text)
    return manifest


def _compare_shards(checks: Sequence[ShardCheck], result: SplitCheck) -> list[ShardCheck]:
    """Find what is missing, of another run or out of order; return the shards of this run."""
    opened = [check for check in checks if check.header]
    run = _most(check.header["fingerprint"] for check in opened)
    own = [check for check in opened if check.header["fingerprint"] == run]
    total = _most(check.place[1] for check in own or checks)
    for check in opened:
        if (found := check.header["fingerprint"]) != run:
            text = f"it is of another run: its fingerprint is {found}, most shards have {run}"
            result.add(check.name, text)
    for check in checks:
        if (found := check.place[1]) != total:
            text = f"it is of a split of {found} shards, most here are of one of {total}"
            result.add(check.name, text)
    expected = {shard_name(number, total) for number in range(total)}
    result.missing = sorted(expected - {check.name for check in checks})
    for one, two in pairwise(check for check in own if not check.faults):
        if two.place[0] != one.place[0] + 1:
            continue
        end, start = one.header["first_row"] + one.rows, two.header["first_row"]
        if start != end:
            text = f"it must begin at row {end}, where {one.name} ends; it begins at {start}"
            result.add(two.name, text)
        if two.keys[0].encode() <= one.keys[1].encode():
            text = f"keys must ascend; {one.name} ends with {one.keys[1]!r}"
            result.faults.append(Fault(two.name, 0, two.keys[0], text))
    return own


def _most(values: Iterable[Any]) -> Any:
    """The most frequent value, of equally frequent ones the first; 0 without any."""
    counts = Counter(values).most_common(1)
    return counts[0][0] if counts else 0


def _compare_manifest(manifest: Manifest, settings: dict[str, Any], result: SplitCheck) -> None:
    names = json.dumps(manifest.class_names, sort_keys=True).encode()
    named = hashlib.sha256(names).hexdigest()
    if (want := settings.get("manifest", manifest.digest)) != manifest.digest:
        text = f"it is not the shards' manifest: its digest is {manifest.digest}, not {want}"
        result.add(MANIFEST, text)
    elif (want := settings.get("class_names")) not in (None, named):
        result.add(MANIFEST, f"its class_names must have the sha256 {want}, as the shards say")
    elif result.ok and len(manifest.keys) != result.rows:
        result.add(MANIFEST, f"it has {len(manifest.keys)} images, the shards {result.rows}")


def _compare_index(
    path: Path, shards: Sequence[Path], sums: dict[str, str], result: SplitCheck
) -> None:
    if not path.exists():
        result.notes.append(f"there is no {INDEX}: it is built when it is needed")
        return
    if result.missing or any(map(parse_shard_name, result.bad_files)):
        result.notes.append(f"{INDEX} was not compared with the shards, as these have faults")
        return
    try:
        text = index_difference(path, shards) or wrong_sum(path, sums.get(INDEX, ""))
    except NewerVersionError as error:
        result.notes.append(f"{INDEX} was not compared with the shards: {error}")
        return
    except FormatError as error:
        text = reason(error, path)
    if text:
        result.add(INDEX, f"stale or damaged: {text}")


def index_difference(path: Path, shards: Sequence[Path]) -> str:
    """What differs, by content, from an index built from the shards now; empty for nothing.

    Raises:
        FormatError: the index is damaged, or the shards do not belong together.
        OSError: the new index cannot be written to the temporary folder.
    """
    remedy = "delete it; it is rebuilt"
    with (
        tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder,
        StoredFile(path, FORMAT, VERSION, remedy) as old,
    ):
        old.check_bytes()
        write_index(Path(folder) / INDEX, list(shards))
        with StoredFile(Path(folder) / INDEX, FORMAT, VERSION, remedy) as new:
            if old.attrs != new.attrs:
                return "its attributes are not what the shards give"
            # Their CRCs stand for the values: the bytes of both files were just compared.
            for name, column in new.columns.items():
                if (
                    name not in old.columns
                    or old.columns[name]._replace(offset=column.offset) != column
                ):
                    return f"its {name} is not what the shards give"
    return ""
