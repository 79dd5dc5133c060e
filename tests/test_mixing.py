"""MixUp and CutMix: torchvision's pictures, and targets that say what the pictures show."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from tests import oracle
from tests.soft_targets import crop_targets, made_up, patch_targets
from tokenlabel.dataset import TokenTargets, ToTokenTargets
from tokenlabel.supervise import (
    CutMix,
    MixedTargets,
    MixUp,
    MixUpOrCutMix,
    TokenLabelLoss,
    mix_labels,
    mix_targets,
)

B, N, K, C = 6, 16, 4, 30
CELLS = (6, 6)
COUNT = CELLS[0] * CELLS[1]
MIXES: dict[str, Callable[[int], Any]] = {
    "mixup": lambda grid: MixUp(0.8),
    "cutmix": lambda grid: CutMix(1.0, grid=grid),
    "mixup by elem": lambda grid: MixUp(0.8, mode="elem"),
    "cutmix by elem": lambda grid: CutMix(1.0, mode="elem", grid=grid),
    "cutmix by pair": lambda grid: CutMix(1.0, mode="pair"),
    "either by batch": lambda grid: MixUpOrCutMix(prob=0.8),
    "either by elem": lambda grid: MixUpOrCutMix(prob=0.8, mode="elem"),
}


@pytest.mark.parametrize(
    ("ours", "stock"), [(MixUp, v2.MixUp), (partial(CutMix, grid=(2, N // 2)), v2.CutMix)]
)
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_pictures_and_labels_are_torchvisions(ours: Any, stock: Any, alpha: float) -> None:
    images, targets = torch.rand(B, 3, 33, 50), made_up(B, N, C, K)
    mix, reference = ours(alpha), stock(alpha=alpha, num_classes=C)
    for seed in range(50):
        torch.manual_seed(seed)
        mixed, (label, *_, label_probs) = mix(images, targets)
        after = torch.rand(1)
        torch.manual_seed(seed)
        expected, labels = reference(images, targets.label)
        assert torch.equal(mixed, expected)
        assert torch.equal(after, torch.rand(1)), "it took other random numbers"
        found = torch.zeros(B, C).scatter_add_(1, label, label_probs)
        torch.testing.assert_close(found, labels)


def shown(augment: Any, grid: int, size: int, smooth: bool) -> tuple[Tensor, TokenTargets]:
    """A batch of painted pictures of one map, each augmented in its own way, and their targets."""
    picture: Any = (
        oracle.smooth(CELLS, (size, size))
        if smooth
        else torch.from_numpy(oracle.flat(CELLS, (size, size)).transpose(2, 0, 1)).float()
    )
    pipeline = v2.Compose([augment, ToTokenTargets(grid, COUNT if smooth else 4)])
    samples = []
    for _ in range(8):
        image, targets = pipeline(
            tv_tensors.Image(picture.clone()), oracle.label_map(CELLS, (size, size))
        )
        samples.append((image.as_subclass(Tensor), targets))
    images, batch = default_collate(samples)
    return images, batch


@pytest.mark.parametrize("kind", MIXES)
def test_targets_are_what_the_mixed_pictures_show(kind: str) -> None:
    """Total variation between targets and pooled colours, and agreement on the largest."""
    torch.manual_seed(0)
    grid, size = 14, 112
    augment = v2.Compose(
        [v2.RandomHorizontalFlip(), v2.RandomCrop(size, padding=12), v2.RandomVerticalFlip()]
    )
    mix = MIXES[kind](grid)
    far, off, clear, agree, rounds = 0.0, 0.0, 0, 0, 3
    for _ in range(rounds):
        images, plain = shown(augment, grid, size, smooth=True)
        images, targets = mix(images, plain)
        pooled = avg_pool2d(images.double(), size // grid).flatten(2).mT
        share, weight = pooled[..., :COUNT], pooled[..., -1]
        truth = share / weight.clamp(min=1e-9).unsqueeze(-1)
        found = patch_targets(targets, COUNT)
        variation = 0.5 * (truth - found).abs().sum(-1)
        inside = torch.minimum(weight, targets.weight.double()) > 0.5
        far += float(variation[inside].mean()) / rounds
        off += float((weight - targets.weight).abs().mean()) / rounds
        best = truth.topk(2, -1).values
        sure = inside & (best[..., 0] - best[..., 1] > 0.2)
        clear += int(sure.sum())
        agree += int((truth.argmax(-1) == found.argmax(-1))[sure].sum())
    assert far <= 0.02
    assert off <= 0.01
    assert clear > 500 and agree / clear >= 0.998


@pytest.mark.parametrize(("grid", "mode"), [(14, "batch"), (7, "pair"), (14, "elem")])
def test_each_patch_of_a_cut_picture_has_the_class_of_its_colour(grid: int, mode: Any) -> None:
    torch.manual_seed(1)
    augment = v2.Compose([v2.RandomResizedCrop(224, scale=(0.3, 1), interpolation=0)])
    clear = agree = 0
    for _ in range(2):
        images, targets = shown(augment, grid, 224, smooth=False)
        images, targets = CutMix(mode=mode)(images, targets)
        best = patch_targets(targets, COUNT).argmax(-1)
        for picture, wanted in zip(images.numpy(), best.numpy(), strict=True):
            colour = oracle.which_colour(picture.transpose(1, 2, 0).astype(np.uint8), COUNT)
            patches = colour.reshape(grid, 224 // grid, grid, 224 // grid).swapaxes(1, 2)
            for pixels, one in zip(patches.reshape(grid * grid, -1), wanted, strict=True):
                votes = np.bincount(pixels[pixels >= 0], minlength=COUNT)
                if votes.max() > oracle.CLEAR * len(pixels):
                    clear += 1
                    agree += int(votes.argmax() == one)
    assert clear > 300 and agree / clear >= 0.998


def box_area(
    box: tuple[int, int, int, int], size: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Share of each patch outside a pixel box, by counting on a picture fine enough for both."""
    fine = torch.ones(size[0] * grid[0], size[1] * grid[1], dtype=torch.float64)
    x0, y0, x1, y1 = box
    fine[y0 * grid[0] : y1 * grid[0], x0 * grid[1] : x1 * grid[1]] = 0
    rows = fine.reshape(grid[0], size[0], grid[1], size[1])
    return rows.mean((1, 3)).flatten()


