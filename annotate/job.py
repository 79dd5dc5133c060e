"""`annotate`: the whole job, from options to verified shards and a report."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..dataset.format.files import TEMPORARY
from ..dataset.format.index import NAME as INDEX
from ..dataset.format.index import build_index, find_shards, open_index
from ..dataset.format.lock import folder_lock
from ..dataset.format.manifest import NAME as MANIFEST
from ..dataset.format.manifest import Manifest, open_manifest, shard_rows
from ..dataset.format.shard import Shard
from ..dataset.sources.folder import open_source
from ..dataset.sources.image_source import ImageSource
from ..errors import FingerprintError, FormatError, JobError, output_error
from .classes import build_manifest
from .cluster.pool import Pool, Tally
from .cluster.session import plan_resources, ray_session
from .config import SAMPLE, AnnotateConfig
from .plan import Identity, Plan, make_plan, unfinished
from .report import Report, make_report
from .sample import sample_folder

_log = logging.getLogger(__name__)
#: Where the embedded sample is laid out.
SAMPLE_PARENT = Path("data")


def annotate(
    config: AnnotateConfig, progress: Callable[[Tally, int, int], None] = lambda *_: None
) -> Report:
    """Annotate a split: build the manifest, make the missing shards, index them, and report.

    Uses the Ray session that is there, or starts one (or attaches to `config.ray_address`) and
    shuts it down. Finished shards are skipped, so a job that was stopped goes on.

    Args:
        config: the options.
        progress: called some times a second with the run's tally, the number of images that this
            run has to annotate, and that of the split.

    Returns:
        The report, also saved as report.json beside the shards. `report.ok` is False when shards
        failed or errors are too many.

    Raises:
        ConfigError: wrong options or input; TeacherError for the teacher.
        OutputError: the folder cannot be written, holds another run's shards (FingerprintError)
            or is locked by another job (LockedError).
        JobError: no teacher could be run.
        FormatError: a finished shard is damaged.
    """
    begin = time.monotonic()
    data = sample_folder(SAMPLE_PARENT) if config.data == SAMPLE else Path(config.data)
    source = open_source(data, config.split)
    folder = config.folder.absolute()
    with folder_lock(folder) as run, _told_errors(), _no_temporary(folder):
        if _looks_finished(config.folder):
            # Nothing to run: the teacher is only asked who it is, here in this process.
            identity = _identify_here(config, source)
            plan, todo = _plan(config, source, run, identity)
            if not todo:
                return _finish(config, plan, identity, Tally(), 0, begin)
        with ray_session(config.ray_address):
            resources = plan_resources(config)
            if resources.gpus == 0:
                config = config.model_copy(update={"device": "cpu"})
            with Pool((config, source, resources.threads), resources) as pool:
                identity = pool.identify(resources.teachers)
                for note in identity.notes:
                    _log.warning(note)
                plan, todo = _plan(config, source, run, identity)
                images = sum(len(shard_rows(plan.rows, plan.shard_size, shard)) for shard in todo)
                tally = pool.run(
                    plan, todo, config.retries, lambda now: progress(now, images, plan.rows)
                )
        return _finish(config, plan, identity, tally, len(todo), begin)


@contextmanager
def _told_errors() -> Iterator[None]:
    """Say what to do about storage that is full, may not be written or fails."""
    try:
        yield
    except OSError as error:
        if told := output_error(error):
            raise told from error
        if error.errno is None or isinstance(error, ConnectionError):  # ours, or of the network
            raise
        if isinstance(error, IsADirectoryError):
            raise JobError(
                f"{error.filename2 or error.filename} is a folder where a file must be. Finished "
                "shards are kept. Remedy: remove it and run the same command again"
            ) from error
        raise JobError(
            f"storage failed: {error}. Finished shards are kept. Remedy: mend the disk or the "
            "mount, and run the same command again"
        ) from error


@contextmanager
def _no_temporary(folder: Path) -> Iterator[None]:
    """Delete what killed runs and actors left half-written. Only under the folder's lock."""

    def clean() -> None:
        for path in folder.iterdir():
            if path.name.startswith(".") and path.name.endswith(TEMPORARY):
                with suppress(FileNotFoundError):
                    path.unlink()

    clean()
    try:
        yield
    finally:
        with suppress(OSError):  # the next run's work; must not hide why this one failed
            clean()


def _looks_finished(folder: Path) -> bool:
    with suppress(FileNotFoundError, FormatError):
        open_index(folder)
        return (folder / INDEX).is_file()  # else it was built in memory
    return False


def _identify_here(config: AnnotateConfig, source: ImageSource) -> Identity:
    from .teacher.identity import build_teacher, identify

    identity = identify(build_teacher(config), source)
    if config.device == "auto":
        # This machine may be a head node without the GPUs that made the shards.
        with Shard(find_shards(config.folder)[0]) as shard, suppress(KeyError, ValueError):
            made_on = json.loads(shard.attrs["settings"])["device"]
            identity = dataclasses.replace(identity, device=made_on)
    return identity


def _plan(
    config: AnnotateConfig, source: ImageSource, run: str, identity: Identity
) -> tuple[Plan, list[int]]:
    manifest = _manifest(config, source, identity)
    plan = make_plan(config, source, run, manifest, identity)
    return plan, unfinished(plan)


def _manifest(config: AnnotateConfig, source: ImageSource, identity: Identity) -> Manifest:
    """The split's manifest: rebuilt, and compared with the one that finished shards are of."""
    path = config.folder / MANIFEST
    saved: Manifest | None = None
    with suppress(FileNotFoundError, FormatError):
        saved = open_manifest(path, verify=True)
    if saved and not config.rescan:
        return saved
    fresh_path = path.with_name(f".{MANIFEST}{TEMPORARY}")
    fresh = build_manifest(source, fresh_path, identity.class_names, identity.num_classes)
    has_shards = any(config.folder.glob("shard-*.h5"))
    if saved and saved.digest != fresh.digest and has_shards:
        fresh_path.unlink()
        raise FingerprintError(_changed(config, saved, fresh))
    fresh_path.replace(path)
    return fresh


def _changed(config: AnnotateConfig, saved: Manifest, fresh: Manifest) -> str:
    pairs = zip(saved.keys, fresh.keys, strict=False)
    where = next((row for row, (old, new) in enumerate(pairs) if old != new), None)
    if where is None and len(saved.keys) == len(fresh.keys):
        return (
            f"the ground truth of the images has changed since {config.folder} was begun: class "
            "folders get other class ids now. Remedy: go back to the old model or class_names, or "
            "annotate into another folder with `out`"
        )
    row = min(len(saved.keys), len(fresh.keys)) if where is None else where
    old, new = ((m.keys[row] if row < len(m.keys) else "nothing") for m in (saved, fresh))
    what = f"the first difference is row {row}: {old!r} then, {new!r} now"
    return (
        f"the images have changed since {config.folder} was begun: {len(saved.keys)} then "
        f"(manifest {saved.digest[:16]}), {len(fresh.keys)} now ({fresh.digest[:16]}); {what}. "
        "Remedy: restore the images, or annotate into another folder with `out`"
    )


def _finish(
    config: AnnotateConfig, plan: Plan, identity: Identity, tally: Tally, todo: int, begin: float
) -> Report:
    if tally.failed:
        _log.error("no index was made: %d shards are missing", len(tally.failed))
    elif todo or not _looks_finished(plan.folder):
        build_index(plan.folder)
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
