"""Every check of one shard: its bytes, its header, its rows, and what HDF5 reads in it.

The directory has a CRC, and holds one of all bytes behind it: no flipped bit passes. The line of
SHA256SUMS shows a file that was rewritten, the header's sha256 of all decoded arrays values that
were changed together with their checksums, and HDF5's view a file that shows HDF5 something else.

`python -m tokenlabel.inspection.verify.shard_check` prints the faults as JSON, for `check_alone`.
"""

import hashlib
import json
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from ...dataset.format.keys import digest64
from ...dataset.format.manifest import open_manifest
from ...dataset.format.score_map import DROPPED, MapLayout
from ...dataset.format.shard import COLUMNS, ContentDigest, Shard, parse_shard_name
from ...dataset.format.sums import NAME as SUMS
from ...dataset.format.sums import file_sha256
from ...dataset.sources.image_table import ImageTable
from ...dataset.sources.open_source import open_images
from ...errors import JobError, NewerVersionError, StorageError

_BLOCK = 256  # rows whose maps are in memory at once
_LISTED = 20  # changed images of a shard that are named one by one
_SECONDS = 1800  # for one shard, images on slow storage included


class Fault(NamedTuple):
    """Something wrong.

    Attributes:
        file: name of the shard, or of the other file of the split.
        text: what is wrong.
        row: row of that shard, None where it is not one row's.
        key: the row's image.
        redone_by_annotate: whether `annotate` can redo the file once it is deleted; not so where
            it is an image that changed.
    """

    file: str
    text: str
    row: int | None = None
    key: str | None = None
    redone_by_annotate: bool = True


def check_alone(path: Path, *others: object) -> list[Fault]:
    """`check_shard` in a process of its own: a file can crash HDF5, hang it or fill the memory.

    Raises:
        JobError: the process failed for another reason.
    """
    command = [sys.executable, "-m", __name__, str(path), *(str(other or "") for other in others)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True)
        return [Fault(*fault) for fault in json.loads(done.stdout)]
    except subprocess.TimeoutExpired:
        text = f"it was not checked within {_SECONDS} s: HDF5 hangs on it, or the storage is slow"
        return [Fault(path.name, text, redone_by_annotate=False)]
    except subprocess.CalledProcessError as error:
        if error.returncode > 0:
            last = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise JobError(
                f"the process that checks {path} failed: {last}. Remedy: check the installation, "
                "and whether memory and disk have room"
            ) from error
        # Whoever kills may have done so for want of memory, which is no reason to delete the shard.
        text = f"HDF5 cannot read it: signal {-error.returncode} ended the process"
        redone = error.returncode != -signal.SIGKILL
        return [Fault(path.name, text, redone_by_annotate=redone)]


def check_shard(
    path: Path, sha256: str = "", manifest: Path | None = None, images: str | None = None
) -> list[Fault]:
    """What is wrong with a shard; of rows that break the same rule, the first one.

    Raises nothing for what is in the file, but HDF5 may end the process.

    Args:
        path: the shard.
        sha256: that must be the file's; empty where none is known.
        manifest: the split's manifest, known to be undamaged; None leaves it out.
        images: as `open_images` takes them; their digests are then compared; None: they are not.
    """
    faults: list[Fault] = []
    try:
        with Shard(path) as shard:
            faults += _header_faults(shard)
            shard.check_bytes()
            faults += sum_faults(path, sha256)
            faults += _row_faults(shard, manifest)
            if not faults:
                faults += _hdf5_faults(shard)
            if images is not None:
                faults += _image_faults(shard, ImageTable(open_images(images), path.parent))
    # Of this machine or for a later release: no reason to delete the shard.
    except (MemoryError, NewerVersionError, PermissionError) as error:
        text = str(error).removeprefix(f"{path} ") or "too large for this machine's memory"
        faults.append(Fault(path.name, text, redone_by_annotate=False))
    # Damaged or hostile files can make NumPy and json raise nearly anything.
    except Exception as error:
        faults.append(Fault(path.name, reason(error, path)))
    return faults


def reason(error: Exception, path: Path) -> str:
    """An error's text without the name of the file, which is printed before it, and the remedy."""
    text = str(error) or type(error).__name__
    return text.removeprefix(f"{path}: ").removeprefix(f"{path} ").partition(". Remedy")[0]


