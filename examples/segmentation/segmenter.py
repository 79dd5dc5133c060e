"""UperNet on LV-ViT or a timm model, with the settings of LV-ViT's published configurations.

The decoder is `UperNetHead` of Hugging Face's `transformers`, with its `UperNetFCNHead` as the
auxiliary head. They read four layers of the backbone through `forward_intermediates` and
`feature_info`, which LV-ViT and timm's models have.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import functional as F
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

import tokenlabel as tl

LVVIT = {"lvvit_t": tl.lvvit_t, "lvvit_s": tl.lvvit_s, "lvvit_m": tl.lvvit_m, "lvvit_l": tl.lvvit_l}
#: Class id of pixels that have no class.
IGNORED = 255


def backbone_of(name: str, size: int, weights: Any = None, **options: Any) -> Any:
    """LV-ViT or a timm model by name, for images of `size` pixels, without its classifiers.

    Position embeddings are resized to `size`, once, after the weights were loaded.

    Args:
        name: of `LVVIT`, or a timm model.
        size: side of the images in pixels.
        weights: a checkpoint: published, of timm, or of a training script; None: random weights.
            One of a timm model needs its number of classes, `num_classes=100`, unless it is 1000.
        **options: for the model's constructor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights do not fit the model.
    """
    if name in LVVIT:
        model: Any = LVVIT[name](image_size=size, weights=weights, **options)
        model.head = model.aux_head = nn.Identity()
        return model
    if name.startswith("volo"):  # has no set_input_size: load_published resizes its positions
        options = {"img_size": size, **options}
    model = timm.create_model(name, **options)
    if weights is not None:
        # VOLO's own aux_head stands where other students have a patch_head.
        load = tl.load_published if hasattr(model, "aux_head") else tl.load_backbone
        load(model, weights)
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(size, size))
    model.reset_classifier(0)
    return model


class Segmenter(nn.Module):
    """A backbone with UperNet: class logits of every pixel.

        model = Segmenter(backbone_of("lvvit_s", 512), num_classes=150)
        loss = model(images, masks)
        ids = model.eval()(images).argmax(1)

    Where all layers of the backbone have one resolution, four of them are enlarged 4, 2, 1 and 1
    times, as published. Of a pyramid (Swin, ConvNeXt, ResNet), the stages are taken as they are.

    Args:
        backbone: a model with `forward_intermediates` and `feature_info`.
        num_classes: number of classes C.
        layers: numbers of four layers, from 0. None: the last and each third before it, which are
            the published ones (6, 9, 12 and 15 of LV-ViT-S), closer in a backbone of fewer than 12
            layers; of a pyramid, the last four stages.
        width: channels of both heads.
        aux_weight: weight of the auxiliary head's loss, on the third of the four layers.

    Raises:
        ValueError: `layers` are not four rising numbers of layers of the backbone.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        *,
        layers: Sequence[int] | None = None,
        width: int = 256,
        aux_weight: float = 0.4,
    ) -> None:
        super().__init__()
        info = list(backbone.feature_info)
        flat = len({row["reduction"] for row in info}) == 1
        if layers is None and len(info) >= 4:
            step = min(3, len(info) // 4) if flat else 1
            layers = range(len(info))[-1 - 3 * step :: step]
        self.layers = [*(layers or [])]
        if len({*self.layers} & {*range(len(info))}) != 4 or self.layers != sorted(self.layers):
            raise ValueError(
                f"layers must be four rising numbers from 0 to {len(info) - 1}, got {self.layers}. "
                "Remedy: --layers with four layers of this backbone, or a deeper backbone"
            )
        channels = [info[layer]["num_chs"] for layer in self.layers]
        self.backbone, self.aux_weight = backbone, aux_weight
        self.necks = nn.ModuleList(nn.Identity() for _ in channels)
        if flat:
            widths = [*channels[:3], min(2048, 8 * width)]
            parts = zip(channels, widths, (4, 2, 1, 1), strict=True)
            self.necks, channels = nn.ModuleList(neck(*part) for part in parts), widths
        config = UperNetConfig(
            hidden_size=width,
            num_labels=num_classes,
            auxiliary_in_channels=channels[2],
            auxiliary_channels=width,
        )
        self.decoder = UperNetHead(config, channels)
        self.auxiliary = UperNetFCNHead(config, channels)
        for head in (self.decoder, self.auxiliary):
            head.classifier = nn.Sequential(nn.Dropout2d(0.1), head.classifier)

    def features(self, images: Tensor) -> list[Tensor]:
        """The four maps that the heads read, [B, channels, h, w] each."""
        layers = self.backbone.forward_intermediates(
            images, indices=self.layers, stop_early=True, intermediates_only=True
        )
        return [part(layer) for part, layer in zip(self.necks, layers, strict=True)]

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Logits [B, C, H, W] of images [B, 3, H, W]; with masks [B, H, W] of class ids, the loss.

        The loss of a batch whose pixels are all ignored is 0.
        """
        maps = self.features(images)

        def logits(head: nn.Module) -> Tensor:
            return functional.interpolate(head(maps).float(), images.shape[-2:], mode="bilinear")

        if masks is None:
            return logits(self.decoder)
        # mmsegmentation divides by all pixels, the ignored ones included: none makes no NaN.
        main, auxiliary = (
            functional.cross_entropy(logits(head), masks, ignore_index=IGNORED, reduction="sum")
            for head in (self.decoder, self.auxiliary)
        )
        return (main + self.aux_weight * auxiliary) / masks.numel()


def neck(channels: int, width: int, scale: int) -> nn.Sequential:
    """Enlarge a layer `scale` times and project it to `width` channels: a published side layer."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)]
    if scale > 1:
        enlarge = nn.ConvTranspose2d(channels, channels, scale, scale, bias=False)
        layers = [enlarge, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), *layers]
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


