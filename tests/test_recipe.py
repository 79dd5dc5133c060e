"""The training recipe: timm's parameters, timm's pixels, and aligned label maps."""

import math
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import auto_augment as timm_aa
from timm.data.random_erasing import RandomErasing as TimmErasing
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from tests.oracle import agreement
from tokenlabel.dataset.transforms.recipe import RandomErasing, eval_transform, train_transform
from tokenlabel.dataset.transforms.timm import TimmAugment

FILL = (124, 116, 104)
GEOMETRIC = ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]
POLICIES = ["original", "originalr-mstd0.5", "v0", "v0r-mstd1", "3a", "rand", "rand-m9-n3-p1-inc1"]
POLICIES += ["rand-m8-mstd101-mmax12", "rand-tweights-p0.8", "rand-t3a-inc0", "rand-n4-t3aw-mstd1"]


def seed(value):
    """All that a run draws from."""
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def photograph(width=61, height=47):
    """Smooth and noisy parts, so that every op shows."""
    generator = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(20, 220, height))
    array = np.stack([x, y, (x + y) / 2], -1) + generator.integers(0, 36, (height, width, 3))
    return PIL.Image.fromarray(array.astype(np.uint8))


# ---- option strings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    "rand-m9-w0 rand-m9-x3 rand-m rand-m9.5 rand-m-9 rand-mstd rand-mstdinf rand-m9- rand-inc "
    "rand-t3b random-m9 RAND-m9 original-m9 original- v1 3aw".split(),
)
def test_strings_that_timm_would_refuse_or_skip_are_refused(text):
    with pytest.raises(ValueError, match=f"timm knows; got '{text}'. Remedy: "):
        train_transform(auto_augment=text)


def test_augmix_is_refused():
    with pytest.raises(ValueError, match=r"'augmix-m5-w4-d2' blends copies .* Remedy: "):
        train_transform(auto_augment="augmix-m5-w4-d2")


@pytest.mark.parametrize("text", ["rand-m9", "original"])
def test_an_op_that_no_map_is_known_to_follow_is_refused(text, monkeypatch):
    monkeypatch.setitem(timm_aa.NAME_TO_OP, "Swirl", timm_aa.rotate)
    monkeypatch.setitem(timm_aa.LEVEL_TO_ARG, "Swirl", None)
    TimmAugment(text)
    monkeypatch.setattr(timm_aa, "_RAND_TRANSFORMS", ["Invert", "Swirl"])
    policy = [[timm_aa.AugmentOp("Invert"), timm_aa.AugmentOp("Swirl")]]
    monkeypatch.setattr(timm_aa, "auto_augment_policy", lambda *_, **__: policy)
    with pytest.raises(ValueError, match=r"got 'Swirl'.*Remedy"):
        TimmAugment(text)


def test_without_timm_there_is_one_clear_error():
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "from tokenlabel.dataset import train_transform\n"
        "train_transform(auto_augment=None)\n"
        "try: train_transform()\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'rand-m9-mstd0.5-inc1' needs timm" in done.stdout
    assert "Remedy: pip install 'tokenlabel[timm]', or auto_augment=None" in done.stdout


# ---- pixels --------------------------------------------------------------------------------------


def of_timm(text, **hparams):
    """timm's own transform, but for its 0 bits, which Pillow 13 refuses."""
    make = timm_aa.rand_augment_transform if text[:4] == "rand" else timm_aa.auto_augment_transform
    transform = make(text, hparams)
    for op in transform.ops if text[:4] == "rand" else chain(*transform.policy):
        if op.name.startswith("Posterize"):
            op.aug_fn = lambda image, bits, **_: timm_aa.posterize(image, max(1, bits))
    return transform


