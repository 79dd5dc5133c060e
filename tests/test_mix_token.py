"""MixToken: patch-aligned CutMix inside the student, with every patch's own target."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from tests import oracle
from tests.records import made_up
from tests.test_mixup import soft
from tests.test_student import CASES, CLASSES, student_of
from tokenlabel.dataset import TokenLabels, ToTokenLabels
from tokenlabel.supervise import LVViT, MixedLabels, MixToken, TokenBox, TokenStudent


def box_of(x0: int, y0: int, x1: int, y1: int, grid: tuple[int, int]) -> TokenBox:
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return TokenBox(mask)


def partners(batch: int) -> Tensor:
    return torch.arange(batch).roll(1)


def cut_labels(labels: TokenLabels, box: TokenBox) -> MixedLabels:
    """Labels of images that the box, a rectangle, was cut into."""
    rows, columns = (box.mask.any(axis).nonzero() for axis in (1, 0))
    (height, width), batch = box.mask.shape, len(labels)
    edges = [columns[0] / width, rows[0] / height]
    edges += [(columns[-1] + 1) / width, (rows[-1] + 1) / height]
    box_edges = torch.cat(edges).expand(batch, 4)
    return MixedLabels(labels, partners(batch), torch.ones(batch), box_edges)


def cut_mix(images: Tensor, box: TokenBox) -> Tensor:
    """The box, in the pixels."""
    height, width = images.shape[-2:]
    rows, columns = box.mask.shape
    pixels = box.mask.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)
    return torch.where(pixels, images[partners(len(images))], images)


FAMILIES = ["timm vit", "timm vit, dynamic", "timm deit, distilled", "timm swin"]
FAMILIES += ["torchvision vit", "hf vit", "hf swin"]


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_patch_aligned_cut_mix(name: str) -> None:
    student = student_of(CASES[name])
    for module in student.modules():
        if isinstance(module, nn.Dropout) or hasattr(module, "drop_prob"):
            module.p = module.drop_prob = 0.0
    rows, columns = student.grid
    images = torch.randn(3, 3, *student.image_size)
    for box in (
        box_of(1, 0, columns, 2, student.grid),
        box_of(0, 1, 1, rows, student.grid),
        box_of(0, 0, columns, rows, student.grid),
    ):
        cls, patches = student(images, box)
        expected_cls, mixed = student(cut_mix(images, box))
        torch.testing.assert_close(cls, expected_cls, rtol=1e-4, atol=1e-5)
        # In image i, the box shows image i - 1: its answer belongs there.
        expected = torch.where(box.mask.flatten()[:, None], mixed.roll(-1, 0), mixed)
        torch.testing.assert_close(patches, expected, rtol=1e-4, atol=1e-5)


def test_labels_are_mixed_by_patches() -> None:
    labels, box = made_up(4, CLASSES, grid=(3, 4), k=3), box_of(1, 0, 3, 2, (3, 4))
    assert box.area == pytest.approx(4 / 12)
    mixed = box.mix_labels(labels)
    assert torch.equal(mixed.label, torch.stack([labels.label, labels.label.roll(1)], 1))
    torch.testing.assert_close(mixed.label_probs, torch.tensor([[8 / 12, 4 / 12]]).expand(4, 2))
    ((windows, area),) = mixed.parts()
    own = labels.targets()
    torch.testing.assert_close(tuple(windows), tuple(own))
    torch.testing.assert_close(area, own.weight)
    crop = labels.crop()
    torch.testing.assert_close(mixed.crop(), crop * 8 / 12 + crop.roll(1, 0) * 4 / 12)
    torch.testing.assert_close(tuple(mixed.sparse(k=2))[1:5], tuple(labels.sparse(k=2))[1:5])


class Palette(nn.Module):
    """A patch embedding whose tokens are the patches' mean colours, and nothing after it."""

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, channels, patch, patch, bias=False)
        with torch.no_grad():
            eye = torch.eye(channels)[..., None, None] / patch**2
            self.embed.weight.copy_(eye.expand_as(self.embed.weight))


class PaletteStudent(TokenStudent):
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = self.model.embed(images).permute(0, 2, 3, 1)
        return self.seen.mean((1, 2)), self.seen

    def patch_embedding(self) -> nn.Module:
        return self.model.embed


