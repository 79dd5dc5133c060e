"""The segmentation example: published settings, real folders, runs that learn and resume."""

import argparse
import gc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import tokenlabel as tl

FOLDER = Path(__file__).parents[1] / "examples" / "segmentation"
NAMES = ("segmenter", "scenes", "train", "compare")
SMALL = ("width=32", "depth=4", "heads=2", "stem_width=8", "patch_size=8")


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """The scripts as modules, which import one another by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        modules = {name: importlib.import_module(name) for name in NAMES}
        yield argparse.Namespace(**modules)
    for name in NAMES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def toy(example: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = example.scenes.make_toy(tmp_path_factory.mktemp("scenes") / "toy", (12, 2))
    return folder


def small(example: Any, size: int = 32, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {"depth": 4, "heads": 2, "stem_width": 8, "patch_size": 8, **options}
    return example.segmenter.backbone_of("lvvit_t", size, width=32, **given)


def arguments(example: Any, data: Path, out: Path, *more: object) -> argparse.Namespace:
    words = [
        *("--data", data, "--out", out, "--num-classes", 6, "--size", 32, "--width", 8),
        *("--model", "lvvit_t", "--model-kwargs", *SMALL, "--drop-path", 0, "--steps", 4),
        *("--warmup", 1, "--batch-size", 4, "--lr", 1e-3, "--save-every", 2, "--workers", 0),
        *("--scales", 1, *more),
    ]
    args: argparse.Namespace = example.train.arguments([str(word) for word in words])
    return args


@pytest.mark.parametrize(
    ("name", "layers", "width"),
    [
        ("lvvit_s", [6, 9, 12, 15], 384),
        ("lvvit_m", [10, 13, 16, 19], 512),
        ("lvvit_l", [14, 17, 20, 23], 768),
    ],
)
def test_the_settings_are_the_published_ones(
    name: str, layers: list[int], width: int, example: Any, tmp_path: Path
) -> None:
    given = ["--data", str(tmp_path), "--out", str(tmp_path), "--model", name]
    args = example.train.arguments(given)
    channels = {"lvvit_l": 512}.get(name, 256)
    assert (args.width, args.size, args.batch_size, args.steps) == (channels, 512, 16, 160_000)
    assert args.drop_path == {"lvvit_s": 0.1, "lvvit_m": 0.2, "lvvit_l": 0.5}[name]
    with torch.device("meta"):
        backbone = example.segmenter.backbone_of(name, 512)
        model = example.segmenter.Segmenter(backbone, 150, width=args.width)
        maps = model.features(torch.zeros(2, 3, 512, 512))
        loss = model.auxiliary(maps)
    assert model.layers == layers and model.aux_weight == 0.4
    sizes = [(width, 128), (width, 64), (width, 32), (2048, 32)]
    assert [(part.shape[1], part.shape[2]) for part in maps] == sizes
    kinds = [[type(layer).__name__ for layer in part] for part in model.necks]
    project = ["Conv2d", "BatchNorm2d", "ReLU"]
    enlarge = ["ConvTranspose2d", "BatchNorm2d", "ReLU"]
    assert kinds == [enlarge + project, enlarge + project, project, project]
    assert loss.shape == (2, 150, 32, 32)


def test_the_learning_rate_is_mmcvs(example: Any) -> None:
    args = argparse.Namespace(lr=6e-5, warmup=1500, steps=160_000)
    rates = [example.train.learning_rate(step, args) for step in (0, 750, 1500, 80_000, 159_999)]
    half = 6e-5 * (1 - 750 / 160_000) * (1 - 0.5 * (1 - 1e-6))
    wanted = [6e-11, half, 6e-5 * (1 - 1500 / 160_000), 3e-5, 6e-5 / 160_000]
    assert rates == pytest.approx(wanted, rel=1e-9)


def test_mean_iou_is_that_of_a_confusion_by_hand(example: Any) -> None:
    # Class 0: 3 of 3 + 1 + 2; class 1: 4 of 4 + 2 + 1; class 2 is nowhere.
    confusion = torch.tensor([[3.0, 1, 0], [2, 4, 0], [0, 0, 0]])
    assert example.train.mean_iou(confusion) == pytest.approx((3 / 6 + 4 / 7) / 2)


class Stripes(nn.Module):
    """Predicts the class in an image's first channel, at any size."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -10 * (images[:, :1] - torch.tensor([0.0, 1]).view(1, 2, 1, 1)).abs()


