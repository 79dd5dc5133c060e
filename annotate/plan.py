"""What a run writes: the images, the settings that decide every byte, and their fingerprint."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..dataset.format.files import TEMPORARY
from ..dataset.format.index import in_order, open_shard
from ..dataset.format.manifest import NAME as MANIFEST
from ..dataset.format.manifest import (
    Manifest,
    Numbered,
    open_manifest,
    parts_digest,
    write_manifest,
)
from ..dataset.format.score_map import MapLayout
from ..dataset.format.shard import parse_shard_name
from ..dataset.sources.image_source import ImageSource
from ..dataset.sources.scan import ScanBlock, manifest_blocks, scan_all
from ..dataset.storage.remote_path import AnyPath
from ..errors import ConfigError, FingerprintError, FormatError
from .classes import (
    Numbering,
    check_numbering,
    describe,
    number_folders,
    sampled_rows,
)
from .config import AnnotateConfig

_log = logging.getLogger(__name__)

#: Raised by one whenever the same settings would give other bytes.
CONTENT_VERSION = 3
#: Images of which the teacher is asked the class, where the folders' classes are in doubt.
_ASKED = 64


@dataclass(frozen=True)
class Identity:
    """What the driver must know of a teacher without loading it.

    Attributes:
        weights_digest: hex sha256 of the weights.
        preprocessing: input size, mean, std, interpolation.
        origins: where each of these comes from, in words, and `crop_pct` the fraction of an image
            that the teacher was tested on, which the job does not crop; None where unknown.
        grid: (H, W) of its maps.
        device: "cpu" or "cuda".
        head_mode: how the patch logits are computed.
        exact: whether their mean must equal the pooled logits, and `pooled_error` the largest
            difference on the first images; None of imported labels.
        is_own: whether it is a network of somebody's own, not one of timm's.
        notes: warnings from building the teacher, for the user.
        libraries: versions of the libraries on its node, and its `processor`. Other ones give codes
            that differ by one in rare cells, so shards record them; they are not in the
            fingerprint, so a job may resume on another machine.
    """

    model: str
    weights_digest: str
    preprocessing: dict[str, Any]
    grid: tuple[int, int]
    num_classes: int
    class_names: list[str] | None
    device: str
    head_mode: str
    exact: bool
    pooled_error: float | None
    origins: dict[str, str] = field(default_factory=dict)
    crop_pct: float | None = None
    is_own: bool = False
    notes: tuple[str, ...] = ()
    libraries: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What an actor needs besides its options to make any shard of the run.

    Attributes:
        folder: folder of its shards, which holds the manifest.
        run: id that the folder's lock must show.
        rows, shards, shard_size: of the split, in images and shards.
        layout: shapes and dtypes of the maps.
        attrs: root attributes that all shards share; `fingerprint` is one.
    """

    folder: AnyPath
    run: str
    rows: int
    shards: int
    shard_size: int
    layout: MapLayout
    attrs: dict[str, Any]


def split_manifest(
    config: AnnotateConfig,
    source: ImageSource,
    identity: Identity,
    scan: Callable[[ImageSource], Iterator[ScanBlock]] = scan_all,
) -> tuple[Manifest, Numbering | None]:
    """The split's manifest: rebuilt, and compared with the one that finished shards are of.

    Args:
        config: the options.
        source: the images.
        identity: the teacher.
        scan: lists the images; by default in this process.

    Returns:
        The manifest, and how its folders were numbered; None where `rescan` is off.

    Raises:
        ConfigError: the folders cannot be numbered as the options say.
        FingerprintError: it has changed since; names the first difference.
    """
    path, parts = config.folder / MANIFEST, source.parts()
    saved: Manifest | None = None
    with suppress(FileNotFoundError, FormatError):
        saved = open_manifest(path, verify=True)
    if saved and not config.rescan:
        if saved.parts != parts_digest(parts):
            raise FingerprintError(
                f"with `rescan: false` the files of {source} must be those that were scanned, and "
                "they are not. Remedy: rescan: true"
            )
        return saved, None
    fresh_path = path.with_name(f".{MANIFEST}{TEMPORARY}")
    numbering = _write_manifest(config, source, identity, scan(source), fresh_path)
    fresh = open_manifest(fresh_path)
    if saved and saved.digest != fresh.digest and any(config.folder.glob("shard-*.h5")):
        fresh_path.unlink()
        old, new = saved.keys, fresh.keys
        pairs = enumerate(zip(old, new, strict=False))
        row = next((row for row, (a, b) in pairs if a != b), min(len(old), len(new)))
        if row == len(old) == len(new):
            raise FingerprintError(
                f"the ground truth of the images has changed since {config.folder} was begun: "
                "class folders get other class ids now. Remedy: go back to the old model, "
                "class_names or numbering, or annotate into another folder with `out`"
            )
        was, now = (repr(keys[row]) if row < len(keys) else "nothing" for keys in (old, new))
        raise FingerprintError(
            f"the images have changed since {config.folder} was begun: {len(old)} then (manifest "
            f"{saved.digest[:16]}), {len(new)} now ({fresh.digest[:16]}); the first difference is "
            f"row {row}: {was} then, {now} now. Remedy: restore the images, or annotate into "
            "another folder with `out`"
        )
    fresh_path.replace(path)
    return fresh, numbering