def test_colour_oracle() -> None:
    """Painted images, transformed, mixed and brought back, against their targets."""
    torch.manual_seed(0)
    cells, size, grid, batch = (4, 4), (112, 112), (14, 14), 4
    count = cells[0] * cells[1]
    pipeline = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            ToTokenLabels(grid),
        ]
    )
    painted, scores = tv_tensors.Image(oracle.smooth(cells, size)), oracle.label_map(cells, size)
    student = PaletteStudent(Palette(count + 1, size[0] // grid[0]), image_size=size).train()
    student.patch_head = nn.Identity()
    agree, clear = 0, 0
    own_distances, mixed_distances = [], []
    for _ in range(25):
        samples = [pipeline(painted, scores) for _ in range(batch)]
        images = torch.stack([image.as_subclass(Tensor) for image, _ in samples])
        labels = torch.utils.data.default_collate([label for _, label in samples])
        box = MixToken().sample(student.grid)
        if box is None:
            continue
        # What a patch answers is its own image's; what the class token saw is the mixed one.
        _, patches = student(images, box)
        seen = student.seen.flatten(1, 2)[..., :count].double()
        own = soft(box.mix_labels(labels))[0].double()
        shown = cut_labels(labels, box)
        patches = patches[..., :count].double()
        own_distances.append(0.5 * (patches - own).abs().sum(-1))
        mixed_distances.append(0.5 * (seen - soft(shown)[0]).abs().sum(-1))
        top = patches.topk(2).values
        unambiguous = top[..., 0] - top[..., 1] > 0.1
        clear += int(unambiguous.sum())
        agree += int((patches.argmax(-1) == own.argmax(-1))[unambiguous].sum())
        torch.testing.assert_close(box.mix_labels(labels).label_probs, shown.label_probs)
    assert clear > 10_000
    assert agree / clear >= 0.998
    assert torch.cat(own_distances).mean() <= 0.02
    assert torch.cat(mixed_distances).mean() <= 0.02


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    scale=st.integers(1, 3),
    batch=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_restore_undoes_mix(rows: int, columns: int, scale: int, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    box = TokenBox(torch.rand(rows, columns, generator=generator) < 0.5)
    tokens = torch.randn(batch, scale * rows, scale * columns, 17, generator=generator)
    for layout in (tokens, tokens.permute(0, 3, 1, 2), tokens.flatten(1, 2)):
        mixed = box.mix(layout)
        assert mixed.shape == layout.shape
        assert torch.equal(box.restore(mixed), layout)
    # The layouts say the same.
    mixed = box.mix(tokens)
    assert torch.equal(box.mix(tokens.permute(0, 3, 1, 2)), mixed.permute(0, 3, 1, 2))
    assert torch.equal(box.mix(tokens.flatten(1, 2)), mixed.flatten(1, 2))
    for row in range(rows):
        for column in range(columns):
            here = (slice(None), scale * row, scale * column)
            source = tokens[partners(batch)] if box.mask[row, column] else tokens
            assert torch.equal(mixed[here], source[here])


def test_boxes_are_cut_mixs() -> None:
    """Rectangles of the grid's shape; their area is CutMix's, worked out for alpha = 1.

    The side s has s * s uniform; a uniform centre cuts s * s / 4 off it on the average, so the mean
    area is E[(s - s * s / 4) ** 2] = 1/2 - 1/5 + 1/48.
    """
    torch.manual_seed(0)
    mix, areas = MixToken(), []
    for _ in range(4000):
        box = mix.sample((32, 48))
        if box is None:
            areas.append(0.0)
            continue
        assert box.mask.shape == (32, 48)
        rows, columns = box.mask.any(1), box.mask.any(0)
        assert torch.equal(box.mask, rows[:, None] & columns)
        for side in (rows, columns):
            assert side.int().diff().abs().sum() <= 2
        areas.append(box.area)
    assert sum(areas) / len(areas) == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.012)


def test_sampling_is_the_seeds() -> None:
    mix = MixToken(alpha=0.8, prob=0.5)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append([mix.sample(14) for _ in range(200)])
    for one, other in zip(*draws, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one.mask, other.mask)
    drawn = sum(box is not None for box in draws[0])
    assert 70 <= drawn <= 130
    assert all(MixToken(prob=0.0).sample(14) is None for _ in range(20))


def test_errors() -> None:
    with pytest.raises(ValueError, match="alpha must be above 0, got 0"):
        MixToken(alpha=0)
    with pytest.raises(ValueError, match=r"prob must be in \[0, 1\], got 1.5"):
        MixToken(prob=1.5)
    box = box_of(0, 0, 1, 1, (4, 4))
    for shape in ((2, 17, 8), (2, 8, 6, 6), (2, 2, 2, 8), (2, 16)):
        with pytest.raises(ValueError, match=r"grid of its box divides.*grid_for"):
            box.mix(torch.zeros(shape))
    student = student_of(CASES["timm vit"])
    with pytest.raises(ValueError, match="grid of its box divides"):
        student(torch.zeros(2, 3, 32, 32), box_of(0, 0, 1, 1, (3, 3)))
    student(torch.zeros(2, 3, 32, 32))  # no box is left behind
    with pytest.raises(ValueError, match="grid of its box divides"):
        LVViT(image_size=64, width=8, heads=1, depth=1)(
            torch.zeros(2, 3, 64, 64), box_of(0, 0, 1, 1, (3, 3))
        )


def test_the_published_boxes_and_partners() -> None:
    """Mean area .270 and empty .021 at grid 14, drawn from the published code's formulas."""
    torch.manual_seed(0)
    mix, areas = MixToken(published=True), []
    for _ in range(40_000):
        box = mix.sample(14)
        areas.append(0.0 if box is None else box.area)
    drawn = torch.tensor(areas)
    assert drawn.mean().item() == pytest.approx(0.270, rel=0.01)
    assert (drawn == 0).double().mean().item() == pytest.approx(0.021, abs=0.002)
    box = TokenBox(torch.eye(3) > 0, flip=True)
    tokens = torch.arange(5.0).view(5, 1, 1).expand(5, 9, 2)
    mixed = box.mix(tokens)
    assert mixed[:, 0, 0].tolist() == [4, 3, 2, 1, 0] and mixed[:, 1, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(box.restore(mixed), tokens)
    assert box.mix_labels(made_up(5, 20)).partner.tolist() == [4, 3, 2, 1, 0]
