"""`inspect-labels --verify` and `--repair`: every kind of damage is found and named."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from tests.jobs import config, digests
from tests.maps import attrs, random_rows, write_split
from tokenlabel.annotate import annotate
from tokenlabel.annotate.lock import folder_lock
from tokenlabel.cli import main
from tokenlabel.dataset.index import build_index
from tokenlabel.dataset.shard import ShardLayout, shard_name, write_shard
from tokenlabel.inspection.shard_check import check_shard
from tokenlabel.inspection.verify import verify

#: FLIPS=200 CUTS=50 for the soak.
FLIPS, CUTS = int(os.environ.get("FLIPS", 40)), int(os.environ.get("CUTS", 15))
FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)


@pytest.fixture(scope="session")
def made(sample: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """Labels of the sample's 16 training pictures by the real job, in 2 shards."""
    out = tmp_path_factory.mktemp("verify")
    annotate(config(sample, out))
    return out


@pytest.fixture
def labels(made: Path, tmp_path: Path) -> Path:
    """A copy of their split, to damage."""
    return Path(shutil.copytree(made / "train", tmp_path / "train"))


def invoke(*command: object, code: int = 0, answer: str | None = None) -> str:
    result = CliRunner().invoke(main, [str(word) for word in command], input=answer)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_undamaged_labels_are_proven_byte_by_byte(made: Path, sample: Path) -> None:
    text = invoke("inspect-labels", made, "--verify", "--images", sample, "--workers", 2)
    assert "read 16 rows in 2 shards" in text and "all is well" in text
    assert "note" not in text, "every byte could be compared"
    for name in (FIRST, SECOND):
        assert check_shard(made / "train" / name).proven is True


@pytest.mark.parametrize("views", [["identity"], ["identity", "hflip"]])
@pytest.mark.parametrize("score_dtype", ["float16", "uint8"])
def test_all_layouts_are_proven(
    made: Path, tmp_path: Path, score_dtype: str, views: list[str]
) -> None:
    layout = ShardLayout(tuple(views), (3, 5), 4, 70_000, score_dtype)
    keys = [f"{n:03d}.jpg" for n in range(5)]
    write_split(tmp_path, keys, layout, errors={keys[1]: "truncated"})
    result = verify(tmp_path)
    assert result.ok and result.rows == 5, result.faults
    assert all(check_shard(path).proven for path in tmp_path.glob("shard-*"))


def test_each_flipped_bit_is_found(labels: Path) -> None:
    """200 of 200 with FLIPS=200; a bit of each block of metadata and data, and of unused bytes."""
    path, rng = labels / FIRST, random.Random(1)
    content = path.read_bytes()
    missed = []
    for _ in range(FLIPS):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        result = verify(labels)
        if result.ok or result.bad_files != [FIRST]:
            missed.append((place, bit))
    assert missed == []
    text = invoke("inspect-labels", labels, "--verify", "--workers", 0, code=1)
    assert FIRST in text and SECOND not in text


def test_each_truncation_is_found(labels: Path) -> None:
    path, rng = labels / SECOND, random.Random(2)
    content = path.read_bytes()
    for length in [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(CUTS - 2))]:
        path.write_bytes(content[:length])
        result = verify(labels)
        assert result.bad_files == [SECOND], length
    path.write_bytes(content + b"\0")
    assert verify(labels).bad_files == [SECOND], "so are bytes behind the end"


def test_class_names_are_covered(labels: Path) -> None:
    """HDF5 stores attributes of more than 4 kB without a checksum."""
    path = labels / FIRST
    content = path.read_bytes()
    place = content.index(b"n01440764") + 3
    path.write_bytes(content[:place] + b"9" + content[place + 1 :])
    (fault,) = verify(labels).faults
    assert "class_names" in fault.text


def change(path: Path, name: str, index: object, value: object) -> None:
    """Change values of a shard with plain h5py, header's digest left as it is."""
    with h5py.File(path, "r+") as file:
        file[name][index] = value


@pytest.mark.parametrize(
    ("name", "index", "value", "row", "message"),
    [
        ("scores", (3, 0, 1, 1, 0), np.nan, 3, "scores must be finite"),
        ("scores", (3, 0, 1, 1, 9), 99, 3, "must descend"),
        ("rest", (5, 0, 0, 0), np.inf, 5, "rest must be a number"),
        ("classes", (6, 0, 0, 0, 0), 1000, 6, "class ids must be below 1000"),
        ("label", 2, 1000, 2, "a label must be -1 or below 1000"),
        ("label", 2, 7, 2, "in the manifest"),
        ("size", (4, 0), 0, 4, "width and height"),
        ("error", 1, b"?", 0, "counts 0 rows with an error, there are 1"),
        ("digest", 1, 1, None, "sha256 of the decoded arrays"),
    ],
)
def test_impossible_values_name_shard_and_row(
    labels: Path, name: str, index: object, value: object, row: int | None, message: str
) -> None:
    change(labels / SECOND, name, index, value)
    faults = verify(labels).faults
    assert {fault.file for fault in faults} == {SECOND}
    assert any(message in fault.text and fault.row == row for fault in faults), faults
    assert any("sha256" in fault.text for fault in faults)


