"""RandAugment, AutoAugment and TrivialAugmentWide: torchvision's image, the map aligned with it."""

import copy
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tests.oracle import agreement
from tokenlabel.dataset.transforms import torchvision as augment
from tokenlabel.dataset.transforms.timm import TimmAugment

GEOMETRIC = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}
SIZE = (24, 32)  # height, width
KINDS = {
    "RandAugment": [
        {},
        {"num_ops": 4, "magnitude": 25, "interpolation": v2.InterpolationMode.BILINEAR},
    ],
    "AutoAugment": [{}, {"policy": v2.AutoAugmentPolicy.SVHN, "fill": [1.0, 2.0, 3.0]}],
    "TrivialAugmentWide": [{}, {"num_magnitude_bins": 5, "fill": 9}],
}
CASES = [(name, kwargs) for name, cases in KINDS.items() for kwargs in cases]


def noise(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def index_mask(size=SIZE):
    """Every pixel its own number, from 1: 0 is what comes from outside."""
    return tv_tensors.Mask(torch.arange(1, size[0] * size[1] + 1).reshape(1, *size))


def photographs(seed=0):
    array = noise(seed)
    tensor = torch.from_numpy(array).permute(2, 0, 1).contiguous()
    return {
        "pil": PIL.Image.fromarray(array),
        "tensor": tensor,
        "image": tv_tensors.Image(tensor),
    }


def plain(photograph):
    if isinstance(photograph, PIL.Image.Image):
        return F.pil_to_tensor(photograph)
    return photograph.as_subclass(torch.Tensor)


def same(one, other):
    return torch.equal(plain(one), plain(other))


def only(transform, ops):
    """The transform with fewer ops to draw from."""
    transform._AUGMENTATION_SPACE = {
        op: entry for op, entry in transform._AUGMENTATION_SPACE.items() if op in ops
    }
    return transform


@pytest.mark.parametrize("kind", ["pil", "tensor"])
@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_the_image_is_the_one_torchvision_gives(name, kwargs, kind):
    photograph = photographs()[kind]
    stock, ours = getattr(v2, name)(**kwargs), getattr(augment, name)(**kwargs)
    for seed in range(110):
        torch.manual_seed(seed)
        expected = stock(photograph)
        state = torch.get_rng_state()
        for sample in [(photograph,), (photograph, index_mask())][seed % 10 > 0 :]:
            torch.manual_seed(seed)
            out = ours(*sample)
            got = out[0] if len(sample) == 2 else out
            assert type(got) is type(expected)
            assert same(got, expected), seed
            assert torch.equal(torch.get_rng_state(), state), "the map drew random numbers"


@pytest.mark.parametrize("kwargs", [{}, {"num_ops": 5, "magnitude": 30}])
@pytest.mark.parametrize("op", [*sorted(GEOMETRIC), "all"])
def test_the_map_takes_the_same_path_as_the_image(op, kwargs):
    transform = only(augment.RandAugment(**kwargs), GEOMETRIC if op == "all" else {op})
    mask = index_mask()
    photograph = plain(mask).to(torch.int16)  # nearest: pixels move, unmixed
    moved = 0
    for seed in range(40):
        torch.manual_seed(seed)
        image, label_map = transform(tv_tensors.Image(photograph), mask)
        assert type(label_map) is tv_tensors.Mask
        assert same(image.long(), label_map)
        moved += not same(label_map, mask)
    assert moved > 35


TIMM = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}


@pytest.mark.parametrize("pil", [True, False], ids=["PIL", "tensor"])
@pytest.mark.parametrize(
    ("family", "op"),
    [*(("timm", op) for op in sorted(TIMM)), *(("torchvision", op) for op in sorted(GEOMETRIC))],
)
def test_the_record_names_the_cell_that_each_patch_shows(family, op, pil):
    """Each cell has a colour of its own; patches of one colour are taught that cell."""
    if family == "timm":
        text = "rand-m9-mstd101-n2-p1"
        transform = TimmAugment(text, fill=(0, 0, 0), interpolation="nearest")
        transform.policy.ops = [drawn for drawn in transform.policy.ops if drawn.name == op]
    else:
        transform = only(augment.RandAugment(magnitude=17, fill=0), {op})
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    found = [agreement(transform, (5, 7), (160, 224), (20, 28), pil) for _ in range(20)]
    clear, right = np.sum(found, 0)
    assert right == clear > 3000