def test_windows_cover_an_image_and_flips_go_back(example: Any) -> None:
    predict = example.segmenter.predict
    image = torch.zeros(3, 32, 45)
    image[:, :, 20:] = 1
    truth = image[0].long()
    one = predict(Stripes(), image, 32, [1.0], False)
    assert one.shape == (2, 32, 45) and torch.equal(one.argmax(0), truth)
    assert torch.equal(example.segmenter.slide(Stripes(), image, 32), Stripes()(image[None])[0])
    for scales, flip in (([1.0], True), ([0.5, 1.0, 2.0], True)):
        found = predict(Stripes(), image, 32, scales, flip)
        assert (found.argmax(0) == truth).float().mean() > 0.97
        torch.testing.assert_close(found.sum(0), torch.ones(32, 45))


def test_views_are_summed_not_kept(example: Any) -> None:
    """The maps of one image and class set are the largest tensors of a test."""
    kept = []

    class Counting(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            objects = (o for o in gc.get_objects() if type(o) is torch.Tensor)
            kept.append(sum(o.shape == (7, 40, 50) for o in objects))
            return torch.zeros(len(images), 7, *images.shape[-2:])

    probs = example.segmenter.predict(Counting(), torch.zeros(3, 40, 50), 64, (0.5, 1, 1.5), True)
    assert max(kept) <= 3  # the sum, and what the last view left behind
    torch.testing.assert_close(probs, torch.full((7, 40, 50), 1 / 7))


def test_several_scales_of_which_there_is_one_are_one_scale(
    example: Any, toy: Path, tmp_path: Path
) -> None:
    args = arguments(example, toy, tmp_path)
    model = example.segmenter.Segmenter(small(example), 6, width=8).eval()
    image = torch.randn(3, 40, 50)
    with torch.inference_mode():
        once = model(image[None, :, :32, :32])[0].softmax(0)
    found = example.segmenter.predict(model, image[:, :32, :32], 32, (1.0,), False)
    torch.testing.assert_close(found, once)
    one = example.train.evaluate(model, args, [1.0], False)
    assert one == example.train.evaluate(model, args, [1.0, 1.0], False)


def test_a_step_lowers_the_loss_and_ignored_pixels_count_for_nothing(example: Any) -> None:
    model = example.segmenter.Segmenter(small(example), 6, width=8)
    for head in (model.decoder, model.auxiliary):
        head.classifier[0].p = 0.0
    images, masks = torch.randn(2, 3, 32, 32), torch.randint(6, (2, 32, 32))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = model(images, masks)
    before.backward()
    optimizer.step()
    assert model(images, masks) < before
    assert model(images, torch.full_like(masks, 255)) == 0
    maps = model.features(images)
    enlarge = nn.Upsample((32, 32), mode="bilinear")
    parts = [
        nn.functional.cross_entropy(enlarge(head(maps)), masks)
        for head in (model.decoder, model.auxiliary)
    ]
    torch.testing.assert_close(model(images, masks), parts[0] + 0.4 * parts[1])


@pytest.mark.parametrize(
    ("make", "file"),
    [(tl.lvvit_t, "lvvit_t.pth"), (tl.lvvit_s, "lvvit_s-26M-224-83.3.pth.tar")],
)
def test_published_weights_load_by_their_names(
    make: Any, file: str, example: Any, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    published = make()
    path = tmp_path / file
    torch.save({"state_dict": published.state_dict(), "epoch": 299}, path)
    args = example.train.arguments(
        ["--data", str(tmp_path), "--out", str(tmp_path), "--weights", str(path)]
    )
    assert args.model == file[:7]
    backbone = example.segmenter.backbone_of(args.model, 96, args.weights, drop_path_rate=0.1)
    own, theirs = backbone.state_dict(), published.state_dict()
    for name in own:
        assert name == "pos_embed" or torch.equal(own[name], theirs[name]), name
    planes = theirs["pos_embed"][:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    planes = nn.functional.interpolate(planes, (6, 6), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(own["pos_embed"][:, 1:], planes)
    model = example.segmenter.Segmenter(backbone, 5, width=16).eval()
    assert model.layers == ([2, 5, 8, 11] if args.model == "lvvit_t" else [6, 9, 12, 15])
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 96, 96)).shape == (1, 5, 96, 96)


def test_students_of_timm_are_backbones(example: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}
    vit = timm.create_model("vit_tiny_patch16_224", **options)
    student = tl.TokenStudent(vit)
    torch.save({"state_dict": student.state_dict()}, tmp_path / "last.pth")
    backbone = example.segmenter.backbone_of(
        "vit_tiny_patch16_224", 64, tmp_path / "last.pth", **options
    )
    assert torch.equal(backbone.blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)
    assert backbone.pos_embed.shape == (1, 17, 32)
    pyramid = example.segmenter.backbone_of("test_resnet", 64)
    for part, sizes in ((backbone, [16, 8, 4, 4]), (pyramid, [16, 8, 4, 2])):
        model = example.segmenter.Segmenter(part, 5, width=8).eval()
        with torch.inference_mode():
            assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5, 64, 64)
            maps = model.features(torch.randn(2, 3, 64, 64))
        assert [len(found[0, 0]) for found in maps] == sizes


@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 1, 2, 4], [3, 2, 1, 0], [0, 0, 1, 2], None])
def test_layers_that_are_not_there_are_refused(layers: list[int] | None, example: Any) -> None:
    backbone = small(example, depth=4 if layers else 3)
    with pytest.raises(ValueError, match=r"(?s)four rising numbers from 0.*Remedy: --layers"):
        example.segmenter.Segmenter(backbone, 5, layers=layers)
    deep = small(example, depth=6)
    assert example.segmenter.Segmenter(deep, 5, layers=[0, 2, 3, 5]).layers == [0, 2, 3, 5]


