"""Build the teacher's network with timm, refusing whatever would leave a layer untrained."""

import difflib
from collections.abc import Sequence
from typing import Any

import timm
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg, is_model, is_model_pretrained
from torch import nn

from ...errors import TeacherError
from .weights import SAMPLE, load_weights

PRETRAINED = "pretrained"


def build_model(
    name: str,
    weights: str = PRETRAINED,
    num_classes: int | None = None,
    input_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Build a timm model with trained weights.

    Args:
        name: timm's name, with or without a tag, or `hf-hub:` or `local-dir:` and a place.
        weights: "pretrained", or what `load_weights` takes.
        num_classes: Classes of the weights, if not the model's default.
        input_size: (h, w) of the images in pixels, for models that are built for one size.

    Raises:
        TeacherError: No such model, it cannot be built like that, or its weights cannot be had.
    """
    settings = _settings(name)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if settings is not None and settings.fixed_input_size:
        trained_at = settings.test_input_size or settings.input_size
        options["img_size"] = input_size or tuple(trained_at[-2:])
    download = weights == PRETRAINED
    if download and settings is not None:
        _refuse_untrained(name, settings, num_classes)
    try:
        model: nn.Module = timm.create_model(name, pretrained=download, **options)
    except (AssertionError, TypeError) as error:
        raise TeacherError(
            f"A model must be built as its family allows; {name} cannot be with {options} "
            f"({type(error).__name__}: {error}). Remedy: another input_size, or leave it out."
        ) from error
    except Exception as error:  # which one depends on the download's library, and on its version
        raise TeacherError(
            f"{name} needs a download or a checkpoint file; the download failed "
            f"({type(error).__name__}: {error}). Remedy: weights: /path/to/checkpoint, or a "
            "machine that reaches huggingface.co."
        ) from error
    if not download:
        load_weights(model, weights)
    return model


def class_names(model: nn.Module, weights: str | None) -> list[str] | None:
    """Return the WordNet ids of an ImageNet classifier's classes, or None if they are not known.

    The number of classes tells the set. For weights of unknown origin (a checkpoint file, or None)
    that is only believed if the model was published with as many.
    """
    published = getattr(model, "pretrained_cfg", {}).get("num_classes")
    if weights not in (PRETRAINED, SAMPLE) and getattr(model, "num_classes", None) != published:
        return None
    subset = infer_imagenet_subset(model)
    info: Any = ImageNetInfo(subset) if subset else None
    return list(info.label_names()) if info else None


def _settings(name: str) -> Any:
    """Return what timm knows of a registered model (a PretrainedCfg), None of a place."""
    if ":" in name:
        return None
    if not is_model(name):
        raise _unknown(name, timm.list_models())
    try:
        return get_pretrained_cfg(name)
    except RuntimeError:
        raise _unknown(name, timm.list_pretrained(f"{name.partition('.')[0]}.*")) from None


def _unknown(name: str, known: Sequence[str]) -> TeacherError:
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them all."
    return TeacherError(f"model must be a timm model; there is no {name!r}. Remedy: {hint}")


def _refuse_untrained(name: str, settings: Any, num_classes: int | None) -> None:
    """Refuse what timm would fill with random numbers."""
    if not is_model_pretrained(name):
        raise TeacherError(
            f"weights 'pretrained' must exist; nobody has published any for {name}. "
            "Remedy: weights: /path/to/checkpoint, or another model (timm.list_pretrained())."
        )
    if num_classes not in (None, settings.num_classes):
        raise TeacherError(
            f"num_classes must be that of the weights; the pretrained ones of {name} have "
            f"{settings.num_classes}, got {num_classes}. Remedy: leave num_classes out, or "
            "weights: /path/to/checkpoint of a model fine-tuned on your classes."
        )
