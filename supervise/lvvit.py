"""LV-ViT (Jiang et al., 2021, "All Tokens Matter", arXiv 2104.10858): T, S, M and L.

A ViT whose stem is four convolutions, whose residual branches are scaled down, and which classifies
every patch as well as the image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .backbones.backbone import Grid, pair
from .checkpoint import load_published
from .layers import Block, initialise, patch_embed
from .mix_token import TokenBox


class LVViT(nn.Module):
    """A vision transformer with class and patch heads: a student, as a `TokenStudent` is.

        student = LVViT(width=240, depth=12, heads=4)  # or lvvit_t(), lvvit_s(), …
        class_logits, patch_logits = student(images)  # [B, 1000] and [B, 196, 1000]
        loss = criterion(class_logits, patch_logits, labels)

    In training, `model(images)` gives class logits [B, C] and patch logits [B, N, C]; in evaluation
    it gives class logits, to which the largest logit over the patches is added, for each class,
    `patch_vote` times. (The published weights are evaluated so, with 0.5.)

    It takes any image of at least one patch each way: position embeddings are interpolated from
    `image_size`'s grid to the image's. For images of 32 px: `patch_size=4, image_size=32`.

    Its parameters have the names of the published code: `load_published` reads the published
    checkpoints, and `torch.save(model.state_dict(), …)` writes what that code reads.

    Args:
        image_size: the default input (H, W) in pixels, or one number for a square.
        patch_size: side of a patch in pixels; even, because the stem's first layer halves.
        in_channels: channels of the images.
        num_classes: number of classes C.
        width: of the tokens.
        depth: number of transformer layers.
        heads: attention heads; they share `width` evenly.
        mlp_ratio: hidden width of the MLPs, as a multiple of `width`.
        stem_width: channels inside the stem.
        residual_scale: each residual branch is divided by it.
        drop_path_rate: stochastic depth's rate at the last layer; it grows linearly from 0.
        patch_vote: weight of the patches' maximum in evaluation; 0 for the class token alone.

    Attributes:
        grid: (h, w) of the patches at `image_size`; N = h * w, row by row. For images of another
            size: `grid_for`.

    Raises:
        ValueError: for sizes that do not go together, or when called, for an image smaller than a
            patch, or with a box in evaluation.
    """

    def __init__(
        self,
        *,
        image_size: int | Grid = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        width: int = 384,
        depth: int = 16,
        heads: int = 6,
        mlp_ratio: float = 3.0,
        stem_width: int = 64,
        residual_scale: float = 2.0,
        drop_path_rate: float = 0.0,
        patch_vote: float = 0.5,
    ) -> None:
        super().__init__()
        if patch_size < 2 or patch_size % 2:
            raise ValueError(f"patch_size must be even, got {patch_size}")
        if width % heads:
            raise ValueError(f"heads must divide width, got {heads} heads and width {width}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.image_size = pair(image_size)
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.patch_vote = patch_vote
        self.patch_embed = patch_embed(in_channels, stem_width, width, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        rows, columns = self.grid
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, width))
        rates = [drop_path_rate * layer / max(depth - 1, 1) for layer in range(depth)]
        hidden = int(width * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, residual_scale, rate) for rate in rates
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        self.aux_head = nn.Linear(width, num_classes)
        self._checkpointing = False
        self.apply(initialise)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(
        self, images: Tensor, box: TokenBox | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Class logits [B, C]; in training, with them the patch logits [B, N, C].

        Args:
            images: [B, in_channels, H, W].
            box: from `MixToken.sample`, in training only: these patches are exchanged after the
                stem and returned at the end. Labels: `box.mix_labels(labels)`.
        """
        if box is not None and not self.training:
            raise ValueError("MixToken is for training. Remedy: model.train(), or box=None")
        cls, patches = self.features(images, box)
        logits: Tensor = self.head(cls)
        if self.training:
            return logits, self.aux_head(patches).flatten(1, 2)
        if self.patch_vote:
            logits = logits + self.patch_vote * self.aux_head(patches).amax((1, 2))
        return logits

    def features(self, images: Tensor, box: TokenBox | None = None) -> tuple[Tensor, Tensor]:
        """The class token [B, D] and the patches [B, h, w, D], normalised, before the heads."""
        tokens, (height, width) = self._embedded(images, box)
        for block in self.blocks:
            tokens = self._through(block, tokens)
        tokens = self.norm(tokens)
        patches = tokens[:, 1:].unflatten(1, (height, width))
        return tokens[:, 0], patches if box is None else box.restore(patches)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features of several layers, for a decoder: as timm's `VisionTransformer` gives them.

        Args:
            x: images [B, in_channels, H, W].
            indices: which layers: the last n, the numbers of a sequence (from the end if below 0),
                or all.
            return_prefix_tokens: give (patches, class token [B, 1, D]) for each.
            norm: normalise the features of each layer as those of the last.
            stop_early: stop after the last layer asked for.
            output_fmt: "NCHW", [B, D, h, w], or "NLC", [B, N, D].
            intermediates_only: give the list alone, without the last layer's tokens.

        Returns:
            (tokens [B, 1 + N, D], normalised; list of features), or the list.

        Raises:
            ValueError: a layer that is not there, or another `output_fmt`.
        """
        depth = len(self.blocks)
        wanted = range(depth)[-indices:] if isinstance(indices, int) else indices
        layers = range(depth) if wanted is None else [number % depth for number in wanted]
        allowed = range(1, depth + 1) if isinstance(indices, int) else range(-depth, depth)
        asked = [indices] if isinstance(indices, int) else indices or []
        if output_fmt not in ("NCHW", "NLC") or any(number not in allowed for number in asked):
            raise ValueError(
                f"indices must name some of {depth} layers and output_fmt be 'NCHW' or 'NLC', got "
                f"{indices} and {output_fmt!r}"
            )
        tokens, grid = self._embedded(x, None)
        found = []
        for number, block in enumerate(self.blocks):
            if stop_early and number > max(layers):
                break
            tokens = self._through(block, tokens)
            if number in layers:
                found.append(self.norm(tokens) if norm else tokens)
        features: list[Any] = [layer[:, 1:] for layer in found]
        if output_fmt == "NCHW":
            features = [layer.mT.unflatten(2, grid).contiguous() for layer in features]
        if return_prefix_tokens:
            features = [(part, layer[:, :1]) for part, layer in zip(features, found, strict=True)]
        return features if intermediates_only else (self.norm(tokens), features)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each layer its module, channels and pixels a patch, as timm has them."""
        width = self.pos_embed.shape[2]
        return [
            {"module": f"blocks.{number}", "num_chs": width, "reduction": self.patch_size}
            for number in range(len(self.blocks))
        ]

    def _embedded(self, images: Tensor, box: TokenBox | None) -> tuple[Tensor, Grid]:
        """Tokens [B, 1 + N, D] before the first layer, and the grid of the patches."""
        height, width = self.grid_for((images.shape[-2], images.shape[-1]))
        if not height * width:
            raise ValueError(
                f"an image must be at least one patch of {self.patch_size} pixels each way, got "
                f"(H, W) = {tuple(images.shape[-2:])}"
            )
        embedded = self.patch_embed(images)
        if box is not None:
            embedded = box.mix(embedded)
        tokens = torch.cat(
            [self.cls_token.expand(len(images), -1, -1), embedded.flatten(2).transpose(1, 2)], dim=1
        )
        return tokens + self._positions((height, width)), (height, width)

    def _through(self, block: nn.Module, tokens: Tensor) -> Tensor:
        run = checkpoint if self._checkpointing and self.training else None
        tokens = run(block, tokens, use_reentrant=False) if run else block(tokens)
        return tokens

    def _positions(self, grid: Grid) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        own, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        # In float32: the filter has no kernel for bfloat16 on the CPU.
        planes = patches.unflatten(1, self.grid).permute(0, 3, 1, 2).float()
        planes = functional.interpolate(
            planes, size=grid, mode="bicubic", antialias=True, align_corners=False
        )
        return torch.cat([own, planes.flatten(2).transpose(1, 2).to(own)], dim=1)

    @property
    def grid(self) -> Grid:
        """(h, w) of the patches at the default input size."""
        return self.grid_for(self.image_size)

    def grid_for(self, image_size: int | Grid) -> Grid:
        """(h, w) of the patches of images of (H, W) pixels: `grid_for(images.shape[-2:])`."""
        height, width = pair(image_size)
        half = self.patch_size // 2
        return (height + 1) // 2 // half, (width + 1) // 2 // half

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside the layers; recompute them in the backward pass."""
        self._checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone, as timm asks for them."""
        return {"cls_token", "pos_embed"}


