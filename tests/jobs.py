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
from tokenlabel.dataset.format.score_map import DROPPED
from tokenlabel.dataset.format.shard import Shard
from tokenlabel.dataset.store import LabelStore

#: 64 px images and 2 x 2 maps keep a job's teacher from costing more than its start. The last
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


def arguments(data: Path | str, out: Path | str, **options: Any) -> list[str]:
    """The same as a command line."""
    given = {"data": data, "out": out, **SMALL, **options}
    return [*COMMAND, *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


def environment() -> dict[str, str]:
    """Of a command that must not find a Ray session that is not its own."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def run(
    *command: str, variables: dict[str, str] | None = None, timeout: float | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end, with these variables in its environment."""
    env = environment() | (variables or {})
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=env, check=False
    )


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the files that must be equal from run to run: all but the report and the lock."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in ("report.json", ".lock")
    }


def assert_nearly_equal(one: Path, other: Path) -> None:
    """What two machines may differ in: a code by one in rare cells, and nothing else."""
    a, b = LabelStore(one), LabelStore(other)
    assert list(a.keys) == list(b.keys)
    for path in sorted(one.glob("shard-*")):
        with Shard(path) as left, Shard(other / path.name) as right:
            assert left.attrs["fingerprint"] == right.attrs["fingerprint"]
            for name in ("label", "size", "digest", "thumbprint", "orientation"):
                np.testing.assert_array_equal(left.read(name), right.read(name))
            assert left.texts("error") == right.texts("error")
    maps = [(a[row], b[row]) for row in np.flatnonzero(~a.failed)]
    at_floor = -np.log(a.attrs["floor"]) / a.layout.step
    for left, right in maps:
        one_code, other_code = left.codes.astype(int), right.codes.astype(int)
        stored = np.minimum(one_code, other_code)
        dropped = np.maximum(one_code, other_code) == DROPPED
        np.testing.assert_array_less(abs(one_code - other_code)[~dropped], 2)
        only_one = dropped & (one_code != other_code)
        np.testing.assert_array_less(abs(stored - at_floor)[only_one], 1)
        assert left.level is not None and right.level is not None
        np.testing.assert_array_max_ulp(left.level, right.level, 1)
        np.testing.assert_allclose(left.residual(), right.residual(), rtol=0.15, atol=2e-3)
    # Two classes that are nearly as probable may change places.
    for name in ("codes", "classes", "level", "residual_codes"):
        changed = np.array([getattr(left, name) != getattr(right, name) for left, right in maps])
        assert changed.sum() <= max(changed.size / 100, 2), f"{name}: rare cells only"


def repeat_images(sample: Path, root: Path, count: int) -> Path:
    """A data set of `count` images: the sample's, over and over, under different names."""
    images = sorted(sample.rglob("*.jpg"))
    for number in range(count):
        source = images[number % len(images)]
        target = root / "train" / source.parent.name / f"{number:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return root
