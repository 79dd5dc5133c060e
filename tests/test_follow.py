"""`TokenLabelMap.follow`: the map after what other libraries did to its image."""

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from tests.oracle import agreement, distance, label_map
from tokenlabel.dataset import TokenLabels

CELLS, SIZE, GRID = (5, 7), (160, 224), (14, 14)
HALF = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])


def as_array(image):
    return (
        np.asarray(image) if isinstance(image, PIL.Image.Image) else image.permute(1, 2, 0).numpy()
    )


def as_image(array):
    return tv_tensors.Image(np.ascontiguousarray(np.atleast_3d(array).transpose(2, 0, 1)))


def turned(image, leaf):
    h, w = leaf.canvas_size
    array = np.rot90(as_array(image), -1)
    return as_image(array), leaf.follow(np.array([[0, 1, 0], [-1, 0, h], [0, 0, 1]]), (w, h))


def mirrored(image, leaf):
    matrix = torch.tensor([[-1.0, 0, leaf.canvas_size[1]], [0, 1, 0], [0, 0, 1]])
    return as_image(as_array(image)[:, ::-1]), leaf.follow(matrix)


def cropped(image, leaf):
    matrix = [[1, 0, 30], [0, 1, 20], [0, 0, 1]]
    return as_image(as_array(image)[20:140, 30:180]), leaf.follow(np.array(matrix), (120, 150))


def warped(matrix, size):
    """OpenCV's warp by a matrix between pixel centres, from old to new."""

    def transform(image, leaf):
        array = as_array(image)
        bands = [
            cv2.warpPerspective(
                np.ascontiguousarray(array[..., n]), matrix, size[::-1], flags=cv2.INTER_NEAREST
                if array.dtype == np.uint8 else cv2.INTER_LINEAR,
            )
            for n in range(array.shape[2])
        ]  # fmt: skip
        back = HALF @ np.linalg.inv(matrix) @ np.linalg.inv(HALF)
        return as_image(np.stack(bands, -1)), leaf.follow(back, size)

    return transform


def remapped(image, leaf):
    """OpenCV's remap by a field of points, one a pixel of the new image."""
    h, w = leaf.canvas_size
    x, y = np.meshgrid(np.arange(160) * w / 160, np.arange(120) * h / 120)
    x, y = x + 9 * np.sin(y / 25), y + 7 * np.cos(x / 30)
    array = as_array(image)
    flags = cv2.INTER_NEAREST if array.dtype == np.uint8 else cv2.INTER_LINEAR
    bands = [
        cv2.remap(np.ascontiguousarray(array[..., n]), np.float32(x), np.float32(y), flags)
        for n in range(array.shape[2])
    ]
    points = np.stack([x, y], -1) + 0.5
    return as_image(np.stack(bands, -1)), leaf.follow(points, (120, 160))


TURN = cv2.getRotationMatrix2D((90, 70), 20, 0.9)
CHANGES = {
    "quarter turn": turned,
    "mirror": mirrored,
    "crop": cropped,
    "rotation": warped(np.vstack([TURN, [0, 0, 1]]), (160, 224)),
    "perspective": warped(np.array([[0.9, 0.1, 8], [-0.05, 1, 9], [4e-4, 3e-4, 1]]), (150, 200)),
    "a field": remapped,
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_map_shows_what_the_image_shows(name):
    clear, right = agreement(CHANGES[name], CELLS, SIZE, GRID, pil=False)
    assert right == clear > 60


@pytest.mark.parametrize(
    ("name", "limit"),
    [("mirror", 0.002), ("crop", 0.005), ("rotation", 0.02), ("perspective", 0.02),
     ("a field", 0.02)],
)  # fmt: skip
def test_targets_are_near_the_pooled_image(name, limit):
    found = distance(CHANGES[name], CELLS, SIZE, (10, 10))
    assert found.inner < limit and found.weight < 0.02


def test_it_is_what_torchvisions_kernels_do():
    leaf = label_map(CELLS, SIZE)
    flip = np.array([[-1.0, 0, 224], [0, 1, 0], [0, 0, 1]])
    assert leaf.follow(flip).path == F.horizontal_flip(leaf).path
    assert leaf.follow(flip * 3).path == F.horizontal_flip(leaf).path, "homogeneous"
    inner = leaf.follow(np.array([[1.0, 0, 7], [0, 1, 5], [0, 0, 1]]), (60, 70))
    assert inner.canvas_size == (60, 70) and inner.path.matrix == F.crop(leaf, 5, 7, 60, 70).path[0]
    there = np.array([[0.8, 0.3, 4], [-0.2, 1.1, 9], [0, 0, 1]])
    both = leaf.follow(there).follow(np.linalg.inv(there))
    x, y, inside = both.path(np.array([50.0]), np.array([60.0]))
    assert inside and np.allclose([x, y], [[50 / 224], [60 / 160]])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.eye(2), r"must be a matrix \[3, 3\] or points \[h, w, 2\], got \[2, 2\]"),
        (np.zeros((3, 3)), "must not be singular"),
        (np.full((4, 4, 2), np.nan), "must be finite"),
    ],
)
def test_what_is_no_geometry_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        label_map(CELLS, SIZE).follow(source)


