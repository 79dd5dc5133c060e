"""`inspect-labels --verify` and `--repair`: every kind of damage is found and named."""

import hashlib
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.jobs import config, digests
from tests.maps import attrs, manifest_of, random_rows, write_split
from tests.painted import invoke
from tests.shards import edit_directory
from tokenlabel.annotate import annotate
from tokenlabel.dataset.format.index import build_index, find_shards
from tokenlabel.dataset.format.keys import digest64
from tokenlabel.dataset.format.lock import folder_lock
from tokenlabel.dataset.format.manifest import (
    Block,
    Numbered,
    open_manifest,
    write_manifest,
)
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.format.shard import Shard, shard_name, write_shard
from tokenlabel.dataset.format.sums import NAME as SUMS
from tokenlabel.dataset.format.sums import file_sha256, read_sums, write_sums
from tokenlabel.errors import FormatError
from tokenlabel.inspection.verify.shard_check import check_shard
from tokenlabel.inspection.verify.verify import index_faults, verify

#: FLIPS=20000 CUTS=500 for the soak.
FLIPS, CUTS = int(os.environ.get("FLIPS", 500)), int(os.environ.get("CUTS", 50))
FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)
LAYOUT = MapLayout(("identity",), (2, 3), 4, 1000, residual=6)
NAMES = [f"n{number:08d}" for number in range(1000)]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of 16 images in 2 shards, with all files of a job, and the images beside it."""
    root = tmp_path_factory.mktemp("verify")
    images, train = root / "images", root / "train"
    for number in range(16):
        path = images / NAMES[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    train.mkdir()
    manifest = manifest_of(images, train / "manifest", NAMES, 1000)
    named = hashlib.sha256(json.dumps(NAMES).encode()).hexdigest()
    settings = json.dumps({"manifest": manifest.digest, "class_names": named, "shard_size": 8})
    more = {
        "settings": settings,
        "fingerprint": hashlib.sha256(settings.encode()).hexdigest(),
        "label_space": "teacher",
    }
    for number in range(2):
        part = slice(8 * number, 8 * number + 8)
        keys, classes, rows = manifest.keys[part], manifest.labels(part), random_rows(LAYOUT, 8)
        digests = np.array([digest64((images / key).read_bytes()) for key in keys], "u8")
        path, header = train / shard_name(number, 2), attrs(number, 2, 8 * number, **more)
        with write_shard(path, LAYOUT, keys, classes, header) as writer:
            writer.append(*rows._replace(digests=digests))
    build_index(train)
    write_sums(train, {path.name: file_sha256(path) for path in train.iterdir()})
    return root


@pytest.fixture
def listed(written: Path, tmp_path: Path) -> Path:
    """A copy of the split, to damage."""
    return Path(shutil.copytree(written / "train", tmp_path / "train"))


@pytest.fixture
def labels(listed: Path) -> Path:
    """The copy without its list of digests, so that other checks find the damage."""
    (listed / SUMS).unlink()
    return listed


def test_undamaged_labels_are_well(written: Path) -> None:
    command = ("inspect-labels", written / "train", "--verify", "--images", written / "images")
    text = invoke(*command, "--workers", 2)
    assert "read 16 rows in 2 shards" in text and "all is well" in text
    assert "note" not in text


@pytest.mark.parametrize(
    ("views", "step", "residual"),
    [(("identity", "hflip"), 0.25, 6), (("identity",), 0.0, 6), (("identity",), 0.25, 0)],
)
def test_all_layouts_are_well(
    tmp_path: Path, views: tuple[str, ...], step: float, residual: int
) -> None:
    layout = MapLayout(views, (3, 5), 4, 70_000, residual, step, level=residual > 0)
    keys = [f"{n:03d}.jpg" for n in range(5)]
    write_split(tmp_path, keys, layout, errors={keys[1]: "truncated"}, mass=float("nan"))
    result = verify(tmp_path)
    assert result.ok and result.rows == 5, result.faults


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("name", [FIRST, "index", "manifest"])
def test_each_flipped_bit_is_found(labels: Path, name: str) -> None:
    """In the directory, in the padding behind it, in HDF5's structure, in the values."""
    path, rng = labels / name, random.Random(1)
    content, missed = path.read_bytes(), []
    assert not found(path)
    for _ in range(FLIPS):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        flip(path, place, bit)
        if not found(path):
            missed.append((place, bit))
        path.write_bytes(content)
    assert missed == []
    flip(path, len(content) // 2)
    text = invoke("inspect-labels", labels, "--verify", "--workers", 1, code=1)
    assert name in text and SECOND not in text


def found(path: Path) -> bool:
    """Whether the part of `verify` that checks this file finds it damaged."""
    try:
        if path.name == "index":
            return any(index_faults(path, find_shards(path.parent)))
        if path.name == "manifest":
            open_manifest(path, verify=True)
            return False
        return bool(check_shard(path))
    except FormatError:
        return True


def test_each_truncation_is_found(labels: Path) -> None:
    path, rng = labels / SECOND, random.Random(2)
    content = path.read_bytes()
    for length in [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(CUTS - 2))]:
        path.write_bytes(content[:length])
        assert check_shard(path), length
    path.write_bytes(content + b"\0")
    assert verify(labels).bad_files == [SECOND], "so are bytes behind the end"