@pytest.mark.parametrize(
    ("text", "count"), [("rand-m9-mstd0.5-inc1", 1000), *((text, 150) for text in POLICIES)]
)
@pytest.mark.parametrize("interpolation", ["random", "bicubic"])
def test_images_are_timm_s_byte_for_byte(text, count, interpolation):
    hparams = {} if interpolation == "random" else {"interpolation": PIL.Image.Resampling.BICUBIC}
    theirs = of_timm(text, img_mean=FILL, **hparams)
    ours = TimmAugment(text, fill=FILL, interpolation=interpolation)
    images = [photograph(), photograph(32, 64)]
    mask = tv_tensors.Mask(torch.zeros(1, 47, 61))

    def run(transform):
        seed(7)
        outs = [transform(images[i % 2]).tobytes() for i in range(count)]
        return outs, random.getstate(), str(np.random.get_state())

    expected, *states = run(theirs)
    found, *states_after = run(ours)
    assert found == expected and states_after == states
    assert len(set(expected)) > 12
    seed(7)  # nor does a map draw
    assert ours(images[0], mask)[0].tobytes() == expected[0]


def test_what_timm_posterizes_to_no_bits_keeps_one():
    transform, image = TimmAugment("v0"), photograph()
    ops = [op for group in transform.policy.policy for op in group]
    (op,) = (op for op in ops if (op.name, op.magnitude) == ("Posterize", 2))
    transform.policy.policy = [[op]]
    op.prob = 1.0
    assert timm_aa.LEVEL_TO_ARG["Posterize"](2, {}) == (0,)
    assert transform(image).tobytes() == timm_aa.posterize(image, 1).tobytes()


def test_threads_share_a_transform():
    transform = geometric_only(v2.Compose([TimmAugment("rand-n3-p1", interpolation="nearest")]))
    cells = np.arange(1, 21, dtype=np.uint8).reshape(4, 5).repeat(16, 0).repeat(16, 1)
    image = PIL.Image.fromarray(cells).convert("RGB")
    mask = tv_tensors.Mask(torch.from_numpy(cells)[None])

    def agreement(_):
        moved, label_map = transform(image, mask)
        ids = F.pil_to_tensor(moved)[:1]
        inside = (ids != 128) & (label_map != 0)
        return (ids == label_map)[inside].float().mean()

    with ThreadPoolExecutor(4) as pool:
        assert min(pool.map(agreement, range(200))) > 0.9


def test_tensors_get_the_pixels_of_pil_images():
    transform = TimmAugment("rand-m9-n4-mstd0.5-inc1", fill=FILL)
    pil = photograph()
    tensor = F.pil_to_tensor(pil)
    for value in range(60):
        outs = []
        for image in pil, tensor, tv_tensors.Image(tensor):
            seed(value)
            outs.append(transform(image))
        assert [type(out) for out in outs[1:]] == [torch.Tensor, tv_tensors.Image]
        expected = F.pil_to_tensor(outs[0])
        assert all(torch.equal(out.as_subclass(torch.Tensor), expected) for out in outs[1:])


# ---- maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("magnitude", [0, 1, 4.2, 9, 10, 17])
def test_a_map_moves_exactly_as_the_image(name, magnitude):
    """Each pixel carries its own coordinates; PIL and torch may only differ by rounding."""
    transform = only(
        TimmAugment("rand-p1-n1-mmax20", fill=(0, 0, 0), interpolation="nearest"), name
    )
    transform.policy.ops[0].magnitude = magnitude
    y, x = np.mgrid[1:48, 1:62]
    coordinates = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    mask = tv_tensors.Mask(torch.from_numpy(coordinates).permute(2, 0, 1))
    for value in range(6):  # of either sign
        seed(value)
        image, label_map = transform(PIL.Image.fromarray(coordinates), mask)
        theirs = F.pil_to_tensor(image).to(torch.int64)
        ours = label_map.as_subclass(torch.Tensor).to(torch.int64)
        inside = (ours[0] > 0) & (theirs[0] > 0)
        assert (inside == (ours[0] > 0)).float().mean() > 0.99
        difference = (ours - theirs).abs().amax(0)[inside]
        assert difference.max() <= 1
        assert (difference == 0).float().mean() > 0.98


