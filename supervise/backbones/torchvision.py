"""Students of torchvision: ViT, Swin, ConvNeXt and ResNet."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ConvNeXt, ResNet, SwinTransformer, VisionTransformer

from .backbone import Backbone, as_map, last_linear, pair, replace_linear


def torchvision_backbone(model: Any) -> Backbone | None:
    """Describe a classifier of torchvision; None for another model."""
    for kind, features in _FAMILIES.items():
        if isinstance(model, kind):
            found, size = last_linear(model), pair(getattr(model, "image_size", 224))
            classes = 0 if found is None else found[1].out_features
            return Backbone(features, size, classes, _reset, _embedding)
    return None


def _embedding(model: Any) -> nn.Module | None:
    if isinstance(model, VisionTransformer):
        return model.conv_proj  # type: ignore[no-any-return]
    return model.features[0] if isinstance(model, SwinTransformer) else None


def _vit_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    patches = model._process_input(images)
    tokens = torch.cat([model.class_token.expand(len(patches), -1, -1), patches], dim=1)
    tokens = model.encoder(tokens)
    return model.heads(tokens[:, 0]), as_map(tokens, images, prefix=1, channels_last=True)


def _swin_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    patches = model.norm(model.features(images))
    pooled = model.flatten(model.avgpool(model.permute(patches)))
    return model.head(pooled), patches


def _convnext_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    features = model.features(images)
    norm = model.classifier[0]
    return model.classifier(model.avgpool(features)), norm(features).permute(0, 2, 3, 1)


def _resnet_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    x = model.layer4(model.layer3(model.layer2(model.layer1(x))))
    return model.fc(model.avgpool(x).flatten(1)), x.permute(0, 2, 3, 1)


_FAMILIES: dict[type[nn.Module], Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    VisionTransformer: _vit_features,
    SwinTransformer: _swin_features,
    ConvNeXt: _convnext_features,
    ResNet: _resnet_features,
}


def _reset(model: Any, num_classes: int) -> None:
    found = last_linear(model)
    assert found is not None
    replace_linear(model, found[0], num_classes)