Change = Callable[[dict[str, Any]], None]


def rewrite(path: Path, change: Change) -> None:
    """Write a shard again with other values, by the real writer, but with the digest of before."""
    with Shard(path) as shard:
        layout, header = shard.layout, dict(shard.attrs)
        columns = ("size", "digest", "thumbprint", "orientation")
        arrays = {name: shard.read(name) for name in (*layout.planes(), "label", *columns)}
        arrays |= {name: shard.texts(name) for name in ("key", "error")}
    change(arrays)
    path.unlink()
    with write_shard(path, layout, arrays["key"], arrays["label"], header) as writer:
        writer.append(arrays, *(arrays[name] for name in columns), arrays["error"])
    edit_directory(
        path,
        lambda found: found["attrs"].update(errors=header["errors"], sha256=header["sha256"]),
    )


def put(name: str, index: object, value: object) -> Change:
    return lambda arrays: arrays[name].__setitem__(index, value)


def class_of_no_code(arrays: dict[str, Any]) -> None:
    arrays["codes"][4, 0, 3, 0, 0], arrays["classes"][4, 0, 3, 0, 0] = 255, 999


@pytest.mark.parametrize(
    ("change", "row", "message"),
    [
        (put("codes", (3, 0, 0, 1, 1), 255), 3, "the first class of a cell must not be dropped"),
        (put("codes", (3, 0, 3, 1, 2), 0), 3, "the codes of a cell must not descend"),
        (put("level", (5, 0, 0, 0), np.inf), 5, "level must be finite"),
        (put("classes", (6, 0, 0, 0, 0), 1000), 6, "class ids must be below 1000"),
        (put("classes", (7, 0, slice(2), 0, 0), 5), 7, "classes of a cell must be different"),
        (class_of_no_code, 4, "dropped classes must be stored as 0"),
        (put("residual_classes", (6, 0, 5), 1001), 6, "residual classes must be below 1000"),
        (put("residual_classes", (6, 0, 5), 0), 6, "residual classes must ascend"),
        (put("label", 2, 1000), 2, "a label must be -1 or below 1000; it is 1000"),
        (put("label", slice(2, 4), 7), 2, "that of the manifest, 1 (and 1 more rows)"),
        (put("size", (4, 0), 0), 4, "width and height must be positive"),
        (put("error", 1, "?"), None, "counts 0 rows with an error, there are 1"),
        (put("digest", 1, 1), None, "sha256 of the decoded arrays"),
        (put("thumbprint", 1, 1), None, "sha256 of the decoded arrays"),
        (put("orientation", 1, 9), None, "sha256 of the decoded arrays"),
        (put("key", 3, "../../secret.jpg"), 3, "a key must be a path inside the split's folder"),
        (put("key", 3, "n00000001/09.jpg"), 4, "its key must not be that of another row"),
        (put("key", 7, "z"), 7, "its key must be that of the manifest, 'n00000001/15.jpg'"),
    ],
)
def test_impossible_values_name_shard_and_row(
    labels: Path, change: Change, row: int | None, message: str
) -> None:
    rewrite(labels / SECOND, change)
    faults = check_shard(labels / SECOND, manifest=labels / "manifest")
    assert any(message in fault.text and fault.row == row for fault in faults), faults
    assert any("sha256" in fault.text for fault in faults)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("shard", 0, "its name says shard 1 of 2, its header 0 of 2"),
        ("fingerprint", "0" * 64, "fingerprint must be"),
        ("first_row", 7, "first_row must be 8 by its settings; it is 7"),
        ("extent", [0, 0, 2, 1], "the extent must be a box in the image; it is [0. 0. 2. 1.]"),
        ("first_row", "zero", "first_row must be int, got 'zero'"),
        # Which of the two depends on the recursion limit, which hypothesis raises at times.
        ("settings", "[" * 1000, "recursion|Expecting value"),
        ("settings", "[1]", "cannot convert"),
        ("extent", [[[[]]]], "extent must be a box of 4 numbers"),
        ("teacher", "another", "its attribute teacher is 'another', to HDF5 'made up'"),
    ],
)
def test_wrong_headers_are_named(labels: Path, attribute: str, value: object, message: str) -> None:
    edit_directory(labels / SECOND, lambda found: found["attrs"].update({attribute: value}))
    texts = [fault.text for fault in check_shard(labels / SECOND)]
    assert any(part in text for text in texts for part in message.split("|"))


