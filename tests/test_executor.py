"""The executor does what calling the transform does: same draws, images and paths."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tests.leaves import LAYOUT, made_up
from tokenlabel.dataset import (
    RandAugment,
    TokenLabelMap,
    TokenLabels,
    ToTokenLabels,
    train_transform,
)
from tokenlabel.dataset.transforms import executor
from tokenlabel.dataset.transforms.recipe import RandomErasing, ResizeToCover
from tokenlabel.dataset.transforms.timm import TimmAugment

SIZE = (90, 120)
_FLOAT = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

TRANSFORMS: dict[str, Callable[[], Any]] = {
    "resized crop": lambda: v2.RandomResizedCrop(32),
    "flip": lambda: v2.RandomHorizontalFlip(),
    "vertical flip": lambda: v2.RandomVerticalFlip(),
    "resize": lambda: v2.Resize(40, max_size=90),
    "centre crop": lambda: v2.CenterCrop((50, 200)),
    "crop": lambda: v2.RandomCrop((50, 130), padding=4, pad_if_needed=True, padding_mode="reflect"),
    "pad": lambda: v2.Pad(9),
    "affine": lambda: v2.RandomAffine(20, (0.1, 0.1), (0.8, 1.2), 5),
    "rotation": lambda: v2.RandomRotation(30, expand=True),
    "perspective": lambda: v2.RandomPerspective(),
    "elastic": lambda: v2.ElasticTransform(),
    "zoom out": lambda: v2.RandomZoomOut(),
    "shortest size": lambda: v2.RandomShortestSize([40, 50, 60]),
    "jitter": lambda: v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    "blur": lambda: v2.GaussianBlur(5),
    "grayscale": lambda: v2.RandomGrayscale(0.5),
    "solarize": lambda: v2.RandomSolarize(100),
    "posterize": lambda: v2.RandomPosterize(3),
    "equalize": lambda: v2.RandomEqualize(),
    "distort": lambda: v2.RandomPhotometricDistort(),
    "to image": lambda: v2.ToImage(),
    "to tensor": lambda: v2.PILToTensor(),
    "normalise": lambda: v2.Compose([_FLOAT, v2.Normalize([0.5] * 3, [0.2] * 3)]),
    "erasing": lambda: v2.Compose([_FLOAT, RandomErasing(0.5)]),
    "to cover": lambda: ResizeToCover((40, 30), v2.InterpolationMode.BILINEAR),
    "timm": lambda: TimmAugment("rand-m9-n3-mstd0.5-inc1"),
    "recipe": lambda: train_transform(32),
    "recipe of many": lambda: train_transform(32, auto_augment="3a", vflip=0.5, erase_prob=0.5),
    "torchvision's, with maps": lambda: RandAugment(),
    "apply": lambda: v2.RandomApply([v2.CenterCrop(60), v2.RandomRotation(9)], 0.5),
    "choice": lambda: v2.RandomChoice([v2.RandomCrop(40), v2.Resize(50)], p=[0.3, 0.7]),
    "order": lambda: v2.RandomOrder([v2.RandomCrop(60), v2.RandomRotation(9)]),
    "nested": lambda: v2.Compose(
        [v2.RandomApply([v2.Compose([v2.RandomChoice([v2.RandomCrop(64), v2.Pad(3)])])]), v2.Pad(2)]
    ),
    "lambda": lambda: v2.Lambda(lambda image: image, PIL.Image.Image),
    "identity": lambda: v2.Identity(),
    "function": lambda: lambda image, leaf: (F.hflip(image), F.hflip(leaf)),
    "a function between": lambda: v2.Compose([v2.RandomCrop(50), _swapped, _swapped, v2.Pad(3)]),
    "subclass": lambda: _Doubled(50),
    "records at the end": lambda: v2.Compose([v2.RandomCrop(50), ToTokenLabels(4)]),
    "records amidst": lambda: v2.Compose([ToTokenLabels(4), v2.RandomHorizontalFlip()]),
}


def _swapped(one: Any, other: Any) -> Any:
    return other, one


class _Doubled(v2.RandomCrop):
    """Draws twice."""

    def forward(self, *inputs: Any) -> Any:
        torch.rand(1)
        return super().forward(*inputs)


def equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, PIL.Image.Image):
        return one.tobytes() == other.tobytes()
    if isinstance(one, TokenLabelMap):
        return torch.equal(TokenLabels.of(one, (3, 4), 0.3), TokenLabels.of(other, (3, 4), 0.3))
    return torch.equal(one, other)


def images() -> dict[str, Any]:
    array = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1).contiguous()
    return {"PIL": PIL.Image.fromarray(array), "pure": tensor, "image": tv_tensors.Image(tensor)}


@pytest.mark.parametrize("kind", ["PIL", "pure", "image"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_as_calling_it(name: str, kind: str) -> None:
    transform, leaf = TRANSFORMS[name](), made_up(LAYOUT, canvas_size=SIZE)[0]
    if name == "to tensor" and kind != "PIL":
        pytest.skip("it takes PIL images only")
    image = images()[kind]
    for seed in range(8):
        results = []
        for way in (transform, lambda *sample: executor.run(transform, *sample)):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            found = way(image, leaf)
            states = random.getstate(), str(np.random.get_state())
            results.append((found, torch.get_rng_state(), states))
        (expected, *state), (found, *state_after) = results
        assert len(found) == len(expected) == 2
        assert all(equal(one, other) for one, other in zip(found, expected, strict=True))
        assert torch.equal(state[0], state_after[0]) and state[1] == state_after[1]


def test_hooks_run() -> None:
    leaf, image = made_up(canvas_size=SIZE)[0], images()["PIL"]
    seen: list[str] = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        crop = v2.RandomCrop(20)
        getattr(crop, register)(lambda *_, register=register: seen.append(register))
        executor.run(v2.Compose([crop]), image, leaf)
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("global"))
    try:
        executor.run(v2.RandomCrop(20), image, leaf)
    finally:
        everywhere.remove()
    own = v2.RandomCrop(20)
    own.forward = lambda *sample: seen.append("own") or sample
    executor.run(own, image, leaf)
    assert seen == ["register_forward_hook", "register_forward_pre_hook", "global", "own"]


def test_transforms_that_refuse_maps_refuse_them() -> None:
    leaf, image = made_up(canvas_size=SIZE)[0], images()["PIL"]
    for transform in (v2.FiveCrop(20), v2.RandAugment()):
        with pytest.raises(TypeError):
            executor.run(v2.Compose([v2.RandomCrop(50), transform]), image, leaf)
    wrong = made_up(canvas_size=(120, 90))[0]
    with pytest.raises(ValueError, match="HxW"):
        executor.run(v2.RandomCrop(30), image, wrong)


def test_other_samples_are_called_as_they_are() -> None:
    leaf, image = made_up(canvas_size=SIZE)[0], images()["image"]
    crop = v2.RandomCrop(50)
    for sample in ((image,), (leaf, image), (image, leaf, 3), ({"leaf": leaf}, leaf)):
        torch.manual_seed(0)
        expected = crop(*sample)
        torch.manual_seed(0)
        found = executor.run(crop, *sample)
        assert type(found) is type(expected)
        assert str(found) == str(expected)
    assert isinstance(executor.run(crop, image), Tensor)
