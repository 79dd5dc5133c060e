"""The teacher of a label set, rebuilt from what the shards say of it."""

import json
from typing import Any, NamedTuple

import torch

from ...errors import ConfigError, FormatError, TeacherError
from .annotator import Annotator
from .identity import load_teacher
from .module_teacher import split_file
from .weights import PRETRAINED, SAMPLE, SAMPLE_MODEL


class Teachers(NamedTuple):
    """The teacher of a label set, with one network in all its forms.

    Attributes:
        annotator: as it annotated, in one pass or several.
        judge: in one pass, at the first input size.
        other: in one pass at another size; None where the network takes no other.
    """

    annotator: Annotator
    judge: Annotator
    other: Annotator | None


def rebuild_teachers(attrs: dict[str, Any], weights: str | None = None) -> Teachers:
    """The teacher that made some labels, keeping all its classes and giving one view.

    Args:
        attrs: root attributes of a shard.
        weights: as `annotate` takes them, or `FILE.py:FUNCTION` of somebody's own network, which is
            never run because a shard names it; None tries the sample's, then timm's.

    Raises:
        FormatError: the shard does not say how it was made.
        ConfigError: the teacher is not found, or has other weights.
    """
    try:
        settings, made = json.loads(attrs["settings"]), json.loads(attrs["preprocessing"])
        name, digest = str(attrs["teacher"]), str(attrs["weights_digest"])
        sizes = [(int(height), int(width)) for height, width in made["input_size"]]
        precision = settings.get("precision", "float32")
        if precision == "float16" and not torch.cuda.is_available():
            precision = "float32"
        options: dict[str, Any] = {
            "interpolation": str(made["interpolation"]),
            "mean": made["mean"],
            "std": made["std"],
            "precision": precision,
        }
        num_classes, size = int(attrs["num_classes"]), sizes[0]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise FormatError(
            f"the shards must say how the teacher was run (`settings`, `preprocessing`); {error}. "
            "Remedy: only labels of `annotate` can be compared with their teacher"
        ) from error
    file = split_file(weights) if weights else None
    if split_file(name) and not file:
        raise ConfigError(
            f"the labels were made by a network of somebody's own, {name}, and no label set may "
            f"say what code to run; got weights {weights!r}. Remedy: --weights /path/to/{name}"
        )
    sample = [SAMPLE] if name.partition(".")[0] == SAMPLE_MODEL else []
    tried = []
    for source in [weights] if weights else [*sample, PRETRAINED]:
        try:
            given = (source,) if file else (name, source, num_classes, size)
            teacher, code = load_teacher(*given)
            annotator = Annotator(teacher, code=code, input_sizes=sizes, **options)
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
    judge = Annotator(teacher, input_sizes=[size], **options)
    height, width = (round(side * 1.4 / 32) * 32 for side in size)
    other = sizes[1] if len(sizes) > 1 else (height, width)
    try:
        return Teachers(annotator, judge, Annotator(teacher, input_sizes=[other], **options))
    except TeacherError:  # built for one size
        return Teachers(annotator, judge, None)