def only(transform, *names):
    """The transform with fewer ops to draw from."""
    transform.policy.ops = [op for op in transform.policy.ops if op.name in names]
    assert transform.policy.ops
    return transform


def geometric_only(transform):
    """The recipe with the colours left alone, so that a painted cell stays recognisable."""
    for step in transform.transforms:
        if isinstance(step, TimmAugment):
            only(step, *GEOMETRIC)
    return transform


@pytest.mark.parametrize("crop_last", [False, True])
@pytest.mark.parametrize("pil", [True, False], ids=["PIL", "tensor"])
def test_cells_of_image_and_map_agree_through_the_whole_recipe(pil, crop_last):
    """Each cell has its own colour; after the recipe, a patch's colour is that of its target."""
    options = {"auto_augment": "rand-m9-n4-mstd0.5-inc1", "erase_prob": 0}
    options |= {"interpolation": "nearest", "mean": (0, 0, 0), "std": (1, 1, 1)}
    options |= {"crop_last": crop_last}
    recipe = geometric_only(train_transform((128, 112), **options))
    seed(0)
    found = [agreement(recipe, (6, 7), (384, 448), (8, 8), pil) for _ in range(100)]
    clear, right = np.sum(found, 0)
    assert right == clear > 2000


@pytest.mark.parametrize("text", ["rand-n1-p1-m9", "rand-n1-p1-m9-inc1", "rand-n1-p1-m9-t3a", "3a"])
def test_the_map_ignores_colours(text):
    transform, mask = TimmAugment(text), tv_tensors.Mask(torch.arange(47 * 61).reshape(1, 47, 61))
    if text != "3a":
        only(transform, *({op.name for op in transform.policy.ops} - set(GEOMETRIC)))
    seed(0)
    for _ in range(60):
        image, label_map = transform(photograph(), mask)
        assert label_map is mask
        assert image.tobytes() != photograph().tobytes()


def test_the_map_ignores_erasing():
    mask = tv_tensors.Mask(torch.arange(47 * 61).reshape(1, 47, 61))
    image, label_map = RandomErasing(1.0)(torch.zeros(3, 47, 61), mask)
    assert label_map is mask and image.any()


def test_errors_of_the_transform():
    transform = TimmAugment("rand-m9")
    mask = tv_tensors.Mask(torch.zeros(1, 47, 61))
    boxes = tv_tensors.BoundingBoxes([[0, 0, 9, 9]], format="XYXY", canvas_size=(47, 61))
    for image in (
        photograph().convert("L"),
        torch.zeros(3, 47, 61),
        torch.zeros(1, 47, 61).byte(),
        boxes,
    ):
        with pytest.raises(TypeError, match=r"mode RGB, uint8 .* got .* Remedy"):
            transform(image, mask)
    with pytest.raises(ValueError, match="share one canvas"):
        transform(photograph(), tv_tensors.Mask(torch.zeros(1, 61, 47)))
    with pytest.raises(ValueError, match="interpolation of auto_augment"):
        TimmAugment("rand-m9", interpolation="lanczos")
    assert repr(transform).startswith("TimmAugment('rand-m9'")


# ---- erasing -------------------------------------------------------------------------------------


def test_erasing_has_timm_s_distribution():
    def statistics(erase):
        boxes = []
        for _ in range(1500):
            erased = (erase(torch.full((3, 64, 96), 7.0)) != 7).any(0).nonzero()
            if len(erased):
                height, width = (erased.amax(0) - erased.amin(0) + 1).tolist()
                assert len(erased) == height * width
                boxes.append((height * width / (64 * 96), math.log(height / width)))
        area, aspect = np.array(boxes).T
        return len(boxes) / 1500, area.mean(), area.std(), aspect.mean(), aspect.std()

    random.seed(0)
    torch.manual_seed(0)
    theirs = statistics(TimmErasing(0.25, mode="pixel", max_count=1, device="cpu"))
    assert statistics(RandomErasing(0.25)) == pytest.approx(theirs, abs=0.1, rel=0.1)
    noise = RandomErasing(1.0)(torch.full((3, 200, 200), 7.0))
    noise = noise[noise != 7]
    assert noise.mean() == pytest.approx(0, abs=0.05) and noise.std() == pytest.approx(1, abs=0.05)