def test_codes_that_are_exact_are_checked_too(tmp_path: Path) -> None:
    write_split(tmp_path, ["a", "b"], LAYOUT._replace(step=0.0))
    path = tmp_path / shard_name(0, 1)
    rewrite(path, put("codes", (1, 0, 0, 0, 0), -1))
    assert any("codes must be 0 or more" in fault.text for fault in check_shard(path))


def test_each_shard_begins_where_the_one_before_it_ends(tmp_path: Path) -> None:
    write_split(tmp_path, ["a", "b", "c", "d"], LAYOUT, shard_size=2)
    with write_shard(tmp_path / SECOND, LAYOUT, ["b"], [0], attrs(1, 2, 3)) as writer:
        writer.append(*random_rows(LAYOUT, 1))
    texts = [fault.text for fault in verify(tmp_path).faults if fault.file == SECOND]
    assert texts == ["it must begin at row 2, where the last shard ends, not at 3"]


def test_a_name_that_claims_very_many_shards_is_an_error_at_once(tmp_path: Path) -> None:
    write_split(tmp_path, ["a"], LAYOUT)
    (tmp_path / shard_name(0, 1)).rename(tmp_path / shard_name(0, 99_999_999_999))
    with pytest.raises(FormatError, match="99999999998 of 99999999999 shards are missing"):
        find_shards(tmp_path)
    result = verify(tmp_path)
    assert "its name says shard 0 of 99999999999, its header 0 of 1" in result.faults[0].text
    assert "99999989998 more of 99999999999 shards are missing" in result.notes


def test_a_manifest_of_more_images_is_named(tmp_path: Path) -> None:
    write_split(tmp_path, ["a", "b"], LAYOUT)
    rows, zeros = np.arange(3, dtype="i4"), np.zeros(3, "u4")
    blocks = [Block(["a", "b", "c"], rows, zeros, zeros, zeros)]
    numbered = Numbered("folders", None, {"a": 0, "b": 1, "c": 2})
    write_manifest(tmp_path / "manifest", blocks, lambda: numbered, "images")
    (fault,) = verify(tmp_path).faults
    assert fault.file == "manifest" and fault.text == "it has 3 images, the shards have 2"


