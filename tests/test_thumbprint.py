"""Thumbprints: the same image passes, however it was decoded; a mirrored or other one does not."""

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional

from tokenlabel.dataset.sources.thumbprint import SIDE, difference, thumbprint

NAMES = {
    Image.Transpose.FLIP_LEFT_RIGHT: "mirrored left to right",
    Image.Transpose.FLIP_TOP_BOTTOM: "mirrored top to bottom",
    Image.Transpose.ROTATE_180: "turned by 180 degrees",
    Image.Transpose.ROTATE_270: "turned by 90 degrees clockwise",
    Image.Transpose.ROTATE_90: "turned by 90 degrees counter-clockwise",
    Image.Transpose.TRANSVERSE: "mirrored, then turned by 90 degrees clockwise",
    Image.Transpose.TRANSPOSE: "mirrored, then turned by 90 degrees counter-clockwise",
}
OTHER = "another image, or a crop of it"

#: Any image, and often smaller than the grid of cells.
images = array_shapes(min_dims=2, max_dims=2, max_side=20).flatmap(
    lambda shape: arrays(np.uint8, (*shape, 3))
)


def files(sample: Path) -> list[Path]:
    """All 20 photographs."""
    return sorted(sample.rglob("*.*"))


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return decode(data.getvalue())


def ramp(height: int, width: int) -> np.ndarray:
    """Grey, brighter to the right and to the bottom, with no symmetry."""
    y, x = np.mgrid[:height, :width]
    grey = 150 * x / width + 90 * (y / height) ** 2
    return np.repeat(grey[..., None], 3, -1).astype(np.uint8)


# --- what the bytes are -------------------------------------------------------------------------


@given(images)
def test_each_byte_is_the_mean_grey_value_of_its_cell(image: np.ndarray) -> None:
    height, width = image.shape[:2]

    def overlap(cell: int, pixel: int, pixels: int) -> Fraction:
        first, last = Fraction(cell * pixels, 8), Fraction((cell + 1) * pixels, 8)
        return max(min(last, Fraction(pixel + 1)) - max(first, Fraction(pixel)), Fraction(0))

    grey = [[Fraction(int(r) + 2 * int(g) + int(b), 4) for r, g, b in row] for row in image]
    print_ = thumbprint(image)
    assert print_.dtype == np.uint8 and print_.shape == (SIDE * SIDE,)
    for r in range(8):
        for c in range(8):
            total = sum(
                overlap(r, y, height) * overlap(c, x, width) * grey[y][x]
                for y in range(r * height // 8, min((r + 1) * height // 8 + 1, height))
                for x in range(c * width // 8, min((c + 1) * width // 8 + 1, width))
            )
            mean = total / Fraction(height * width, 64)
            assert print_[8 * r + c] == (mean + Fraction(1, 2)) // 1


def test_the_bytes_of_an_image_never_change() -> None:
    y, x = np.mgrid[:13, :21]
    image = np.stack([x * 12, y * 19, (x * y) % 256], -1).astype(np.uint8)
    assert thumbprint(image).tobytes().hex() == (
        "060e161f272f373f151e27313a434c55252f39434d58626c35404c57626e7984"
        "44505d6975828e9a55626f7d8a98a5b2647381909eadbbc9738392a2b1c1d0df"
    )


@given(images, st.integers(1, 4), st.integers(1, 4))
def test_an_enlarged_image_has_the_same_bytes(image: np.ndarray, down: int, across: int) -> None:
    large = image.repeat(down, 0).repeat(across, 1)
    np.testing.assert_array_equal(thumbprint(large), thumbprint(image))


@given(images)
def test_the_print_of_a_mirrored_image_is_mirrored(image: np.ndarray) -> None:
    cells = thumbprint(image).reshape(SIDE, SIDE)
    for undo in (np.fliplr, np.flipud, np.rot90, lambda array: array.swapaxes(0, 1)):
        np.testing.assert_array_equal(thumbprint(undo(image)), undo(cells).ravel())


@given(images)
def test_the_form_of_the_image_does_not_matter(image: np.ndarray) -> None:
    expected = thumbprint(image)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    alpha = np.full_like(image[..., :1], 7)
    same: list[Any] = [
        Image.fromarray(image),
        Image.fromarray(image).convert("RGBA"),
        image[..., ::-1],  # BGR
        np.concatenate([image, alpha], -1),
        tensor,
        tensor.contiguous(),
        tensor.to(torch.int64),
    ]
    for form in same:
        np.testing.assert_array_equal(thumbprint(form), expected)
    floats = thumbprint(tensor / 255).astype(int)
    assert abs(floats - expected).max() <= 1  # float32 rounds other halves

    grey = image[..., 0]
    for form in (grey, grey[..., None], torch.from_numpy(grey)[None], Image.fromarray(grey)):
        np.testing.assert_array_equal(thumbprint(form), thumbprint(np.stack([grey] * 3, -1)))


@pytest.mark.parametrize("height", [70_005, 70_013])  # where sums in float32 round to other bytes
def test_the_bytes_of_the_tallest_images_are_exact(height: int) -> None:
    grey = 255 - np.arange(height) % 2  # so that parts of pixels decide how a mean is rounded
    cell, pixel = np.arange(8)[:, None] * height, np.arange(height) * 8
    overlaps = np.minimum(cell + height, pixel + 8) - np.maximum(cell, pixel)
    sums = np.maximum(overlaps, 0) @ grey
    expected = (2 * sums + height) // (2 * height)
    assert set(expected) == {254, 255}
    print_ = thumbprint(grey.astype(np.uint8)[:, None])
    np.testing.assert_array_equal(print_.reshape(8, 8), np.repeat(expected[:, None], 8, 1))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        torch.zeros(8, 8),
        torch.zeros(8, 8, 3),
        torch.zeros(1, 3, 8, 8),
    ],
)
def test_other_shapes_are_refused(image: Any) -> None:
    with pytest.raises(ValueError, match=r"expected .* of 1 to 4 channels, got \["):
        thumbprint(image)


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, numpy as np\n"
        "from tokenlabel.dataset.sources.thumbprint import difference, thumbprint\n"
        "image = np.zeros((9, 9, 3), np.uint8)\n"
        "assert difference(thumbprint(image), image) is None\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the same image -----------------------------------------------------------------------------


