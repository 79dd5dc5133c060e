"""The parts of LV-ViT: stem, attention, layers with scaled residual branches."""

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
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop_path = StochasticDepth(drop_path_rate, "row")
        self.residual_scale = residual_scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 1 + N, D] to the same."""
        branch = self.attention(self.attention_norm(tokens))
        tokens = tokens + self.drop_path(branch) / self.residual_scale
        branch = self.mlp(self.mlp_norm(tokens))
        tokens = tokens + self.drop_path(branch) / self.residual_scale
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention, with no bias on queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 1 + N, D] to the same."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def stem(in_channels: int, hidden: int, width: int, patch_size: int) -> nn.Sequential:
    """Three convolutions at half the resolution, then one that makes a token of each patch."""
    layers: list[nn.Module] = []
    for channels, kernel, stride in ((in_channels, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
        layers += [
            nn.Conv2d(channels, hidden, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(hidden, width, patch_size // 2, patch_size // 2))


def initialise(module: nn.Module) -> None:
    """Draw linear weights from a truncated normal of std 0.02, as DeiT does; biases are 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