def _built(size: dict[str, Any], options: dict[str, Any]) -> LVViT:
    weights = options.pop("weights", None)
    model = LVViT(**size | options)
    if weights is not None:
        load_published(model, weights)
    return model


def lvvit_t(**options: Any) -> LVViT:
    """LV-ViT-T: 12 layers of width 240, residual scale 1.

    Args:
        **options: those of `LVViT`; and `weights`, a published checkpoint, as `load_published`
            takes it.
    """
    return _built({"width": 240, "depth": 12, "heads": 4, "residual_scale": 1.0}, options)


def lvvit_s(**options: Any) -> LVViT:
    """LV-ViT-S: 16 layers of width 384. `options`: as of `lvvit_t`."""
    return _built({"width": 384, "depth": 16, "heads": 6}, options)


def lvvit_m(**options: Any) -> LVViT:
    """LV-ViT-M: 20 layers of width 512. `options`: as of `lvvit_t`."""
    return _built({"width": 512, "depth": 20, "heads": 8}, options)


def lvvit_l(**options: Any) -> LVViT:
    """LV-ViT-L: 24 layers of width 768, residual scale 3. `options`: as of `lvvit_t`."""
    size = {"width": 768, "depth": 24, "heads": 12, "stem_width": 128, "residual_scale": 3.0}
    return _built(size, options)
