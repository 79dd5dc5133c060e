"""MixUp and CutMix: torchvision's images, and targets that say what the images show."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from tests import oracle
from tests.records import exact, made_up, with_word
from tokenlabel.dataset import TokenLabels, ToTokenLabels
from tokenlabel.supervise import CutMix, MixedLabels, MixUp, MixUpOrCutMix, TokenBox, TokenLabelLoss

B, N, C = 6, 9, 30
CELLS = (6, 6)
COUNT = CELLS[0] * CELLS[1]
MIXES: dict[str, Callable[[], Any]] = {
    "mixup": lambda: MixUp(0.8),
    "cutmix": lambda: CutMix(1.0),
    "mixup by elem": lambda: MixUp(0.8, mode="elem"),
    "cutmix by elem": lambda: CutMix(1.0, mode="elem"),
    "cutmix by pair": lambda: CutMix(1.0, mode="pair"),
    "either by batch": lambda: MixUpOrCutMix(prob=0.8),
    "either by elem": lambda: MixUpOrCutMix(prob=0.8, mode="elem"),
}


def soft(labels: MixedLabels, grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """The patches' targets, [B, N, C], and their weights, [B, N]."""
    parts = labels.parts(grid)
    weight = torch.stack([area for _, area in parts]).sum(0)
    target = torch.stack([windows.dense() * area.unsqueeze(-1) for windows, area in parts]).sum(0)
    return target / weight.clamp(min=1e-9).unsqueeze(-1), weight


@pytest.mark.parametrize(("ours", "stock"), [(MixUp, v2.MixUp), (CutMix, v2.CutMix)])
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_images_and_labels_are_torchvisions(ours: Any, stock: Any, alpha: float) -> None:
    images, labels = torch.rand(B, 3, 33, 50), made_up(B)
    mix, reference = ours(alpha), stock(alpha=alpha, num_classes=C)
    for seed in range(50):
        torch.manual_seed(seed)
        mixed, found = mix(images, labels)
        after = torch.rand(1)
        torch.manual_seed(seed)
        expected, probs = reference(images, labels.label)
        assert torch.equal(mixed, expected)
        assert torch.equal(after, torch.rand(1)), "it took other random numbers"
        ours_probs = torch.zeros(B, C).scatter_add_(1, found.label, found.label_probs)
        torch.testing.assert_close(ours_probs, probs)


def shown(augment: Any, grid: int, size: int, smooth: bool) -> tuple[Tensor, TokenLabels]:
    """A batch of painted images of one map, each augmented in its own way, and their records."""
    image: Any = (
        oracle.smooth(CELLS, (size, size))
        if smooth
        else torch.from_numpy(oracle.flat(CELLS, (size, size)).transpose(2, 0, 1)).float()
    )
    pipeline = v2.Compose([augment, ToTokenLabels(grid)])
    samples = []
    for _ in range(8):
        moved, record = pipeline(
            tv_tensors.Image(image.clone()), oracle.label_map(CELLS, (size, size))
        )
        samples.append((moved.as_subclass(Tensor), record))
    images, labels = default_collate(samples)
    return images, labels


