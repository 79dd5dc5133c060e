"""The training recipe: timm's parameters, timm's pixels, and label maps in step."""

import math
import pickle
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import auto_augment as timm_aa
from timm.data.random_erasing import RandomErasing as TimmErasing
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

import tokenlabel.dataset.kernels  # noqa: F401
from tokenlabel.dataset.label_map import TokenLabelMap
from tokenlabel.dataset.recipe import RandomErasing, eval_transform, train_transform
from tokenlabel.dataset.timm_augment import RESAMPLING, TimmAugment
from tokenlabel.dataset.timm_ops import OPS, Geometric
from tokenlabel.dataset.timm_policy import _POLICIES, _SETS, Step, parse_auto_augment

FILL = (124, 116, 104)
GEOMETRIC = [name for name, op in OPS.items() if isinstance(op, Geometric)]


def picture(width=61, height=47):
    """Smooth and noisy parts, so that every op shows."""
    generator = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(20, 220, height))
    array = np.stack([x, y, (x + y) / 2], -1) + generator.integers(0, 36, (height, width, 3))
    return PIL.Image.fromarray(array.astype(np.uint8))


# ---- option strings ------------------------------------------------------------------------------


def described(policy):
    """Our policy in the terms of timm's objects."""
    ops = [
        (step.op, step.prob, step.magnitude, policy.magnitude_std, policy.magnitude_max)
        for choice in policy.choices
        for step in choice
    ]
    total = sum(policy.weights or ())
    return ops, policy.draws, policy.weights and [weight / total for weight in policy.weights]


def described_timm(ops):
    return [
        (op.name, op.prob, op.magnitude, op.magnitude_std, op.magnitude_max or 10) for op in ops
    ]


@settings(max_examples=200, deadline=None)
@given(
    st.permutations(
        [
            st.none() | st.integers(0, 30).map("m{}".format),
            st.none() | st.integers(1, 3).map("n{}".format),
            st.none() | st.sampled_from(["p0", "p0.3", "p1", "p1.0"]),
            st.none() | st.sampled_from(["mstd0", "mstd0.5", "mstd1", "mstd100", "mstd101"]),
            st.none() | st.integers(1, 30).map("mmax{}".format),
            st.none() | st.sampled_from(["inc0", "inc1"]),
            st.none() | st.sampled_from(["tweights", "t3a", "t3aw"]),
        ]
    ).flatmap(lambda sections: st.tuples(*sections))
)
def test_rand_strings_mean_what_they_mean_in_timm(sections):
    text = "-".join(["rand", *filter(None, sections)])
    theirs = timm_aa.rand_augment_transform(text)
    ops, draws, weights = described(parse_auto_augment(text))
    assert ops == described_timm(theirs.ops)
    assert draws == theirs.num_layers
    assert (weights is None) == (theirs.choice_weights is None)
    if weights is not None:
        assert weights == pytest.approx(list(theirs.choice_weights))


@pytest.mark.parametrize("suffix", ["", "-mstd0.5"])
@pytest.mark.parametrize("name", _POLICIES)
def test_auto_augment_strings_mean_what_they_mean_in_timm(name, suffix):
    theirs = timm_aa.auto_augment_transform(name + suffix)
    ours = parse_auto_augment(name + suffix)
    assert [len(choice) for choice in ours.choices] == [len(group) for group in theirs.policy]
    ops, draws, weights = described(ours)
    assert ops == described_timm([op for group in theirs.policy for op in group])
    assert (draws, weights) == (1, None)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("augmix-m5-w4-d2", "augmix cannot carry label maps"),
        ("rand-m9-w0", "tweights"),
        ("rand-m9-x3", "-x3 is no option"),
        ("rand-m", "-m takes an integer"),
        ("rand-m9.5", "-m takes an integer"),
        ("rand-m-9", "-m takes an integer"),
        ("rand-mstd", "-mstd takes a number"),
        ("rand-mstdinf", "-mstdinf is no option"),
        ("rand-m9-", "- is no option"),
        ("rand-n0", "-n lies between 1"),
        ("rand-p1.5", "-p lies between 0 and 1"),
        ("rand-mmax0", "-mmax lies between 1"),
        ("rand-inc2", "-inc lies between 0 and 1"),
        ("rand-m9-m8", "-m is given twice"),
        ("rand-t3b", "-t takes one of weights, 3a, 3aw"),
        ("rand-t3a-tweights", "-t takes one of"),
        ("rand-n16-tweights", "at most 15"),
        ("random-m9", "'random' is no augmentation"),
        ("RAND-m9", "'RAND' is no augmentation"),
        ("original-m9", "-m9 is no option"),
        ("v1", "'v1' is no augmentation"),
    ],
)
def test_bad_strings_are_refused_with_rule_value_and_remedy(text, rule):
    with pytest.raises(ValueError) as refusal:
        train_transform(auto_augment=text)
    message = str(refusal.value)
    assert rule in message and repr(text) in message and "Remedy: " in message


