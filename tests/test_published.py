"""`import-labels`: published label sets, from where they lie to targets of a student."""

import errno
import logging
import math
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import v2

import tokenlabel as tl
from tests.jobs import digests
from tests.painted import invoke
from tokenlabel.annotate.config import AnnotateConfig
from tokenlabel.annotate.sample import sample_folder
from tokenlabel.annotate.teacher.annotator import Annotator
from tokenlabel.annotate.teacher.timm_teacher import TimmTeacher, build_model
from tokenlabel.errors import ConfigError, FingerprintError, FormatError, TokenLabelError
from tokenlabel.inspection.verify.verify import verify
from tokenlabel.published import archive
from tokenlabel.published.geometry import Geometry
from tokenlabel.published.importer import import_labels

SIDE = 160
Save = Callable[[Path, Path], None]


def label(seed: int = 0, k: int = 5, grid: tuple[int, int] = (4, 5), classes: int = 50) -> Tensor:
    """As the published generator saves it: a permuted view, float16, descending along K."""
    torch.manual_seed(seed)
    scores, ids = (3 * torch.randn(*grid, classes) + 2).topk(k)
    return torch.stack([scores, ids.float()]).half().permute(0, 3, 1, 2)


def make_images(folder: Path, names: list[str]) -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        path = folder / "images" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    return folder / "images" / "train"


NAMES = ["a/one.jpg", "a/two.png", "b/one.jpg", "b/x.y.jpg"]
STEMS = ["a/one", "a/two", "b/one", "b/x"]


def make_set(folder: Path, labels: dict[str, Any] | None = None) -> Path:
    labels = labels or {stem: label(seed) for seed, stem in enumerate(STEMS)}
    for stem, one in labels.items():
        path = folder / "set" / f"{stem}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(one, path)
    return folder / "set"


def as_zip(source: Path, to: Path, **options: Any) -> Path:
    with zipfile.ZipFile(to, "w", **options) as file:
        for path in sorted(source.rglob("*")):
            file.write(path, Path("deep") / "set" / path.relative_to(source))
    return to


def as_tar(source: Path, to: Path, **options: Any) -> Path:
    with tarfile.open(to, "w", **options) as file:
        file.add(source, "deep/set")
    return to


def as_old_tar(source: Path, to: Path) -> Path:
    """Headers without a magic number, as before POSIX."""
    data = bytearray(as_tar(source, to, format=tarfile.USTAR_FORMAT).read_bytes())
    with tarfile.open(to) as file:
        places = [member.offset for member in file]
    for place in places:
        data[place + 257 : place + 512] = bytes(255)
        data[place + 148 : place + 156] = b" " * 8
        data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    to.write_bytes(data)
    return to


def bring(labels: Path, images: Path, out: Path, **options: Any) -> Any:
    own = {"geometry", "rest", "teacher", "check"}
    given = {name: options.pop(name) for name in own & options.keys()}
    base = {"numbering": "folders", "num_classes": 50, "shard_size": 3}
    settings = AnnotateConfig(out=str(out), split="train", **{**base, **options})
    return import_labels(labels, images, settings, **{"geometry": "whole", **given})


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's photographs, cut to 3:2 and 2:3, where a centre crop is not the whole."""
    source = sample_folder(tmp_path_factory.mktemp("whole"))
    folder = tmp_path_factory.mktemp("cut") / "train"
    for number, path in enumerate(sorted((source / "train").rglob("*.jpg"))):
        to = folder / path.parent.name / path.name
        to.parent.mkdir(parents=True, exist_ok=True)
        box = (0, 80, 510, 420) if number % 2 else (80, 0, 420, 510)
        Image.open(path).crop(box).save(to, quality=95)
    return folder


