"""Every check of one shard: its bytes, its header, its rows, and what HDF5 reads in it.

The directory has a CRC, and holds one of all bytes behind it: no flipped bit passes. The line of
SHA256SUMS shows a file that was rewritten, the header's sha256 of all decoded arrays values that
were changed together with their checksums, and HDF5's view a file that shows HDF5 something else.

`python -m tokenlabel.inspection.verify.shard_check` prints the result as JSON, for `check_alone`:
a file can crash HDF5, hang it or make it fill the memory.
"""

import hashlib
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from ...annotate.images import file_digest
from ...dataset.format.manifest import open_manifest
from ...dataset.format.score_map import DROPPED, MapLayout
from ...dataset.format.shard import COLUMNS, ContentDigest, Shard, parse_shard_name
from ...dataset.format.sums import NAME as SUMS
from ...dataset.format.sums import file_sha256
from ...dataset.sources.folder import FolderSource
from ...errors import NewerVersionError, StorageError

_BLOCK = 256  # rows whose maps are in memory at once
_LISTED = 20  # changed images of a shard that are named one by one
_SECONDS = 1800  # for one shard, images on slow storage included


class Fault(NamedTuple):
    """Something wrong.

    Attributes:
        file: name of the shard, or of the other file of the split.
        row: row of that shard, None where it is not one row's.
        key: the row's image.
        text: what is wrong.
        redone_by_annotate: whether `annotate` can redo the file once it is deleted; not so where
            it is an image that changed.
    """

    file: str
    row: int | None
    key: str | None
    text: str
    redone_by_annotate: bool = True


@dataclass
class ShardCheck:
    """What is known of one shard after the checks.

    Attributes:
        name: of the file.
        faults: what is wrong; of rows that break the same rule, the first one.
        header: its attributes; empty when it cannot be opened.
        settings: what the fingerprint is the digest of; empty where the header does not say.
        rows: number of rows.
        nbytes: size of the file.
        keys: of the first and the last row; empty when they cannot be read.
    """

    name: str
    faults: list[Fault] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    nbytes: int = 0
    keys: Sequence[str] = ("", "")

    @property
    def place(self) -> tuple[int, int]:
        """The number of the shard, and of how many, by its name."""
        return parse_shard_name(self.name) or (-1, -1)

    def add(self, text: str, redone: bool = True) -> None:
        """Note a fault of the whole file."""
        self.faults.append(Fault(self.name, None, None, text, redone))


