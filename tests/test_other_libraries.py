"""albumentations and kornia: label maps follow what they do, by the colour oracle."""

import os
import pickle
import random
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tests.oracle import agreement, distance, label_map
from tokenlabel.dataset import Albumentations, Kornia, TokenLabelMap, TokenLabels, aligned

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for a newer version
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their own, about what they import
    import albumentations as A
    import kornia.augmentation as K

# kornia's elastic transform calls grid_sample without saying which corners it means.
pytestmark = pytest.mark.filterwarnings("ignore:Default grid_sample and affine_grid behavior")

CELLS, SIZE, GRID = (5, 6), (180, 150), (14, 14)
REFLECT, REPLICATE = 4, 1  # OpenCV's modes of borders

ALBUMENTATIONS = {
    "flip": lambda i: A.HorizontalFlip(p=1),
    "transpose": lambda i: A.Transpose(p=1),
    "any of the eight turns": lambda i: A.D4(p=1),
    "random crop": lambda i: A.RandomCrop(100, 120),
    "random resized crop": lambda i: A.RandomResizedCrop((112, 112), interpolation=i),
    "shorter side": lambda i: A.SmallestMaxSize(112, interpolation=i),
    "padding": lambda i: A.PadIfNeeded(230, 240),
    "padding, reflected": lambda i: A.PadIfNeeded(230, 240, border_mode=REFLECT),
    "padding, repeated": lambda i: A.PadIfNeeded(230, 240, border_mode=REPLICATE),
    "affine": lambda i: A.Affine(
        rotate=(-40, 40), scale=(0.7, 1.4), shear=(-15, 15), p=1, interpolation=i
    ),
    "affine, reflected": lambda i: A.Affine(
        rotate=(20, 40), border_mode=REFLECT, p=1, interpolation=i
    ),
    "rotation": lambda i: A.Rotate(90, p=1, interpolation=i),
    "perspective": lambda i: A.Perspective((0.05, 0.15), p=1, interpolation=i),
    "elastic": lambda i: A.ElasticTransform(60, 8, p=1, interpolation=i),
    "grid distortion": lambda i: A.GridDistortion(p=1, interpolation=i),
    "a crop that is padded": lambda i: A.Compose([A.CenterCrop(100, 100), A.Pad(20)]),
    "a chain": lambda i: A.Compose(
        [
            A.RandomResizedCrop((150, 150), interpolation=i),
            A.HorizontalFlip(),
            A.Rotate(30, p=1, interpolation=i),
            A.Perspective(p=1, interpolation=i),
            A.RandomCrop(112, 112),
        ]
    ),
}
KORNIA = {
    "flip": lambda r: K.RandomHorizontalFlip(p=1),
    "padded crop": lambda r: K.RandomCrop((130, 140), padding=30),
    "random resized crop": lambda r: K.RandomResizedCrop((112, 112), resample=r),
    "random resized crop, resampled": lambda r: K.RandomResizedCrop(
        (112, 112), cropping_mode="resample", resample=r
    ),
    "resize": lambda r: K.Resize((160, 112), resample=r),
    "padding": lambda r: K.PadTo((220, 230)),
    "affine": lambda r: K.RandomAffine(
        40, (0.2, 0.2), (0.7, 1.4), (-15, 15), p=1, resample=r
    ),
    "affine, reflected": lambda r: K.RandomAffine(
        40, padding_mode="reflection", p=1, resample=r
    ),
    "rotation": lambda r: K.RandomRotation(90, p=1, resample=r),
    "perspective": lambda r: K.RandomPerspective(0.4, p=1, resample=r),
    "elastic": lambda r: K.RandomElasticTransform(p=1, resample=r),
    "a chain": lambda r: K.AugmentationSequential(
        K.RandomResizedCrop((150, 150), resample=r),
        K.RandomHorizontalFlip(),
        K.RandomRotation(30, p=1, resample=r),
        K.RandomPerspective(0.3, p=1, resample=r),
        K.RandomCrop((112, 112)),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed(request):
    number = sum(request.node.name.encode())
    torch.manual_seed(number)
    random.seed(number)


class Step(v2.Transform):
    """An adapter as one step of a pipeline of v2; in `batch` by way of records.

    Kornia's floats become bytes again for images that were bytes.
    """

    def __init__(self, adapter, batch=False):
        super().__init__()
        self.adapter, self.batch = adapter, batch

    def forward(self, *inputs):
        image, leaf = inputs
        if not self.batch:
            moved, leaf = self.adapter(image, leaf)
        else:
            tensor = F.to_dtype(F.to_image(image), torch.float32, scale=True)[None]
            moved, leaf = self.adapter(tensor, TokenLabels.of(leaf, GRID)[None])
            moved, leaf = moved[0], leaf[0]
        is_float = isinstance(image, torch.Tensor) and image.is_floating_point()
        return tv_tensors.Image(
            moved if is_float else F.to_dtype(moved, torch.uint8, scale=True)
        ), leaf


def albumentations_of(name, kind):
    return Step(Albumentations(A.Compose([ALBUMENTATIONS[name](kind)], seed=3)))


@pytest.mark.parametrize("name", ALBUMENTATIONS)
def test_albumentations_moves_the_map_with_the_image(name):
    clear = right = 0
    for pil in (True, False) * 2:
        found = agreement(albumentations_of(name, 0), CELLS, SIZE, GRID, pil)  # nearest pixel
        clear, right = clear + found[0], right + found[1]
    assert right == clear > 30
    found = distance(albumentations_of(name, 1), CELLS, SIZE, GRID)
    assert found.inner < 0.005 and found.variation < 0.01 and found.weight < 0.02


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("name", KORNIA)
def test_kornia_moves_the_labels_with_the_image(name, batch, monkeypatch):
    monkeypatch.setattr("tests.oracle.ToTokenLabels", lambda grid: Records(grid))
    clear = right = 0
    for _ in range(3):
        step = Step(Kornia(KORNIA[name]("nearest")), batch)
        found = agreement(step, CELLS, SIZE, GRID, False)
        clear, right = clear + found[0], right + found[1]
    assert right == clear > 30
    found = distance(Step(Kornia(KORNIA[name]("bilinear")), batch), CELLS, SIZE, GRID)
    assert found.inner < 0.005 and found.variation < 0.01 and found.weight < 0.02


class Records(torch.nn.Module):
    """ToTokenLabels, but for records, which it leaves as they are."""

    def __init__(self, grid):
        super().__init__()
        self.grid = grid

    def forward(self, image, labels):
        return image, TokenLabels.of(labels, self.grid) if isinstance(
            labels, TokenLabelMap
        ) else labels


def test_what_is_erased_keeps_its_label():
    images = torch.rand(4, 3, 64, 64)
    labels = torch.stack([TokenLabels.of(label_map(CELLS, (64, 64)), (4, 4))] * 4)
    erased, after = Kornia(K.RandomErasing(p=1.0, scale=(0.3, 0.3)))(images, labels)
    assert not torch.equal(erased, images)
    assert torch.equal(after.targets().weight, torch.ones(4, 16))
    drop = Albumentations(A.Compose([A.CoarseDropout(p=1)]))
    _, leaf = drop(np.full((64, 64, 3), 99, np.uint8), label_map(CELLS, (64, 64)))
    assert torch.equal(TokenLabels.of(leaf)[None].targets(4).weight, torch.ones(1, 16))


def mirrored_map(size):
    """A map of two views: class 0 as it is, class 1 mirrored."""
    views = [
        (torch.zeros(2, 2, 1), torch.full((2, 2, 1), kind), torch.full((2, 2), -torch.inf))
        for kind in (0, 1)
    ]
    return TokenLabelMap.from_scores(*views[0], mirrored=views[1], canvas_size=size, num_classes=2)


@pytest.mark.parametrize(
    "flip",
    [
        lambda: Albumentations(A.Compose([A.HorizontalFlip(p=1), A.ElasticTransform(60, 8, p=1)])),
        lambda: Albumentations(A.Compose([A.HorizontalFlip(p=1)])),
        lambda: Kornia(K.RandomHorizontalFlip(p=1)),
    ],
    ids=["flip and elastic", "flip", "kornia"],
)
def test_a_mirrored_image_is_taught_by_the_mirrored_view(flip):
    image = PIL.Image.new("RGB", (64, 64))
    for times, kind in ((1, 1), (2, 0)):
        moved, leaf = image, mirrored_map((64, 64))
        for _ in range(times):
            moved, leaf = flip()(moved, leaf)
        targets = TokenLabels.of(leaf)[None].targets(1)
        assert targets.dense()[0, 0].argmax() == kind


def test_a_batch_on_the_device_takes_the_mirrored_view():
    labels = torch.stack([TokenLabels.of(mirrored_map((64, 64)))] * 2)
    images, labels = Kornia(K.RandomHorizontalFlip(p=1))(torch.rand(2, 3, 64, 64), labels)
    assert labels.targets(1).dense()[:, 0].argmax(1).tolist() == [1, 1]
    _, labels = Kornia(K.RandomElasticTransform(p=1))(images, labels)
    assert labels.targets(1).dense()[:, 0].argmax(1).tolist() == [1, 1]


def test_pipelines_are_wrapped_where_they_are_assigned_and_go_to_workers():
    pipeline = aligned(A.Compose([A.HorizontalFlip(p=1), A.Normalize()]))
    image, leaf = PIL.Image.new("RGB", (30, 20)), label_map(CELLS, (20, 30))
    moved, after = pickle.loads(pickle.dumps(pipeline))(image, leaf)
    assert moved.dtype == torch.float32 and moved.shape == (3, 20, 30)
    assert after.path.matrix == F.horizontal_flip(leaf).path.matrix
    assert pipeline(image).shape == (3, 20, 30)
    moved, after = aligned(K.RandomHorizontalFlip(p=1))(image, leaf)
    assert moved.shape == (3, 20, 30) and after.path == F.horizontal_flip(leaf).path
    assert aligned(K.RandomHorizontalFlip(p=1))(image).shape == (3, 20, 30)


def test_what_no_map_can_follow_is_named():
    with pytest.raises(TypeError, match=r"can follow albumentations\.Morphological"):
        Albumentations(A.Compose([A.Morphological()]))
    with pytest.raises(TypeError, match=r"takes an albumentations\.Compose of version 2"):
        aligned(A.HorizontalFlip())
    with pytest.raises(NotImplementedError):  # kornia's own
        Kornia(K.RandomFisheye(*[torch.tensor([-0.3, 0.3])] * 2, torch.tensor([0.9, 1.0]), p=1))(
            PIL.Image.new("RGB", (30, 20)), label_map(CELLS, (20, 30))
        )

    with pytest.raises(TypeError, match=r"RandomMixUpV2, which mixes images\. Remedy: "):
        Kornia(K.AugmentationSequential(K.RandomMixUpV2(p=1)))


def test_both_are_steps_of_a_pipeline_of_v2():
    flips = [K.RandomHorizontalFlip(p=1), A.Compose([A.VerticalFlip(p=1)])]
    flips += [Kornia(flips[0]), Albumentations(flips[1])]
    image, leaf = PIL.Image.new("RGB", (64, 40)), label_map(CELLS, (40, 64))
    _, after = aligned(v2.Compose([v2.CenterCrop(32), *flips]))(image, leaf)
    assert after.path.matrix == pytest.approx(F.center_crop(leaf, 32).path.matrix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_halves_and_autocast_lose_no_label(dtype):
    labels = torch.stack([TokenLabels.of(label_map(CELLS, (64, 64)), (4, 4))] * 3)
    augment = Kornia(K.RandomAffine(20.0, p=1))
    torch.manual_seed(0)
    _, expected = augment(torch.rand(3, 3, 64, 64), labels)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        images, after = augment(torch.rand(3, 3, 64, 64).to(dtype), labels)
    assert images.dtype == dtype
    assert torch.equal(after, expected) and expected.targets().weight.mean() > 0.8


def test_workers_draw_numbers_of_their_own():
    pipeline = Albumentations(A.Compose([A.RandomCrop(8, 8)], seed=1))

    def epoch(seed):
        torch.manual_seed(seed)
        loader = DataLoader(Drawn(pipeline), batch_size=None, num_workers=2)
        return [tuple(matrix) for matrix in loader]

    assert len({*epoch(0), *epoch(1)}) == 8, "two workers, two epochs, two images each"
    assert epoch(0) == epoch(0)


class Drawn(Dataset):
    def __init__(self, pipeline):
        self.pipeline = pipeline

    def __len__(self):
        return 4

    def __getitem__(self, _):
        image, leaf = np.zeros((200, 200, 3), np.uint8), label_map(CELLS, (200, 200))
        return self.pipeline(image, leaf)[1].path.matrix


def test_a_crop_that_is_enlarged_is_one_matrix():
    for seed in range(20):
        pipeline = Albumentations(A.Compose([A.RandomResizedCrop((64, 64))], seed=seed))
        _, leaf = pipeline(np.zeros((90, 80, 3), np.uint8), label_map(CELLS, (90, 80)))
        assert leaf.path.is_single, "no field of points, which takes longer and fifty kilobytes"
