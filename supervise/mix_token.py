"""`MixToken`: a box of patch tokens exchanged between images inside the student."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dataset.targets.token_labels import TokenLabels
from .backbones.backbone import Grid, pair
from .mixed_labels import MixedLabels, check_records


class TokenBox(NamedTuple):
    """The patches that every image of a batch takes from its partner, the image before it.

        box = MixToken().sample(student.grid)
        if box is not None:
            loss = criterion(student(images, box), box.mix_labels(labels))

    Attributes:
        mask: bool [h, w], over the student's grid: True where a patch is the partner's. A tensor,
            so that a compiled student does not compile again for every box.
        flip: whose patches an image takes. False: those of the one before it, the first image of
            the last, as in torchvision's `CutMix`. True: the batch's in reverse order, as in the
            published code, where the middle one of an odd batch stays as it is.
    """

    mask: Tensor
    flip: bool = False

    @property
    def area(self) -> float:
        """Fraction of the patches that are the partner's."""
        return self.mask.double().mean().item()

    def mix(self, tokens: Tensor) -> Tensor:
        """Take each partner's tokens where the mask is True.

        Args:
            tokens: patch tokens [B, N, D] row by row, or a map [B, H, W, D] or [B, D, H, W]; with
                H = s * h and W = s * w for a whole s, s * s of them belong to a patch.

        Raises:
            ValueError: for a map that the student's grid does not divide.
        """
        return self._exchange(tokens, 1)

    def restore(self, tokens: Tensor) -> Tensor:
        """Bring mixed tokens back to the images they came from: undoes `mix`."""
        return self._exchange(tokens, -1)

    def mix_labels(self, labels: TokenLabels) -> MixedLabels:
        """Labels for what the student returns: the class token's are mixed by area, no patch's.

        Args:
            labels: records of the batch, [B, bytes].
        """
        labels = check_records(labels)
        size, device = len(labels), labels.device
        own = 1 - self.mask.float().mean().to(device)
        return MixedLabels(
            labels,
            partner=self._partners(torch.arange(size, device=device), 1),
            blend=own.expand(size),
            box=torch.zeros(size, 4, device=device),
            patches=False,
        )

    def _exchange(self, tokens: Tensor, shift: int) -> Tensor:
        scale, shape = self._layout(tokens)
        mask = self.mask.to(tokens.device)
        if scale > 1:
            mask = mask.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        return torch.where(mask.reshape(shape), self._partners(tokens, shift), tokens)

    def _partners(self, batch: Tensor, shift: int) -> Tensor:
        return batch.flip(0) if self.flip else batch.roll(shift, 0)

    def _layout(self, tokens: Tensor) -> tuple[int, list[int]]:
        """Tokens along each side of a patch, and the shape of a mask that broadcasts to them."""
        height, width = self.mask.shape
        if tokens.ndim == 3:
            scale = math.isqrt(tokens.shape[1] // (height * width))
            if scale and tokens.shape[1] == scale**2 * height * width:
                return scale, [1, tokens.shape[1], 1]
        if tokens.ndim == 4:
            for axis, shape in ((1, [1, -1, 1, 1]), (2, [1, 1, -1, 1])):
                rows, columns = tokens.shape[axis : axis + 2]
                scale = rows // height
                if scale and (rows, columns) == (scale * height, scale * width):
                    shape[axis : axis + 2] = rows, columns
                    return scale, shape
        raise ValueError(
            "MixToken needs tokens that the grid of its box divides; got tokens of shape "
            f"{tuple(tokens.shape)} and a box over (h, w) = {(height, width)} patches. Remedy: "
            "mix.sample(student.grid_for(images.shape[-2:])), or CutMix on the images"
        )


class MixToken:
    """Draws the boxes of MixToken (LV-ViT, Jiang et al., 2021, arXiv 2104.10858).

        mix = MixToken()
        for images, labels in loader:
            box = mix.sample(student.grid)
            if box is not None:
                labels = box.mix_labels(labels)
            criterion(student(images, box), labels).backward()

    CutMix on the images lets one patch show parts of two. MixToken exchanges whole tokens after
    the patch embedding, so every token is of one image and keeps that image's target; the
    student returns its outputs to the images they came from, and only the class token's target is
    mixed. For a backbone whose patch embedding sees nothing outside the patch, this equals CutMix
    of a box that ends at patch borders.

    Args:
        alpha: of the Beta(alpha, alpha) distribution of the fraction that stays (CutMix: 1).
        prob: probability that a batch is mixed at all.
        published: draw boxes and partners as the published code does, on whole patches throughout:
            at grid 14 a box then has .27 of the area on average instead of .32, and one in 50 is
            empty.
    """

    def __init__(self, alpha: float = 1.0, prob: float = 1.0, *, published: bool = False) -> None:
        if alpha <= 0:
            raise ValueError(f"alpha must be above 0, got {alpha}")
        if not 0 <= prob <= 1:
            raise ValueError(f"prob must be in [0, 1], got {prob}")
        self.alpha = alpha
        self.prob = prob
        self.published = published

    def __repr__(self) -> str:
        return f"MixToken(alpha={self.alpha}, prob={self.prob}, published={self.published})"

    def sample(self, grid: int | Grid) -> TokenBox | None:
        """Draw the box of a batch from torch's generator on the CPU.

        As in CutMix, the box has the image's shape and a uniform centre, and ends at the
        image's border; here its edges are rounded to patches.

        Args:
            grid: the student's patches, (h, w), or one number for a square.

        Returns:
            The box; None to leave the batch unmixed, or where the box rounds to nothing.
        """
        if torch.rand(()).item() >= self.prob:
            return None
        stays = torch.distributions.Beta(self.alpha, self.alpha).sample().item()
        half = 0.5 * math.sqrt(1 - stays)
        inside = []
        for patches in pair(grid):
            if self.published:
                middle = int(torch.randint(patches, ()))
                reach = int(patches * 2 * half) // 2
                first, end = max(middle - reach, 0), min(middle + reach, patches)
            else:
                centre = torch.rand(()).item()
                first = round(max(centre - half, 0.0) * patches)
                end = round(min(centre + half, 1.0) * patches)
            index = torch.arange(patches)
            inside.append((index >= first) & (index < end))
        mask = inside[0][:, None] & inside[1]
        return TokenBox(mask, self.published) if mask.any() else None


class TokenExchange:
    """Forward hook of a patch embedding: mixes its output while `box` is set.

    It stays in place, because a hook that comes and goes breaks the graph of `torch.compile`.
    """

    def __init__(self) -> None:
        self.box: TokenBox | None = None

    @property
    def pending(self) -> bool:
        """Whether a box is set that no forward pass has used."""
        return self.box is not None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Mix tokens, or the first of a tuple, and note that it was done."""
        box, self.box = self.box, None
        if box is None:
            return None
        if isinstance(output, tuple):
            return (box.mix(output[0]), *output[1:])
        return box.mix(output)