@pytest.mark.parametrize("name", KINDS)
def test_photometric_ops_leave_the_map_alone(name):
    transform = getattr(augment, name)()
    assert set(transform._AUGMENTATION_SPACE) - augment.PHOTOMETRIC == GEOMETRIC
    if name == "AutoAugment":
        transform._policies = [
            policy for policy in transform._policies if not {op for op, *_ in policy} & GEOMETRIC
        ]
    only(transform, augment.PHOTOMETRIC)
    changed = 0
    for seed in range(50):
        torch.manual_seed(seed)
        photograph, mask = photographs()["image"], index_mask()
        image, label_map = transform(photograph, mask)
        assert same(label_map, mask)
        changed += not same(image, photograph)
    assert changed > 15


def test_an_op_that_the_map_cannot_follow_raises():
    transform = augment.RandAugment()
    transform._AUGMENTATION_SPACE = {"Swirl": (lambda *_: None, False)}
    with pytest.raises(ValueError, match="Swirl"):
        transform(photographs()["image"], index_mask())


def test_fill_of_a_mask_is_its_own():
    transform = only(augment.RandAugment(num_ops=1, magnitude=30, fill=200), {"TranslateX"})
    _, label_map = transform(photographs()["image"], index_mask())
    assert 0 in label_map
    fill = {tv_tensors.Mask: -1, "others": 200}
    transform = only(augment.RandAugment(num_ops=1, magnitude=30, fill=fill), {"TranslateX"})
    image, label_map = transform(photographs()["image"], index_mask())
    assert 0 not in label_map and -1 in label_map
    assert (image[:, (label_map == -1)[0]] == 200).all()


def test_every_shape_of_sample():
    transform = augment.RandAugment(magnitude=20, num_ops=3)
    photograph, mask = photographs()["pil"], index_mask()
    samples = [
        ((photograph, mask), lambda s: s),
        ([mask, photograph], lambda s: s[::-1]),
        ({"a": photograph, "b": mask, "c": 5}, lambda s: (s["a"], s["b"])),
        ((7, {"x": (photograph, ""), "m": [mask] * 2}), lambda s: (s[1]["x"][0], *s[1]["m"])),
        (photograph, lambda s: (s,)),
    ]
    for sample, pick in samples:
        torch.manual_seed(3)
        image, label_map = transform(photograph, mask)
        assert not same(label_map, mask)
        torch.manual_seed(3)
        found, *maps = pick(transform(sample))
        assert same(found, image)
        assert all(same(one, label_map) for one in maps)


@pytest.mark.parametrize("keypoints", [True, False], ids=["as installed", "before 0.23"])
def test_errors(keypoints, monkeypatch):
    if not keypoints:
        monkeypatch.delattr(tv_tensors, "KeyPoints", raising=False)
    photograph, mask = photographs()["pil"], index_mask()
    transform = augment.RandAugment()
    assert len(transform(photograph, mask)) == 2
    with pytest.raises(ValueError, match=r"share one canvas.*\(24, 32\).*\(32, 24\).*Remedy"):
        transform(photograph, index_mask(SIZE[::-1]))
    with pytest.raises(TypeError, match="no image"):
        transform(mask)
    with pytest.raises(TypeError, match="single image"):
        transform(photograph, photograph, mask)
    boxes = tv_tensors.BoundingBoxes([[0, 0, 9, 9]], format="XYXY", canvas_size=SIZE)
    with pytest.raises(TypeError, match="BoundingBoxes"):
        transform(photograph, boxes, mask)


def test_copies_and_threads():
    transform = only(augment.RandAugment(num_ops=3, magnitude=20), GEOMETRIC)
    assert isinstance(transform, v2.RandAugment) and "num_ops=3" in repr(transform)
    mask = index_mask()
    photograph = tv_tensors.Image(plain(mask).to(torch.int16))

    def aligned(_):
        image, label_map = transform(photograph, mask)
        return same(image.long(), label_map)

    with ThreadPoolExecutor(4) as pool:  # the ops of one sample never reach another's map
        assert all(pool.map(aligned, range(300)))
    wide = augment.TrivialAugmentWide()
    for other in copy.deepcopy(wide), pickle.loads(pickle.dumps(wide)):
        torch.manual_seed(1)
        expected = wide(photograph, mask)
        torch.manual_seed(1)
        assert all(same(a, b) for a, b in zip(expected, other(photograph, mask), strict=True))