def check_alone(path: Path, sha256: str, manifest: Path | None, images: Path | None) -> ShardCheck:
    """`check_shard` in a process of its own, whose end is a fault of the shard."""
    check = ShardCheck(path.name)
    words = [str(word or "") for word in (path, sha256, manifest, images)]
    command = [sys.executable, "-m", __name__, *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        check.add(f"HDF5 does not read it within {_SECONDS} s")
        return check
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        check.add(f"HDF5 cannot read it: {last or f'it ends with status {done.returncode}'}")
        return check
    check = ShardCheck(**json.loads(done.stdout))
    check.faults = [Fault(*fault) for fault in check.faults]
    return check


def check_shard(
    path: Path, sha256: str = "", manifest: Path | None = None, images: Path | None = None
) -> ShardCheck:
    """Check one shard. Raises nothing for what is in the file; HDF5 may end the process.

    Args:
        path: the shard.
        sha256: that must be the file's; empty where none is known.
        manifest: the split's manifest, known to be undamaged; None leaves it out.
        images: folder of the images, whose digests are then compared; None leaves them out.
    """
    check = ShardCheck(path.name)
    try:
        with Shard(path) as shard:
            check.header, check.rows, check.nbytes = shard.attrs, shard.rows, shard.end
            check.settings = dict(json.loads(shard.attrs.get("settings", "{}")))
            _check_header(check)
            shard.check_bytes()
            if text := wrong_sum(path, sha256):
                check.add(text)
            keys = shard.texts("key")
            check.keys = keys[0], keys[-1]
            _check_rows(shard, keys, manifest, check)
            if not check.faults and (text := _hdf5_difference(shard)):
                check.add(text)
            if images is not None:
                check.faults += _image_faults(images, shard, keys)
    # Of this machine or for a later release: no reason to delete the shard.
    except (PermissionError, NewerVersionError) as error:
        check.add(str(error).removeprefix(f"{path} "), redone=False)
    except MemoryError:
        check.add("too large for this machine's memory", redone=False)
    # Damaged or hostile files can make NumPy, HDF5 and json raise nearly anything.
    except Exception as error:
        check.add(reason(error, path))
    return check


def reason(error: Exception, path: Path) -> str:
    """An error's text without the name of the file, which is printed before it, and the remedy."""
    text = str(error) or type(error).__name__
    return text.removeprefix(f"{path}: ").removeprefix(f"{path} ").partition(". Remedy")[0]


def wrong_sum(path: Path, sha256: str) -> str:
    """How a file differs from its line in SHA256SUMS; empty where it does not, or has none."""
    if not sha256 or (found := file_sha256(path)) == sha256:
        return ""
    return f"its sha256 must be {sha256}, as in {SUMS}; it is {found}"


def _check_header(check: ShardCheck) -> None:
    header, settings = check.header, check.settings
    number, total = check.place
    if (header["shard"], header["shards"]) != check.place:
        check.add(
            f"its name says shard {number} of {total}, its header {header['shard']} of "
            f"{header['shards']}: it was renamed, or swapped with another"
        )
    wanted: dict[str, Any] = {
        name: settings[name] for name in ("num_classes", "k") if name in settings
    }
    if "settings" in header:
        wanted["fingerprint"] = hashlib.sha256(header["settings"].encode()).hexdigest()
    if "shard_size" in settings:
        wanted["first_row"] = header["shard"] * settings["shard_size"]
    for name, want in wanted.items():
        if header[name] != want:
            check.add(f"{name} must be {want}, by its settings; it is {header[name]}")


def _check_rows(shard: Shard, keys: list[str], manifest: Path | None, check: ShardCheck) -> None:
    """Compare all values with the rules of docs/format.md, and with their digest."""
    attrs, layout = shard.attrs, shard.layout
    columns = {name: shard.read(name) for name in COLUMNS if name in shard}
    labels, sizes, good = columns["label"], columns["size"], columns["error"] == b""

    def add(rule: str, broken: Any, values: Sequence[Any] | np.ndarray = keys) -> None:
        """Note the first row that breaks a rule, which says {} for the value there."""
        if len(rows := np.flatnonzero(broken)):
            row = int(rows[0])
            more = f" (so have {len(rows) - 1} more rows)" if len(rows) > 1 else ""
            text = rule.format(values[row]) + more
            check.faults.append(Fault(check.name, row, keys[row], text))

    if (count := int((~good).sum())) != attrs["errors"]:
        check.add(f"the header counts {attrs['errors']} rows with an error, there are {count}")
    outside = ["\0" in key or key[:1] in ("", "/") or ".." in key.split("/") for key in keys]
    add("a key must be a path inside the split's folder", outside)
    follows = columns["key"][1:] > columns["key"][:-1]
    add("keys must be unique and ascend by their UTF-8 bytes", ~np.append(True, follows))
    wrong, rule = labels < -1, "a class"
    if attrs.get("label_space") == "teacher":
        wrong, rule = wrong | (labels >= layout.num_classes), f"below {layout.num_classes}"
    add(f"a label must be -1 or {rule}; it is {{}}", wrong, labels)
    wrong = ((sizes < 1) & good[:, None] | (sizes < 0)).any(1)
    add("width and height must be positive; they are {}", wrong, sizes)
    boxes = columns.get("extent", np.tile(np.array(attrs["extent"], float), (len(keys), 1)))
    x0, y0, x1, y1 = boxes.T
    inside = (0 <= x0) & (x0 < x1) & (x1 <= 1) & (0 <= y0) & (y0 < y1) & (y1 <= 1)
    add("the extent must be a box in the image; it is {}", ~inside, boxes)
    if manifest is not None:
        split = open_manifest(manifest)
        # Another manifest is the split's fault, and reported there once.
        if check.settings.get("manifest", split.digest) == split.digest:
            rows = slice(attrs["first_row"], attrs["first_row"] + len(keys))
            wanted: list[str | None] = [*split.keys[rows]]
            wanted += [None] * (len(keys) - len(wanted))
            others = [key != want for key, want in zip(keys, wanted, strict=True)]
            add("its key must be that of the manifest, {!r}", others, wanted)
            if not any(others):
                want = split.labels[rows]
                add("its label must be that of the manifest, {}", labels != want, want)

    digest = ContentDigest()
    for name, column in columns.items():
        digest.update(name, column)
    broken: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(keys), bool))
    for start in range(0, len(keys), _BLOCK):
        block = {name: shard.read(name, start, start + _BLOCK) for name in layout.planes()}
        for name, plane in block.items():
            digest.update(name, plane)
        for rule, flags in _map_rules(block, layout):
            broken[rule][start : start + _BLOCK] = flags.reshape(len(flags), -1).any(1)
    for rule, flags in broken.items():
        add(rule, flags & good)
    if (found := digest.hexdigest()) != attrs["sha256"]:
        check.add(
            f"the sha256 of the decoded arrays must be {attrs['sha256']}, it is {found}: values "
            "changed after they were written"
        )


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


