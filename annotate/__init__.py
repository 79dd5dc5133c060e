"""Run a large teacher over a set of images once, on Ray, and store per-patch top-k scores.

`job` is the whole of it: `config` says what to do, `plan` what to write and `output` where, the
actors of `cluster` run a `teacher`, `report` says what came out.

Names load on first use: a decode worker imports this package for a few kilobytes of code and must
not pay for torch, timm and pydantic.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import AnnotateConfig
    from .job import annotate
    from .teacher.teacher import Teacher

__all__ = ["AnnotateConfig", "Teacher", "annotate"]

_HOMES = {"AnnotateConfig": "config", "Teacher": "teacher.teacher", "annotate": "job"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