@torch.inference_mode()
def predict(
    model: nn.Module, image: Tensor, size: int, scales: Sequence[float], flip: bool
) -> Tensor:
    """Probabilities [C, H, W] of an image [3, H, W]: the mean over scales and, if asked, a flip.

    At scale 1 the shorter side has `size` pixels. The model is in evaluation.
    """
    shape = image.shape[-2:]
    total, count = None, 0
    for scale in scales:
        sides = [max(1, round(side * scale * size / min(shape))) for side in shape]
        view = F.resize(image, sides, antialias=True)
        for mirrored in (False, True)[: 1 + flip]:
            logits = slide(model, view.flip(-1) if mirrored else view, size)
            logits = functional.interpolate(logits[None], shape, mode="bilinear")[0]
            probs = (logits.flip(-1) if mirrored else logits).softmax(0)
            # Summed, because a view of 1600 x 1600 pixels and 150 classes has 1.5 GB.
            total = probs if total is None else total.add_(probs)
            count += 1
    assert total is not None
    return total.div_(count)


def slide(model: nn.Module, image: Tensor, size: int) -> Tensor:
    """Logits [C, H, W] of an image [3, H, W]: the mean over windows, two thirds of `size` apart."""
    height, width = image.shape[-2:]
    # With the mean colour, as crops of small images are padded in training.
    image = functional.pad(image, (0, max(0, size - width), 0, max(0, size - height)))
    stride = max(1, size * 2 // 3)
    tops, lefts = (
        [min(start, side - size) for start in range(0, side - size + stride, stride)]
        for side in image.shape[-2:]
    )
    total, count = None, image.new_zeros(image.shape[-2:])
    for place in [(..., slice(y, y + size), slice(x, x + size)) for y in tops for x in lefts]:
        logits = model(image[place][None])[0]
        if total is None:
            total = logits.new_zeros(len(logits), *image.shape[-2:])
        total[place] += logits
        count[place] += 1
    assert total is not None
    return (total / count)[:, :height, :width]
