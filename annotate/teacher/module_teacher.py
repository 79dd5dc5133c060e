"""Somebody's own network as a teacher: one file, with a function that builds it."""

import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ...errors import TeacherError
from .teacher import PatchHead, Teacher

MODULE_MODE = "output of the network itself; the pooled logits are its mean"
_NEEDED = ("num_classes", "input_size", "mean", "std")


class ModuleTeacher:
    """A `Teacher` whose network gives the patch logits itself, as `Teacher` describes.

    Args:
        network: Normalised images [B, 3, h, w] to patch logits [B, C, H, W].
        name: What shards call it.

    Raises:
        TeacherError: The network lacks an attribute, or its classes or size are no such numbers.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        self.name, self.network = name, network
        net: Any = network
        if missing := [attribute for attribute in _NEEDED if not hasattr(net, attribute)]:
            rule = f"have the attributes {', '.join(_NEEDED)}"
            got = f"gives a {type(net).__name__} without {', '.join(missing)}"
            raise _refusal(rule, name, got, "set them on its class")
        self.num_classes, size = net.num_classes, net.input_size
        self.input_size = tuple(size) if isinstance(size, list | tuple) else (size, size)
        numbers = (self.num_classes, *self.input_size)
        if len(numbers) != 3 or not all(isinstance(n, int) and n > 0 for n in numbers):
            rule = "have a number of classes, and as input_size (height, width) in pixels"
            got = f"has num_classes {self.num_classes!r} and input_size {size!r}"
            raise _refusal(rule, name, got, "set them to positive integers")
        self.mean, self.std = net.mean, net.std
        self.interpolation = getattr(net, "interpolation", "bicubic")
        self.class_names = getattr(net, "class_names", None)

    def features(self, images: Tensor) -> Tensor:
        """The patch logits [B, C, H, W], in the precision of the job."""
        logits: Tensor = self.network(images)
        return logits

    def patch_head(self, features: Tensor, input_size: tuple[int, int]) -> PatchHead:
        """The patch logits as they are, and their mean.

        Raises:
            TeacherError: They are no [1, C, H, W] of two patches or more.
        """
        shape = tuple(features.shape) if isinstance(features, Tensor) else ()
        if len(shape) != 4 or shape[:2] != (1, self.num_classes) or shape[2] * shape[3] < 2:
            h, w = input_size
            rule = f"map images [B, 3, {h}, {w}] to logits [B, {self.num_classes}, H, W] of patches"
            got = f"gives {shape or type(features).__name__} for B = 1"
            raise _refusal(rule, self.name, got, "return the logits of each patch, before pooling")
        return PatchHead(
            shape[2:], MODULE_MODE, True, lambda x: x.movedim(1, 3), lambda x: x.mean((2, 3))
        )


def split_file(model: str) -> tuple[Path, str] | None:
    """File and function of `FILE.py:FUNCTION`; None for the name of a timm model."""
    match = re.fullmatch(r"(.+\.py)(?::(.*))?", model)
    return (Path(match[1]).expanduser(), match[2] or "") if match else None


def load_file(path: Path, function: str) -> tuple[Teacher, bytes]:
    """Run somebody's file: the teacher that its function gives, and the bytes of the file.

    The bytes belong to the digest of its weights. It is called by the file's name without its
    folder.

    Raises:
        TeacherError: The file cannot be read or run, or its function returns no teacher.
    """
    name = f"{path.name}:{function}"
    try:
        code = path.read_bytes()
    except OSError as error:
        got, remedy = f"is not: {path}: {error.strerror}", "correct the path in `model`"
        raise _refusal("be in a file that can be read", name, got, remedy) from error
    module = ModuleType(f"tokenlabel_teacher_{path.stem}")
    module.__file__ = str(path.absolute())
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    try:
        # No import, which may run a cached .pyc: the digest is of the bytes that run.
        exec(compile(code, module.__file__, "exec"), vars(module))
        build = vars(module).get(function)
        network = build() if callable(build) else None
    except TeacherError:
        raise
    except Exception as error:  # it is not our code
        trace = traceback.extract_tb(error.__traceback__)
        lines = [at.lineno for at in trace if at.filename == module.__file__]
        where = f" in line {lines[-1]}" if lines else ""
        got = f"raises {type(error).__name__}{where}: {error}"
        raise _refusal("be built without an error", name, got, "correct the file") from error
    if isinstance(network, Teacher):
        return network, code
    if isinstance(network, nn.Module):
        return ModuleTeacher(network, name), code
    if not callable(build):
        got, remedy = f"names none in {path}", "name it in `model`: FILE.py:FUNCTION"
        raise _refusal("be returned by a function of the file", name, got, remedy)
    got = f"returns an object of type {type(network).__name__}"
    raise _refusal("be an nn.Module, or a Teacher", name, got, f"return one from {function}")


def _refusal(rule: str, name: str, got: str, remedy: str) -> TeacherError:
    return TeacherError(
        f"A network of your own must {rule}; {name} {got}. Remedy: {remedy}. docs/teachers.md "
        "shows a file that works."
    )