def batch_of(sizes, **more):
    return torch.stack([TokenLabels.of(label_map(CELLS, size), GRID, **more) for size in sizes])


MATRICES = {
    "mirror": [[-1.0, 0, 224], [0, 1, 0], [0, 0, 1]],
    "crop": [[0.5, 0, 30], [0, 0.6, 20], [0, 0, 1]],
    "rotation": [[0.9, 0.3, 4], [-0.2, 1.1, 9], [0, 0, 1]],
    "perspective": [[0.9, 0.1, 8], [-0.05, 1, 9], [4e-4, 3e-4, 1]],
}


@pytest.mark.parametrize("first", MATRICES)
@pytest.mark.parametrize("then", MATRICES)
def test_a_batch_follows_as_its_maps_do(first, then):
    leaf = label_map(CELLS, SIZE)
    here, there = np.array(MATRICES[first]), np.array(MATRICES[then])
    leaves = [leaf.follow(here).follow(there), leaf.follow(here).follow(here)]
    expected = torch.stack([TokenLabels.of(leaf, GRID) for leaf in leaves]).targets()
    labels = torch.stack([TokenLabels.of(leaf.follow(here), GRID)] * 2)
    labels = labels.follow(torch.from_numpy(np.stack([there, here])))
    assert torch.allclose(labels.targets().dense(), expected.dense(), atol=2e-5)
    assert torch.allclose(labels.targets().weight, expected.weight, atol=2e-5)


def test_a_batch_follows_more_changes_than_records_have_room_for():
    turn = np.vstack([cv2.getRotationMatrix2D((112, 80), 9, 1.0), [0, 0, 1]])
    leaf, labels = label_map(CELLS, SIZE), batch_of([SIZE])
    for _ in range(11):
        leaf = leaf.follow(turn)
        labels = labels.follow(torch.from_numpy(turn)[None])
    expected, found = TokenLabels.of(leaf, GRID)[None].targets(), labels.targets()
    assert labels.record_layout.lattice
    inner = (expected.weight > 0.999) & (found.weight > 0.999)
    off = (expected.dense() - found.dense()).abs().sum(-1)[inner] / 2
    assert inner.sum() > 80 and off.mean() < 0.01


def test_a_batch_follows_points_and_boxes():
    labels = batch_of([SIZE])
    x, y = np.meshgrid(np.arange(150) + 0.5, np.arange(120) + 0.5)
    points = torch.from_numpy(np.stack([224 - (x + 30), y + 20], -1))[None]
    by_points = labels.follow(points, (120, 150)).targets()
    matrix = torch.tensor([[[-1.0, 0, 194], [0, 1, 20], [0, 0, 1]]])
    by_matrix = labels.follow(matrix, (120, 150)).targets()
    off = (by_points.dense() - by_matrix.dense()).abs().sum(-1) / 2
    assert off.mean() < 0.01 and torch.allclose(by_points.weight, by_matrix.weight)
    half = labels.follow(torch.eye(3)[None], boxes=torch.tensor([[0, 0, 112, 160]])).targets()
    assert (
        half.weight[0].view(GRID)[:, :7].min() == 1 and half.weight[0].view(GRID)[:, 7:].max() == 0
    )


def test_the_largest_windows_keep_all_cells_after_a_change():
    """Zooming out after the loader must widen the windows that were planned for its crops."""
    leaf = label_map(CELLS, SIZE)
    crop = F.resized_crop(leaf, 20, 20, 60, 60, [160, 224])
    back = np.array([[224 / 60, 0, 0], [0, 160 / 60, 0], [0, 0, 1]])
    out = np.array([[224.0 / 60, 0, -75], [0, 160 / 60, -53], [0, 0, 1]])
    for matrix in (back, out):
        expected = TokenLabels.of(crop.follow(matrix), (2, 2))[None].targets()
        found = TokenLabels.of(crop, (2, 2))[None].follow(torch.from_numpy(matrix)[None]).targets()
        assert torch.allclose(found.dense(), expected.dense(), atol=1e-5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.eye(3), r"must be floats \[B, 3, 3\] or \[B, h, w, 2\], for 2 images"),
        (torch.zeros(2, 3, 3), "must be finite and not singular"),
        (torch.eye(3).expand(2, 3, 3), "differ in size"),
    ],
)
def test_batches_refuse_what_is_no_geometry(source, message):
    with pytest.raises(ValueError, match=message):
        batch_of([SIZE, (100, 100)]).follow(source)