# ---- the pipelines -------------------------------------------------------------------------------


def stages(transform):
    return [type(step).__name__ for step in transform.transforms]


@pytest.mark.parametrize(
    "auto_augment", [None, "rand-m9-mstd0.5-inc1", "3a", "original", "rand-t3a"]
)
@pytest.mark.parametrize("interpolation", ["random", "bicubic"])
def test_the_recipe_has_timm_s_stages(auto_augment, interpolation):
    theirs = transforms_imagenet_train(
        160,
        auto_augment=auto_augment,
        interpolation=interpolation,
        re_prob=0.25,
        re_mode="pixel",
        color_jitter=0.3,
    )
    ours = train_transform(
        160, auto_augment=auto_augment, interpolation=interpolation, color_jitter=0.3
    )
    twin = {
        "RandomResizedCropAndInterpolation": "RandomChoice"
        if interpolation == "random"
        else "RandomResizedCrop",
        "RandAugment": "TimmAugment",
        "AutoAugment": "TimmAugment",
        "MaybeToTensor": "ToImage",
    }
    names = [twin.get(name, name) for name in stages(theirs)]
    assert [name for name in stages(ours) if name != "ToDtype"] == names
    for mine, other in zip(ours.transforms, theirs.transforms, strict=False):
        if isinstance(mine, TimmAugment):
            ops = other.ops if hasattr(other, "ops") else other.policy[0]
            own = mine.policy.ops if hasattr(mine.policy, "ops") else mine.policy.policy[0]
            assert str(own) == str(ops)
            assert own[0].kwargs == ops[0].kwargs and ops[0].kwargs["fillcolor"] == FILL


