"""Students of Hugging Face `transformers`, with a classifier or without."""

import sys
from typing import Any

from torch import Tensor, nn

from .backbone import Backbone, as_map, last_linear, pair, replace_linear

_HEADS = ("classifier", "cls_classifier", "distillation_classifier")


def transformers_backbone(model: Any) -> Backbone | None:
    """Describe a vision model of Hugging Face's `transformers`; None for another model."""
    if "transformers" not in sys.modules:  # then it cannot have made this model
        return None
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.main_input_name != "pixel_values":
        return None
    size = pair(getattr(model.config, "image_size", 224))
    heads = _heads(model)
    if not heads:
        return Backbone(_bare_features, size, 0, None, _embedding)
    (_, classifier), *_ = heads
    return Backbone(_classifier_features, size, classifier.out_features, _reset, _embedding)


def _heads(model: Any) -> list[tuple[str, nn.Linear]]:
    """Names and modules of the final layers of a model's classifiers."""
    heads = []
    for name in _HEADS:
        head = getattr(model, name, None)
        found = last_linear(head) if isinstance(head, nn.Module) else None
        if found is not None:
            heads.append((".".join(filter(None, (name, found[0]))), found[1]))
    return heads


def _embedding(model: Any) -> nn.Module | None:
    for owner in (model, model.base_model):
        embedding = getattr(getattr(owner, "embeddings", None), "patch_embeddings", None)
        if isinstance(embedding, nn.Module):
            return embedding
    return None


def _reset(model: Any, num_classes: int) -> None:
    for name, _ in _heads(model):
        replace_linear(model, name, num_classes)
    model.config.num_labels = model.num_labels = num_classes


def _options(model: Any, images: Tensor) -> dict[str, Any]:
    # On request only: interpolating where the size fits would not be the identity in every model.
    default = pair(getattr(model.config, "image_size", images.shape[-2:]))
    fits = default == tuple(images.shape[-2:])
    return {"return_dict": True} | ({} if fits else {"interpolate_pos_encoding": True})


def _bare_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    outputs = model(images, **_options(model, images))
    patches, prefix = _patches(model, outputs.get("last_hidden_state"), images)
    pooled = outputs.get("pooler_output")
    if pooled is None:
        pooled = outputs.last_hidden_state[:, 0] if prefix else patches.mean((1, 2))
    return pooled.flatten(1), patches


def _classifier_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    seen: list[Any] = []
    handle = model.base_model.register_forward_hook(lambda *call: seen.append(call[2]))
    try:
        logits = model(images, **_options(model, images)).logits
    finally:
        handle.remove()
    return logits, _patches(model, seen[-1][0], images)[0]


def _patches(model: Any, features: Any, images: Tensor) -> tuple[Tensor, int]:
    prefix, (rows, columns) = 0, pair(getattr(model.config, "patch_size", 16))
    if isinstance(features, Tensor) and features.ndim == 3:
        patches = (images.shape[-2] // rows) * (images.shape[-1] // columns)
        # Hierarchical models (Swin) have far fewer tokens than patches, and no prefix.
        prefix = max(features.shape[1] - patches, 0)
    return as_map(features, images, prefix, channels_last=False), prefix
