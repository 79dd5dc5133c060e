"""The teacher of a label set, rebuilt from what the shards say of it."""

import json
from typing import Any

import torch

from tokenlabel.annotate.config import SAMPLE
from tokenlabel.annotate.errors import ConfigError, TeacherError
from tokenlabel.annotate.model import PRETRAINED
from tokenlabel.annotate.teacher import Teacher
from tokenlabel.annotate.weights import SAMPLE_MODEL
from tokenlabel.dataset.errors import FormatError


def rebuild_teacher(attrs: dict[str, Any], weights: str | None = None) -> Teacher:
    """The teacher that made some labels, keeping all its classes and looking at one view.

    Args:
        attrs: root attributes of a shard.
        weights: as `annotate` takes them; None tries the sample's, then timm's.

    Raises:
        FormatError: the shard does not say how it was made.
        TeacherError: the teacher cannot be built, or has other weights.
    """
    try:
        settings, made = json.loads(attrs["settings"]), json.loads(attrs["preprocessing"])
        name, digest = str(attrs["teacher"]), attrs["weights_digest"]
        height, width = (int(side) for side in made["input_size"])
        options: dict[str, Any] = {
            "num_classes": int(attrs["num_classes"]),
            "input_size": (height, width),
            "k": int(attrs["num_classes"]),
            "interpolation": str(made["interpolation"]),
            "mean": made["mean"],
            "std": made["std"],
        }
        precision = settings.get("precision", "float32")
        if precision == "float16" and not torch.cuda.is_available():
            precision = "float32"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"the shards must say how the teacher was run (`settings`, `preprocessing`); {error}. "
            "Remedy: only labels of `annotate` can be compared with their teacher"
        ) from error
    tried = []
    for source in [weights] if weights else _sources(name):
        try:
            teacher = Teacher(name, weights=source, precision=precision, **options)
        except TeacherError as error:
            tried.append(f"{source}: {error}")
            continue
        if teacher.weights_digest == digest:
            return teacher
        tried.append(f"{source}: these weights have the digest {teacher.weights_digest[:12]}")
    raise ConfigError(
        f"the labels were made by {name} with weights of digest {digest[:12]}, which were not "
        "found. Remedy: name them with --weights\n  " + "\n  ".join(tried)
    )


def _sources(name: str) -> list[str]:
    return [SAMPLE, PRETRAINED] if name.partition(".")[0] == SAMPLE_MODEL else [PRETRAINED]
