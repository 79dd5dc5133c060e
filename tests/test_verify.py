"""`inspect-labels --verify` and `--repair`: every kind of damage is found and named."""

import hashlib
import json
import os
import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from tests.jobs import config, digests
from tests.maps import attrs, random_rows, write_split
from tests.shards import edit_directory
from tokenlabel.annotate import annotate
from tokenlabel.annotate.classes import build_manifest
from tokenlabel.annotate.images import file_digest
from tokenlabel.cli import main
from tokenlabel.dataset.format.index import build_index
from tokenlabel.dataset.format.lock import folder_lock
from tokenlabel.dataset.format.manifest import open_manifest
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.format.shard import Shard, shard_name, write_shard
from tokenlabel.dataset.sources.folder import FolderSource
from tokenlabel.errors import FormatError
from tokenlabel.inspection.verify.index_check import index_difference
from tokenlabel.inspection.verify.shard_check import check_shard
from tokenlabel.inspection.verify.verify import verify

#: FLIPS=20000 CUTS=500 for the soak.
FLIPS, CUTS = int(os.environ.get("FLIPS", 500)), int(os.environ.get("CUTS", 50))
FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)
LAYOUT = MapLayout(("identity",), (2, 3), 4, 1000, residual=6)
NAMES = [f"n{number:08d}" for number in range(1000)]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of 16 images in 2 shards, with manifest and index, and the images beside it."""
    root = tmp_path_factory.mktemp("verify")
    keys = [f"{NAMES[number % 2]}/{number:02d}.jpg" for number in range(16)]
    for key in keys:
        path = root / "images" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(key.encode())
    (root / "train").mkdir()
    manifest = build_manifest(
        FolderSource(root / "images"), root / "train" / "manifest", NAMES, 1000
    )
    named = hashlib.sha256(json.dumps(NAMES).encode()).hexdigest()
    settings = json.dumps({"manifest": manifest.digest, "class_names": named, "shard_size": 8})
    more = {
        "settings": settings,
        "fingerprint": hashlib.sha256(settings.encode()).hexdigest(),
        "label_space": "teacher",
    }
    for number in range(2):
        part = slice(8 * number, 8 * number + 8)
        header = attrs(number, 2, 8 * number, **more)
        rows = random_rows(LAYOUT, 8, number)
        digests = [file_digest((root / "images" / key).read_bytes()) for key in manifest.keys[part]]
        with write_shard(
            root / "train" / shard_name(number, 2),
            LAYOUT,
            manifest.keys[part],
            manifest.labels[part],
            header,
        ) as writer:
            writer.append(rows.maps, rows.sizes, np.array(digests, "u8"), rows.errors)
    build_index(root / "train")
    return root


@pytest.fixture
def labels(written: Path, tmp_path: Path) -> Path:
    """A copy of the split, to damage."""
    return Path(shutil.copytree(written / "train", tmp_path / "train"))


def invoke(*command: object, code: int = 0, answer: str | None = None) -> str:
    result = CliRunner().invoke(main, [str(word) for word in command], input=answer)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_undamaged_labels_are_well(written: Path) -> None:
    command = ("inspect-labels", written / "train", "--verify", "--images", written / "images")
    text = invoke(*command, "--workers", 2)
    assert "read 16 rows in 2 shards" in text and "all is well" in text
    assert "note" not in text


@pytest.mark.parametrize("views", [("identity",), ("identity", "hflip")])
@pytest.mark.parametrize("step", [0.25, 0.0])
@pytest.mark.parametrize("residual", [6, 0])
def test_all_layouts_are_well(
    tmp_path: Path, step: float, views: tuple[str, ...], residual: int
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
    text = invoke("inspect-labels", labels, "--verify", "--workers", 0, code=1)
    assert name in text and SECOND not in text


def found(path: Path) -> bool:
    """Whether the part of `verify` that checks this file finds it damaged."""
    try:
        if path.name == "index":
            return bool(index_difference(path, sorted(path.parent.glob("shard-*"))))
        if path.name == "manifest":
            open_manifest(path, verify=True)
            return False
        return bool(check_shard(path).faults)
    except FormatError:
        return True


def test_each_truncation_is_found(labels: Path) -> None:
    path, rng = labels / SECOND, random.Random(2)
    content = path.read_bytes()
    for length in [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(CUTS - 2))]:
        path.write_bytes(content[:length])
        assert check_shard(path).faults, length
    path.write_bytes(content + b"\0")
    assert verify(labels).bad_files == [SECOND], "so are bytes behind the end"


def test_class_names_are_covered(labels: Path, written: Path) -> None:
    """A manifest that is whole, with the names of other classes."""
    build_manifest(
        FolderSource(written / "images"), labels / "manifest", NAMES[:2] + NAMES[:1:-1], 1000
    )
    (fault,) = verify(labels).faults
    assert fault.file == "manifest" and "class_names" in fault.text


def rewrite(path: Path, name: str, index: object, value: object) -> None:
    """Write a shard again with other values, by the real writer, but with the digest of before."""
    with Shard(path) as shard:
        layout, header, rows = shard.layout, dict(shard.attrs), shard.rows
        names = ("key", "label", "size", "digest", "error")
        arrays = {part: shard.read(part) for part in (*layout.planes(), *names)}
    if name == "error":
        arrays[name] = arrays[name].astype("S9")
    arrays[name][index] = value
    keys, errors = ([text.decode() for text in arrays[part].tolist()] for part in ("key", "error"))
    maps = {part: arrays[part] for part in layout.planes()}
    path.unlink()
    with write_shard(path, layout, keys, arrays["label"], header) as writer:
        writer.append(maps, arrays["size"], arrays["digest"], [""] * rows)
        writer._errors = errors
    edit_directory(
        path,
        lambda found: found["attrs"].update(errors=header["errors"], sha256=header["sha256"]),
    )


@pytest.mark.parametrize(
    ("name", "index", "value", "row", "message"),
    [
        ("codes", (3, 0, 0, 1, 1), 255, 3, "the first class of a cell must not be dropped"),
        ("codes", (3, 0, 3, 1, 2), 0, 3, "must not descend"),
        ("level", (5, 0, 0, 0), np.inf, 5, "level must be finite"),
        ("classes", (6, 0, 0, 0, 0), 1000, 6, "class ids must be below 1000"),
        ("residual_classes", (6, 0, 5), 1001, 6, "residual classes must be below 1000"),
        ("residual_classes", (6, 0, 5), 0, 6, "residual classes must ascend"),
        ("label", 2, 1000, 2, "a label must be -1 or below 1000"),
        ("label", 2, 7, 2, "in the manifest"),
        ("size", (4, 0), 0, 4, "width and height"),
        ("error", 1, b"?", 0, "counts 0 rows with an error, there are 1"),
        ("digest", 1, 1, None, "sha256 of the decoded arrays"),
        ("key", 3, b"../../secret.jpg", 3, "a key must be a path inside the split's folder"),
    ],
)
def test_impossible_values_name_shard_and_row(
    labels: Path, name: str, index: object, value: object, row: int | None, message: str
) -> None:
    rewrite(labels / SECOND, name, index, value)
    faults = verify(labels).faults
    assert {fault.file for fault in faults} == {SECOND}
    assert any(message in fault.text and fault.row == row for fault in faults), faults
    assert any("sha256" in fault.text for fault in faults)


def test_classes_of_a_cell_are_different(labels: Path) -> None:
    with Shard(labels / FIRST) as shard:
        twice = int(shard.read("classes")[7, 0, 0, 0, 0])
    rewrite(labels / FIRST, "classes", (7, 0, 1, 0, 0), twice)
    assert any("must be different" in f.text and f.row == 7 for f in verify(labels).faults)


def test_a_damaged_row_is_named_with_its_image(labels: Path) -> None:
    with Shard(labels / FIRST) as shard:
        key, bounds = shard.texts("key")[2], shard.read("bounds")
        place = shard.maps.offset + int(bounds[10] + bounds[11]) // 2
    flip(labels / FIRST, place, 4)
    (fault,) = verify(labels).faults
    assert (fault.file, fault.row, fault.key) == (FIRST, 2, key)
    facts = json.loads(invoke("inspect-labels", labels, "--verify", "--json", code=1))
    assert facts[0]["bad_files"] == [FIRST] and facts[0]["faults"][0]["row"] == 2


def forge(path: Path, change: Callable[[h5py.File], None]) -> None:
    """Show HDF5 something else than the directory says, with all of our checksums right."""
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        change(file)
    size = path.stat().st_size

    def update(found: dict[str, object]) -> None:
        rest = path.read_bytes()[int(str(found["block"])) :]
        found.update(size=size, crc=zlib.crc32(rest))

    edit_directory(path, update)


def forged_attribute(file: h5py.File) -> None:
    file.attrs["teacher"] = "another"


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
    data = file.create_dataset(
        "codes", (8, 1, 4, 2, 3), "u1", chunks=(8, 1, 4, 2, 3), compression="gzip"
    )
    data.id.write_direct_chunk((0,) * 5, zlib.compress(b"a"))


def lost_dataset(file: h5py.File) -> None:
    del file["size"]


@pytest.mark.parametrize(
    "change", [forged_attribute, forged_values, forged_shape, forged_chunk, lost_dataset]
)
def test_a_file_that_shows_hdf5_something_else_is_named(
    labels: Path, change: Callable[[h5py.File], None]
) -> None:
    forge(labels / FIRST, change)
    (fault,) = verify(labels).faults
    assert fault.file == FIRST and "HDF5" in fault.text, fault


def swap(labels: Path) -> list[str]:
    (labels / FIRST).rename(labels / "other")
    (labels / SECOND).rename(labels / FIRST)
    (labels / "other").rename(labels / SECOND)
    return ["its name says shard 0 of 2, its header 1 of 2", "its name says shard 1 of 2"]


def lose(labels: Path) -> list[str]:
    (labels / SECOND).unlink()
    return [f"{SECOND} is missing"]


def replace_by_another_run(labels: Path) -> list[str]:
    with write_shard(labels / SECOND, LAYOUT, ["z.jpg"], [0], attrs(1, 2, 8)) as writer:
        writer.append(*random_rows(LAYOUT, 1))
    return [f"{SECOND}: it is of another run: its fingerprint is {'f' * 64}"]


def stale_index(labels: Path) -> list[str]:
    """As from before the shards were redone with other images."""
    other = labels.parent / "other"
    write_split(other, [f"{n}.jpg" for n in range(8)], LAYOUT)
    build_index(other)
    shutil.copy(other / "index", labels / "index")
    return ["index: stale or damaged"]


def another_manifest(labels: Path) -> list[str]:
    path = labels / "manifest"
    content = path.read_bytes()
    place = content.index(b"n00000001/01.jpg")
    path.write_bytes(content[:place] + b"N" + content[place + 1 :])
    return ["manifest: is damaged"]


def another_length(labels: Path) -> list[str]:
    shutil.copy(labels / FIRST, labels / shard_name(0, 3))
    return [f"{shard_name(0, 3)}: it is of a split of 3 shards"]


@pytest.mark.parametrize(
    "damage",
    [swap, lose, replace_by_another_run, stale_index, another_manifest, another_length],
)
def test_files_that_do_not_belong_together_are_named(
    labels: Path, damage: Callable[[Path], list[str]]
) -> None:
    messages = damage(labels)
    text = invoke("inspect-labels", labels, "--verify", "--workers", 0, code=1)
    for message in messages:
        assert message in text


def test_changed_images_are_named_and_do_not_condemn_the_shard(
    labels: Path, written: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(written / "images", tmp_path / "images"))
    first, second, *_ = sorted(images.rglob("*.jpg"))
    first.write_bytes(first.read_bytes() + b"\0")
    second.unlink()
    result = verify(labels, images)
    assert [fault.key for fault in result.faults] == [
        path.relative_to(images).as_posix() for path in (first, second)
    ]
    assert "not the one that was annotated" in result.faults[0].text
    assert "No such file" in result.faults[1].text
    assert result.bad_files == []


def test_repair_asks_and_annotate_makes_the_same_bytes_again(
    sample: Path, tmp_path: Path, ray_here: None
) -> None:
    out = tmp_path / "labels"
    annotate(config(sample, out))
    want = digests(out / "train")
    path, kept = out / "train" / FIRST, out / "train" / SECOND
    command = ("inspect-labels", out, "--repair", "--workers", 0, "--images", sample)
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


def hostile_claim(found: dict[str, Any]) -> None:
    found["columns"]["key"]["shape"] = [1 << 40]


def hostile_attribute(found: dict[str, Any]) -> None:
    found["attrs"]["first_row"] = "zero"


def hostile_settings(found: dict[str, Any]) -> None:
    found["attrs"]["settings"] = "[" * 1000


def hostile_nesting(found: dict[str, Any]) -> None:
    found["attrs"]["extent"] = [[[[]]]]


@pytest.mark.parametrize(
    "damage", [hostile_claim, hostile_attribute, hostile_settings, hostile_nesting]
)
def test_hostile_shards_end_in_a_message(
    labels: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    edit_directory(labels / FIRST, damage)
    text = invoke("inspect-labels", labels, "--verify", code=1)
    assert FIRST in text


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
