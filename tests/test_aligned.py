"""Pipelines of torchvision v1 and timm: their own image, with a label map that follows it."""

import random
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import create_transform
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tests.oracle import agreement, distance, label_map
from tokenlabel.dataset import ImageOnly, TokenLabelMap, aligned
from tokenlabel.dataset.transforms.timm import TimmAugment

SIZE = (96, 128)
NEAREST, BILINEAR = v1.InterpolationMode.NEAREST, v1.InterpolationMode.BILINEAR
MOVES = {
    "resize": v1.Resize((140, 112)),
    "resize the short side": v1.Resize(120, interpolation=BILINEAR),
    "centre crop": v1.CenterCrop((80, 100)),
    "pad": v1.Pad((4, 8, 12, 0)),
    "random crop": v1.RandomCrop(84, padding=8),
    "resized crop": v1.RandomResizedCrop(112, scale=(0.3, 1), interpolation=BILINEAR),
    "flips": v1.Compose([v1.RandomHorizontalFlip(0.5), v1.RandomVerticalFlip(0.5)]),
    "rotation": v1.RandomRotation(20),
    "affine": v1.RandomAffine(15, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=10),
    "perspective": v1.RandomPerspective(0.3, p=1),
    "apply": v1.RandomApply([v1.RandomRotation((10, 30))], p=0.5),
    "choice": v1.RandomChoice([v1.RandomHorizontalFlip(1), v1.CenterCrop(90)]),
    "order": v1.RandomOrder([v1.RandomHorizontalFlip(1), v1.CenterCrop(90)]),
    "TrivialAugment": v1.Compose([v1.RandomHorizontalFlip(), v1.Resize(112)]),
    "timm crop": create_transform(112, is_training=True, color_jitter=0, hflip=0.5).transforms[0],
}
COLOURS = {
    "v1": [
        v1.ColorJitter(0.4, 0.4, 0.4, 0.1),
        v1.RandomGrayscale(0.5),
        v1.GaussianBlur(5),
        v1.RandomPosterize(3, 0.5),
        v1.RandomSolarize(99, 0.5),
        v1.RandomApply([v1.RandomInvert(1)], 0.5),
        v1.ToTensor(),
        v1.RandomErasing(0.9),
        v1.Normalize([0.5] * 3, [0.2] * 3),
    ],
    "timm": create_transform(
        128, is_training=True, scale=(1, 1), hflip=0, color_jitter=0.4, re_prob=1.0, re_mode="pixel"
    ).transforms[1:],
}


def seed(number):
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def photograph(size=SIZE):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize("pil", [True, False], ids=["PIL", "tensor"])
@pytest.mark.parametrize("name", MOVES)
def test_the_map_follows_what_moves_pixels(name, pil):
    seed(0)
    transform = aligned(MOVES[name])
    found = [agreement(transform, (5, 7), (160, 224), (14, 14), pil) for _ in range(12)]
    clear, right = np.sum(found, 0)
    assert right == clear > 300


def test_targets_are_exact():
    seed(0)
    pipeline = v1.Compose([MOVES["resized crop"], v1.RandomHorizontalFlip(0.5)])
    found = [distance(aligned(pipeline), (7, 7), (120, 150), (7, 7)) for _ in range(8)]
    assert max(one.variation for one in found) < 0.005


@pytest.mark.parametrize("name", COLOURS)
def test_what_moves_no_pixel_gives_the_pipelines_own_image_and_leaves_the_map(name):
    pipeline, image, leaf = v1.Compose(COLOURS[name]), photograph(), label_map((3, 4), SIZE)
    for number in range(8):
        seed(number)
        expected = pipeline(image)
        seed(number)
        got, followed = aligned(pipeline)(image, leaf)
        assert torch.equal(torch.as_tensor(got), expected)
        assert followed.path == leaf.path


@pytest.mark.parametrize("auto_augment", ["rand-m6-mstd0.5-inc1", "original", "3a"])
def test_timms_whole_training_pipeline_with_its_own_draws(auto_augment):
    """All after the crop, whose draws come from another generator, is timm's, byte for byte."""
    pipeline = create_transform(96, is_training=True, auto_augment=auto_augment, hflip=0)
    ours = aligned(pipeline)
    assert isinstance(ours.transforms[1], TimmAugment)
    image, leaf = photograph((96, 96)), label_map((3, 3), (96, 96))
    moved = 0
    for number in range(30):
        seed(number)
        expected = image
        for step in pipeline.transforms[1:]:
            expected = step(expected)
        seed(number)
        got, followed = v2.Compose(ours.transforms[1:])(image, leaf)
        assert torch.equal(torch.as_tensor(got), expected)
        moved += followed.path != leaf.path
    assert moved or auto_augment == "3a"


def test_timms_prefetcher_pipeline_gives_bytes():
    pipeline = create_transform(64, is_training=True, use_prefetcher=True)
    image, leaf = aligned(pipeline)(photograph(), label_map((3, 4), SIZE))
    assert image.dtype == torch.uint8
    assert F.get_size(image) == list(leaf.canvas_size) == [64, 64]


def test_pipelines_that_need_nothing_are_returned_as_they_are():
    def function(image, leaf):
        return image, leaf

    for transform in (None, function, v2.Compose([v2.CenterCrop(9)]), v2.CenterCrop(9)):
        assert aligned(transform) is transform


def test_v1_transforms_inside_a_v2_pipeline_follow_too():
    pipeline = aligned(v2.Compose([v1.RandomHorizontalFlip(1), v2.CenterCrop(64), v1.ToTensor()]))
    image, leaf = pipeline(photograph(), label_map((3, 4), SIZE))
    assert isinstance(leaf, TokenLabelMap)
    assert F.get_size(image) == [64, 64]


