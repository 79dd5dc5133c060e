"""`check_alignment`, on pipelines that keep image and map together and on some that do not."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tokenlabel.dataset import ToTokenLabels, check_alignment, train_transform

CROP = v2.RandomResizedCrop(224)
TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "pipeline",
    [
        train_transform(),
        v2.Compose([CROP, v2.RandomSolarize(128, p=1), v2.RandomInvert()]),
        v2.Compose([v2.RandomPerspective(0.5, 1), v2.RandomRotation(30), CROP]),
        v2.Compose([CROP, TENSOR, v2.RandomErasing(p=1), ToTokenLabels(14)]),
    ],
    ids=["the recipe", "colours upside down", "tilted", "erased, to records"],
)
@pytest.mark.filterwarnings("ignore:RandomErasing")  # torchvision's, of all that is a Mask
def test_what_stays_together_passes(pipeline):
    found = check_alignment(pipeline)
    assert found.agreement > 0.95 and found.shift < 0.15 and found.draws > 50


def flip_of_the_image(image, leaf):
    image, leaf = CROP(image, leaf)
    return (F.horizontal_flip(image) if torch.rand(1) < 0.3 else image), leaf


def transposed_map(image, leaf):
    image, leaf = v2.CenterCrop(224)(image, leaf)
    return image.transpose(Image.Transpose.TRANSPOSE), leaf


def crop_of_the_image(image, leaf):
    image, whole = CROP(image), v2.Resize((224, 224))
    return image, whole(leaf)


def swapped_box(image, leaf):
    """What the published code does: the box reaches the map as (y, x)."""
    image, leaf = v2.Resize((256, 256))(image, leaf)
    top, left, height, width = CROP.get_params(image, [0.2, 0.5], [0.75, 1.3])
    image = F.resized_crop(image, top, left, height, width, [224, 224])
    return image, F.resized_crop(leaf, left, top, width, height, [224, 224])


def one_pixel_off(image, leaf):
    image, leaf = v2.Resize((224, 224))(image, leaf)
    return image, leaf.follow(torch.tensor([[1.0, 0, 1], [0, 1, 0.5], [0, 0, 1]]))


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (flip_of_the_image, "mirrored left to right"),
        (transposed_map, "the map is transposed"),
        (crop_of_the_image, "must stay together; in .* draws they did not"),
        (swapped_box, "must stay together; in .* draws they did not"),
        (one_pixel_off, r"within 0.5 pixels; they lie 1\.\d+ apart"),
        (lambda image, leaf: (image.point(lambda _: 0), leaf), "found nothing to compare"),
    ],
)
def test_what_comes_apart_is_named(pipeline, message):
    with pytest.raises(ValueError, match=message):
        check_alignment(pipeline)


def test_a_pipeline_without_a_map_is_refused():
    with pytest.raises(TypeError, match="the second is NoneType"):
        check_alignment(lambda image, _: image)