def forge(path: Path, change: Callable[[h5py.File], object]) -> None:
    """Show HDF5 something else than the directory says, with all of our checksums right."""
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        change(file)
    data = path.read_bytes()
    edit_directory(
        path,
        lambda found: found.update(size=len(data), crc=zlib.crc32(data[found["block"] :])),
    )


def forged_values(file: h5py.File) -> None:
    data = file["classes"][:]
    del file["classes"]
    file["classes"] = data ^ 1


def forged_shape(file: h5py.File) -> None:
    del file["label"]
    file.create_dataset("label", (1 << 40,), "<i4", chunks=(1024,), compression="gzip")


def forged_chunk(file: h5py.File) -> None:
    """HDF5 reads what lies behind it in memory, and may die of it."""
    file.move("codes", "before")
    shape = (8, 1, 4, 2, 3)
    data = file.create_dataset("codes", shape, "u1", chunks=shape, compression="gzip")
    data.id.write_direct_chunk((0,) * 5, zlib.compress(b"a"))


@pytest.mark.parametrize(
    "change", [forged_values, forged_shape, forged_chunk, lambda file: file.pop("size")]
)
def test_a_file_that_shows_hdf5_something_else_is_named(
    labels: Path, change: Callable[[h5py.File], object]
) -> None:
    forge(labels / FIRST, change)
    (fault,) = verify(labels).faults
    assert fault.file == FIRST and "HDF5" in fault.text, fault


@pytest.mark.parametrize(
    ("text", "bit", "message"),
    [
        (f"  {FIRST}", 0, "two spaces"),
        (FIRST, 0, "it lists 'rhard-00000-of-00002.h5', which is no file of a split"),
        (FIRST[10:], 1, f"it lacks 1 files, {FIRST} the first of them"),
        ("index", 0, "it lacks 1 files, index the first of them"),
        ("\n", 0, "it lacks 2 files"),
    ],
)
def test_each_flipped_bit_of_the_list_is_found(
    listed: Path, text: str, bit: int, message: str
) -> None:
    path = listed / SUMS
    flip(path, path.read_bytes().index(text.encode()), bit)
    assert any(fault.file == SUMS and message in fault.text for fault in verify(listed).faults)


@pytest.mark.parametrize("name", [FIRST, "index", "manifest"])
def test_a_file_with_another_digest_than_listed_is_named(listed: Path, name: str) -> None:
    """As after a rewrite that left all checksums inside the file right."""
    write_sums(listed, read_sums(listed) | {name: "0" * 64})
    (fault,) = verify(listed).faults
    assert fault.file == name and f"must be {'0' * 64}, as in {SUMS}" in fault.text


def test_listed_files_that_are_gone_are_missing(listed: Path) -> None:
    for name in (SECOND, "manifest", "index"):
        (listed / name).unlink()
    result = verify(listed)
    assert (result.missing, result.faults) == (["manifest", SECOND], [])
    assert "there is no index: it is built when it is needed" in result.notes


def swap(labels: Path) -> None:
    (labels / FIRST).rename(labels / "other")
    (labels / SECOND).rename(labels / FIRST)
    (labels / "other").rename(labels / SECOND)


def replace_by_another_run(labels: Path) -> None:
    with write_shard(labels / SECOND, LAYOUT, ["z.jpg"], [0], attrs(1, 2, 8)) as writer:
        writer.append(*random_rows(LAYOUT, 1))


def stale_index(labels: Path) -> None:
    """As from before the shards were redone with other images."""
    other = labels.parent / "other"
    write_split(other, [f"{n}.jpg" for n in range(8)], LAYOUT)
    build_index(other)
    shutil.copy(other / "index", labels / "index")


