"""`--verify` and `--repair`: is a split complete, undamaged, of one run and in order?"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import mode
from typing import Any

from ...dataset.format.files import sync_folder
from ...dataset.format.index import NAME as INDEX
from ...dataset.format.index import load_index
from ...dataset.format.manifest import NAME as MANIFEST
from ...dataset.format.manifest import Manifest, open_manifest
from ...dataset.format.shard import Shard, parse_shard_name, shard_name
from ...dataset.format.sums import NAME as SUMS
from ...dataset.format.sums import read_sums
from ...dataset.sources.image_table import ImageTable
from ...dataset.sources.open_source import open_images
from ...errors import FormatError, NewerVersionError, OutputError
from ...terminal import Watch
from .shard_check import Fault, check_alone, reason, settings_of, sum_faults

_LISTED = 10_000  # missing files by name

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
        """Note a fault of a file."""
        self.faults.append(Fault(file, text))

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        facts = vars(self) | {"ok": self.ok, "bad_files": self.bad_files}
        facts["faults"] = [fault._asdict() for fault in self.faults]
        return facts | {"bytes": facts.pop("nbytes")}


def verify(
    root: Path, images: str | None = None, workers: int = 1, watch: Watch = lambda *_: None
) -> SplitCheck:
    """Check every byte of a split's shards, and that shards, manifest and index belong together.

    Args:
        root: folder of the split.
        images: its images, as `open_images` takes them, whose digests are then compared.
        workers: how many shards to check at a time, each in a process of its own.
        watch: called with (shards checked, shards).
    """
    paths = sorted(path for path in root.iterdir() if parse_shard_name(path.name))
    result = SplitCheck(str(root), shards=len(paths))
    sums = _read_sums(root, paths, result)
    manifest, path = None, root / MANIFEST
    try:
        manifest = open_manifest(path, verify=True)
        result.faults += sum_faults(path, sums.get(MANIFEST, ""))
    except FileNotFoundError:
        result.notes.append(f"there is no {MANIFEST}: the order of the images was not compared")
    except FormatError as error:
        result.add(MANIFEST, reason(error, path))
    others = path if manifest else None, images
    if images:
        len(ImageTable(open_images(images), root))  # scanned once, for all of the processes
    # Threads: each waits for the process that checks its shard.
    with ThreadPoolExecutor(workers) as pool:
        tasks = [pool.submit(check_alone, path, sums.get(path.name), *others) for path in paths]
        try:
            for done, task in enumerate(as_completed(tasks), 1):
                task.result()
                watch(done, len(paths))
        except BaseException:  # also Ctrl-C: what has not begun is not begun
            pool.shutdown(cancel_futures=True)
            raise
    result.faults += [fault for task in tasks for fault in task.result()]
    good = _compare_shards(paths, result)
    lost = {name for name in sums if name != INDEX and not (root / name).exists()}
    result.missing = sorted(lost.union(result.missing))
    if manifest and good:
        _compare_manifest(manifest, settings_of(good[0]), result)
    _compare_index(root / INDEX, paths, sums.get(INDEX, ""), result)
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


def _compare_shards(paths: Sequence[Path], result: SplitCheck) -> list[Shard]:
    """Find what is missing, of another run or out of order; return the shards without faults."""
    bad, opened, good = {fault.file for fault in result.faults}, [], []
    for path in paths:
        with suppress(FormatError, OSError), Shard(path) as shard:  # else among the faults already
            opened.append(shard)
            result.rows += shard.rows
            result.nbytes += shard.end
    run = mode(shard.attrs["fingerprint"] for shard in opened) if opened else ""
    before = {-1: 0}
    for shard in opened:
        number, row, name = shard.attrs["shard"], shard.attrs["first_row"], shard.path.name
        if (found := shard.attrs["fingerprint"]) != run:
            text = f"it is of another run: its fingerprint is {found}, most shards have {run}"
            result.add(name, text)
        elif name not in bad:
            end = before.get(number - 1, row)
            before[number] = row + shard.rows
            good.append(shard)
            if row != end:
                text = f"it must begin at row {end}, where the last shard ends, not at {row}"
                result.add(name, text)
            if shard.layout != good[0].layout:
                result.add(name, f"its layout must be {good[0].layout}, it is {shard.layout}")
    numbers = [parsed for path in paths if (parsed := parse_shard_name(path.name))]
    total = mode(shards for _, shards in numbers) if numbers else 0
    there = {path.name for path in paths}
    expected = {shard_name(number, total) for number, _ in numbers if number < total}
    gone = (name for n in range(total) if (name := shard_name(n, total)) not in there)
    # A file's name can claim more shards than memory has room for their names.
    result.missing = [*islice(gone, _LISTED)]
    if more := total - len(there & expected) - len(result.missing):
        result.notes.append(f"{more} more of {total} shards are missing")
    for name in sorted(there - expected):
        result.add(name, f"most shards here are of a split of {total} shards")
    return good


def _compare_manifest(manifest: Manifest, settings: dict[str, Any], result: SplitCheck) -> None:
    names = json.dumps(manifest.class_names, sort_keys=True).encode()
    digest, named, text = manifest.digest, hashlib.sha256(names).hexdigest(), ""
    if (want := settings.get("manifest", digest)) != digest:
        text = f"it is not the shards' manifest: its digest is {digest}, not {want}"
    elif (want := settings.get("class_names") or named) != named:
        text = f"its class_names must have the sha256 {want}, as the shards' settings say"
    elif result.ok and len(manifest.keys) != result.rows:
        text = f"it has {len(manifest.keys)} images, the shards have {result.rows}"
    if text:
        result.add(MANIFEST, text)


def _compare_index(path: Path, shards: list[Path], sha256: str, result: SplitCheck) -> None:
    if not path.exists():
        result.notes.append(f"there is no {INDEX}: it is built when it is needed")
    elif result.missing or any(map(parse_shard_name, result.bad_files)):
        result.notes.append(f"{INDEX} was not compared with the shards, as these have faults")
    else:
        try:
            result.faults += [*index_faults(path, shards)] or sum_faults(path, sha256)
        except NewerVersionError as error:
            result.notes.append(f"{INDEX} was not compared with the shards: {error}")


def index_faults(path: Path, shards: list[Path]) -> Iterator[Fault]:
    """How an index is damaged, or which shard differs from it.

    Raises:
        NewerVersionError: a later release wrote it.
    """
    try:
        index = load_index(path, shards)
        index.file.check_bytes()
        for number, shard_path in enumerate(shards):
            with Shard(shard_path) as shard:
                if not index.fits(shard, number):
                    yield Fault(path.name, f"stale: it differs from {shard_path.name}")
    except NewerVersionError:
        raise
    except FormatError as error:
        yield Fault(path.name, reason(error, path))
