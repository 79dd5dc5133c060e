"""`annotate`: the whole job, from options to verified shards and a report."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..dataset.format.index import find_shards
from ..dataset.format.lock import folder_lock
from ..dataset.format.manifest import shard_rows
from ..dataset.format.shard import Shard
from ..dataset.sources.open_source import open_split
from ..dataset.sources.scan import entries_of
from .cluster.pool import Pool
from .cluster.scan import scan
from .cluster.session import plan_resources, ray_session
from .config import SAMPLE, AnnotateConfig
from .output import (
    explained_errors,
    finish,
    looks_finished,
    no_temporary_files,
    sums_of_written,
)
from .plan import check_classes, make_plan, split_manifest, unfinished
from .report import Report, Tally
from .sample import sample_folder

_log = logging.getLogger(__name__)
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
    data = str(sample_folder(SAMPLE_PARENT)) if config.data == SAMPLE else config.data
    source, tally = open_split(data, config.split, config.ground_truth or ""), Tally()
    folder = config.folder.absolute()
    with folder_lock(folder) as run, explained_errors(), no_temporary_files(folder):
        if looks_finished(folder):
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
                return finish(config, plan, identity, tally, 0, begin)
        with ray_session(config.ray_address):
            resources = plan_resources(config)
            if resources.gpus == 0:
                config = config.model_copy(update={"device": "cpu"})
            with Pool((config, source, resources.threads), resources) as pool:
                identity = pool.identify(resources.teachers)
                for note in identity.notes:
                    _log.warning(note)
                manifest, numbering = split_manifest(config, source, identity, scan)
                plan = make_plan(config, run, manifest, identity)
                todo = unfinished(plan)
                if numbering and len(todo) == plan.shards:
                    tally.class_fits = check_classes(
                        config,
                        manifest,
                        numbering,
                        identity,
                        lambda rows: pool.answers(entries_of(manifest, rows)),
                    )
                images = sum(len(shard_rows(plan.rows, plan.shard_size, shard)) for shard in todo)
                with sums_of_written(plan, todo, tally):
                    pool.run(
                        plan,
                        todo,
                        config.retries,
                        tally,
                        lambda now: progress(now, images, plan.rows),
                    )
        return finish(config, plan, identity, tally, len(todo), begin)
