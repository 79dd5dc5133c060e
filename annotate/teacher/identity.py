"""Build the teacher that a job's options name, and describe it to the driver."""

import platform
import re
from contextlib import suppress
from importlib import metadata
from itertools import chain, islice
from pathlib import Path

import torch

from ... import __version__
from ...dataset.sources.image_source import ImageSource
from ...errors import ConfigError, StorageError, TeacherError
from ..classes import chosen_names
from ..config import AnnotateConfig
from ..images import DecodedBatch, decode_batch, join_batches
from ..plan import Identity
from .annotator import Annotator
from .module_teacher import load_file, split_file
from .preprocess import recorded_settings
from .teacher import Teacher
from .timm_teacher import TimmTeacher, build_model
from .weights import PRETRAINED, SAMPLE

#: Images on which the patch logits are compared with the pooled ones at start-up.
_CHECKED = 8
_LIBRARIES = ("torch", "timm", "numpy", "pillow", "h5py")


def build_teacher(config: AnnotateConfig) -> Annotator:
    """The teacher that the options name, ready to annotate.

    Raises:
        TeacherError: it cannot be built or run as asked.
    """
    given = config.input_size
    sides = [given] if isinstance(given, int) else given or []
    sizes = [(side, side) if isinstance(side, int) else (side[0], side[1]) for side in sides]
    size = sizes[0] if sizes else None
    teacher, code = load_teacher(config.model, config.weights, config.num_classes, size)
    for name in ("mean", "std"):
        given, origins = getattr(config, name), getattr(teacher, "origins", {})
        known, origin = list(getattr(teacher, name)), origins.get(name, config.model)
        # timm's settings are those of the name, which the weights need not be of.
        if given not in (None, known) and (origin.startswith("args of ") or not origins):
            raise TeacherError(
                f"{name} must be that of the weights; {origin} says {known}, got {given}. Remedy: "
                f"leave {name} out, or correct it there."
            )
    annotator = Annotator(
        teacher,
        code=code,
        input_sizes=sizes,
        precision=config.precision,
        channels_last=config.channels_last,
        compile=config.compile,
        device=config.device,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
    )
    own, count = annotator.class_names, annotator.num_classes
    annotator.class_names = chosen_names(config.class_names, own, count, annotator.name)
    return annotator


def load_teacher(
    model: str,
    weights: str = PRETRAINED,
    num_classes: int | None = None,
    input_size: tuple[int, int] | None = None,
) -> tuple[Teacher, bytes]:
    """A teacher of any family, and the bytes of its file: none of timm's.

    Args:
        model: timm's name of a model, or `FILE.py:FUNCTION` of somebody's own.
        weights: as `build_model` takes it; for timm only, like what follows.
        num_classes: likewise.
        input_size: likewise.

    Raises:
        TeacherError: it cannot be built.
    """
    file = split_file(model)
    if file is None:
        is_file = weights not in (PRETRAINED, SAMPLE)
        recorded = recorded_settings(Path(weights).expanduser()) if is_file else {}
        if input_size is None and "input_size" in recorded:
            input_size = recorded["input_size"].value
        return TimmTeacher(
            build_model(model, weights, num_classes, input_size), model, recorded
        ), b""
    if weights != PRETRAINED or num_classes is not None:
        raise TeacherError(
            f"weights and num_classes are those that a network of your own has; got weights "
            f"{weights!r} and num_classes {num_classes} beside {model}. Remedy: leave them out, "
            f"and load weights in {file[1] or 'the function'}"
        )
    return load_file(*file)


def identify(annotator: Annotator, source: ImageSource) -> Identity:
    """Describe a teacher, after comparing its patch with its pooled logits on the first images.

    Raises:
        TeacherError: they differ although they must not.
        StorageError: none of the first images can be read.
    """
    sizes, interpolation = annotator.input_sizes, annotator.interpolation
    scans = map(source.scan, range(len(source.parts())))
    entries = list(islice(chain.from_iterable(scans), _CHECKED))
    parts: list[DecodedBatch] = []
    failure: StorageError | None = None
    for entry in entries:
        try:
            parts.append(decode_batch(source, [entry], sizes, interpolation))
        except StorageError as error:  # fails its own shard alone
            failure = error
    if failure and not parts:
        raise failure
    if not parts:
        raise ConfigError(f"no images found in {source}. Remedy: check the path")
    return Identity(
        model=annotator.name,
        weights_digest=annotator.weights_digest,
        preprocessing=annotator.preprocessing,
        origins=annotator.origins,
        crop_pct=getattr(annotator.teacher, "crop_pct", None),
        grid=annotator.grid,
        num_classes=annotator.num_classes,
        class_names=list(annotator.class_names) if annotator.class_names else None,
        device=annotator.device.type,
        head_mode=annotator.head.mode,
        exact=annotator.head.exact,
        pooled_error=annotator.check(join_batches(parts).images),
        is_own=not isinstance(annotator.teacher, TimmTeacher),
        libraries=libraries(annotator.device),
    )


def libraries(device: torch.device) -> dict[str, str]:
    """Everything but the settings that decides the last bits of a score here: name to value.

    `processor` is a GPU's name, or a CPU's with its vector instructions and the threads in use.
    """
    # A node of a cluster may have tokenlabel as the code that the job brought along, not installed.
    versions = {"tokenlabel": __version__}
    versions |= {name: metadata.version(name) for name in _LIBRARIES}
    if device.type == "cuda":
        return {**versions, "processor": torch.cuda.get_device_name(device)}
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # only Linux has this file, and only x86 says more there
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M):
            name = found[1]
    vectors, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return {
        **versions,
        "processor": f"{name}, {vectors}, {threads} thread{'s' * (threads != 1)}",
    }