def _write_manifest(
    config: AnnotateConfig,
    source: ImageSource,
    identity: Identity,
    blocks: Iterator[ScanBlock],
    path: AnyPath,
) -> Numbering:
    """Write the manifest of a scan; returns how its classes were numbered."""
    classes: dict[str, int] = {}
    found: list[Numbering] = []
    first: list[str] = []

    def watched() -> Iterator[ScanBlock]:
        for block in blocks:
            first[:] = first or block.keys[:1]
            yield block

    def number() -> Numbered:
        names = sorted(classes)
        try:
            numbering = number_folders(
                names,
                identity.class_names,
                identity.num_classes,
                config.numbering,
                own_names=bool(config.class_names) or identity.is_own,
                numbered=source.numbered,
            )
        except ConfigError as error:
            folder = config.split if config.split in names else names[0]
            if first[0].count("/") > 1 and (len(names) == 1 or config.split in names):
                raise ConfigError(
                    f"a split must hold a folder for each class; its images, such as {first[0]!r}, "
                    f"lie in folders of {folder!r}. Remedy: split: {config.split}/{folder}"
                ) from error
            raise
        found.append(numbering)
        # In order of the numbers that the rows have.
        ids = {name: numbering.classes.get(name, -1) for name in classes}
        return Numbered(numbering.label_space, identity.class_names, ids, numbering.rule)

    rows = manifest_blocks(watched(), source, classes)
    write_manifest(path, rows, number, str(source), source.parts())
    return found[0]


def check_classes(
    config: AnnotateConfig,
    manifest: Manifest,
    numbering: Numbering,
    identity: Identity,
    ask: Callable[[list[int]], Sequence[int]],
) -> dict[str, tuple[int, int]]:
    """Say which class each folder is; unless its name leaves no doubt, ask the teacher first.

    Args:
        config: the options.
        manifest: of the split.
        numbering: to be tested.
        identity: the teacher.
        ask: gives the teacher's top class of each of these rows of the manifest; -1 where there
            is none.

    Returns:
        (right answers, images) by rule.

    Raises:
        ConfigError: the answers fit another numbering clearly better, or none.
    """
    fits: dict[str, tuple[int, int]] = {}
    notes: list[str] = []
    if not numbering.is_sure and numbering.label_space == "teacher":
        rows, asked = sampled_rows(manifest, _ASKED), config.numbering != "auto"
        names = [*manifest.folders, ""]  # class -1 is the last
        folders = [names[number] for number in manifest.classes[rows].tolist()]
        try:
            fits, notes = check_numbering(
                numbering, folders, ask(rows), identity.num_classes, asked
            )
        except ConfigError:
            (config.folder / MANIFEST).unlink()  # or `rescan: false` would take it as it is
            raise
    _log.info("%s", describe(numbering, identity.class_names, fits))
    for note in (*numbering.notes, *notes):
        _log.warning(note)
    return fits


def make_plan(config: AnnotateConfig, run: str, manifest: Manifest, teacher: Identity) -> Plan:
    """Combine options, images and teacher."""
    layout = config.layout(teacher.grid, teacher.num_classes)
    settings = {
        "content_version": CONTENT_VERSION,
        "manifest": manifest.digest,
        "label_space": manifest.label_space,
        "model": teacher.model,
        "weights": teacher.weights_digest,
        "num_classes": teacher.num_classes,
        "class_names": _digest(teacher.class_names),
        "dense_rule": teacher.head_mode,
        "device": teacher.device,
        "preprocessing": teacher.preprocessing,
        "k": layout.k,
        "step": layout.step,
        "floor": config.floor,
        "residual": layout.residual,
        "level": layout.level,
        "views": config.views,
        "precision": config.precision,
        "channels_last": config.channels_last,
        "compile": config.compile,
        "batch_size": config.batch_size,
        "shard_size": config.shard_size,
    }
    rows, folder = len(manifest.keys), config.folder.absolute()
    shards = -(-rows // config.shard_size)
    attrs = {
        "teacher": teacher.model,
        "weights_digest": teacher.weights_digest,
        "dense_rule": teacher.head_mode,
        "preprocessing": _json({**teacher.preprocessing, "crop_pct": teacher.crop_pct}),
        "floor": config.floor,
        "extent": [0.0, 0.0, 1.0, 1.0],
        "label_space": manifest.label_space,
        "numbering": manifest.numbering,
        "settings": _json(settings),
        "fingerprint": _digest(settings),
        "libraries": _json(teacher.libraries),
        "shards": shards,
        "split_rows": rows,
    }
    return Plan(folder, run, rows, shards, config.shard_size, layout, attrs)


def unfinished(plan: Plan) -> list[int]:
    """Numbers of the shards that are still to be made.

    Raises:
        FingerprintError: the folder holds a shard of other input or settings; names what differs.
        FormatError: a shard in the folder is damaged.
    """
    todo, names = set(range(plan.shards)), sorted(path.name for path in plan.folder.iterdir())
    paths = [plan.folder / name for name in names if parse_shard_name(name)]
    for path, attrs in zip(paths, in_order(_header, paths), strict=True):
        if (found := attrs.get("fingerprint")) != plan.attrs["fingerprint"]:
            try:
                old, new = json.loads(attrs["settings"]), json.loads(plan.attrs["settings"])
                differ = [
                    f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
                    for key in sorted(old.keys() | new.keys())
                    if old.get(key) != new.get(key)
                ]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise FormatError(f"{path} does not say how it was made: {error}") from error
            raise FingerprintError(
                f"{plan.folder} holds finished shards of another run: {path.name} has fingerprint "
                f"{found}, this job {plan.attrs['fingerprint']}.\n  "
                + "\n  ".join(differ or ["the settings are equal, so the header was changed"])
                + "\nRemedy: annotate into another folder with `out`, go back to the old settings, "
                "or delete the folder to start over"
            )
        number, shards = parse_shard_name(path.name) or (-1, -1)
        if shards == plan.shards:
            todo.discard(number)
    return sorted(todo)


def _header(path: AnyPath) -> dict[str, Any]:
    with open_shard(path) as shard:
        return shard.attrs


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(_json(value).encode()).hexdigest()