@pytest.fixture(scope="session")
def sets(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of these, by the steps of the published generator: `centre`, and `squash`."""
    folder = tmp_path_factory.mktemp("sets")
    network = TimmTeacher(build_model("tf_efficientnet_lite0", weights="sample"))
    teacher = Annotator(network, input_sizes=[(SIDE, SIDE)], device="cpu")
    shown = {
        "centre": v2.Compose([v2.Resize(SIDE, v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIDE)]),
        "squash": v2.Resize((SIDE, SIDE), v2.InterpolationMode.BICUBIC),
    }
    for name, transform in shown.items():
        for path in photographs.rglob("*.jpg"):
            pixels = np.asarray(transform(Image.open(path)))[None]
            scores, ids = teacher.logits([pixels])[0].topk(5)
            to = folder / name / path.parent.name / f"{path.name.partition('.')[0]}.pt"
            to.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.stack([scores, ids.float()]).half().permute(0, 3, 1, 2), to)
    return folder


def test_folder_zip_and_tar_give_the_same_split_which_verifies(tmp_path: Path) -> None:
    images, folder = make_images(tmp_path, NAMES), make_set(tmp_path)
    (folder / "a" / "._one.pt").write_bytes(b"of a Mac")
    (folder / "README.txt").write_text("no label")
    forms = {
        "folder": folder,
        "stored": as_zip(folder, tmp_path / "stored.zip"),
        "deflated": as_zip(folder, tmp_path / "d.zip", compression=zipfile.ZIP_DEFLATED),
        "gnu": as_tar(folder, tmp_path / "gnu.tar", format=tarfile.GNU_FORMAT),
        "v7": as_old_tar(folder, tmp_path / "v7.tar"),
        "pax": as_tar(folder, tmp_path / "pax.tar", format=tarfile.PAX_FORMAT),
    }
    with zipfile.ZipFile(tmp_path / "wide.zip", "w") as file:  # all numbers of 64 bits
        for path in folder.rglob("*.pt"):
            with file.open(f"{path.parent.name}/{path.name}", "w", force_zip64=True) as member:
                member.write(path.read_bytes())
    forms["wide"] = tmp_path / "wide.zip"
    for name, path in forms.items():
        report = bring(path, images, tmp_path / name)
        assert report.ok and (report.images, report.errors, report.shards) == (4, 0, 2)
        assert verify(tmp_path / name / "train", images).ok
    sums = {name: digests(tmp_path / name / "train") for name in forms}
    assert all(one == sums["folder"] for one in sums.values())


def test_a_zip_of_more_entries_than_16_bits_count_is_listed_whole(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as file:
        for number in range(70_000):
            file.writestr(f"set/c{number % 9}/{number}.pt", b"")
    with archive.LabelFiles(tmp_path / "many.zip") as files:
        assert len(files) == 70_000
        assert (files.find(archive.hash_stems(["c1/1.JPEG", "c2/1.JPEG"])) >= 0).tolist() == [1, 0]


def test_what_is_stored_is_the_files_scores_and_the_rest_as_told(tmp_path: Path) -> None:
    images, folder = make_images(tmp_path, NAMES), make_set(tmp_path)
    for rest in ("zeros", "none"):
        bring(folder, images, tmp_path / rest, rest=rest)
        store = tl.LabelStore(tmp_path / rest / "train")
        for seed, key in enumerate(NAMES):
            scores, ids = label(seed).float().permute(0, 2, 3, 1)
            found, logits = store[key].logits()
            assert (torch.from_numpy(found.astype(int)) == ids).all()
            np.testing.assert_allclose(logits, scores, atol=8e-3)
            _, probs, left = store[key].probabilities()
            others = 45 if rest == "zeros" else 0
            total = scores.exp().sum(-1) + others
            np.testing.assert_allclose(probs, scores.exp() / total[..., None], atol=4e-3)
            np.testing.assert_allclose(left, others / total, atol=8e-3)


def published_target(one: Tensor, box: Any, grid: int, classes: int) -> Tensor:
    """What the published code makes of a label and a crop, with the box the right way round."""
    scores, ids = one.float()
    maps = torch.zeros(classes, *scores.shape[1:]).scatter_(0, ids.long(), scores)
    sides = torch.tensor([scores.shape[2], scores.shape[1]] * 2)
    region = torch.cat([torch.zeros(1), torch.tensor(box).float() * sides - 0.5])[None]
    return roi_align(maps[None], region, (grid, grid))[0].flatten(1).softmax(0).T


def test_rule_published_gives_the_published_targets(sets: Path, photographs: Path) -> None:
    out = sets / "out-whole"
    bring(sets / "centre", photographs, out, num_classes=1000, numbering="auto", geometry="whole")
    store = tl.LabelStore(out / "train")
    rng, worst = np.random.default_rng(0), 0.0
    for row, key in enumerate(store.keys):
        low, size = rng.uniform(0, 0.4, 2), rng.uniform(0.3, 0.6, 2)
        box = [*low, *(low + size)]
        labels = store.labels([row], torch.tensor([box]), torch.zeros(1, dtype=torch.bool))
        found = labels.sparse(grid=7, k=1000, rule="published")
        dense = torch.zeros(49, 1000).scatter_(1, found.classes[0].long(), found.probs[0])
        one = torch.load(sets / "centre" / f"{key.partition('.')[0]}.pt", weights_only=True)
        worst = max(worst, float((dense - published_target(one, box, 7, 1000)).abs().max()))
    assert worst < 5e-3


def test_extents_are_where_torchvision_crops() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = rng.integers(20, 700, 2).tolist()
        size, crop_pct = int(rng.integers(16, 90)), float(rng.choice([1.0, 0.9, 0.875, 0.5]))
        resized = v2.functional.resize(
            torch.zeros(1, height, width), [math.floor(size / crop_pct)], antialias=False
        )
        rows, columns = np.indices(resized.shape[1:])
        marked = torch.from_numpy(np.stack([columns, rows]))
        corner = v2.functional.center_crop(marked, [size, size])[:, 0, 0].tolist()
        sides = resized.shape[2], resized.shape[1]
        ends = [(corner[axis] + add) / sides[axis] for add in (0, size) for axis in (0, 1)]
        found = Geometry("centre", size, crop_pct).extent(width, height)
        np.testing.assert_allclose(found, ends, atol=1e-6)


@pytest.mark.parametrize("name", ["centre", "squash"])
def test_detect_finds_what_the_teacher_was_shown(
    sets: Path, photographs: Path, name: str, tmp_path: Path
) -> None:
    teacher = AnnotateConfig(weights="sample", device="cpu")
    given: dict[str, Any] = {"num_classes": 1000, "numbering": "auto", "geometry": "detect"}
    report = bring(sets / name, photographs, tmp_path, teacher=teacher, check=9, **given)
    expected = {"centre": f"centre:{SIDE}:1", "squash": "squash"}[name]
    assert report.preprocessing == {"resize": expected, "rest": "zeros"}
    assert report.top1 > 0.5 and report.class_fits["names"][0] > 8
    store = tl.LabelStore(tmp_path / "train")
    extents = {store[row].extent for row in range(len(store))}
    assert len(extents) == (2 if name == "centre" else 1)


def test_detect_says_when_it_cannot_tell(tmp_path: Path) -> None:
    images, teacher = make_images(tmp_path, NAMES), AnnotateConfig(weights="sample", device="cpu")
    wide = {stem: label(seed, classes=1000) for seed, stem in enumerate(STEMS)}
    with pytest.raises(ConfigError, match=r"cannot tell.* Remedy: name the geometry"):
        given: dict[str, Any] = {"num_classes": 1000, "geometry": "detect", "teacher": teacher}
        bring(make_set(tmp_path, wide), images, tmp_path / "out", **given)


def test_targets_of_a_centre_crop_lie_where_the_teacher_looked(tmp_path: Path) -> None:
    images, one = make_images(tmp_path, ["a/one.jpg"]), torch.zeros(2, 2, 4, 4)
    one[0, 0], one[1, 0], one[1, 1] = 20.0, torch.arange(16.0).view(4, 4), 49
    bring(make_set(tmp_path, {"a/one": one}), images, tmp_path / "out", geometry="centre:128")
    dataset = tl.TokenLabelDataset(
        str(images),
        str(tmp_path / "out" / "train"),
        transform=v2.Compose([v2.Resize((96, 128)), v2.ToImage()]),
        grid=(6, 8),
        label_source="maps",
    )
    _, labels = dataset[0]
    targets = labels[None].sparse(grid=(6, 8), k=1)
    inside = targets.weight[0].view(6, 8)
    # Of 40 x 30 pixels the middle 30 x 30 were seen: from 1/8 of the width to 7/8, in whole
    # pixels of the resized image.
    assert (inside[:, 1:7] > 0.99).all() and (inside[:, [0, 7]] < 0.02).all()
    assert targets.classes[0].view(6, 8)[0, 1] == 0 and targets.classes[0].view(6, 8)[5, 6] == 15


def broken(value: float, plane: int = 1, cell: int = 0) -> Tensor:
    one = label().float().contiguous()
    one[plane, cell, 1, 2] = value
    return one


def repeated() -> Tensor:
    one = label()
    one[1, 1, 3, 4] = one[1, 0, 3, 4]
    return one


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (repeated().float(), f"a cell must be different, one is {label()[1, 0, 3, 4]:g}\\."),
        (broken(1.5), "whole numbers from 0 to 49, one is 1.5"),
        (broken(-1), "whole numbers from 0 to 49, one is -1"),
        (broken(50), "whole numbers from 0 to 49, one is 50"),
        (broken(math.nan), "whole numbers from 0 to 49, one is nan"),
        (broken(math.inf, plane=0), "its scores must be finite, one is inf"),
        (label(k=4).float(), r"torch.float32 \[2, 4, 4, 5\], where the first.*, [ab]/\w+\.pt, is"),
        (label()[0], r"its tensor must be \[2, K, H, W\], .* it is \[5, 4, 5\]"),
        ({"label": label()}, "it must hold one tensor of floats, it holds dict"),
        (label().int(), "it must hold one tensor of floats, it holds torch.int32"),
        (torch.zeros(2, 5, 4, 5, device="meta"), "its tensor must be dense and hold values"),
        (
            torch.zeros(1).expand(2, 5, 4000, 4000),
            r"at most 4194304 numbers, it is \[2, 5, 4000, 4000\]",
        ),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, one: Any, message: str) -> None:
    images = make_images(tmp_path, NAMES)
    labels = make_set(tmp_path, dict.fromkeys(STEMS, label().float()) | {"b/one": one})
    with pytest.raises(FormatError, match=f"(?s)(b/one.jpg|first file).*{message}.* Remedy: "):
        bring(labels, images, tmp_path / "out")
    assert not (tmp_path / "out" / "train" / "index").exists()


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_labels_of_other_floats_and_of_a_training_run_are_taken(tmp_path: Path) -> None:
    images = make_images(tmp_path, NAMES)
    kinds = (label().double(), label().bfloat16(), label().float().requires_grad_())
    for number, one in enumerate(kinds):
        labels = make_set(tmp_path / str(number), dict.fromkeys(STEMS, one))
        assert bring(labels, images, tmp_path / str(number)).ok


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = make_images(tmp_path, NAMES)
    with pytest.raises(FormatError, match=r"first file, [ab]/\w+\.pt, .*weights_only=True\)"):
        bring(make_set(tmp_path, dict.fromkeys(STEMS, Runs())), images, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_ids_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    images, labels = make_images(tmp_path, NAMES), make_set(tmp_path)
    with pytest.raises(ConfigError, match=r"torch.float16.* up to 2048 only.*are 21843"):
        bring(labels, images, tmp_path / "out", num_classes=21843)
    wide = {stem: label(seed).float() for seed, stem in enumerate(STEMS)}
    wide["a/one"][1, 0] = 21842
    bring(make_set(tmp_path / "wide", wide), images, tmp_path / "out", num_classes=21843)
    assert tl.LabelStore(tmp_path / "out" / "train")["a/one.jpg"].classes.max() == 21842


def test_names_that_clash_are_listed(tmp_path: Path) -> None:
    images, labels = make_images(tmp_path, NAMES), make_set(tmp_path)
    torch.save(label(), labels / "b" / "x.z.pt")
    with pytest.raises(FormatError, match=r"1 have more: (b/x.pt, b/x.z.pt|b/x.z.pt, b/x.pt)"):
        bring(labels, images, tmp_path / "out")
    (labels / "b" / "x.z.pt").unlink()
    make_images(tmp_path, ["b/x.z.jpg"])
    with pytest.raises(ConfigError, match=r"several: b/x.y.jpg, b/x.z.jpg"):
        bring(labels, images, tmp_path / "out")


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_an_archive_that_was_cut_short_is_refused_wherever(tmp_path: Path, form: str) -> None:
    images, labels = make_images(tmp_path, NAMES), make_set(tmp_path)
    make = as_zip if form == "zip" else as_tar
    data = make(labels, tmp_path / f"set.{form}").read_bytes()
    end = len(data) if form == "zip" else len(data.rstrip(b"\0")) // 512 * 512 + 512
    for size in sorted({600, end // 2, end // 2 // 512 * 512, end - 513, end - 512, end - 1}):
        (tmp_path / "short").write_bytes(data[:size])
        with pytest.raises(TokenLabelError, match=r"short.*Remedy"):
            bring(tmp_path / "short", images, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"a folder, a \.zip or a \.tar that is not compressed"):
        bring(as_tar_gz(labels, tmp_path / "set.tar.gz"), images, tmp_path / "out")


def as_tar_gz(source: Path, to: Path) -> Path:
    with tarfile.open(to, "w:gz") as file:
        file.add(source, "set")
    return to


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_label_that_is_a_link_in_a_tar_is_refused_by_name(tmp_path: Path, link: Any) -> None:
    images, labels = make_images(tmp_path, NAMES), make_set(tmp_path)
    (labels / "b" / "x.pt").unlink()
    link(labels / "b" / "one.pt", labels / "b" / "x.pt")
    bring(labels, images, tmp_path / "folder")
    with pytest.raises(FormatError, match=r"b/(one|x)\.pt is a link to .*b/(x|one)\.pt\. Remedy"):
        bring(as_tar(labels, tmp_path / "set.tar"), images, tmp_path / "out")


def test_a_folder_that_cannot_be_listed_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = make_images(tmp_path, NAMES), make_set(tmp_path)
    scandir = os.scandir

    def denied(path: Any) -> Any:  # the superuser may list any folder
        if str(path).endswith("set/b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ConfigError, match=r"set/b is not: Permission denied\. Remedy"):
        bring(labels, images, tmp_path / "out")


def test_a_flipped_byte_in_a_zip_is_found(tmp_path: Path) -> None:
    images = make_images(tmp_path, NAMES)
    path = as_zip(make_set(tmp_path), tmp_path / "set.zip")
    with zipfile.ZipFile(path) as file:
        place = file.getinfo("deep/set/b/one.pt").header_offset
    data = bytearray(path.read_bytes())
    data[place + 700] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"b/one.jpg is damaged.*checksum"):
        bring(path, images, tmp_path / "out")


def test_images_without_labels_and_labels_without_images_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, labels = make_images(tmp_path, NAMES), make_set(tmp_path)
    (labels / "a" / "one.pt").unlink()
    torch.save(label(), labels / "b" / "nobody.pt")
    (images / "b" / "one.jpg").write_bytes(b"damaged")
    with caplog.at_level(logging.INFO, "tokenlabel"):
        report = bring(labels, images, tmp_path / "out", max_errors=2)
    assert report.ok and report.error_list == [
        ("a/one.jpg", "the label set has none for it"),
        ("b/one.jpg", "not an image, or its header is damaged"),
    ]
    assert "1 labels of" in caplog.text and "1 images have no label" in caplog.text
    assert "the 45 classes that a patch leaves out have logit 0 each" in caplog.text
    assert verify(tmp_path / "out" / "train").ok
    assert not bring(labels, images, tmp_path / "strict", max_errors=1).ok
    with pytest.raises(ConfigError, match="none is of an image"):
        bring(labels, make_images(tmp_path / "other", ["z/q.jpg"]), tmp_path / "none")


def test_an_import_resumes_and_refuses_other_settings(tmp_path: Path) -> None:
    images, labels = make_images(tmp_path, NAMES), make_set(tmp_path)
    bring(labels, images, tmp_path / "out")
    before = digests(tmp_path / "out" / "train")
    (tmp_path / "out" / "train" / "shard-00001-of-00002.h5").unlink()
    report = bring(as_zip(labels, tmp_path / "set.zip"), images, tmp_path / "out")
    assert (report.written, report.skipped) == (1, 1)
    assert digests(tmp_path / "out" / "train") == before
    other = {stem: label(seed + 9) for seed, stem in enumerate(STEMS)}
    sizes = {path: path.stat().st_size for path in labels.rglob("*.pt")}
    make_set(tmp_path, other)
    assert sizes == {path: path.stat().st_size for path in labels.rglob("*.pt")}
    (tmp_path / "out" / "train" / "shard-00001-of-00002.h5").unlink()
    with pytest.raises(FingerprintError, match="weights: "):
        bring(labels, images, tmp_path / "out")
    make_set(tmp_path)
    for change in ({"geometry": "squash"}, {"rest": "none"}, {"num_classes": 60}):
        with pytest.raises(FingerprintError):
            bring(labels, images, tmp_path / "out", **change)


@pytest.mark.parametrize("text", ["center", "squash:3", "centre:0", "centre:9:1.1", "centre:9:1:1"])
def test_a_geometry_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="geometry must be centre"):
        bring(make_set(tmp_path), make_images(tmp_path, NAMES), tmp_path / "out", geometry=text)


def test_labels_of_another_numbering_are_refused(
    sets: Path, photographs: Path, tmp_path: Path
) -> None:
    for path in (sets / "squash").rglob("*.pt"):
        one = torch.load(path, weights_only=True)
        one[1] = (one[1] + 7) % 1000
        to = tmp_path / "set" / path.parent.name / path.name
        to.parent.mkdir(parents=True, exist_ok=True)
        torch.save(one, to)
    given: dict[str, Any] = {"num_classes": 1000, "numbering": "auto", "geometry": "squash"}
    report = bring(tmp_path / "set", photographs, tmp_path / "out", **given)
    assert report.class_fits["names"] == (0, 16)


def test_the_command_imports_and_the_others_take_the_split(
    sets: Path, photographs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "labels" / "train"
    arguments: list[object] = [sets / "squash", "--images", photographs, "--out", out]
    done = invoke("import-labels", *arguments, "--geometry", "squash")
    assert "Next: python cli.py inspect-labels" in done
    assert "resize squash" in invoke("inspect-labels", out)
    assert "all is well" in invoke("inspect-labels", out, "--verify", "--images", photographs)
    given = ["--geometry", "squash", "--config", "sample"]
    assert "leave them out" in invoke("import-labels", *arguments, *given, code=2)
    wrong = invoke("import-labels", *arguments, "--geometry", "middle", code=2)
    assert "geometry must be" in wrong


def test_naming_a_file_leaves_the_others_readable(tmp_path: Path) -> None:
    folder = make_set(tmp_path, {f"c/{number}": label(number) for number in range(9)})
    for path in (folder, as_zip(folder, tmp_path / "set.zip"), as_tar(folder, tmp_path / "s.tar")):
        with archive.LabelFiles(path) as files:
            before = [files.read(row) for row in range(9)]
            names = [files.name(row) for row in range(9)]
            assert [files.read(row) for row in range(9)] == before
            assert files.find(archive.hash_stems(names)).tolist() == [*range(9)]
