"""timm's classifiers as teachers, refusing whatever would leave a layer untrained."""

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model, is_model_pretrained
from torch import Tensor, nn

from ...errors import TeacherError
from .dense import dense_head, no_patches
from .preprocess import Setting
from .teacher import PatchHead
from .weights import PRETRAINED, load_weights


class TimmTeacher:
    """A `Teacher` of timm: its head, applied at every location of its feature map.

    >>> teacher = TimmTeacher(build_model("tf_efficientnet_lite0", weights="sample"))
    >>> teacher.num_classes, teacher.input_size, teacher.class_names[0]
    (1000, (224, 224), 'n01440764')

    Args:
        network: A timm classifier with trained weights.
        name: What shards call it; default: its architecture.
        recorded: What its checkpoint says of its preprocessing; default: nothing, so that timm's
            settings of the model are taken.

    Raises:
        TeacherError: It is no classifier of timm.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str | None = None,
        recorded: Mapping[str, Setting] = MappingProxyType({}),
    ) -> None:
        self.network = net = cast(Any, network)
        cfg = getattr(network, "pretrained_cfg", {})
        self.name = name or cfg.get("architecture") or type(network).__name__
        if not hasattr(network, "forward_features") or not hasattr(network, "forward_head"):
            raise no_patches(self.name, "it lacks timm's `forward_features` and `forward_head`")
        self.num_classes = int(net.num_classes)
        if not self.num_classes:
            raise no_patches(self.name, "it has no classifier (num_classes is 0)")
        # The number of classes names the ImageNet set. Of weights from a file that is only believed
        # where the model was published with as many.
        published = cfg.get("num_classes") == self.num_classes
        subset = infer_imagenet_subset(network) if published else None
        self.class_names: Sequence[str] | None = wordnet_ids(subset) if subset else None
        resolve: Any = resolve_model_data_config
        default = resolve(network, use_test_size=True)
        # A model built for one size knows it best: its settings name the size of the weights.
        built_for = getattr(getattr(network, "patch_embed", None), "img_size", None)
        settings = {
            "input_size": built_for or default["input_size"][-2:],
            **{name: default[name] for name in ("interpolation", "mean", "std", "crop_pct")},
        }
        self.origins = dict.fromkeys(settings, f"timm's settings of {self.name}")
        for name, setting in recorded.items():
            if name != "input_size" or not built_for:
                settings[name], self.origins[name] = setting
        height, width = settings["input_size"]
        self.input_size = (int(height), int(width))
        self.interpolation = str(settings["interpolation"])
        self.mean, self.std = settings["mean"], settings["std"]
        self.crop_pct = float(settings["crop_pct"])

    def features(self, images: Tensor) -> Tensor:
        """The features before pooling and classifier."""
        features: Tensor = self.network.forward_features(images)
        return features

    def patch_head(self, features: Tensor, input_size: tuple[int, int]) -> PatchHead:
        """The head at every location; see `tokenlabel.annotate.teacher.dense`."""
        return dense_head(self.network, self.name, features, input_size)


def build_model(
    name: str,
    weights: str = PRETRAINED,
    num_classes: int | None = None,
    input_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Build a timm model with trained weights.

    Args:
        name: timm's name, with or without a tag, or `hf-hub:` and a repository, or `local-dir:` and
            a folder.
        weights: "pretrained", or what `load_weights` takes.
        num_classes: Classes of the weights, if not the model's default.
        input_size: (h, w) of the images in pixels, for models that are built for one size.

    Raises:
        TeacherError: No such model, it cannot be built like that, or its weights are not found.
    """
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    download = weights == PRETRAINED
    if ":" not in name:  # else timm knows nothing of it yet
        settings = _settings(name)
        if settings.fixed_input_size:
            trained_at = settings.test_input_size or settings.input_size
            options["img_size"] = input_size or tuple(trained_at[-2:])
        if download and not is_model_pretrained(name):
            raise TeacherError(
                f"weights 'pretrained' must exist; nobody has published any for {name}. "
                "Remedy: weights: /path/to/checkpoint, or another model (timm.list_pretrained())."
            )
        # timm would fill another classifier with random numbers.
        if download and num_classes not in (None, settings.num_classes):
            raise TeacherError(
                f"num_classes must be that of the weights; the pretrained ones of {name} have "
                f"{settings.num_classes}, got {num_classes}. Remedy: leave num_classes out, or "
                "weights: /path/to/checkpoint of a model fine-tuned on your classes."
            )
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


def wordnet_ids(subset: str = "imagenet-1k") -> list[str]:
    """The WordNet ids of an ImageNet set's classes, in order of the class ids."""
    info: Any = ImageNetInfo(subset)
    return list(info.label_names())


def imagenet_names(num_classes: int) -> list[str] | None:
    """The names of the ImageNet set with so many classes; None if there is none."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return wordnet_ids(subset) if subset else None


def _settings(name: str) -> Any:
    """What timm knows of a registered model, a `PretrainedCfg`."""
    try:
        if is_model(name):
            return get_pretrained_cfg(name) or PretrainedCfg()  # none: a model of the user's own
        known = timm.list_models()
    except RuntimeError:  # no such tag
        known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them all."
    raise TeacherError(
        f"model must be a timm model, or FILE.py:FUNCTION; there is no {name!r}. Remedy: {hint}"
    )
