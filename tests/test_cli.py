"""The command line: what a person sees of a job and of its labels."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.jobs import arguments, config, run
from tests.maps import write_split
from tokenlabel.annotate import annotate
from tokenlabel.cli import main
from tokenlabel.dataset.format.score_map import MapLayout

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def labels(sample: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """Both splits of the sample, the training one with two bad files."""
    folder = tmp_path_factory.mktemp("cli")
    data = Path(shutil.copytree(sample, folder / "data"))
    (data / "train" / "n02108422" / "a [bold]b.jpg").touch()
    (data / "train" / "n02108422" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    out = folder / "labels"
    annotate(config(data, out, max_errors=2))
    annotate(config(data, out, split="val"))
    return out


def invoke(*command: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_summary_of_all_splits(labels: Path) -> None:
    text = invoke("inspect-labels", labels)
    assert str(labels / "train") in text.replace("\n", "")
    assert "18 in 3 shards, 2 errors" in text
    assert "2 x 2 patches, top 16 of 1000 classes" in text
    assert "'n02108422/a [bold]b.jpg': the file is empty" in text, "names are not markup"
    assert re.search(r"\d\.\d%\s+\d+  \w+", text), "frequent classes by name"


def test_summary_as_json(labels: Path) -> None:
    train, val = json.loads(invoke("inspect-labels", labels, "--json"))
    assert (train["images"], train["errors"], train["labelled"]) == (18, 2, 16)
    assert (val["images"], val["errors"], val["shards"]) == (4, 0, 1)
    assert 0 < train["topk_mass"] < 1
    assert 0 <= train["teacher_top1"] <= train["teacher_top5"] <= 1
    assert 0 < train["patches_with_label_on_top"] < 1
    assert len(train["frequent_classes"]) == 10
    assert train["attrs"]["teacher"] == "tf_efficientnet_lite0"
    assert train["bytes_per_image"] == pytest.approx(
        sum(p.stat().st_size for p in (labels / "train").glob("shard-*")) / 18
    )


def test_one_map(labels: Path) -> None:
    key = "n02108422/imagenet_00_243.jpg"
    text = invoke("inspect-labels", labels, "--key", key)
    assert "512 x 512 px, label: bull mastiff" in text.replace("\n", " ")
    assert len(re.findall(r"^   [A-La-l.]  [A-La-l.] $", text, re.MULTILINE)) == 2
    facts = json.loads(invoke("inspect-labels", labels, "--key", key, "--json"))
    assert facts["label_name"] == "bull mastiff"
    assert len(facts["classes"]) == len(facts["probs"]) == 2
    assert set(map(int, facts["names"])) == {c for row in facts["classes"] for c in row}


def test_nothing_to_inspect() -> None:
    text = invoke("inspect-labels", "/nowhere", code=2)
    assert "no folder /nowhere. Remedy: make labels" in text
    assert "no shards in" in invoke("inspect-labels", ROOT / "docs", code=2)


def test_keys_without_a_map(labels: Path) -> None:
    assert "no image 'x.jpg' in" in invoke("inspect-labels", labels, "--key", "x.jpg", code=1)
    text = invoke("inspect-labels", labels, "--key", "n02108422/cut.jpg", code=1)
    assert "'n02108422/cut.jpg' has no score map: not an image" in text


def test_one_incomplete_split_does_not_hide_the_others(labels: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(labels, tmp_path / "labels")
    (copy / "train" / "shard-00001-of-00003.h5").unlink()
    text = invoke("inspect-labels", copy, code=1)
    assert "4 in 1 shards" in text
    assert "is incomplete: 1 of 3 shards are missing" in text
    key = json.loads(invoke("inspect-labels", labels / "val", "--json"))[0]["folder"]
    assert key == str(labels / "val")


def test_labels_of_another_writer(tmp_path: Path) -> None:
    """The spec asks no writer for statistics; the summary says what it misses."""
    write_split(tmp_path, ["a.jpg"], MapLayout(("identity",), (2, 2), 3, 50, residual=4))
    assert "the header lacks labelled, mass, top1, top5" in invoke(
        "inspect-labels", tmp_path, code=1
    )


def test_annotate_reports_and_says_what_is_next(sample: Path, tmp_path: Path) -> None:
    command = arguments(sample, tmp_path, split="val")[3:]
    for state in ("1 new, 0 kept", "0 new, 1 kept"):
        text = invoke(*command)
        assert state in text.replace("\n", " ")
        assert "teacher accuracy" in text and "bytes per image" in text
        assert f"Next: python cli.py inspect-labels {tmp_path}" in text.replace("\n", "")
    assert "k: 16 there, 5 now" in invoke(*command, "--k", 5, code=1)


def test_too_many_errors_end_with_status_1(sample: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(sample / "val", data / "train")
    (data / "train" / "empty.jpg").touch()
    text = invoke(*arguments(data, tmp_path / "out")[3:], code=1)
    assert "Too many images have no map (1 of 5)" in text.replace("\n", " ")
    assert "no map 'empty.jpg': the file is empty" in text.replace("\n", " ")


def test_no_traceback_from_a_teacher_that_fails_in_its_actor(sample: Path, tmp_path: Path) -> None:
    done = run(*arguments(sample, tmp_path, weights=tmp_path / "none.pth"))
    assert done.returncode == 2
    assert "none.pth" in done.stderr and "Remedy" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_signal_that_a_callback_swallows_is_remembered_without_a_stack_dump() -> None:
    code = """
import os, signal, weakref
from tokenlabel.cli import _stop_on_signals

class Thing: pass

def stop(_):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000): pass

def fail(_):
    raise ValueError("ours")

with _stop_on_signals() as stopped:
    for callback in (stop, fail):
        thing = Thing()
        reference = weakref.ref(thing, callback)
        del thing
    print(stopped.is_set())
"""
    done = run(sys.executable, "-c", code)
    assert done.stdout == "True\n"
    assert "KeyboardInterrupt" not in done.stderr
    assert "ValueError: ours" in done.stderr, "other errors are reported as before"