@given(images)
def test_an_image_is_never_different_from_itself(image: np.ndarray) -> None:
    stored = thumbprint(image)
    assert difference(stored, image) is None
    assert difference(stored, torch.from_numpy(image).permute(2, 0, 1) / 255) is None


@given(st.floats(0.001, 1000), st.floats(-1, 1))
def test_brightness_and_contrast_do_not_count(gain: float, offset: float) -> None:
    image = ramp(40, 60)
    stored, changed = thumbprint(image), (image / 255 + offset) * gain
    assert difference(stored, changed) is None
    assert difference(stored, changed[:, ::-1]) == "mirrored left to right"
    assert difference(stored, torch.from_numpy(changed).permute(2, 0, 1).half()) is None


# torchvision 0.29 deprecates its decoders, which earlier loaders use.
@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_photographs_pass_in_other_encodings_sizes_and_decoders(sample: Path) -> None:
    for path in files(sample):
        data = path.read_bytes()
        image = decode(data)
        stored = thumbprint(image)
        tensor = decode_image(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB
        )
        draft = Image.open(path)
        draft.draft("RGB", (image.width // 2, image.height // 2))
        small = functional.resize(image, 256)
        for same in (
            *(jpeg(image, quality) for quality in (50, 75, 95)),
            small,
            jpeg(small, 75),
            image.resize((256, 256), Image.Resampling.BICUBIC),
            image.resize((64, 48), Image.Resampling.BOX),
            tensor,
            functional.normalize(tensor / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            draft.convert("RGB"),
        ):
            assert difference(stored, same) is None, path


# --- another image ------------------------------------------------------------------------------


def test_mirrored_and_turned_photographs_are_named(sample: Path) -> None:
    for path in files(sample):
        image = decode(path.read_bytes())
        for turn, name in NAMES.items():
            assert difference(thumbprint(image), image.transpose(turn)) == name, path
            assert difference(thumbprint(image), jpeg(image.transpose(turn), 60)) == name, path


def test_exif_orientation_that_a_loader_applies_is_named(sample: Path) -> None:
    image = decode(files(sample)[0].read_bytes()).resize((200, 200))
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.save(data, "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(data))
    stored = thumbprint(decode(data.getvalue()))
    assert difference(stored, upright) == "turned by 90 degrees clockwise"


def test_photographs_are_told_from_each_other_and_from_their_crops(sample: Path) -> None:
    photographs = [decode(path.read_bytes()) for path in files(sample)]
    for i, image in enumerate(photographs):
        stored = thumbprint(image)
        for j, other in enumerate(photographs):
            assert difference(stored, other) == (None if i == j else OTHER)
        small = functional.resize(image, 256)
        part = [side * 7 // 8 for side in (image.height, image.width)]
        for crop in (
            functional.center_crop(small, [224, 224]),
            functional.center_crop(image, part),
            functional.crop(image, 0, 0, *part),
        ):
            assert difference(stored, crop) == OTHER


# --- what a thumbprint cannot tell --------------------------------------------------------------


@given(images)
def test_the_mirror_image_of_a_symmetric_image_passes(image: np.ndarray) -> None:
    symmetric = np.concatenate([image, image[:, ::-1]], 1)
    assert difference(thumbprint(symmetric), symmetric[:, ::-1]) is None


def test_a_symmetric_photograph_is_told_where_it_is_not_symmetric(sample: Path) -> None:
    for path in files(sample):
        image = np.asarray(decode(path.read_bytes()))
        symmetric = Image.fromarray(np.concatenate([image, image[:, ::-1]], 1))
        stored = thumbprint(symmetric)
        mirrored = jpeg(symmetric.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 75)
        assert difference(stored, mirrored) is None
        upside_down = symmetric.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        assert difference(stored, upside_down) in (
            "mirrored top to bottom",
            "turned by 180 degrees",
        )


@given(st.integers(0, 255), images)
def test_any_image_passes_for_one_of_one_colour(colour: int, image: np.ndarray) -> None:
    stored = thumbprint(np.full((30, 40, 3), colour, np.uint8))
    assert difference(stored, image) is None


def test_an_image_of_one_colour_does_not_pass_for_another() -> None:
    assert difference(thumbprint(ramp(40, 60)), np.full((40, 60, 3), 90, np.uint8)) == OTHER
