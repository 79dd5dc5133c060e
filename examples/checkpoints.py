"""Checkpoints of the training scripts here: written whole, and of one run only."""

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; a crash leaves the old one or the new one, never half of one."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def refuse_other_run(path: Path, saved: dict[str, str], asked: dict[str, str]) -> None:
    """Raise ValueError if a checkpoint is of a run with other settings than those asked for."""
    changed = [
        f"{name}: {saved.get(name)} then, {value} now"
        for name, value in asked.items()
        if saved.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{path} is of a run with other settings ({'; '.join(changed)}). "
            "Remedy: another --out, or delete it"
        )
