"""Small jobs on real photographs, for the tests of the job."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenlabel.annotate.config import AnnotateConfig

#: 64 px pictures and 2 x 2 maps keep a job's teacher from costing more than its start. The last
#: batch of each shard is smaller than the others, as in most data sets.
SMALL: dict[str, Any] = {
    "model": "tf_efficientnet_lite0",
    "weights": "sample",
    "input_size": 64,
    "batch_size": 5,
    "shard_size": 8,
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


def repeat_images(sample: Path, root: Path, count: int) -> Path:
    """A data set of `count` pictures: the sample's, over and over, under different names."""
    pictures = sorted(sample.rglob("*.jpg"))
    for number in range(count):
        source = pictures[number % len(pictures)]
        target = root / "train" / source.parent.name / f"{number:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return root