def sum_faults(path: Path, sha256: str) -> Iterator[Fault]:
    """How a file differs from its line in SHA256SUMS; no line is an empty one."""
    if sha256 and (found := file_sha256(path)) != sha256:
        yield Fault(path.name, f"its sha256 must be {sha256}, as in {SUMS}; it is {found}")


def settings_of(shard: Shard) -> dict[str, Any]:
    """What the fingerprint is the digest of; empty where the header does not say."""
    return dict(json.loads(shard.attrs.get("settings", "{}")))


def _header_faults(shard: Shard) -> Iterator[Fault]:
    attrs, name, settings = shard.attrs, shard.path.name, settings_of(shard)
    here, place = (attrs["shard"], attrs["shards"]), parse_shard_name(name)
    if place and place != here:
        yield Fault(
            name,
            f"its name says shard {place[0]} of {place[1]}, its header {here[0]} of {here[1]}: it "
            "was renamed, or swapped with another",
        )
    wanted = {part: want for part, want in settings.items() if part in ("num_classes", "k")}
    if "settings" in attrs:
        wanted["fingerprint"] = hashlib.sha256(attrs["settings"].encode()).hexdigest()
    if "shard_size" in settings:
        wanted["first_row"] = attrs["shard"] * settings["shard_size"]
    for part, want in wanted.items():
        if attrs[part] != want:
            yield Fault(name, f"{part} must be {want} by its settings; it is {attrs[part]}")


def _row_faults(shard: Shard, manifest: Path | None) -> Iterator[Fault]:
    """Compare all values with the rules of docs/format.md, and with their digest."""
    attrs, layout, name, keys = shard.attrs, shard.layout, shard.path.name, shard.texts("key")
    columns = {part: shard.read(part) for part in COLUMNS if part in shard}
    labels, sizes, good = columns["label"], columns["size"], columns["error"] == b""

    def first(
        rule: str, broken: Sequence[bool] | np.ndarray, values: Sequence[Any] | np.ndarray = keys
    ) -> Iterator[Fault]:
        """The first row that breaks a rule, in which {} stands for the value there."""
        if len(rows := np.flatnonzero(broken)):
            row, more = int(rows[0]), f" (and {len(rows) - 1} more rows)" * (len(rows) > 1)
            yield Fault(name, rule.format(values[row]) + more, row, keys[row])

    if (count := int((~good).sum())) != attrs["errors"]:
        text = f"the header counts {attrs['errors']} rows with an error, there are {count}"
        yield Fault(name, text)
    outside = ["\0" in key or key[:1] in ("", "/") or ".." in key.split("/") for key in keys]
    yield from first("a key must be a path inside the split's folder", outside)
    repeated = np.ones(len(keys), bool)
    repeated[np.unique(columns["key"], return_index=True)[1]] = False
    yield from first("its key must not be that of another row", repeated)
    wrong, rule = labels < -1, "a class"
    if attrs.get("label_space") == "teacher":
        wrong, rule = wrong | (labels >= layout.num_classes), f"below {layout.num_classes}"
    yield from first(f"a label must be -1 or {rule}; it is {{}}", wrong, labels)
    wrong = ((sizes < 1) & good[:, None] | (sizes < 0)).any(1)
    yield from first("width and height must be positive; they are {}", wrong, sizes)
    boxes = columns.get("extent", np.tile(np.array(attrs["extent"], float), (len(keys), 1)))
    x0, y0, x1, y1 = boxes.T
    inside = (0 <= x0) & (x0 < x1) & (x1 <= 1) & (0 <= y0) & (y0 < y1) & (y1 <= 1)
    yield from first("the extent must be a box in the image; it is {}", ~inside, boxes)
    if manifest is not None:
        split = open_manifest(manifest)
        # Another manifest is the split's fault, and reported there once.
        if settings_of(shard).get("manifest", split.digest) == split.digest:
            rows = slice(attrs["first_row"], attrs["first_row"] + len(keys))
            wanted: list[str | None] = [*split.keys[rows]]
            wanted += [None] * (len(keys) - len(wanted))
            others = [key != want for key, want in zip(keys, wanted, strict=True)]
            yield from first("its key must be that of the manifest, {!r}", others, wanted)
            if not any(others):
                want = split.labels(rows)
                yield from first("its label must be that of the manifest, {}", labels != want, want)

    digest = ContentDigest()
    for part, column in columns.items():
        digest.update(part, column)
    broken: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(keys), bool))
    for start in range(0, len(keys), _BLOCK):
        block = {part: shard.read(part, start, start + _BLOCK) for part in layout.planes()}
        for part, plane in block.items():
            digest.update(part, plane)
        for rule, flags in _map_rules(block, layout):
            broken[rule][start : start + _BLOCK] = flags.reshape(len(flags), -1).any(1)
    for rule, flags in broken.items():
        yield from first(rule, flags & good)
    if (found := digest.hexdigest()) != (want := attrs["sha256"]):
        text = f"the sha256 of the decoded arrays must be {want}, it is {found}"
        yield Fault(name, f"{text}: values changed after they were written")


