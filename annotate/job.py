"""`annotate`: the whole job, from options to verified shards and a report."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..dataset.format.index import NAME as INDEX
from ..dataset.format.index import build_index, find_shards, open_index
from ..dataset.format.lock import folder_lock
from ..dataset.format.manifest import NAME as MANIFEST
from ..dataset.format.manifest import Manifest, shard_rows
from ..dataset.format.shard import Shard
from ..dataset.sources.folder import open_source
from ..errors import ConfigError, FormatError
from .classes import Numbering, check_numbering, describe, sampled_keys
from .cluster.pool import Pool
from .cluster.session import plan_resources, ray_session
from .config import SAMPLE, AnnotateConfig
from .output import complete_sums, explained_errors, no_temporary_files, sums_of_written
from .plan import Identity, Plan, make_plan, split_manifest, unfinished
from .report import Report, Tally, make_report
from .sample import sample_folder

_log = logging.getLogger(__name__)
#: Images of which the teacher is asked the class, where the folders' classes are in doubt.
_ASKED = 64
#: The embedded sample is laid out here.
SAMPLE_PARENT = Path("data")


def annotate(
    config: AnnotateConfig, progress: Callable[[Tally, int, int], None] = lambda *_: None
) -> Report:
    """Annotate a split: build the manifest, make the missing shards, index them, and report.

        >>> config = AnnotateConfig(weights="sample", input_size=64, out="labels-64")
        >>> report = annotate(config)
        >>> report.ok, report.images
        (True, 16)

    Uses the Ray session that is running, or starts one (or attaches to `config.ray_address`) and
    shuts it down. Finished shards are skipped, so a job that was stopped resumes.

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
        JobError: no teacher could be started, or storage failed.
        FormatError: a finished shard is damaged.
    """
    begin = time.monotonic()
    data = sample_folder(SAMPLE_PARENT) if config.data == SAMPLE else Path(config.data)
    source, tally = open_source(data, config.split), Tally()
    folder = config.folder.absolute()
    with folder_lock(folder) as run, explained_errors(), no_temporary_files(folder):
        if _looks_finished(folder):
            # No teacher has to run, so it is only identified, here in this process.
            from .teacher.identity import build_teacher, identify

            identity = identify(build_teacher(config), source)
            if config.device == "auto":
                # This machine may be a head node without the GPUs that made the shards.
                with Shard(find_shards(folder)[0]) as shard, suppress(KeyError, ValueError):
                    made_on = json.loads(shard.attrs["settings"])["device"]
                    identity = dataclasses.replace(identity, device=made_on)
            manifest, _ = split_manifest(config, source, identity)
            plan = make_plan(config, run, manifest, identity)
            if not unfinished(plan):
                return _finish(config, plan, identity, tally, 0, begin)
        with ray_session(config.ray_address):
            resources = plan_resources(config)
            if resources.gpus == 0:
                config = config.model_copy(update={"device": "cpu"})
            with Pool((config, source, resources.threads), resources) as pool:
                identity = pool.identify(resources.teachers)
                for note in identity.notes:
                    _log.warning(note)
                manifest, numbering = split_manifest(config, source, identity)
                plan = make_plan(config, run, manifest, identity)
                todo = unfinished(plan)
                if numbering and len(todo) == plan.shards:
                    tally.class_fits = _check_classes(config, manifest, numbering, identity, pool)
                images = sum(len(shard_rows(plan.rows, plan.shard_size, shard)) for shard in todo)
                with sums_of_written(plan, todo, tally):
                    pool.run(
                        plan,
                        todo,
                        config.retries,
                        tally,
                        lambda now: progress(now, images, plan.rows),
                    )
        return _finish(config, plan, identity, tally, len(todo), begin)


def _check_classes(
    config: AnnotateConfig, manifest: Manifest, numbering: Numbering, identity: Identity, pool: Pool
) -> dict[str, tuple[int, int]]:
    """Say which class each folder is; unless its name leaves no doubt, ask the teacher first."""
    fits: dict[str, tuple[int, int]] = {}
    notes: list[str] = []
    if not numbering.is_sure and numbering.label_space == "teacher":
        keys = sampled_keys(manifest, _ASKED)
        answers = pool.answers(keys)
        asked = config.numbering != "auto"
        try:
            fits, notes = check_numbering(numbering, keys, answers, identity.num_classes, asked)
        except ConfigError:
            (config.folder / MANIFEST).unlink()  # or `rescan: false` would take it as it is
            raise
    _log.info("%s", describe(numbering, identity.class_names, fits))
    for note in (*numbering.notes, *notes):
        _log.warning(note)
    return fits


def _looks_finished(folder: Path) -> bool:
    with suppress(FileNotFoundError, FormatError):
        open_index(folder)
        return (folder / INDEX).is_file()  # where it cannot be written, it is built in memory
    return False


def _finish(
    config: AnnotateConfig, plan: Plan, identity: Identity, tally: Tally, todo: int, begin: float
) -> Report:
    if tally.failed:
        _log.error("no index is built: %d shards are missing", len(tally.failed))
    elif todo or not _looks_finished(plan.folder):
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