def test_classes_of_a_patch_are_different(labels: Path) -> None:
    with h5py.File(labels / FIRST, "r+") as file:
        file["classes"][7, 0, 0, 0, 1] = file["classes"][7, 0, 0, 0, 0]
    assert any("must be different" in f.text and f.row == 7 for f in verify(labels).faults)


def test_a_damaged_row_is_named_with_its_image(labels: Path) -> None:
    with h5py.File(labels / FIRST) as file:
        chunk, key = file["scores"].id.get_chunk_info(2), file["key"].asstr()[2]
    content = bytearray((labels / FIRST).read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 16
    (labels / FIRST).write_bytes(content)
    (fault,) = verify(labels).faults
    assert (fault.file, fault.row, fault.key) == (FIRST, 2, key)
    facts = json.loads(invoke("inspect-labels", labels, "--verify", "--json", code=1))
    assert facts[0]["bad_files"] == [FIRST] and facts[0]["faults"][0]["row"] == 2


def swap(labels: Path) -> list[str]:
    (labels / FIRST).rename(labels / "other")
    (labels / SECOND).rename(labels / FIRST)
    (labels / "other").rename(labels / SECOND)
    return ["its name says shard 0 of 2, its header 1 of 2", "its name says shard 1 of 2"]


def lose(labels: Path) -> list[str]:
    (labels / SECOND).unlink()
    return [f"{SECOND} is missing"]


def replace_by_another_run(labels: Path) -> list[str]:
    layout = ShardLayout(("identity",), (2, 2), 10, 1000)
    with write_shard(labels / SECOND, layout, ["z.jpg"], [0], attrs(1, 2, 8)) as writer:
        writer.append(*random_rows(layout, 1))
    return [f"{SECOND}: it is of another run: its fingerprint is {'f' * 64}"]


def stale_index(labels: Path) -> list[str]:
    """As from before the shards were made again with other images."""
    other = labels.parent / "other"
    layout = ShardLayout(("identity",), (2, 2), 10, 1000)
    write_split(other, [f"{n}.jpg" for n in range(8)], layout)
    build_index(other)
    shutil.copy(other / "index.h5", labels / "index.h5")
    return ["index.h5: stale or damaged"]


def another_manifest(labels: Path) -> list[str]:
    path = labels / "manifest.h5"
    content = path.read_bytes()
    place = content.index(b"imagenet_00")
    path.write_bytes(content[:place] + b"I" + content[place + 1 :])
    return ["manifest.h5: is damaged"]


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
    labels: Path, sample: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(sample / "train", tmp_path / "images"))
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
    made: Path, sample: Path, tmp_path: Path
) -> None:
    want = digests(made / "train")
    out = Path(shutil.copytree(made, tmp_path / "labels"))
    path, kept = out / "train" / FIRST, out / "train" / SECOND
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    command = ("inspect-labels", out, "--repair", "--workers", 0)
    assert f"Delete {FIRST} of" in invoke(*command, code=1, answer="n\n")
    assert path.exists()
    stamp = kept.stat().st_mtime_ns
    text = invoke(*command, code=1, answer="y\n")
    assert f"Deleted {FIRST}, index.h5 of" in text
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


def test_shards_of_another_writer_are_not_called_damaged(tmp_path: Path) -> None:
    """The spec lets a writer store as it likes; then only content can be compared."""
    layout = ShardLayout(("identity",), (2, 2), 3, 50)
    write_split(tmp_path, ["a.jpg", "b.jpg"], layout)
    path = tmp_path / shard_name(0, 1)
    with (
        h5py.File(path) as source,
        h5py.File(tmp_path / "copy", "w", libver=("v110", "v110")) as copy,
    ):
        for name in source:
            copy.create_dataset(name, data=source[name][:])
        for name, value in source.attrs.items():
            copy.attrs[name] = value
    (tmp_path / "copy").replace(path)
    result = verify(tmp_path)
    assert result.ok
    assert any("written by other versions" in note for note in result.notes)


def hostile_claim(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["label"]
        file.create_dataset("label", (1 << 40,), "<i4", chunks=(1024,), compression="gzip")


def hostile_attribute(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["first_row"] = "zero"


def hostile_key(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["key"][0] = b"../../secret.jpg"


def hostile_settings(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["settings"] = np.bytes_(b"[" * 100_000)


@pytest.mark.parametrize(
    "damage", [hostile_claim, hostile_attribute, hostile_key, hostile_settings]
)
def test_hostile_shards_end_in_a_message(
    labels: Path, sample: Path, damage: Callable[[Path], None]
) -> None:
    damage(labels / FIRST)
    text = invoke("inspect-labels", labels, "--verify", "--images", sample, code=1)
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