# ---- pixels --------------------------------------------------------------------------------------


def test_every_op_of_timm_s_sets_is_there():
    named = {*timm_aa._RAND_TRANSFORMS, *timm_aa._RAND_INCREASING_TRANSFORMS, *timm_aa._RAND_3A}
    named |= {*timm_aa._RAND_WEIGHTED_0, *timm_aa._RAND_WEIGHTED_3A}
    for name in _POLICIES:
        named |= {op.name for group in timm_aa.auto_augment_policy(name) for op in group}
    assert set(OPS) == named
    assert set(_SETS) == {"weights", "3a", "3aw"}


@pytest.mark.parametrize("name", OPS)
def test_each_op_gives_timm_s_pixels(name):
    op, compared = OPS[name], 0
    for image in picture(), picture(32, 64):
        for magnitude in (0.0, 0.7, 2.5, 5, 7.3, 9, 9.6, 10, 17):
            for seed in (1, 2, 4):  # draws of either sign
                draw = random.Random(seed).random()
                argument = op.argument(magnitude / 10.0, draw)
                random.seed(seed)
                to_args = timm_aa.LEVEL_TO_ARG[name]
                args = to_args(magnitude, {}) if to_args else ()
                for resample in RESAMPLING["random"] + RESAMPLING["nearest"]:
                    if isinstance(op, Geometric):
                        got = op.picture(image, argument, resample, FILL)
                    else:
                        got = op.picture(image, argument)
                    if name.startswith("Posterize") and args[0] <= 0:
                        # Pillow before 13 blackens, and so do we; from 13 on timm's op raises.
                        expected = PIL.Image.new("RGB", image.size)
                    else:
                        call = timm_aa.NAME_TO_OP[name]
                        expected = call(image, *args, resample=resample, fillcolor=FILL)
                    assert got.tobytes() == expected.tobytes(), (magnitude, seed, resample)
                    compared += 1
                    if not isinstance(op, Geometric):
                        break
    assert compared >= 54


def test_tensor_pictures_get_the_pixels_of_pil_pictures():
    transform = TimmAugment("rand-m9-n4-mstd0.5-inc1", fill=FILL)
    pil = picture()
    tensor = F.pil_to_tensor(pil)
    for seed in range(60):
        outs = []
        for image in pil, tensor, tv_tensors.Image(tensor):
            torch.manual_seed(seed)
            outs.append(transform(image))
        assert [type(out) for out in outs[1:]] == [torch.Tensor, tv_tensors.Image]
        expected = F.pil_to_tensor(outs[0])
        assert all(torch.equal(out.as_subclass(torch.Tensor), expected) for out in outs[1:])


