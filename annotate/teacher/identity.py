"""Build the teacher that a job's options name, and describe it to the driver."""

import platform
import re
from contextlib import suppress
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch

from ...dataset.sources.image_source import ImageSource
from ...errors import StorageError, TeacherError
from ..config import AnnotateConfig
from ..images import DecodedBatch, decode_batch, join_batches
from ..plan import Identity
from .timm_teacher import Teacher

#: Images on which the dense logits are compared with the pooled ones at start-up.
_CHECKED = 8
_LIBRARIES = ("tokenlabel", "torch", "timm", "numpy", "pillow", "h5py")


def build_teacher(config: AnnotateConfig) -> Teacher:
    """The teacher that the options name."""
    teacher = Teacher(
        config.model,
        weights=config.weights,
        num_classes=config.num_classes,
        input_size=config.input_size,
        precision=config.precision,
        channels_last=config.channels_last,
        compile=config.compile,
        device=config.device,
        interpolation=config.interpolation,
    )
    if config.class_names:
        teacher.class_names = read_class_names(config.class_names, teacher.num_classes)
    return teacher


def read_class_names(path: str, num_classes: int) -> list[str]:
    """Lines of a text file; raises TeacherError unless there is one a class, all different."""
    try:
        names = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"class_names: {path} cannot be read: {error}") from error
    if len(names) != num_classes or len(set(names)) != num_classes or "" in names:
        raise TeacherError(
            f"class_names: {path} must hold a different name a line for each of the teacher's "
            f"{num_classes} classes; it has {len(names)} lines, {len(set(names))} different"
        )
    return names


def identify(teacher: Teacher, source: ImageSource) -> Identity:
    """Describe a teacher, after comparing its dense with its pooled logits on the first images.

    Raises:
        TeacherError: they differ although they must not.
        StorageError: none of the first images can be read.
    """
    batch = _first_images(teacher, source)
    return Identity(
        model=teacher.name,
        weights_digest=teacher.weights_digest,
        preprocessing=teacher.preprocessing(),
        grid=teacher.grid,
        num_classes=teacher.num_classes,
        class_names=teacher.class_names,
        device=teacher.device.type,
        head_mode=teacher.rule,
        exact=teacher.exact,
        pooled_error=float(teacher.check(batch.images)),
        libraries=libraries(teacher.device),
    )


def libraries(device: torch.device) -> dict[str, str]:
    """Everything but the settings that decides the last bits of a score here: name to value."""
    versions = {name: version(name) for name in _LIBRARIES}
    return {**versions, "processor": _processor(device)}


def _processor(device: torch.device) -> str:
    """What computes: a GPU's name; a CPU's, its vector instructions and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # only Linux has this file, and only x86 says more there
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M):
            name = found[1]
    vectors, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{name}, {vectors}, {threads} thread{'s' * (threads != 1)}"


def _first_images(teacher: Teacher, source: ImageSource) -> DecodedBatch:
    parts: list[DecodedBatch] = []
    failure: StorageError | None = None
    for entry in islice(source.scan(), _CHECKED):
        try:
            sizes, interpolation = teacher.input_sizes, teacher.interpolation
            parts.append(decode_batch(source, [entry.key.decode()], sizes, interpolation))
        except StorageError as error:  # fails its own shard alone
            failure = error
    if failure and not parts:
        raise failure
    return join_batches(parts)