def test_cropping_last_is_the_published_order_of_torchvision_s_and_timm_s_own_parts():
    text = "rand-m9-mstd0.5-inc1"
    crops = [
        v2.RandomResizedCrop(32, interpolation=mode)
        for mode in (v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC)
    ]
    parts = [v2.RandomHorizontalFlip(), of_timm(text, img_mean=FILL), v2.RandomChoice(crops)]
    theirs = v2.Compose([*parts, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    ours = train_transform(
        32, auto_augment=text, erase_prob=0, crop_last=True, mean=(0, 0, 0), std=(1, 1, 1)
    )
    for step in ours.transforms:
        if isinstance(step, TimmAugment):  # the fill is the mean's, which is 0 here
            step.policy = TimmAugment(text, fill=FILL).policy
    for value in range(40):
        seed(value)
        expected = theirs(photograph())
        seed(value)
        assert torch.equal(ours(photograph()), expected)
    jitter = train_transform(auto_augment=None, crop_last=True)
    assert stages(jitter)[:3] == ["RandomHorizontalFlip", "ColorJitter", "RandomChoice"]


def test_random_interpolation_is_bilinear_or_bicubic():
    choice = train_transform().transforms[0]
    assert [crop.interpolation.value for crop in choice.transforms] == ["bilinear", "bicubic"]
    assert len(set(choice.p)) == 1
    assert choice.transforms[0].scale == (0.08, 1.0)


def test_color_jitter():
    off = "rand-m9-mstd0.5-inc1"
    assert "ColorJitter" not in stages(train_transform(auto_augment=off, color_jitter=0.4))
    assert "ColorJitter" in stages(train_transform(auto_augment=off, force_color_jitter=True))
    assert "ColorJitter" not in stages(train_transform(auto_augment=None, color_jitter=None))
    jitter = train_transform(auto_augment=None, color_jitter=(0.1, 0.2, 0.3, 0.05)).transforms[2]
    assert (jitter.brightness, jitter.hue) == ((0.9, 1.1), (-0.05, 0.05))
    jitter = train_transform(auto_augment=None, color_jitter=0.3).transforms[2]
    assert jitter.saturation == (0.7, 1.3) and jitter.hue is None


@pytest.mark.parametrize("size", [64, (48, 80)])
def test_every_shape_of_sample(size):
    recipe = train_transform(size, auto_augment="rand-m9-n3-mstd0.5-inc1", erase_prob=0.5)
    expected = (size, size) if isinstance(size, int) else size
    mask = tv_tensors.Mask(torch.arange(47 * 61).reshape(1, 47, 61))
    pil, tensor = photograph(), F.pil_to_tensor(photograph())

    def run(*sample, at):
        seed(at)
        return recipe(*sample)

    for value in range(20):
        image, label_map = run(pil, mask, at=value)
        assert image.dtype == torch.float32 and image.shape[-2:] == label_map.shape[-2:] == expected
        record = run({"image": pil, "more": [mask, 3], "name": "n"}, at=value)
        assert record["more"][1:] == [3] and record["name"] == "n"
        for other in run(pil, at=value), record["image"]:
            assert torch.equal(image, other)
        for other in tensor, tv_tensors.Image(tensor):
            assert torch.equal(run(other, mask, at=value)[1], label_map)
        assert torch.equal(label_map, record["more"][0])


def test_bad_arguments():
    for kwargs, rule in [
        ({"size": 0}, "size is a positive integer"),
        ({"size": (1, 2, 3)}, "size is a positive integer"),
        ({"scale": (1, 0.08)}, "scale is"),
        ({"ratio": (0, 1)}, "ratio is"),
        ({"interpolation": "cubic"}, "interpolation is one of nearest"),
        ({"interpolation": "lanczos"}, "interpolation of auto_augment"),
        ({"auto_augment": None, "color_jitter": (1, 2)}, "color_jitter is one number"),
        ({"erase_prob": 2}, "interval"),
    ]:
        with pytest.raises(ValueError, match=rule):
            train_transform(**kwargs)
    train_transform(interpolation="lanczos", auto_augment=None)
    for kwargs in {"crop_pct": 0}, {"crop_pct": 1.1}, {"interpolation": "random"}:
        with pytest.raises(ValueError):
            eval_transform(**kwargs)


class Photographs:
    def __init__(self):
        self.transform = train_transform(32, auto_augment="rand-m9-n3-mstd0.5-inc1")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.transform(photograph())


def test_what_the_seeds_govern():
    recipe = pickle.loads(pickle.dumps(train_transform(32, erase_prob=0.5)))

    def run(value, of_torch):
        seed(value)
        torch.manual_seed(of_torch)
        return torch.stack([recipe(photograph()) for _ in range(12)])

    assert torch.equal(run(1, 1), run(1, 1))
    assert not torch.equal(run(1, 1), run(1, 2))
    assert not torch.equal(run(1, 1), run(2, 1))


def test_torch_s_seed_governs_the_workers_of_a_data_loader():
    def batches(of_torch):
        torch.manual_seed(of_torch)
        return torch.cat(list(DataLoader(Photographs(), batch_size=2, num_workers=2)))

    seed(1)
    first = batches(0)
    seed(2)
    assert torch.equal(first, batches(0)) and not torch.equal(first, batches(1))
    assert len({image.numpy().tobytes() for image in first}) == 8  # workers differ


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", [32, (32, 32), (40, 24), (24, 40)])
def test_eval_transform_is_timm_s(size, crop_pct, interpolation):
    ours = eval_transform(size, crop_pct=crop_pct, interpolation=interpolation)
    theirs = transforms_imagenet_eval(size, crop_pct=crop_pct, interpolation=interpolation)
    for image in photograph(), photograph(47, 61), photograph(50, 50), photograph(201, 77):
        mask = tv_tensors.Mask(torch.zeros(1, image.height, image.width))
        got, label_map = ours(image, mask)
        assert torch.allclose(got.as_subclass(torch.Tensor), theirs(image), atol=1e-6)
        assert got.shape[-2:] == label_map.shape[-2:]