def _hdf5_difference(shard: Shard) -> str:
    """How HDF5's view of a shard differs from that of its directory; empty where it does not."""
    digest, planes = ContentDigest(), shard.layout.planes()
    try:
        with h5py.File(shard.path, "r", locking=False) as file:
            for name, value in shard.attrs.items():
                seen = np.asarray(file.attrs.get(name))
                seen = (np.char.decode(seen, "utf-8") if seen.dtype.kind == "S" else seen).tolist()
                if repr(seen) != repr(value):  # as text, for NaN is not equal to itself
                    return f"the attribute {name} is {value!r}, to HDF5 {seen!r}"
            for name in (*planes, *(name for name in COLUMNS if name in shard)):
                dataset = file[name]
                # Types and shapes are ours: HDF5 would allocate memory for what it is shown.
                column = shard.columns.get(name)
                dtype, tail = planes[name] if column is None else (column.dtype, COLUMNS[name][1])
                if (dataset.dtype, dataset.shape) != (dtype, (shard.rows, *tail)):
                    return f"{name} is {dataset.dtype} {dataset.shape} to HDF5"
                step = _BLOCK if name in planes else shard.rows
                for start in range(0, shard.rows, step):
                    digest.update(name, dataset[start : start + step])
    except Exception as error:  # nearly anything
        return f"HDF5 cannot read it: {error}"
    if (found := digest.hexdigest()) != shard.attrs["sha256"]:
        return f"HDF5 reads arrays with the sha256 {found}, not {shard.attrs['sha256']}"
    return ""


def _image_faults(images: Path, shard: Shard, keys: list[str]) -> Iterator[Fault]:
    """The images that are not the files that were annotated."""
    source, changed = FolderSource(images), 0
    for row, (key, digest) in enumerate(zip(keys, shard.read("digest").tolist(), strict=True)):
        if digest == 0:  # unknown
            continue
        try:
            (data,) = source.read([key])
            if isinstance(data, bytes) and file_digest(data) == digest:
                continue
            why = "its digest differs" if isinstance(data, bytes) else str(data)
        except StorageError as error:
            why = str(error).partition(". ")[0]
        changed += 1
        if changed <= _LISTED:
            text = f"its image is not the one that was annotated: {why}"
            yield Fault(shard.path.name, row, key, text, False)
    if changed > _LISTED:
        text = f"{changed - _LISTED} more images changed or cannot be read"
        yield Fault(shard.path.name, None, None, text, False)


if __name__ == "__main__":
    shard, line, *folders = sys.argv[1:]
    manifest, images = (Path(folder) if folder else None for folder in folders)
    print(json.dumps(asdict(check_shard(Path(shard), line, manifest, images))))