@pytest.mark.parametrize("kind", MIXES)
def test_targets_are_what_the_mixed_images_show(kind: str) -> None:
    """Total variation between targets and pooled colours, and agreement on the largest."""
    torch.manual_seed(0)
    grid, size = 14, 112
    augment = v2.Compose(
        [v2.RandomHorizontalFlip(), v2.RandomCrop(size, padding=12), v2.RandomVerticalFlip()]
    )
    mix = MIXES[kind]()
    far, off, clear, agree, rounds = 0.0, 0.0, 0, 0, 3
    for _ in range(rounds):
        images, labels = mix(*shown(augment, grid, size, smooth=True))
        pooled = avg_pool2d(images.double(), size // grid).flatten(2).mT
        area, inside = pooled[..., :COUNT], pooled[..., -1]
        truth = area / inside.clamp(min=1e-9).unsqueeze(-1)
        found, weight = soft(labels)
        variation = 0.5 * (truth - found).abs().sum(-1)
        half = torch.minimum(inside, weight.double()) > 0.5
        far += float(variation[half].mean()) / rounds
        off += float((inside - weight).abs().mean()) / rounds
        best = truth.topk(2, -1).values
        sure = half & (best[..., 0] - best[..., 1] > 0.2)
        clear += int(sure.sum())
        agree += int((truth.argmax(-1) == found.argmax(-1))[sure].sum())
    assert far <= 0.02
    assert off <= 0.01
    assert clear > 500 and agree / clear >= 0.998


@pytest.mark.parametrize(("grid", "mode"), [(14, "batch"), (7, "pair"), (14, "elem")])
def test_each_patch_of_a_cut_image_has_the_class_of_its_colour(grid: int, mode: Any) -> None:
    torch.manual_seed(1)
    augment = v2.Compose([v2.RandomResizedCrop(224, scale=(0.3, 1), interpolation=0)])
    clear = agree = 0
    for _ in range(2):
        images, labels = CutMix(mode=mode)(*shown(augment, grid, 224, smooth=False))
        best = labels.sparse(k=1).classes[..., 0]
        for image, wanted in zip(images.numpy(), best.numpy(), strict=True):
            colour = oracle.which_colour(image.transpose(1, 2, 0).astype(np.uint8), COUNT)
            patches = colour.reshape(grid, 224 // grid, grid, 224 // grid).swapaxes(1, 2)
            for pixels, one in zip(patches.reshape(grid * grid, -1), wanted, strict=True):
                votes = np.bincount(pixels[pixels >= 0], minlength=COUNT)
                if votes.max() > oracle.CLEAR * len(pixels):
                    clear += 1
                    agree += int(votes.argmax() == one)
    assert clear > 300 and agree / clear >= 0.998


def outside(mixed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Fraction of each patch that is 0, by counting on an image fine enough for both."""
    fine = mixed.repeat_interleave(grid[0], 0).repeat_interleave(grid[1], 1)
    patches = fine.reshape(grid[0], mixed.shape[0], grid[1], mixed.shape[1])
    return 1 - patches.double().mean((1, 3)).flatten()


@given(st.integers(5, 24), st.integers(5, 24), st.integers(1, 5), st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_areas_are_exact(height: int, width: int, rows: int, columns: int, data: Any) -> None:
    """Also where patches' edges cut pixels: counted pixel by pixel."""
    images = torch.zeros(2, 1, height, width)
    images[1] = 1
    torch.manual_seed(data.draw(st.integers(0, 999)))
    mixed, found = CutMix()(images, made_up(2))
    own = outside(mixed[0, 0], (rows, columns))
    area = found.own_area((rows, columns)).double()
    torch.testing.assert_close(area[0], own, atol=2e-6, rtol=0)
    torch.testing.assert_close(area[1], own, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.label_probs[0, 0].double(), own.mean(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("mix", [MixUp(), CutMix(mode="elem"), MixUpOrCutMix(mode="pair")])
def test_targets_are_the_mixture_of_the_dense_ones(mix: Any) -> None:
    """The rule: each image counts by its fraction of the patch times its weight there."""
    labels = with_word(made_up(B, shrink=0.3), 1, state=0)
    windows = labels.targets()
    assert (windows.weight < 1).any()
    torch.manual_seed(3)
    _, mixed = mix(torch.rand(B, 3, 32, 32), labels)
    area, partner, target = mixed.own_area((3, 3)), mixed.partner, exact(windows)
    own, other = area * windows.weight, (1 - area) * windows.weight[partner]
    truth = own.unsqueeze(-1) * target + other.unsqueeze(-1) * target[partner]
    truth = truth / (own + other).clamp(min=1e-9).unsqueeze(-1)
    found, weight = soft(mixed)
    torch.testing.assert_close(weight, own + other)
    torch.testing.assert_close(found.double(), truth, atol=1e-6, rtol=1e-5)
    merged = mixed.sparse(k=C)
    spread = torch.zeros(B, N, C).scatter_add_(2, merged.classes.long(), merged.probs)
    torch.testing.assert_close(spread, found)
    torch.testing.assert_close(merged.weight, weight)
    few = mixed.sparse(k=2)
    for sums in (few.probs.sum(-1) + few.rest, few.crop_probs.sum(-1) + few.crop_rest):
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_labels_and_crops_are_mixed_by_area() -> None:
    labels = with_word(with_word(made_up(B), 1, state=0), 2, label=-1)
    torch.manual_seed(3)
    _, mixed = CutMix(mode="elem")(torch.rand(B, 3, 32, 32), labels)
    partner, probs = torch.arange(B).roll(1), mixed.label_probs
    assert torch.equal(mixed.label, torch.stack([labels.label, labels.label[partner]], 1))
    torch.testing.assert_close(probs.sum(1), torch.ones(B))
    crop = labels.crop()
    truth = probs[:, :1] * crop + probs[:, 1:] * crop[partner]
    torch.testing.assert_close(mixed.crop(), truth / truth.sum(1, keepdim=True))
    larger = mixed.label.gather(1, probs.argmax(1, keepdim=True))[:, 0]
    assert torch.equal(mixed.hard_label(), larger)


def test_images_without_a_map_leave_no_target() -> None:
    labels = made_up(2)
    for row in range(2):
        labels = with_word(labels, row, state=0)
    _, mixed = MixUp()(torch.rand(2, 3, 8, 8), labels)
    found, weight = soft(mixed)
    assert not weight.any() and not found.any() and not mixed.crop().any()
    merged = mixed.sparse()
    assert not merged.probs.any() and merged.rest.eq(1).all() and merged.crop_rest.eq(1).all()


def test_a_grid_is_needed_and_may_be_any() -> None:
    _, mixed = CutMix()(torch.rand(B, 3, 32, 32), made_up(B, grid=None))
    with pytest.raises(ValueError, match=r"grid.*Remedy"):
        mixed.parts()
    assert mixed.parts(2)[0][1].shape == (B, 4) and mixed.sparse((1, 3)).weight.shape == (B, 3)


def test_pairs_exchange_and_elements_differ() -> None:
    images = torch.arange(B).float().reshape(B, 1, 1, 1).expand(B, 1, 8, 8).contiguous()
    labels = made_up(B)
    torch.manual_seed(0)
    mixed, found = MixUp(mode="pair")(images, labels)
    assert torch.equal(found.label[:, 1], labels.label.flip(0))
    assert torch.equal(found.label_probs, found.label_probs.flip(0))
    torch.testing.assert_close(mixed + mixed.flip(0), images + images.flip(0))
    assert len(found.label_probs[:, 0].unique()) == B // 2
    mixed, found = MixUp(mode="elem")(images, labels)
    assert torch.equal(found.label[:, 1], labels.label.roll(1))
    assert len(found.label_probs[:, 0].unique()) == B
    expected = (found.label_probs * torch.stack([images, images.roll(1, 0)], 1)[:, :, 0, 0, 0]).sum(
        1
    )
    torch.testing.assert_close(mixed[:, 0, 3, 3], expected)


def test_the_switch_keeps_its_probabilities() -> None:
    """Of 2000 images: about 30% left alone, 40% of the others cut."""
    size = 2000
    images = torch.zeros(size, 1, 8, 8)
    images[1::2] = 1
    torch.manual_seed(0)
    mix = MixUpOrCutMix(1.0, 1.0, prob=0.7, switch_prob=0.4, mode="elem")
    mixed, _ = mix(images, made_up(2)[torch.arange(size) % 2])
    changed = mixed != images
    blended = ((mixed > 0) & (mixed < 1)).flatten(1).any(1)
    cut = changed.flatten(1).any(1) & ~blended
    assert abs(blended.float().mean() - 0.7 * 0.6) < 0.04
    # A box may be less than a pixel.
    assert 0.7 * 0.4 - 0.08 < cut.float().mean() < 0.7 * 0.4 + 0.04


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_prob_0_changes_nothing(mode: Any) -> None:
    images, labels = torch.rand(B, 3, 8, 8), made_up(B)
    mixed, found = MixUpOrCutMix(prob=0.0, mode=mode)(images, labels)
    assert torch.equal(mixed, images) and mixed is not images
    torch.testing.assert_close(soft(found)[0], labels.targets().dense())
    logits = torch.randn(B, C), torch.randn(B, N, C)
    torch.testing.assert_close(TokenLabelLoss()(*logits, found), TokenLabelLoss()(*logits, labels))


def test_the_batch_itself_is_left_as_it_was() -> None:
    images, labels = torch.rand(B, 3, 8, 8), made_up(B)
    before = images.clone(), labels.clone()
    for mix in (MixUp(), CutMix(), MixUpOrCutMix(mode="elem")):
        mix(images, labels)[1].sparse()
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])


def test_kinds_of_images() -> None:
    labels = made_up(B)
    mixed, _ = CutMix()(torch.randint(256, (B, 3, 8, 8), dtype=torch.uint8), labels)
    assert mixed.dtype == torch.uint8
    mixed, _ = MixUp()(torch.rand(B, 3, 8, 8, dtype=torch.bfloat16), labels)
    assert mixed.dtype == torch.bfloat16
    assert type(MixUp()(tv_tensors.Image(torch.rand(B, 3, 8, 8)), labels)[0]) is tv_tensors.Image


def test_moves_as_one() -> None:
    _, mixed = CutMix()(torch.rand(B, 3, 8, 8), made_up(B))
    torch.testing.assert_close(soft(pickle.loads(pickle.dumps(mixed))), soft(mixed))
    moved = mixed.to("meta", non_blocking=True)
    assert len(moved) == B and moved.device.type == "meta"
    fields = (moved.labels, moved.partner, moved.blend, moved.box)
    assert all(part.device.type == "meta" for part in fields) and moved.patches
    assert not TokenBox(torch.eye(3) > 0).mix_labels(made_up(B)).to("meta").patches


IMAGES, LABELS = torch.rand(5, 3, 8, 8), made_up(5)


@pytest.mark.parametrize(
    ("kind", "message", "mix", "images", "labels"),
    [
        (ValueError, "must be even", CutMix(mode="pair"), IMAGES, LABELS),
        (ValueError, "must be 2 or more", MixUp(), IMAGES[:1], LABELS[:1]),
        (ValueError, "must be of one batch", MixUp(), IMAGES[:4], LABELS),
        (ValueError, "must be a batch", MixUp(), IMAGES[0], LABELS),
        (ValueError, r"must be a batch \[B, bytes\]", MixUp(), IMAGES, LABELS[0]),
        (TypeError, "floating dtype", MixUp(), IMAGES.byte(), LABELS),
        (TypeError, "must be TokenLabels, got TokenTargets", MixUp(), IMAGES, LABELS.sparse()),
        (TypeError, "mixed once", MixUp(), IMAGES, MixUp()(IMAGES, LABELS)[1]),
    ],
)
def test_errors(kind: Any, message: str, mix: Any, images: Any, labels: Any) -> None:
    with pytest.raises(kind, match=message) as caught:
        mix(images, labels)
    assert "Remedy" in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MixUp(0),
        lambda: CutMix(-1),
        lambda: MixUp(mode="patch"),  # type: ignore[arg-type]
        lambda: MixUpOrCutMix(prob=2),
        lambda: MixUpOrCutMix(0, 0),
    ],
)
def test_options_are_checked(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        make()