def another_manifest(labels: Path, by: int = 1, names: Sequence[str] = NAMES) -> None:
    old = open_manifest(labels / "manifest")
    zeros = np.zeros(len(old.keys), np.uint32)
    ids = {name: number + by for name, number in old.folders.items()}
    write_manifest(
        labels / "manifest",
        [Block(list(old.keys), old.classes, zeros, zeros, zeros)],
        lambda: Numbered("teacher", names, ids),
        old.source,
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap, f"{FIRST}: its name says shard 0 of 2, its header 1 of 2"),
        (lambda labels: (labels / SECOND).unlink(), f"{SECOND} is missing"),
        (replace_by_another_run, f"{SECOND}: it is of another run: its fingerprint is ffff"),
        (stale_index, "index: is older than the shards"),
        (another_manifest, "manifest: it is not the shards' manifest: its digest is"),
        (
            lambda labels: another_manifest(labels, 0, NAMES[::-1]),
            "manifest: its class_names must have the sha256",
        ),
        (
            lambda labels: shutil.copy(labels / FIRST, labels / shard_name(0, 3)),
            f"{shard_name(0, 3)}: most shards here are of a split of 2 shards",
        ),
    ],
)
def test_files_that_do_not_belong_together_are_named(
    labels: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(labels)
    assert message in invoke("inspect-labels", labels, "--verify", "--workers", 1, code=1)


def test_an_index_of_other_values_is_stale(labels: Path) -> None:
    """Of a shard of the same size that is not the first one, which is compared on each opening."""
    rewrite(labels / SECOND, put("label", 0, 3))
    (fault,) = index_faults(labels / "index", find_shards(labels))
    assert fault.text == f"stale: it differs from {SECOND}"


def test_changed_images_are_named_and_do_not_condemn_the_shard(
    labels: Path, written: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(written / "images", tmp_path / "images"))
    first, second, *_ = sorted(images.rglob("*.jpg"))
    first.write_bytes(first.read_bytes() + b"\0")
    second.unlink()
    result = verify(labels, images)
    assert [images / str(fault.key) for fault in result.faults] == [first, second]
    assert "not the one that was annotated" in result.faults[0].text
    assert "is not among the images" in result.faults[1].text
    assert result.bad_files == []


def test_repair_asks_and_annotate_makes_the_same_bytes_again(
    sample: Path, tmp_path: Path, ray_here: None
) -> None:
    out = tmp_path / "labels"
    annotate(config(sample, out))
    want = digests(out / "train")
    path, kept = out / "train" / FIRST, out / "train" / SECOND
    command = ("inspect-labels", out, "--repair", "--workers", 1, "--images", sample)
    assert "all is well" in invoke(*command)
    flip(path, path.stat().st_size // 2)
    assert f"Delete {FIRST} of" in invoke(*command, code=1, answer="n\n")
    assert path.exists()
    stamp = kept.stat().st_mtime_ns
    text = invoke(*command, code=1, answer="y\n")
    assert f"Deleted {FIRST}, index of" in text
    assert not path.exists() and kept.exists()
    assert f"{FIRST} is missing" in invoke(*command, "--yes", code=1)
    report = annotate(config(sample, out))
    assert (report.written, report.skipped) == (1, 1)
    assert digests(out / "train") == want and kept.stat().st_mtime_ns == stamp
    assert "all is well" in invoke(*command)


def test_repair_keeps_away_from_a_running_job(labels: Path) -> None:
    (labels / FIRST).write_bytes(b"damaged")
    with folder_lock(labels):
        text = invoke("inspect-labels", labels, "--repair", "--yes", code=1)
    assert "another job is writing" in text and (labels / FIRST).exists()


@pytest.mark.parametrize(
    "command",
    [
        ["--verify", "--html", "x.html"],
        ["--png", "x.png"],
        ["--repair", "--json"],
        ["--verify", "--images", "/nowhere"],
        ["--workers", "-1"],
    ],
)
def test_bad_usage(labels: Path, command: list[str]) -> None:
    invoke("inspect-labels", labels, *command, code=2)
