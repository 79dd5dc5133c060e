"""The parts of LV-ViT, their parameters named as in the published code."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth


class Block(nn.Module):
    """A transformer layer, normalised first, its two residual branches divided by a constant.

    Args:
        width: of the tokens.
        heads: attention heads.
        hidden: width inside the MLP.
        residual_scale: what the branches are divided by.
        drop_path_rate: probability that an image skips a branch in training.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, residual_scale: float, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width))
        )
        self.drop_path = StochasticDepth(drop_path_rate, "row")
        self.residual_scale = residual_scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 1 + N, D] to the same."""
        branch = self.attn(self.norm1(tokens))
        tokens = tokens + self.drop_path(branch) / self.residual_scale
        branch = self.mlp(self.norm2(tokens))
        tokens = tokens + self.drop_path(branch) / self.residual_scale
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention, with no bias on queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 1 + N, D] to the same."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


def patch_embed(in_channels: int, hidden: int, width: int, patch_size: int) -> nn.Sequential:
    """Three convolutions at half the resolution, then one that makes a token of each patch."""
    layers: dict[str, nn.Module] = {}
    parts = ((in_channels, 7, 2), (hidden, 3, 1), (hidden, 3, 1))
    for number, (channels, kernel, stride) in enumerate(parts, 1):
        layers[f"conv{number}"] = nn.Conv2d(
            channels, hidden, kernel, stride, padding=kernel // 2, bias=False
        )
        layers[f"bn{number}"] = nn.BatchNorm2d(hidden)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
    layers["proj"] = nn.Conv2d(hidden, width, patch_size // 2, patch_size // 2)
    return nn.Sequential(OrderedDict(layers))


def initialise(module: nn.Module) -> None:
    """Draw linear weights from a truncated normal of std 0.02, as DeiT does; biases are 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