def _map_rules(block: dict[str, np.ndarray], layout: MapLayout) -> Iterator[tuple[str, np.ndarray]]:
    """What must hold of the planes of some rows, and where it does not: bool [b, ...]."""
    codes, classes = block["codes"], block["classes"]
    dropped = codes == (DROPPED if layout.step else np.inf)
    below = f"must be below {layout.num_classes}"
    yield "codes must be 0 or more", np.isnan(codes) | (codes < 0)
    yield "the codes of a cell must not descend", codes[:, :, 1:] < codes[:, :, :-1]
    yield "the first class of a cell must not be dropped", dropped[:, :, 0]
    yield "dropped classes must be stored as 0", dropped & (classes != 0)
    yield f"class ids {below}", classes >= layout.num_classes
    # Dropped ones have no class: what they are compared as differs from all others.
    ids = np.where(dropped, -1 - np.arange(layout.k)[:, None, None], classes.astype(np.int64))
    ids.sort(2)
    yield "classes of a cell must be different", ids[:, :, 1:] == ids[:, :, :-1]
    if layout.residual:
        named = block["residual_classes"]
        yield f"residual classes {below}", named >= layout.num_classes
        yield "residual classes must ascend", named[..., 1:] <= named[..., :-1]
    if layout.level:
        yield "level must be finite", ~np.isfinite(block["level"])


def _hdf5_faults(shard: Shard) -> Iterator[Fault]:
    """How HDF5's view of a shard differs from that of its directory."""
    name, digest, planes = shard.path.name, ContentDigest(), shard.layout.planes()
    try:
        with h5py.File(shard.path, "r", locking=False) as file:
            for part, value in shard.attrs.items():
                seen = np.asarray(file.attrs.get(part))
                seen = (np.char.decode(seen, "utf-8") if seen.dtype.kind == "S" else seen).tolist()
                if repr(seen) != repr(value):  # as text, for NaN is not equal to itself
                    yield Fault(name, f"its attribute {part} is {value!r}, to HDF5 {seen!r}")
            for part in (*planes, *(part for part in COLUMNS if part in shard)):
                dataset, column = file[part], shard.columns.get(part)
                # Types and shapes are ours: HDF5 would allocate memory for what it is shown.
                dtype, tail = planes[part] if column is None else (column.dtype, COLUMNS[part][1])
                if (dataset.dtype, dataset.shape) != (dtype, (shard.rows, *tail)):
                    raise ValueError(f"{part} is {dataset.dtype} {dataset.shape}")
                for start in range(0, shard.rows, _BLOCK):
                    digest.update(part, dataset[start : start + _BLOCK])
        if (found := digest.hexdigest()) != (want := shard.attrs["sha256"]):
            yield Fault(name, f"HDF5 reads arrays with the sha256 {found}, not {want}")
    except Exception as error:  # nearly anything
        yield Fault(name, f"HDF5 cannot read it: {error}")


def _image_faults(shard: Shard, table: ImageTable) -> Iterator[Fault]:
    """The images that are not the files that were annotated."""
    digests, changed = shard.read("digest").tolist(), 0
    for row, (key, digest) in enumerate(zip(shard.texts("key"), digests, strict=True)):
        if digest == 0:  # unknown
            continue
        try:
            data = table.read_key(key)
            if isinstance(data, bytes) and digest64(data) == digest:
                continue
            why = "its digest differs" if isinstance(data, bytes) else str(data)
        except StorageError as error:
            why = str(error).partition(". ")[0]
        changed += 1
        if changed <= _LISTED:
            text = f"its image is not the one that was annotated: {why}"
            yield Fault(shard.path.name, text, row, key, False)
    if changed > _LISTED:
        text = f"{changed - _LISTED} more images are not those that were annotated"
        yield Fault(shard.path.name, text, redone_by_annotate=False)


if __name__ == "__main__":
    place, line, known, shown = sys.argv[1:]
    print(json.dumps(check_shard(Path(place), line, Path(known) if known else None, shown or None)))
