"""`TokenStudent`: any image backbone with class logits and one classifier for every patch."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .backbones.backbone import OVERRIDE, Grid, new_linear, pair
from .backbones.timm import timm_backbone
from .backbones.torchvision import torchvision_backbone
from .backbones.transformers import transformers_backbone
from .loss import TokenLabelLoss
from .lvvit import LVViT
from .mix_token import TokenBox, TokenExchange

#: ^ of a regular expression, but not that of [^…].
_START = re.compile(r"(?<![\[\\])\^")


def _of_the_model(name: str, text: str) -> Any:
    """A property of the model that the student has too, if the model has it."""
    return property(lambda student: getattr(student.model, name), doc=text)


class StudentOutput(NamedTuple):
    """What `student(pixel_values=…, labels=…)` gives, as models of Hugging Face do.

    Attributes:
        loss: the criterion's, a scalar.
        logits: class logits [B, C].
    """

    loss: Tensor
    logits: Tensor


class TokenStudent(nn.Module):
    """A backbone that classifies the image and, in training, each of its patches.

        import timm

        student = TokenStudent(timm.create_model("vit_tiny_patch16_224"))
        class_logits, patch_logits = student(images)  # [B, 1000] and [B, 196, 1000]
        loss = criterion(class_logits, patch_logits, labels)
        class_logits = student.eval()(images)

    Takes models of timm (ViT, DeiT with or without its distillation token, EVA, VOLO, Swin,
    ConvNeXt, ResNet, …), torchvision (ViT, Swin, ConvNeXt, ResNet) and Hugging Face
    (`ViTModel`, `ViTForImageClassification`, `Dinov2Model`, …). The class logits are the model's
    own; the patch head is one linear layer on the patches' last features, without class,
    distillation and register tokens.

    The backbone is `student.model`, with its own parameter names:
    `torch.save(student.model.state_dict(), …)` writes a checkpoint that loads strictly into the
    bare model (made with `num_classes` classes, where its classifier was replaced). The patch head,
    `student.patch_head`, is needed in training only. `load_backbone` puts what a training script
    saved back into the bare model. What such scripts ask of a model, the student hands on: timm's
    `default_cfg`, `set_grad_checkpointing`, `reset_classifier`, …, and Hugging Face's `config`,
    `save_pretrained` and `pixel_values=`. VOLO has a patch head of its own, its
    auxiliary head, which is used instead. A model with no place for a classifier (`ViTModel`) gets
    one beside it, `student.cls_head`.

    For any other model, subclass and override `features`:

        class MyStudent(TokenStudent):
            def features(self, images):
                tokens = self.model.tokens(images)  # [B, 1 + N, D]
                return self.model.head(tokens[:, 0]), tokens[:, 1:].unflatten(1, (14, 14))

    Args:
        model: the backbone. It is used itself, not copied.
        num_classes: number of classes C. None: that of the model's classifier. If it differs, the
            classifier is replaced by a new one.
        image_size: default input (H, W) in pixels, or one number for a square. None: the model's.
        patches: whether training gives patch logits. False: class logits alone, and no patch head:
            the control of a study, for `TokenLabelLoss(dense_weight=0)`.

    Attributes:
        model: the backbone.
        criterion: the loss where `labels` are passed to the student: `TokenLabelLoss()`, with
            `dense_weight=0` if it was made with `patches=False`; can be replaced.
        num_classes: C.
        image_size: (H, W) of the default input.
        grid: (h, w) of the patches at `image_size`; N = h * w, row by row. For images of another
            size: `grid_for`.

    Raises:
        ValueError: for a model of an unknown kind, or with no classifier and no `num_classes`.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int | None = None,
        *,
        image_size: int | Grid | None = None,
        patches: bool = True,
    ) -> None:
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if isinstance(model, TokenStudent | LVViT):
            raise ValueError(
                f"{type(model).__name__} is a student already. Remedy: use it directly"
            )
        self._backbone = backbone = (
            timm_backbone(model) or torchvision_backbone(model) or transformers_backbone(model)
        )
        if image_size is None:
            image_size = 224 if backbone is None else backbone.image_size
        self.image_size = pair(image_size)
        self._grids: dict[Grid, Grid] = {}
        self.model = model
        self.cls_head: nn.Module = nn.Identity()
        self.patch_head: nn.Module = nn.Identity()
        reset = None
        if backbone is not None:
            num_classes = num_classes or backbone.num_classes
            if not num_classes:
                raise ValueError(
                    f"{type(model).__name__} has no classifier to take the number of classes "
                    "from. Remedy: TokenStudent(model, num_classes=…)"
                )
            reset = backbone.reset_classifier
            if reset is not None and num_classes != backbone.num_classes:
                reset(model, num_classes)
        for name, parameter in model.named_parameters():
            # Only masked pre-training uses it; DistributedDataParallel would wait for its gradient.
            if name.rpartition(".")[2] == "mask_token":
                parameter.requires_grad_(False)
        cls, features = self._probe(self.image_size)
        like = next(model.parameters())
        self.num_classes = num_classes or cls.shape[-1]
        if backbone is not None and reset is None:
            self.cls_head = new_linear(cls.shape[-1], self.num_classes, like)
        elif self.num_classes != cls.shape[-1]:
            raise ValueError(
                f"class logits must have num_classes = {num_classes} columns; the model's have "
                f"{cls.shape[-1]}. Remedy: give the model a classifier of {num_classes} classes"
            )
        self.patches = patches
        self.criterion = TokenLabelLoss() if patches else TokenLabelLoss(dense_weight=0)
        if patches and (backbone is None or not backbone.dense):
            self.patch_head = new_linear(features.shape[-1], self.num_classes, like)
        self._exchange: TokenExchange | None = None
        if (embedding := self.patch_embedding()) is not None:
            self._exchange = TokenExchange()
            embedding.register_forward_hook(self._exchange)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, C] and patch features [B, h, w, D]. Override it for other models.

        Args:
            images: [B, channels, H, W], normalised as the model wants it.
        """
        if self._backbone is None:
            raise ValueError(
                f"TokenStudent does not know the parts of a {type(self.model).__name__}. {OVERRIDE}"
            )
        return self._backbone.features(self.model, images)

    def patch_embedding(self) -> nn.Module | None:
        """The module whose output are patch tokens with no position yet, for `MixToken`."""
        return None if self._backbone is None else self._backbone.embedding(self.model)

    def forward(
        self,
        images: Tensor | None = None,
        box: TokenBox | None = None,
        *,
        patches: bool | None = None,
        pixel_values: Tensor | None = None,
        labels: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor] | StudentOutput:
        """Class logits [B, C] in evaluation; in training also patch logits [B, N, C].

        Args:
            images: [B, channels, H, W].
            patches: whether to give patch logits too; None: in training, unless the student was
                made with `patches=False`.
            pixel_values: the images, as Hugging Face calls them.
            labels: what `criterion` takes, token labels or classes. With it, the result is a
                `StudentOutput`, as a model of Hugging Face would answer `model(**batch)`.
            box: from `MixToken.sample`, in training only: these patches are exchanged after the
                patch embedding and returned at the end, so that patch logits are those of
                `images`' own patches. The class logits are of the mixed images:
                `box.mix_labels(labels)`.
        """
        images = pixel_values if images is None else images
        if images is None:
            raise TypeError("a student takes images [B, channels, H, W], got none")
        logits: Tensor
        if labels is not None:
            output: Any = TokenStudent.forward(self, images, box, patches=patches)
            logits = output if isinstance(output, Tensor) else output[0]
            return StudentOutput(self.criterion(output, labels), logits)
        if patches is None:
            patches = self.training and self.patches
        elif patches and not self.patches:
            raise ValueError(
                "a student made with patches=False has no patch logits. Remedy: make it without"
            )
        if box is not None and not self.training:
            raise ValueError("MixToken is for training. Remedy: student.train(), or box=None")
        if box is None:
            cls, features = self.features(images)
            logits = self.cls_head(cls)
            if not patches:
                return logits
            return logits, self.patch_head(features).flatten(1, 2)
        if self._exchange is None:
            raise ValueError(
                f"MixToken needs a patch embedding; {type(self.model).__name__} has none. Remedy: "
                "CutMix on the images, or override `patch_embedding` in a subclass"
            )
        self._exchange.box = box
        try:
            cls, features = self.features(images)
            if self._exchange.pending:
                raise ValueError(
                    "the patch embedding did not run, so that MixToken could not mix its tokens. "
                    "Remedy: make a new TokenStudent after replacing parts of the model"
                )
        finally:
            self._exchange.box = None
        logits = self.cls_head(cls)
        if not patches:
            return logits
        return logits, self.patch_head(box.restore(features)).flatten(1, 2)

    default_cfg = _of_the_model("default_cfg", "timm's settings of the model.")
    pretrained_cfg = _of_the_model("pretrained_cfg", "timm's settings of the model.")
    num_features = _of_the_model("num_features", "Channels of the model's features, for timm.")
    get_classifier = _of_the_model("get_classifier", "The model's own, for timm.")
    set_grad_checkpointing = _of_the_model("set_grad_checkpointing", "The model's own, for timm.")
    config = _of_the_model("config", "Hugging Face's configuration of the model.")
    activation_checkpointing_enable = _of_the_model(
        "activation_checkpointing_enable", "The model's own, for Hugging Face's Trainer."
    )
    gradient_checkpointing_enable = _of_the_model(
        "gradient_checkpointing_enable", "The same in older versions of Hugging Face's Trainer."
    )
    save_pretrained = _of_the_model(
        "save_pretrained", "The model's own: writes what `from_pretrained` of its class loads."
    )

    def reset_classifier(self, num_classes: int) -> None:
        """Put new classifiers of so many classes on the image and on its patches."""
        like, backbone = next(self.model.parameters()), self._backbone
        if isinstance(self.cls_head, nn.Linear):
            self.cls_head = new_linear(self.cls_head.in_features, num_classes, like)
        elif backbone is not None and backbone.reset_classifier is not None:
            backbone.reset_classifier(self.model, num_classes)
        else:
            raise ValueError(
                f"the classifier of a {type(self.model).__name__} cannot be replaced from here. "
                "Remedy: TokenStudent of a model of so many classes"
            )
        if isinstance(self.patch_head, nn.Linear):
            self.patch_head = new_linear(self.patch_head.in_features, num_classes, like)
        self.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the model wants without weight decay, as timm asks."""
        return {f"model.{name}" for name in getattr(self.model, "no_weight_decay", set)()}

    @property
    def group_matcher(self) -> Callable[..., Any]:
        """The model's own, for timm's layer decay; the heads added here go with its last layer.

        Raises:
            AttributeError: the model has none.
        """
        matcher_of: Any = self.model.group_matcher

        def moved(rule: Any) -> Any:
            if isinstance(rule, str):  # timm matches from the start of a name, also without ^
                return rf"model\.(?:{_START.sub('', rule)})"
            return rule and [(moved(pattern), suffix) for pattern, suffix in rule]

        def group_matcher(coarse: bool = False) -> Any:
            matcher = matcher_of(coarse=coarse)
            if callable(matcher):
                return lambda name: matcher(name.removeprefix("model."))
            return {group: moved(rule) for group, rule in matcher.items()}

        return group_matcher

    @property
    def grid(self) -> Grid:
        """(h, w) of the patches at the default input size."""
        return self.grid_for(self.image_size)

    def grid_for(self, image_size: int | Grid) -> Grid:
        """(h, w) of the patches of images of (H, W) pixels: `grid_for(images.shape[-2:])`."""
        size = pair(image_size)
        if size not in self._grids:
            self._probe(size)
        return self._grids[size]

    @torch.no_grad()
    def _probe(self, size: Grid) -> tuple[Tensor, Tensor]:
        """Run the features of one empty image, so that shapes are those it really has."""
        weight = next(self.model.parameters())
        convolutions = [m for m in self.model.modules() if isinstance(m, nn.Conv2d)]
        channels = getattr(
            self.model, "in_chans", convolutions[0].in_channels if convolutions else 3
        )
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            image = torch.zeros(1, channels, *size, device=weight.device, dtype=weight.dtype)
            cls, patches = self.features(image)
        except ValueError:
            raise
        except Exception as error:  # the model's own code: of any kind
            raise ValueError(
                f"{type(self.model).__name__} must take images of (H, W) = {size}; it raised "
                f"{type(error).__name__}: {error}. Remedy: pass the size that the model was "
                f"built for, TokenStudent(model, image_size=…). {OVERRIDE}"
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
        if cls.ndim != 2 or patches.ndim != 4:
            raise ValueError(
                "features must return class logits [B, C] and patch features [B, h, w, D], got "
                f"shapes {tuple(cls.shape)} and {tuple(patches.shape)}"
            )
        self._grids[size] = (patches.shape[1], patches.shape[2])
        return cls, patches
