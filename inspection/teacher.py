"""The teacher of a label set, rebuilt from what the shards say of it."""

import json
from typing import Any, NamedTuple

import torch

from ..annotate.config import SAMPLE
from ..annotate.teacher.model import PRETRAINED
from ..annotate.teacher.timm_teacher import Teacher
from ..annotate.teacher.weights import SAMPLE_MODEL
from ..errors import ConfigError, FormatError, TeacherError


class Teachers(NamedTuple):
    """The teacher of a label set, with one network in all its forms.

    Attributes:
        annotator: as it annotated, in one pass or several.
        judge: in one pass, at the first input size.
        other: in one pass at another size; None where the network takes no other.
    """

    annotator: Teacher
    judge: Teacher
    other: Teacher | None


def rebuild_teachers(attrs: dict[str, Any], weights: str | None = None) -> Teachers:
    """The teacher that made some labels, keeping all its classes and giving one view.

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
        sizes = [[int(height), int(width)] for height, width in made["input_size"]]
        precision = settings.get("precision", "float32")
        if precision == "float16" and not torch.cuda.is_available():
            precision = "float32"
        options: dict[str, Any] = {
            "interpolation": str(made["interpolation"]),
            "mean": made["mean"],
            "std": made["std"],
            "precision": precision,
        }
        num_classes = int(attrs["num_classes"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"the shards must say how the teacher was run (`settings`, `preprocessing`); {error}. "
            "Remedy: only labels of `annotate` can be compared with their teacher"
        ) from error
    tried = []
    for source in [weights] if weights else _sources(name):
        try:
            annotator = Teacher(
                name, weights=source, num_classes=num_classes, input_size=sizes, **options
            )
        except TeacherError as error:
            tried.append(f"{source}: {error}")
            continue
        if annotator.weights_digest == digest:
            break
        tried.append(f"{source}: these weights have the digest {annotator.weights_digest[:12]}")
    else:
        raise ConfigError(
            f"the labels were made by {name} with weights of digest {digest[:12]}, which were not "
            "found. Remedy: name them with --weights\n  " + "\n  ".join(tried)
        )
    judge = Teacher(annotator.model, input_size=sizes[:1], **options)
    other = sizes[1] if len(sizes) > 1 else [round(side * 1.4 / 32) * 32 for side in sizes[0]]
    try:
        return Teachers(annotator, judge, Teacher(judge.model, input_size=[other], **options))
    except TeacherError:  # built for one size
        return Teachers(annotator, judge, None)


def _sources(name: str) -> list[str]:
    return [SAMPLE, PRETRAINED] if name.partition(".")[0] == SAMPLE_MODEL else [PRETRAINED]