def test_a_run_learns_resumes_and_ends_as_an_undisturbed_one(
    example: Any, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--steps", 60, "--save-every", 30)
    scores = example.train.run(arguments(example, toy, tmp_path / "whole", *more))
    assert [*scores] == ["before", "one", "several"] and scores["one"] > 2 * scores["before"]
    whole = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)

    path = tmp_path / "killed" / "checkpoint.pt"
    saved, save = [], example.train.save

    def killed(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        saved.append(state["step"])
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(example.train, "save", killed)
        example.train.run(arguments(example, toy, path.parent, *more))
    assert saved == [30]
    capsys.readouterr()
    assert example.train.run(arguments(example, toy, path.parent, *more)) == scores
    said = capsys.readouterr().out
    assert "resuming after step 30" in said and "step 30/60" not in said
    resumed = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(value, resumed[name]) for name, value in whole["model"].items())
    evaluated = example.train.run(arguments(example, toy, path.parent, *more, "--eval-only"))
    assert evaluated == scores
    with pytest.raises(ValueError, match=r"lr: 0.001 then, 0.5 now.*Remedy"):
        example.train.run(arguments(example, toy, path.parent, *more, "--lr", 0.5))


def test_the_order_goes_through_all_images_of_an_epoch(example: Any) -> None:
    args = argparse.Namespace(batch_size=4, seed=3)
    whole = example.train.order(10, 0, 10, args)
    assert [sorted(whole[at : at + 10]) for at in range(0, 40, 10)] == [[*range(10)]] * 4
    parts = [example.train.order(10, at, at + 2, args) for at in range(0, 10, 2)]
    assert [number for part in parts for number in part] == whole


def write(folder: Path, image: tuple[int, int], mask: np.ndarray | None, name: str = "a") -> None:
    for part in ("images", "masks"):
        (folder / "train" / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", image).save(folder / "train" / "images" / f"{name}.jpg")
    if mask is not None:
        Image.fromarray(mask).save(folder / "train" / "masks" / f"{name}.png")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, r"must have a PNG file of its name.*none for 1 of 1 images.*a\.png"),
        (np.zeros((5, 4), np.uint8), r"uint8 of its image's \(H, W\) = \(4, 5\), got .*\(5, 4\)"),
        (np.zeros((4, 5, 3), np.uint8), r"uint8 of its image's.*\(4, 5, 3\)"),
        (np.full((4, 5), 6, np.uint8), r"class ids must be below 6, got 6 in .*--num-classes"),
    ],
)
def test_bad_masks_are_named(
    mask: np.ndarray | None, message: str, example: Any, tmp_path: Path
) -> None:
    write(tmp_path, (5, 4), mask)
    with pytest.raises(ValueError, match=message):
        example.scenes.Scenes(tmp_path, "train", 6, False, None)[0]


