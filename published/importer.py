"""`import_labels`: a published label set as a split of ours, written and resumed like a job's."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..annotate.classes import chosen_names, sampled_rows
from ..annotate.config import AnnotateConfig
from ..annotate.images import DecodedBatch, exif_orientation, failed_batch
from ..annotate.output import explained_errors, finish, no_temporary_files, sums_of_written
from ..annotate.plan import Identity, Plan, check_classes, make_plan, split_manifest, unfinished
from ..annotate.report import Report, Tally, count_maps
from ..dataset.format.keys import digest64
from ..dataset.format.lock import check_holder, folder_lock
from ..dataset.format.manifest import Manifest, shard_rows
from ..dataset.format.shard import shard_name, write_shard
from ..dataset.label_map.path import UNIT_BOX
from ..dataset.sources.decode import decode_image, opened_image
from ..dataset.sources.image_source import Entry, ImageSource
from ..dataset.sources.open_source import open_images
from ..dataset.sources.scan import entries_of
from ..errors import ConfigError, ImageError
from .archive import LabelFiles, hash_stem, hash_stems
from .geometry import Geometry, agreement, clearly_better, parse_geometry
from .label_set import LabelSet

#: What stands for the logits of the classes that a file leaves out.
_RESTS = ("zeros", "none")
_BLOCK = 256  # images in memory at once
_LISTED = 6

_log = logging.getLogger(__name__)


def import_labels(
    labels: Path,
    images: str | os.PathLike[str],
    options: AnnotateConfig,
    *,
    geometry: str = "detect",
    rest: str = "zeros",
    teacher: AnnotateConfig | None = None,
    check: int = 48,
    progress: Callable[[Tally, int, int], None] = lambda *_: None,
) -> Report:
    """Make a split of a published label set: of TokenLabeling, ReLabel, or saved like them.

        options = AnnotateConfig(out="labels", split="train", num_classes=1000)
        report = import_labels(Path("label_top5_train_nfnet.zip"), images, options)

    Nothing is unpacked, and nothing that a file says is run. Finished shards are kept, so an import
    that was stopped resumes. An image without a label has a row with an error. Logits are stored as
    float16; neither the set nor this function knows thumbprints of the images.

    Args:
        labels: folder, .zip or .tar of the set, with a file CLASS/NAME.pt for each image: a tensor
            [2, K, H, W] of logits and of the ids of their classes.
        images: of the split: a folder CLASS/NAME.EXTENSION, or another source, as `open_images`
            takes it.
        options: `out`, `split`, `num_classes` (default: 1000), `class_names` (default: ImageNet's,
            if there are as many), `numbering`, `shard_size` and `max_errors` count.
        geometry: what the set's teacher was shown: `centre:SIZE:CROP_PCT` (the centre crop of SIZE
            pixels, after the short side was resized to SIZE / CROP_PCT; by default 32 times the
            grid's side, and 1), `squash` (all of the image) or `whole` (taken for that, as the
            published code takes all labels); `detect` finds out which of the first two.
        rest: what the logits of the classes that a file leaves out were: `zeros`, as the published
            code takes them, or `none`, which leaves these classes no probability.
        teacher: for `detect`, of the same classes; None: the default one.
        check: images for `detect`.
        progress: as in `annotate`.

    Raises:
        ConfigError: wrong options or input, or `detect` cannot tell.
        FormatError: the set is damaged, or a file breaks a rule.
        OutputError: the folder cannot be written, holds another run's shards (FingerprintError)
            or is locked by another job (LockedError).
        JobError: storage failed; StorageError where that is the images' storage.
    """
    begin = time.monotonic()
    folder, source = (
        options.folder.absolute(),
        open_images(os.fspath(images), options.ground_truth or ""),
    )
    if rest not in _RESTS:
        raise ConfigError(f"rest must be one of {', '.join(_RESTS)}, got {rest!r}")
    with LabelFiles(labels) as files:
        set_ = LabelSet(files, options.num_classes or 1000, rest)
        work, geometries = _Import(set_, source), parse_geometry(geometry, set_.layout.grid)
        with folder_lock(folder) as run, explained_errors(), no_temporary_files(folder):
            identity = work.identity(options)
            manifest, numbering = split_manifest(options, source, identity)
            work.match(manifest)
            found, origin = geometries[0], "options"
            if len(geometries) > 1:
                found, origin = work.detect(geometries, teacher, check)
            identity = dataclasses.replace(
                identity,
                preprocessing={"resize": str(found), "rest": rest},
                origins={"resize": origin},
            )
            given = {"k": set_.layout.k, "step": 0.0, "floor": 0.0, "residual": 0}
            options = options.model_copy(update=given)
            plan = make_plan(options, run, manifest, identity)
            todo, tally = unfinished(plan), Tally()
            if numbering and len(todo) == plan.shards:
                tally.class_fits = check_classes(
                    options,
                    manifest,
                    numbering,
                    identity,
                    lambda rows: set_.top_classes([manifest.keys[row] for row in rows]),
                )
            _log.info("%s", set_.described_rest)
            total = sum(len(shard_rows(plan.rows, plan.shard_size, shard)) for shard in todo)

            def watch(rows: int, errors: int) -> None:
                tally.images, tally.errors = tally.images + rows, tally.errors + errors
                tally.rate = tally.images / (time.monotonic() - begin)
                progress(tally, total, plan.rows)

            with sums_of_written(plan, todo, tally):
                for shard in todo:
                    tally.written[shard] = work.write(plan, shard, found, watch)
            return finish(options, plan, identity, tally, len(todo), begin)


class _Import:
    """A label set beside its images."""

    def __init__(self, labels: LabelSet, source: ImageSource) -> None:
        self._labels, self._source = labels, source

    def identity(self, options: AnnotateConfig) -> Identity:
        """What stands for the teacher, of which the set says nothing."""
        from ..annotate.teacher.identity import libraries  # imports timm
        from ..annotate.teacher.timm_teacher import imagenet_names

        names = imagenet_names(self._labels.layout.num_classes)
        return Identity(
            model="imported",
            weights_digest=self._labels.files.digest,
            preprocessing={},
            grid=self._labels.layout.grid,
            num_classes=self._labels.layout.num_classes,
            class_names=chosen_names(
                options.class_names, names, self._labels.layout.num_classes, "ImageNet"
            ),
            device="cpu",
            head_mode="imported",
            exact=False,
            pooled_error=None,
            is_own=True,  # so that the numbers of the classes are always compared with the labels
            libraries=libraries(torch.device("cpu")),
        )

    def match(self, manifest: Manifest) -> None:
        """Find the label of each image.

        Raises:
            ConfigError: two images have the same one, or none has any.
        """
        self._manifest, files = manifest, self._labels.files
        count = len(manifest.keys)
        stems = hash_stems(manifest.keys)
        order = stems.argsort(kind="stable")
        same = stems[order][1:] == stems[order][:-1]
        if same.any():
            twice = {*stems[order][1:][same].tolist()}
            names = (key for key in manifest.keys if hash_stem(key) in twice)
            raise ConfigError(
                "images must have different names up to the first dot, which name their labels; "
                f"{len(twice)} names stand for several: {', '.join(islice(names, _LISTED))} … "
                "Remedy: move all but the right one out of the split"
            )
        self._rows = files.find(stems)
        there = int((self._rows >= 0).sum())
        if not there:
            raise ConfigError(
                f"{files.path} has {len(files)} labels, and none is of an image of {self._source}, "
                f"such as {manifest.keys[0]!r}. Remedy: check both paths; labels "
                "lie in CLASS/NAME.pt, images in CLASS/NAME.EXTENSION"
            )
        if unused := len(files) - there:
            _log.warning("%d labels of %s are of no image here", unused, files.path)
        if missing := count - there:
            first = manifest.keys[int((self._rows < 0).argmax())]
            _log.warning("%d images have no label, the first is %s", missing, ascii(first))

    def detect(
        self, geometries: Sequence[Geometry], config: AnnotateConfig | None, count: int
    ) -> tuple[Geometry, str]:
        """Show a teacher what the set's may have been shown, and compare with the labels by patch.

        Returns:
            The one that fits, and what says so.

        Raises:
            ConfigError: neither fits clearly better, or the teacher has other classes.
        """
        from ..annotate.teacher.identity import build_teacher

        # A teacher sees most of what the set's saw at the same size.
        config = (config or AnnotateConfig()).model_copy(update={"input_size": geometries[0].size})
        teacher = build_teacher(config)
        classes = self._labels.layout.num_classes
        if teacher.num_classes != classes:
            raise ConfigError(
                f"the teacher that finds the geometry must have the set's classes; {teacher.name} "
                f"has {teacher.num_classes}, not {classes}. Remedy: another "
                "--config, or name the geometry"
            )
        only, seen = np.zeros(2, int), 0
        entries = entries_of(self._manifest, sampled_rows(self._manifest, count))
        keys = [entry.key for entry in entries]
        ((height, width),) = teacher.input_sizes
        resample = Image.Resampling[teacher.interpolation.upper()]
        for key, row, data in zip(
            keys, self._labels.find(keys), self._source.read(entries), strict=True
        ):
            if row < 0 or isinstance(data, ImageError):
                continue
            with suppress(ImageError):
                image = decode_image(data)
                best = self._labels.planes(np.array([row]), [key])["classes"][0, 0, 0]
                shown = []
                for geometry in geometries:
                    box = np.multiply(geometry.extent(*image.size), image.size * 2).tolist()
                    shown.append(np.asarray(image.resize((width, height), resample, box)))
                live = teacher.logits([np.stack(shown)]).argmax(-1).cpu().numpy()
                first, second = (agreement(one, best) for one in live)
                only += [int((first & ~second).sum()), int((second & ~first).sum())]
                seen += 1
        text = " and ".join(f"{n} by {one} alone" for n, one in zip(only, geometries, strict=True))
        text = f"of {seen} images, the teacher agrees with {text} on the best class of patches"
        if (better := clearly_better(only.tolist())) is None:
            raise ConfigError(
                f"geometry detect cannot tell what the set's teacher was shown: {text} (of square "
                "images it was the same). Remedy: name the geometry, more images with --check, or "
                "a better teacher with --config"
            )
        _log.info("geometry %s: %s", geometries[better], text)
        return geometries[better], text

    def write(
        self, plan: Plan, shard: int, geometry: Geometry, watch: Callable[[int, int], None]
    ) -> str:
        """Write one shard; returns its sha256."""
        rows = shard_rows(plan.rows, plan.shard_size, shard)
        part = slice(rows.start, rows.stop)
        keys, truth, found = (
            self._manifest.keys[part],
            self._manifest.labels(part),
            self._rows[part],
        )
        facts = self._facts(entries_of(self._manifest, rows), found)
        extents = np.tile(np.array(UNIT_BOX), (len(keys), 1))
        for i, error in enumerate(facts.errors):
            if not error:
                extents[i] = geometry.extent(*facts.sizes[i].tolist())
        path, attrs = plan.folder / shard_name(shard, plan.shards), dict(plan.attrs)
        attrs |= {"shard": shard, "first_row": rows.start}
        counts = {"labelled": 0, "top1": 0, "top5": 0, "mass": 0.0}
        known = truth if attrs["label_space"] == "teacher" else np.full_like(truth, -1)
        folders = self._manifest.folders
        with write_shard(
            path, plan.layout, keys, truth, attrs, extents if geometry.size else None, folders
        ) as writer:
            for start in range(0, len(keys), _BLOCK):
                part = slice(start, start + _BLOCK)
                errors = facts.errors[part]
                good = np.array([not error for error in errors])
                planes = self._labels.planes(np.where(good, found[part], -1), keys[part])
                writer.append(
                    planes,
                    facts.sizes[part],
                    facts.digests[part],
                    facts.thumbprints[part],
                    facts.orientations[part],
                    errors,
                )
                top5 = self._labels.top5(planes)
                count_maps(counts, known[part], good, planes["codes"], top5, self._labels.layout)
                watch(len(errors), int((~good).sum()))
            writer.attrs |= counts
            check_holder(plan.folder, plan.run)
        return writer.file_sha256

    def _facts(self, entries: Sequence[Entry], found: np.ndarray) -> DecodedBatch:
        """What is stored of these images themselves; only their headers are decoded."""
        facts = failed_batch(len(entries), [], "")
        for i, data in enumerate(self._source.read(entries)):
            try:
                if isinstance(data, ImageError):
                    raise data
                facts.digests[i] = digest64(data)
                with opened_image(data) as image:
                    facts.sizes[i] = image.size
                    facts.orientations[i] = exif_orientation(image)
                if found[i] < 0:
                    raise ImageError("the label set has none for it")
            except ImageError as error:
                facts.errors[i] = str(error)
        return facts
