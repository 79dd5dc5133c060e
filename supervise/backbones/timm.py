"""Students of timm: whatever has its `forward_features` and `forward_head`. Imports no timm."""

from typing import Any

from torch import Tensor, nn

from .backbone import Backbone, as_map

_INTERFACE = ("forward_features", "forward_head", "get_classifier", "reset_classifier")


def timm_backbone(model: Any) -> Backbone | None:
    """Describe a model of timm's interface; None for another."""
    if not all(callable(getattr(model, name, None)) for name in _INTERFACE):
        return None
    size = getattr(_embedding(model), "img_size", None)
    if size is None:  # timm's factory notes the img_size of models that keep it elsewhere
        config = getattr(model, "pretrained_cfg", None) or {}
        size = getattr(model, "_traits", {}).get("img_size") or config.get("input_size", (224, 224))
    dense = getattr(model, "aux_head", None) is not None  # VOLO
    return Backbone(
        _volo_features if dense else _features,
        (int(size[-2]), int(size[-1])),
        int(model.num_classes),
        _reset,
        _embedding,
        dense,
    )


def _embedding(model: Any) -> nn.Module | None:
    embedding = getattr(model, "patch_embed", None)
    return embedding if isinstance(embedding, nn.Module) else None


def _features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    features = model.forward_features(images)
    logits = model.forward_head(features)
    if isinstance(logits, tuple):  # DeiT in its distilled training: both heads, as in evaluation
        logits = (logits[0] + logits[1]) / 2
    channels_last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
    if isinstance(features, Tensor):
        width = features.shape[1 if features.ndim == 4 and not channels_last else -1]
        features = _final_norm(model, width)(features)
    patches = as_map(
        features,
        images,
        getattr(model, "num_prefix_tokens", 0),
        channels_last=channels_last,
    )
    return logits, patches


def _final_norm(model: Any, width: int) -> nn.Module:
    """The norm that some models apply after pooling; their patches need it as much.

    A norm of another width is of a hidden layer in the head (InceptionNeXt), not of the features.
    """
    for owner, name in ((model, "fc_norm"), (getattr(model, "head", None), "norm")):
        norm = getattr(owner, name, None)
        weight = getattr(norm, "weight", None)
        if isinstance(norm, nn.Module) and (weight is None or len(weight) == width):
            return norm
    return nn.Identity()


def _reset(model: Any, num_classes: int) -> None:
    like = next(model.parameters())
    model.reset_classifier(num_classes)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        head.to(device=like.device, dtype=like.dtype)


def _volo_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model.forward_features(images)
    if model.training:
        logits = model.head(model.head_drop(tokens[:, 0]))
    else:  # adds half of the patches' maximum
        logits = model.forward_head(tokens)
    dense = model.aux_head(model.head_drop(tokens))
    return logits, as_map(dense, images, prefix=1, channels_last=True)