# ---- maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GEOMETRIC)
def test_a_map_moves_exactly_as_the_picture(name):
    """Each pixel carries its own coordinates; PIL and torch may only differ by rounding."""
    op, (width, height) = OPS[name], (61, 47)
    y, x = np.mgrid[1 : height + 1, 1 : width + 1]
    coordinates = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    mask = tv_tensors.Mask(torch.from_numpy(coordinates).permute(2, 0, 1))
    for magnitude in (0.0, 1, 4.2, 9, 10, 17):
        for draw in (0.2, 0.8):
            argument = op.argument(magnitude / 10, draw)
            image = PIL.Image.fromarray(coordinates)
            moved = op.picture(image, argument, RESAMPLING["nearest"][0], (0, 0, 0))
            theirs = F.pil_to_tensor(moved).to(torch.int64)
            ours = op.follow(mask, argument).as_subclass(torch.Tensor).to(torch.int64)
            inside = (ours[0] > 0) & (theirs[0] > 0)
            assert (inside == (ours[0] > 0)).float().mean() > 0.99
            difference = (ours - theirs).abs().amax(0)[inside]
            assert difference.max() <= 1
            assert (difference == 0).float().mean() > 0.98, (magnitude, draw)


def geometric_only(transform):
    """The recipe with the colours left alone, so that a painted cell stays recognisable."""
    for step in transform.transforms:
        if isinstance(step, TimmAugment):
            choices = tuple(c for c in step.policy.choices if c[0].op in GEOMETRIC)
            step.policy = step.policy._replace(choices=choices)
    return transform


def cells_shown(label_map):
    """The number of the cell that each pixel of the picture shows, 0 for none."""
    if not isinstance(label_map, TokenLabelMap):
        return label_map[0].as_subclass(torch.Tensor)
    height, width = label_map.canvas_size
    y, x = np.mgrid[0:height, 0:width] + 0.5
    x, y, inside = label_map.path(x.ravel(), y.ravel())
    rows, columns = label_map.map_layout.grid
    row = np.clip(y * rows, 0, rows - 1).astype(int)
    column = np.clip(x * columns, 0, columns - 1).astype(int)
    shown = np.where(inside, row * columns + column + 1, 0)
    return torch.from_numpy(shown).reshape(height, width)