def test_bad_folders_and_files_are_named(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError, match=r"train/images.*no image in.*Remedy: check --data"):
        example.scenes.Scenes(tmp_path, "train", 6, False, None)
    write(tmp_path, (5, 4), np.zeros((4, 5), np.uint8))
    (tmp_path / "train" / "images" / "a.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"must be an image.*Remedy"):
        example.scenes.Scenes(tmp_path, "train", 6, False, None)[0]
    bad = [("--weights", "nowhere.pth"), ("--model", "lvvit_x"), ("--batch-size", 1)]
    for option in bad:
        with pytest.raises(SystemExit):
            arguments(example, tmp_path, tmp_path, *option)
        assert option[0] in capsys.readouterr().err.rpartition("error")[2]


def test_ids_are_read_as_ade20k_wants_them(example: Any, tmp_path: Path) -> None:
    write(tmp_path, (3, 1), np.array([[0, 6, 255]], np.uint8))
    _, mask = example.scenes.Scenes(tmp_path, "train", 6, True, lambda *pair: pair)[0]
    assert mask.tolist() == [[255, 5, 255]]


def test_crops_and_masks_stay_together(example: Any) -> None:
    """On an image whose colour is its class."""
    torch.manual_seed(0)
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[10:30, 20:50] = 1
    kinds = example.scenes.tv_tensors
    image, ids = kinds.Image(mask.mul(200).expand(3, -1, -1)), kinds.Mask(mask)
    geometry = example.scenes.v2.Compose(example.scenes.train_transform(32).transforms[:3])
    for _ in range(8):
        crop, found = geometry(image, ids)
        assert crop.shape[-2:] == found.shape == (32, 32)
        known = found != 255
        assert ((crop[0] > 100).long() == found)[known].float().mean() > 0.93


def test_the_toy_set_repeats_and_its_maps_are_its_masks(example: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        example.scenes.make_toy(tmp_path / name, (2, 1), seed=5)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 6
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    _, mask = example.scenes.paint(np.random.default_rng(0))
    leaf = example.compare.label_map(mask)
    labels = tl.ToTokenLabels((12, 16))(torch.zeros(3, 96, 128), leaf)[1]
    dense = labels[None].targets().dense()[0]
    cells = mask.reshape(12, 8, 16, 8)
    shown = np.stack([(cells == number).mean((1, 3)) for number in range(6)], -1).reshape(-1, 6)
    # A map is read between its cells, so the edges of objects are soft.
    truth = torch.tensor(shown).float()
    assert (dense.argmax(1) == truth.argmax(1)).float().mean() > 0.9
    torch.testing.assert_close(dense.mean(0), truth.mean(0), atol=0.02, rtol=0)
    assert leaf.label == 1 + np.bincount(mask.ravel(), minlength=6)[1:].argmax()


def test_one_command_compares_two_students(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.scenes.make_toy(tmp_path / "toy", (8, 2))
    small = {"width": 16, "depth": 4, "heads": 2, "stem_width": 8, "patch_size": 8}
    command = ["compare.py", "--out", tmp_path, "--seeds", 1, "--images", 64, "--epochs", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, command), "--steps", "2"])
        patch.setattr(example.compare, "STUDENT", {**small, "num_classes": 6})
        example.compare.main()
        first = capsys.readouterr().out
        example.compare.main()
        second = capsys.readouterr().out
    rows = [line.split(" | ") for line in first.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == ["| labels only", "| + token labels"]
    assert all(0 <= float(score) <= 100 for row in rows[1:] for score in (row[1], row[2], row[4]))
    assert first.endswith(second[second.index("| pretrained") :]) and "epoch" not in second
    heads = students(tmp_path, "aux_head.weight")
    assert not torch.equal(*heads)


def test_token_labels_are_all_that_differs(example: Any, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.compare, "ARMS", dict.fromkeys(example.compare.ARMS, 0.0))
        args = argparse.Namespace(out=tmp_path, images=64, epochs=1)
        example.compare.pretrain(0, args)
    for name in ("head.weight", "blocks.3.attn.qkv.weight"):
        assert torch.equal(*students(tmp_path, name))


def students(out: Path, name: str) -> list[torch.Tensor]:
    """A parameter of both pretrained students."""
    paths = [out / "seed-0" / arm / "lvvit.pth" for arm in ("labels-only", "token-labels")]
    return [torch.load(path, weights_only=True)["state_dict"][name] for path in paths]
