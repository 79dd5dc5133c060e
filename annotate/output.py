"""A job's output folder: errors of its storage, unfinished files, checksums, index and report."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..dataset.format.files import TEMPORARY
from ..dataset.format.index import NAME as INDEX
from ..dataset.format.index import build_index, open_index
from ..dataset.format.lock import holder
from ..dataset.format.manifest import NAME as MANIFEST
from ..dataset.format.shard import shard_name
from ..dataset.format.sums import file_sha256, read_sums, write_sums
from ..dataset.storage.remote_path import AnyPath
from ..errors import FormatError, JobError, StoreError, output_error
from .config import AnnotateConfig
from .plan import Identity, Plan
from .report import Report, Tally, make_report

_log = logging.getLogger(__name__)


@contextmanager
def explained_errors() -> Iterator[None]:
    """Say what to do about storage that is full, read-only or failing."""
    try:
        yield
    except OSError as error:
        if explained := output_error(error):
            raise explained from error
        if error.errno is None or isinstance(error, ConnectionError):  # ours, or of the network
            raise
        what, remedy = f"storage failed: {error}", "fix the disk or the mount,"
        if isinstance(error, IsADirectoryError):
            what = f"{error.filename2 or error.filename} is a folder where a file must be"
            remedy = "remove it"
        raise JobError(
            f"{what}. Finished shards are kept. Remedy: {remedy} and run the same command again"
        ) from error


@contextmanager
def no_temporary_files(folder: AnyPath) -> Iterator[None]:
    """Delete what killed runs and actors left unfinished. Only under the folder's lock."""

    def clean() -> None:
        for path in folder.iterdir():
            if path.name.startswith(".") and path.name.endswith(TEMPORARY):
                with suppress(FileNotFoundError):
                    path.unlink()

    clean()
    try:
        yield
    finally:
        if not _store_failed():
            with suppress(OSError, StoreError):  # the next run cleans up; keep why this one failed
                clean()


def _store_failed() -> bool:
    """Whether a store has ended the job: each further request would fail as slowly."""
    return isinstance(sys.exc_info()[1], StoreError)


@contextmanager
def sums_of_written(plan: Plan, todo: list[int], tally: Tally) -> Iterator[None]:
    """Keep SHA256SUMS true during a run: no line of a shard that is remade, all of its own after.

    The digests of the actors are saved however the run ends, so that a stopped job has only those
    shards to hash later that no actor reported.
    """
    listed = _listed_sums(plan.folder)
    made = {shard_name(number, plan.shards) for number in todo}
    sums = {name: listed[name] for name in listed.keys() - made - {MANIFEST, INDEX}}
    if sums != listed:
        write_sums(plan.folder, sums)
    try:
        yield
    finally:
        sums |= {shard_name(number, plan.shards): sha for number, sha in tally.written.items()}
        if not _store_failed():
            with suppress(OSError, StoreError):  # must not hide why the run failed
                if holder(plan.folder) == plan.run:  # else the list is that of another job
                    write_sums(plan.folder, sums)


def _listed_sums(folder: AnyPath) -> dict[str, str]:
    with suppress(FormatError):  # damaged: rewritten
        return read_sums(folder)
    return {}


def complete_sums(plan: Plan) -> None:
    """Write SHA256SUMS with a line for each shard that is there, the manifest and the index."""
    listed = _listed_sums(plan.folder)
    shards = [shard_name(number, plan.shards) for number in range(plan.shards)]
    sums = {name: listed[name] for name in shards if name in listed}
    for name in (*shards, MANIFEST, INDEX):
        if name not in sums and (plan.folder / name).is_file():
            sums[name] = file_sha256(plan.folder / name)
    if sums != listed:
        write_sums(plan.folder, sums)


def looks_finished(folder: AnyPath) -> bool:
    """Whether a folder has an index that fits its shards."""
    with suppress(FileNotFoundError, FormatError):
        open_index(folder)
        return (folder / INDEX).is_file()  # where it cannot be written, it is built in memory
    return False


def finish(
    config: AnnotateConfig, plan: Plan, identity: Identity, tally: Tally, todo: int, begin: float
) -> Report:
    """Index the shards, complete their checksums, and report.

    Args:
        config: the options.
        plan: what the run wrote.
        identity: the teacher.
        tally: what the run did.
        todo: how many shards it had to make.
        begin: when it began, by the monotonic clock.
    """
    if tally.failed:
        _log.error("no index is built: %d shards are missing", len(tally.failed))
    elif todo or not looks_finished(plan.folder):
        build_index(plan.folder)
    complete_sums(plan)
    report = make_report(
        plan, identity, tally, plan.shards - todo, time.monotonic() - begin, config.max_errors
    )
    report.save()
    if len(report.libraries) > 1:
        names = {name for one in report.libraries for name in one}
        kinds = {name: sorted({str(one.get(name)) for one in report.libraries}) for name in names}
        differ = [f"{name}: {'; '.join(k)}" for name, k in sorted(kinds.items()) if len(k) > 1]
        _log.warning(
            "the shards were made on %d kinds of machines, so here and there a code differs by one "
            "from what one of them alone would have given (%s)",
            len(report.libraries),
            ", ".join(differ),
        )
    return report
