"""Small jobs on real photographs, for the tests of the job."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tokenlabel.annotate.config import AnnotateConfig
from tokenlabel.dataset.shard import Shard
from tokenlabel.dataset.store import LabelStore

#: 64 px pictures and 2 x 2 maps keep a job's teacher from costing more than its start. The last
#: batch of each shard is smaller than the others, as in most data sets. Equal bytes are promised
#: for an equal number of threads only, so it does not depend on the machine or on the teachers.
SMALL: dict[str, Any] = {
    "model": "tf_efficientnet_lite0",
    "weights": "sample",
    "input_size": 64,
    "batch_size": 5,
    "shard_size": 8,
    "threads": 1,
}
COMMAND = [sys.executable, "-m", "tokenlabel.cli", "annotate"]


def config(data: Path, out: Path, **options: Any) -> AnnotateConfig:
    """Options of a small job on `data`/train."""
    return AnnotateConfig(data=str(data), out=str(out), **{**SMALL, **options})


def arguments(data: Path, out: Path, **options: Any) -> list[str]:
    """The same as a command line."""
    given = {"data": data, "out": out, **SMALL, **options}
    return [*COMMAND, *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


def environment() -> dict[str, str]:
    """Of a command that must not find a Ray session that is not its own."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def run(*command: str, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment(), check=False
    )


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the files that must be equal from run to run: all but the report."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "report.json"
    }


def assert_nearly_equal(one: Path, other: Path) -> None:
    """What two machines may differ in: the last unit of a score in rare cells, and nothing else."""
    a, b = LabelStore(one), LabelStore(other)
    assert list(a.keys) == list(b.keys)
    for column in ("labels", "sizes", "failed"):
        np.testing.assert_array_equal(getattr(a, column), getattr(b, column))
    for path in sorted(one.glob("shard-*")):
        with Shard(path) as left, Shard(other / path.name) as right:
            assert left.attrs["fingerprint"] == right.attrs["fingerprint"]
            np.testing.assert_array_equal(left.read("digest"), right.read("digest"))
            assert left.texts("error") == right.texts("error")
    maps = [(a[row], b[row]) for row in np.flatnonzero(~a.failed)]
    for name in ("scores", "rest"):
        left, right = (np.stack([getattr(pair[i], name) for pair in maps]) for i in (0, 1))
        np.testing.assert_array_max_ulp(left, right, 1)
        assert (left != right).mean() < 0.01, f"{name}: rare cells only"
    # Two classes with nearly the same logit may change places.
    assert np.mean([left.classes != right.classes for left, right in maps]) < 0.01


def repeat_images(sample: Path, root: Path, count: int) -> Path:
    """A data set of `count` pictures: the sample's, over and over, under different names."""
    pictures = sorted(sample.rglob("*.jpg"))
    for number in range(count):
        source = pictures[number % len(pictures)]
        target = root / "train" / source.parent.name / f"{number:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return root