@given(st.integers(5, 24), st.integers(5, 24), st.integers(1, 5), st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_areas_are_exact(height: int, width: int, rows: int, columns: int, data: Any) -> None:
    """Also where patches' edges cut pixels; seen in the weights where the partner has no map."""
    images = torch.zeros(2, 1, height, width)
    images[1] = 1
    targets = made_up(2, rows * columns, C, K, padded=False)
    targets.weight[1] = 0
    torch.manual_seed(data.draw(st.integers(0, 999)))
    mixed, found = CutMix(grid=(rows, columns))(images, targets)
    pasted = mixed[0, 0].nonzero()
    box = (0, 0, 0, 0)
    if len(pasted):
        (y0, x0), (y1, x1) = pasted[0].tolist(), pasted[-1].tolist()
        box = (x0, y0, x1 + 1, y1 + 1)
    own = box_area(box, (height, width), (rows, columns))
    torch.testing.assert_close(found.weight[0].double(), own)
    torch.testing.assert_close(found.label_probs[0, 0].double(), own.mean())
    torch.testing.assert_close(found.weight[1].double(), 1 - own)


def test_targets_are_the_mixture_of_the_dense_ones() -> None:
    """The rule: each picture counts by its share of the patch times its weight there."""
    targets = made_up(B, N, C, K)
    targets.weight[1] = 0
    partner = torch.arange(B).roll(1)
    share = torch.rand(B, N, generator=torch.Generator().manual_seed(0))
    share[:, 1:3] = torch.tensor([0.0, 1.0])
    found = mix_targets(targets, partner, share)
    own, other = share * targets.weight, (1 - share) * targets.weight[partner]
    soft = patch_targets(targets, C)
    total = own + other
    part = (own / total.clamp(min=1e-9)).unsqueeze(-1)
    some = total > 0
    truth = part * soft + (1 - part) * soft[partner]
    torch.testing.assert_close(found.weight, total)
    torch.testing.assert_close(patch_targets(found, C)[some], truth[some], atol=1e-6, rtol=1e-5)
    part = (own.sum(1) / (own + other).sum(1)).unsqueeze(-1)
    crops = crop_targets(targets, C)
    torch.testing.assert_close(
        crop_targets(found, C), part * crops + (1 - part) * crops[partner], atol=1e-6, rtol=1e-5
    )
    for sums in (found.probs.sum(-1) + found.rest.sum(-1), found.label_probs.sum(-1)):
        torch.testing.assert_close(sums, torch.ones_like(sums))
    assert [part.dtype for part in found[:8]] == [part.dtype for part in targets]
    assert found.classes.shape == (B, N, 2 * K) and found.rest.shape == (B, N, 2)


def test_labels_alone() -> None:
    targets, partner = made_up(B, N, C, K), torch.arange(B).roll(1)
    share = torch.rand(B, N)
    labels, whole = mix_labels(targets, partner, share), mix_targets(targets, partner, share)
    for field in ("classes", "probs", "rest", "weight"):
        assert torch.equal(getattr(labels, field), getattr(targets, field))
    for field in ("label", "crop_classes", "crop_probs", "crop_rest", "label_probs"):
        assert torch.equal(getattr(labels, field), getattr(whole, field))


def test_pictures_without_a_map_leave_no_target() -> None:
    targets = made_up(B, N, C, K)
    empty = TokenTargets(
        targets.label,
        *(torch.zeros_like(part) for part in targets[1:3]),
        torch.ones_like(targets.rest),
        torch.zeros_like(targets.weight),
        *(torch.zeros_like(part) for part in targets[5:7]),
        torch.ones_like(targets.crop_rest),
    )
    _, found = MixUp()(torch.rand(B, 3, 8, 8), empty)
    assert not found.weight.any() and not found.probs.any() and not found.crop_probs.any()
    torch.testing.assert_close(found.rest.sum(-1), torch.ones(B, N))
    torch.testing.assert_close(found.crop_rest.sum(-1), torch.ones(B))


def test_pairs_exchange_and_elements_differ() -> None:
    images = torch.arange(B).float().reshape(B, 1, 1, 1).expand(B, 1, 8, 8).contiguous()
    targets = made_up(B, N, C, K)
    torch.manual_seed(0)
    mixed, found = MixUp(mode="pair")(images, targets)
    assert torch.equal(found.label[:, 1], targets.label.flip(0))
    assert torch.equal(found.label_probs, found.label_probs.flip(0))
    torch.testing.assert_close(mixed + mixed.flip(0), images + images.flip(0))
    assert len(found.label_probs[:, 0].unique()) == B // 2
    mixed, found = MixUp(mode="elem")(images, targets)
    assert torch.equal(found.label[:, 1], targets.label.roll(1))
    assert len(found.label_probs[:, 0].unique()) == B
    expected = (found.label_probs * torch.stack([images, images.roll(1, 0)], 1)[:, :, 0, 0, 0]).sum(
        1
    )
    torch.testing.assert_close(mixed[:, 0, 3, 3], expected)


def test_the_switch_keeps_its_probabilities() -> None:
    """Of 2000 pictures: about 30% left alone, 40% of the others cut."""
    size = 2000
    images = torch.zeros(size, 1, 8, 8)
    images[1::2] = 1
    torch.manual_seed(0)
    mix = MixUpOrCutMix(1.0, 1.0, prob=0.7, switch_prob=0.4, mode="elem")
    mixed, _ = mix(images, made_up(size, 4, 5, 2))
    changed = mixed != images
    blended = ((mixed > 0) & (mixed < 1)).flatten(1).any(1)
    cut = changed.flatten(1).any(1) & ~blended
    assert abs(blended.float().mean() - 0.7 * 0.6) < 0.04
    # A box may be less than a pixel.
    assert 0.7 * 0.4 - 0.08 < cut.float().mean() < 0.7 * 0.4 + 0.04


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_prob_0_changes_nothing(mode: Any) -> None:
    images, targets = torch.rand(B, 3, 8, 8), made_up(B, N, C, K)
    mixed, found = MixUpOrCutMix(prob=0.0, mode=mode)(images, targets)
    assert torch.equal(mixed, images) and mixed is not images
    torch.testing.assert_close(patch_targets(found, C), patch_targets(targets, C))
    logits = torch.randn(B, C), torch.randn(B, N, C)
    torch.testing.assert_close(TokenLabelLoss()(*logits, found), TokenLabelLoss()(*logits, targets))


def test_the_batch_itself_is_left_as_it_was() -> None:
    images, targets = torch.rand(B, 3, 8, 8), made_up(B, N, C, K)
    before = images.clone(), TokenTargets(*(part.clone() for part in targets))
    for mix in (MixUp(), CutMix(), MixUpOrCutMix(mode="elem")):
        mix(images, targets)
    assert torch.equal(images, before[0])
    assert all(torch.equal(a, b) for a, b in zip(targets, before[1], strict=True))


def test_kinds_of_pictures() -> None:
    targets = made_up(B, N, C, K)
    mixed, _ = CutMix()(torch.randint(256, (B, 3, 8, 8), dtype=torch.uint8), targets)
    assert mixed.dtype == torch.uint8
    mixed, _ = MixUp()(torch.rand(B, 3, 8, 8, dtype=torch.bfloat16), targets)
    assert mixed.dtype == torch.bfloat16
    assert type(MixUp()(tv_tensors.Image(torch.rand(B, 3, 8, 8)), targets)[0]) is tv_tensors.Image


class Samples(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        one = made_up(8, N, C, K)
        return torch.full((3, 8, 8), float(index)), TokenTargets(*(part[index] for part in one))


def collate_and_mix(samples: list[Any]) -> Any:
    return MixUpOrCutMix()(*default_collate(samples))


def test_in_a_loaders_worker() -> None:
    loader = DataLoader(Samples(), batch_size=4, num_workers=1, collate_fn=collate_and_mix)
    for images, targets in loader:
        assert images.shape == (4, 3, 8, 8) and isinstance(targets, MixedTargets)
        assert targets.label.shape == (4, 2)


IMAGES, TARGETS = torch.rand(5, 3, 8, 8), made_up(5, N, C, K)
ONE = TokenTargets(*(part[0] for part in TARGETS))


@pytest.mark.parametrize(
    ("kind", "message", "mix", "images", "targets"),
    [
        (ValueError, "must be even", CutMix(mode="pair"), IMAGES, TARGETS),
        (ValueError, "must be 2 or more", MixUp(), IMAGES[:1], made_up(1, N, C, K)),
        (ValueError, "must be of one batch", MixUp(), IMAGES[:4], TARGETS),
        (ValueError, "must be a batch", MixUp(), IMAGES[0], TARGETS),
        (ValueError, "patches form a square", CutMix(), IMAGES, made_up(5, 15, C, K)),
        (ValueError, "must be square", CutMix(), IMAGES[..., :4], TARGETS),
        (ValueError, "3 x 5, they have 16", CutMix(grid=(3, 5)), IMAGES, TARGETS),
        (ValueError, "must be collated", MixUp(), IMAGES, ONE),
        (TypeError, "floating dtype", MixUp(), IMAGES.byte(), TARGETS),
        (TypeError, "must be TokenTargets, got Tensor", MixUp(), IMAGES, TARGETS.label),
        (TypeError, "mixed once", MixUp(), IMAGES, MixUp()(IMAGES, TARGETS)[1]),
    ],
)
def test_errors(kind: Any, message: str, mix: Any, images: Any, targets: Any) -> None:
    with pytest.raises(kind, match=message) as caught:
        mix(images, targets)
    assert "Remedy" in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MixUp(0),
        lambda: CutMix(-1),
        lambda: MixUp(mode="patch"),  # type: ignore[arg-type]
        lambda: MixUpOrCutMix(prob=2),
        lambda: MixUpOrCutMix(0, 0),
        lambda: CutMix(grid=0),
    ],
)
def test_options_are_checked(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        make()
