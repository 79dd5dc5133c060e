"""Run a large teacher over a folder of images once, on Ray, and store per-patch top-k scores.

Names load on first use: a decode worker imports this package for a few kilobytes of code and
must not pay for torch, timm and pydantic.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenlabel.annotate.config import AnnotateConfig
    from tokenlabel.annotate.job import annotate
    from tokenlabel.annotate.teacher import Teacher

__all__ = ["AnnotateConfig", "Teacher", "annotate"]

_HOMES = {
    "AnnotateConfig": "tokenlabel.annotate.config",
    "Teacher": "tokenlabel.annotate.teacher",
    "annotate": "tokenlabel.annotate.job",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