@pytest.mark.parametrize("kind", ["pil", "tensor"])
@pytest.mark.parametrize("map_kind", ["mask", "token"])
def test_cells_of_picture_and_map_agree_through_the_whole_recipe(map_kind, kind):
    """Each cell of a 6 x 7 grid has its own colour; after the recipe, colour tells the cell."""
    rows, columns, side = 6, 7, 64  # so large that crops are not enlarged
    ids = torch.arange(1, rows * columns + 1).reshape(rows, columns)
    painted_ids = ids.repeat_interleave(side, 0).repeat_interleave(side, 1)
    levels = torch.tensor([[i // 16, i // 4 % 4, i % 4] for i in range(rows * columns + 1)]) * 70
    painted = levels[painted_ids].permute(2, 0, 1).to(torch.uint8)
    image = F.to_pil_image(painted) if kind == "pil" else tv_tensors.Image(painted)
    label_map = tv_tensors.Mask(painted_ids[None])
    if map_kind == "token":
        label_map = TokenLabelMap.from_scores(
            torch.zeros(rows, columns, 1),
            ids[..., None],
            torch.full((rows, columns), -math.inf),
            canvas_size=painted_ids.shape,
        )
    recipe = geometric_only(
        train_transform(
            (64, 56),
            interpolation="nearest",
            auto_augment="rand-m9-n4-mstd0.5-inc1",
            erase_prob=0,
            mean=(0, 0, 0),
            std=(1, 1, 1),
        )
    )
    agreed = compared = 0
    seeds = range(100 if map_kind == "token" else 25)  # the mask has 172,032 pixels to move
    for seed in seeds:
        torch.manual_seed(seed)
        out, moved = recipe(image, label_map)
        assert out.shape == (3, 64, 56) and F.get_size(moved) == [64, 56]
        # argmax over cells: the nearest colour
        colours = out.as_subclass(torch.Tensor).permute(1, 2, 0).reshape(-1, 3) * 255
        argmax = torch.cdist(colours, levels.float()).argmin(-1).reshape(64, 56)
        cells = cells_shown(moved)
        # Rounding decides where two cells meet: compare where 5 x 5 pixels are of one cell.
        windows = cells.unfold(0, 5, 1).unfold(1, 5, 1).flatten(2)
        uncut = windows.amin(-1) == windows.amax(-1)
        compared += int(uncut.sum())
        agreed += int((argmax == cells)[2:-2, 2:-2][uncut].sum())
    assert agreed == compared > 1500 * len(seeds)


def test_the_map_ignores_colours_and_erasing():
    mask = tv_tensors.Mask(torch.arange(47 * 61).reshape(1, 47, 61))
    for name in set(OPS) - set(GEOMETRIC):
        policy = parse_auto_augment("original")._replace(choices=((Step(name, 1.0, 9.0),),))
        torch.manual_seed(0)
        image, label_map = TimmAugment(policy)(picture(), mask)
        assert label_map is mask
        assert image.tobytes() != picture().tobytes()
    image, label_map = RandomErasing(1.0)(torch.zeros(3, 47, 61), mask)
    assert label_map is mask and image.any()


def test_errors_of_the_transform():
    transform = TimmAugment("rand-m9")
    mask = tv_tensors.Mask(torch.zeros(1, 47, 61))
    boxes = tv_tensors.BoundingBoxes([[0, 0, 9, 9]], format="XYXY", canvas_size=(47, 61))
    for image in (
        picture().convert("L"),
        torch.zeros(3, 47, 61),
        torch.zeros(1, 47, 61).byte(),
        boxes,
    ):
        with pytest.raises(TypeError, match=r"mode RGB, uint8 .* got .* Remedy"):
            transform(image, mask)
    with pytest.raises(ValueError, match="share one canvas"):
        transform(picture(), tv_tensors.Mask(torch.zeros(1, 61, 47)))
    with pytest.raises(ValueError, match="interpolation of auto_augment"):
        TimmAugment("rand-m9", interpolation="lanczos")
    assert repr(transform).startswith("TimmAugment('rand-m9'")


# ---- distributions -------------------------------------------------------------------------------


def test_draws_have_the_distribution_they_should():
    transform = TimmAugment("rand-m9-n2-mstd0.5-inc1")
    torch.manual_seed(0)
    drawn = [op for _ in range(4000) for op in transform.make_params([])["ops"]]
    assert len(drawn) == pytest.approx(4000, abs=200)  # 2 ops, probability 1/2
    names = Counter(name for name, *_ in drawn)
    assert len(names) == 15
    assert all(count == pytest.approx(len(drawn) / 15, rel=0.25) for count in names.values())
    degrees = torch.tensor([argument for name, argument, _ in drawn if name == "Rotate"])
    assert (degrees > 0).float().mean() == pytest.approx(0.5, abs=0.1)
    assert degrees.abs().mean() == pytest.approx(27, abs=0.3)
    assert degrees.abs().std() == pytest.approx(1.5, abs=0.3)
    assert degrees.abs().max() <= 30
    bicubic = [resample == PIL.Image.Resampling.BICUBIC for *_, resample in drawn]
    assert sum(bicubic) / len(bicubic) == pytest.approx(0.5, abs=0.03)


def test_uniform_magnitudes_and_bounds():
    def degrees(text):
        transform = TimmAugment(text)
        torch.manual_seed(0)
        drawn = [op for _ in range(2000) for op in transform.make_params([])["ops"]]
        return torch.tensor([argument for name, argument, _ in drawn if name == "Rotate"]).abs()

    uniform = degrees("rand-m10-mstd101-p1")
    assert uniform.mean() == pytest.approx(15, abs=2) and uniform.min() < 2
    assert (degrees("rand-m15-p1") == 30).all()
    assert (degrees("rand-m15-mmax12-p1") == 36).all()


@pytest.mark.parametrize("text", ["rand-tweights-p1", "rand-t3aw-p1"])
def test_weighted_ops_are_drawn_as_numpy_draws_them(text):
    theirs = timm_aa.rand_augment_transform(text)
    transform = TimmAugment(text)
    np.random.seed(0)
    torch.manual_seed(0)
    expected, got = Counter(), Counter()
    for _ in range(3000):
        expected.update(
            op.name
            for op in np.random.choice(theirs.ops, 2, replace=False, p=theirs.choice_weights)
        )
        names = [name for name, *_ in transform.make_params([])["ops"]]
        assert len(set(names)) == 2
        got.update(names)
    for name in expected | got:
        assert got[name] == pytest.approx(expected[name], abs=30 + 4 * math.sqrt(expected[name]))


def test_auto_augment_draws_pairs():
    transform = TimmAugment("original")
    torch.manual_seed(0)
    drawn = [[name for name, *_ in transform.make_params([])["ops"]] for _ in range(3000)]
    pairs = {tuple(step.op for step in choice) for choice in transform.policy.choices}
    assert {tuple(names) for names in drawn if len(names) == 2} <= pairs
    expected = np.mean([sum(s.prob for s in c) for c in transform.policy.choices])
    assert np.mean([len(names) for names in drawn]) == pytest.approx(expected, abs=0.05)


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
            assert ops[0].kwargs["fillcolor"] == mine.fill == FILL
            resample = ops[0].kwargs["resample"]
            filters = resample if isinstance(resample, tuple) else (resample,)
            assert RESAMPLING[mine.interpolation] == filters


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
    pil, tensor = picture(), F.pil_to_tensor(picture())

    def run(*sample, seed):
        torch.manual_seed(seed)
        return recipe(*sample)

    for seed in range(20):
        image, label_map = run(pil, mask, seed=seed)
        assert image.dtype == torch.float32 and image.shape[-2:] == label_map.shape[-2:] == expected
        alone = run(pil, seed=seed)
        record = run({"image": pil, "more": [mask, 3], "name": "n"}, seed=seed)
        pair = run((pil, mask), seed=seed)
        for other in alone, record["image"], pair[0]:
            assert torch.equal(image, other)
        assert torch.equal(label_map, record["more"][0]) and torch.equal(label_map, pair[1])
        assert record["more"][1:] == [3] and record["name"] == "n"
        for other in tensor, tv_tensors.Image(tensor):
            assert torch.equal(run(other, mask, seed=seed)[1], label_map)
            assert run(other, seed=seed).shape == (3, *expected)


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


class Pictures:
    def __init__(self):
        self.transform = train_transform(32, auto_augment="rand-m9-n3-mstd0.5-inc1")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.transform(picture())


def test_torch_s_seed_decides_everything():
    recipe = pickle.loads(pickle.dumps(train_transform(32, erase_prob=0.5)))

    def run(seed, other):
        torch.manual_seed(seed)
        random.seed(other)
        np.random.seed(other)
        return torch.stack([recipe(picture()) for _ in range(12)])

    assert torch.equal(run(1, 1), run(1, 2))
    assert not torch.equal(run(1, 1), run(2, 1))

    def batches(seed):
        torch.manual_seed(seed)
        return torch.cat(list(DataLoader(Pictures(), batch_size=2, num_workers=2)))

    first, again = batches(0), batches(0)
    assert torch.equal(first, again) and not torch.equal(first, batches(1))
    assert len({image.numpy().tobytes() for image in first}) == 8  # workers differ


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", [32, (32, 32), (40, 24), (24, 40)])
def test_eval_transform_is_timm_s(size, crop_pct, interpolation):
    ours = eval_transform(size, crop_pct=crop_pct, interpolation=interpolation)
    theirs = transforms_imagenet_eval(size, crop_pct=crop_pct, interpolation=interpolation)
    for image in picture(), picture(47, 61), picture(50, 50), picture(201, 77):
        mask = tv_tensors.Mask(torch.zeros(1, image.height, image.width))
        got, label_map = ours(image, mask)
        assert torch.allclose(got.as_subclass(torch.Tensor), theirs(image), atol=1e-6)
        assert got.shape[-2:] == label_map.shape[-2:]


def test_the_recipe_needs_no_timm():
    code = (
        "import sys, tokenlabel.dataset.recipe, tokenlabel.dataset.augment;"
        "print({'timm', 'ray', 'click'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