class MyCrop(v1.RandomCrop):
    pass


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (v1.Compose([v1.Resize(99), v1.Lambda(lambda image: image)]), "transforms.Lambda"),
        (v1.Compose([v1.FiveCrop(9)]), "FiveCrop"),
        (v1.AugMix(), "AugMix"),
        (v1.Compose([MyCrop(9)]), "MyCrop"),
        (v1.RandomApply([lambda image: image]), "<lambda>"),
        (v2.Compose([v1.FiveCrop(9)]), "FiveCrop"),
        (create_transform(96, is_training=True, train_crop_mode="rkrc"), "ResizeKeepRatio"),
        (create_transform(96, is_training=True, auto_augment="augmix-m3"), "AugMixAugment"),
    ],
)
def test_what_no_map_can_follow_is_named_with_the_remedy(transform, name):
    with pytest.raises(TypeError, match=rf"cannot follow \S*{name}.*Remedy: .*ImageOnly"):
        aligned(transform)


def test_image_only_refuses_what_moves_pixels():
    image, leaf = tv_tensors.Image(torch.zeros(3, 8, 8)), label_map((2, 2), (8, 8))
    blurred, same = ImageOnly(v1.GaussianBlur(3))(image, leaf)
    assert blurred.shape == image.shape and same.path == leaf.path
    with pytest.raises(ValueError, match=r"ImageOnly.*CenterCrop made an image of .* \[4, 4\]"):
        ImageOnly(v1.CenterCrop(4))(image, leaf)


class Preset:
    """A pipeline in a class, as torchvision's training scripts have it."""

    def __init__(self, library: Any = v1) -> None:
        steps = [library.CenterCrop(64), library.RandAugment(), library.PILToTensor()]
        self.pipeline = library.Compose([*steps, v2.ToPureTensor()] if library is v2 else steps)

    def __call__(self, image: Any) -> Any:
        """A name and a docstring of its own."""
        return self.pipeline(image)


class BusyPreset(Preset):
    def __call__(self, image: Any) -> Any:
        return self.pipeline(image.rotate(3))


@pytest.mark.parametrize("library", [v1, v2], ids=["v1", "v2"])
def test_a_class_that_only_runs_a_pipeline_is_that_pipeline(library: Any) -> None:
    preset, paths = Preset(library), set()
    for number in range(8):
        seed(number)
        expected = preset(photograph())
        seed(number)
        image, leaf = aligned(preset)(photograph(), label_map((3, 4), SIZE))
        assert isinstance(leaf, TokenLabelMap) and leaf.canvas_size == (64, 64)
        assert image.shape == expected.shape and type(image) is type(expected)
        assert library is v1 or torch.equal(image, expected)  # v1's operations are drawn otherwise
        paths.add(str(leaf.path))
    assert len(paths) > 1, "RandAugment moved the map too"


def test_what_takes_an_image_alone_is_refused_where_it_is_assigned() -> None:
    for transform in (BusyPreset(), lambda image: image):
        with pytest.raises(TypeError, match=r"takes an image alone\. Remedy: make it a function"):
            aligned(transform)
    with pytest.raises(TypeError, match=r"Identity takes an image alone"):
        aligned(torch.nn.Identity())
    for function in (lambda image, leaf: (image, leaf), lambda *pair: pair):
        assert aligned(function) is function


class MyFlip(torch.nn.Module):
    def forward(self, image: Any, leaf: Any) -> Any:
        return F.horizontal_flip(image), F.horizontal_flip(leaf)


@pytest.mark.parametrize("step", [MyFlip(), MyFlip().forward], ids=["module", "function"])
def test_a_step_of_ones_own_takes_image_and_map(step: Any) -> None:
    seen, agreed = agreement(
        aligned(v2.Compose([step, v2.CenterCrop(150)])), (5, 7), (160, 224), (14, 14), True
    )
    assert seen == agreed > 30


@pytest.mark.parametrize("library", [v1, v2], ids=["v1", "v2"])
def test_steps_in_sequential_are_a_pipeline(library: Any) -> None:
    steps = torch.nn.Sequential(library.RandomHorizontalFlip(1), library.CenterCrop(150))
    seen, agreed = agreement(aligned(steps), (5, 7), (160, 224), (14, 14), False)
    assert seen == agreed > 30


def test_to_tensor_takes_the_tensor_of_a_numpy_image() -> None:
    array = np.array(photograph())
    tensor = tv_tensors.Image(torch.from_numpy(array).permute(2, 0, 1))
    image, _ = aligned(v1.Compose([v1.ToTensor()]))(tensor, label_map((3, 4), SIZE))
    assert torch.equal(image, v1.ToTensor()(array))


@pytest.mark.parametrize("name", ["RandAugment", "AutoAugment", "TrivialAugmentWide"])
def test_v2s_automatic_augmentation_takes_the_map_along(name: str) -> None:
    theirs = getattr(v2, name)(fill=7, interpolation=BILINEAR)
    clear = right = 0
    for number in range(12):
        for transform in (theirs, v2.Compose([theirs])):
            seed(number)
            expected = theirs(photograph())
            seed(number)
            image, _ = aligned(transform)(photograph(), label_map((3, 4), SIZE))
            assert image.tobytes() == expected.tobytes()
        seen, agreed = agreement(aligned(theirs), (5, 7), (160, 224), (14, 14), True)
        clear, right = clear + seen, right + agreed
    assert right == clear > 300
