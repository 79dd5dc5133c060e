"""TokenLabelDataset: data sets and loaders of all sorts, and pictures that do not match."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import create_dataset
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from tests.jobs import config
from tokenlabel.annotate import annotate
from tokenlabel.dataset import (
    LabelStore,
    MissingMapError,
    TokenLabelDataset,
    TokenTargets,
    ToTokenTargets,
    train_transform,
)
from tokenlabel.dataset.sources import Pictures

GRID = (3, 4)


@pytest.fixture(scope="module")
def labels(sample: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """Real maps, 4 x 4, of both views of the sample's training pictures."""
    out = tmp_path_factory.mktemp("dataset")
    annotate(config(sample, out, input_size=128, views=["identity", "hflip"]))
    return out / "train"


@pytest.fixture
def images(sample: Path) -> Path:
    return sample / "train"


def transform() -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomResizedCrop(64, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def read(path: Path) -> PIL.Image.Image:
    with PIL.Image.open(path) as picture:
        return picture.convert("RGB")


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_folder(images: Path, labels: Path) -> None:
    dataset = TokenLabelDataset(images, labels, transform=transform(), grid=GRID, k=6)
    assert len(dataset) == 16
    for index in (0, 15, -1):
        picture, targets = dataset[index]
        assert picture.shape == (3, 64, 64)
        assert isinstance(targets, TokenTargets)
        assert targets.classes.shape == targets.probs.shape == (12, 6)
        torch.testing.assert_close(targets.probs.sum(-1) + targets.rest, torch.ones(12))
        assert targets.crop_probs.shape == (6,)
        key = dataset.pictures.key(index % 16)
        assert targets.label == dataset.store[key].label, (
            "ImageNet's class, not the folder's number"
        )
    with pytest.raises(IndexError, match="index 16 is outside the 16 pictures"):
        dataset[16]


def test_without_transform_the_whole_picture_is_the_whole_map(images: Path, labels: Path) -> None:
    dataset = TokenLabelDataset(images, labels, grid=4, k=3, truth="maps")
    picture, targets = dataset[0]
    assert isinstance(picture, PIL.Image.Image)
    entry = dataset.store[dataset.pictures.key(0)]
    best = torch.from_numpy(entry.classes[0, :, :, 0].astype("i4")).ravel()
    assert (targets.classes[:, 0] == best).float().mean() >= 0.75


def test_the_mirrored_view_serves_mirrored_crops(images: Path, labels: Path) -> None:
    flip = v2.RandomHorizontalFlip(1)
    dataset = TokenLabelDataset(images, labels, transform=flip, grid=4)
    _, got = dataset[0]
    entry = dataset.store[0]
    assert (entry.scores[0] != entry.scores[1][:, ::-1]).any()
    one_view = v2.Identity()
    want = TokenLabelDataset(images, labels, transform=one_view, grid=4)
    view = want.store[0]._replace(
        **{name: getattr(entry, name)[1:] for name in ("scores", "classes", "rest")}
    )
    picture, _ = want.pictures[0]
    score_map = want._map(view, "key", picture, int(got.label))
    assert same(got, ToTokenTargets(4)(picture, score_map)[1])


def test_a_transform_gives_back_the_map(images: Path, labels: Path) -> None:
    ended = v2.Compose([v2.CenterCrop(64), ToTokenTargets(4)])
    with pytest.raises(TypeError, match=r"TokenLabelMap.*is TokenTargets.*to_targets"):
        TokenLabelDataset(images, labels, transform=ended)[0]


def test_keys_are_relative_to_the_root_however_it_is_spelt(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)
    folder = ImageFolder(images)
    name = Path(folder.samples[3][0]).relative_to(images)
    for root in (str(images), f"{images}/", images.name, f"./{images.name}/"):
        assert Pictures(root, None).key(3) == name.as_posix()
    folder.samples[3] = (images.parent / ".." / images.parent.name / images.name / name, 0)
    assert Pictures(folder, None).key(3) == name.as_posix()


# timm's reader leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_data_sets_of_all_sorts_give_the_same(images: Path, labels: Path) -> None:
    reference = TokenLabelDataset(images, labels, grid=GRID)
    folder = ImageFolder(images)
    names = [Path(path).relative_to(images).as_posix() for path, _ in folder.samples]
    rows = [{"image": read(images / name), "label": 5} for name in names]
    pairs = [(read(images / name), np.int64(7)) for name in names]
    kinds: dict[str, tuple[Any, Any]] = {
        "ImageFolder": (folder, None),
        "Subset of a Subset": (Subset(Subset(folder, list(range(16))), list(range(16))), None),
        "timm": (create_dataset("", root=str(images)), None),
        "rows": (rows, lambda index: names[index]),
        "pairs": (pairs, names.__getitem__),
        "str": (str(images), None),
    }
    for kind, (source, key) in kinds.items():
        dataset = TokenLabelDataset(source, LabelStore(labels), grid=GRID, key=key, truth="maps")
        assert len(dataset) == 16
        where = {dataset.pictures.key(index): index for index in range(16)}
        for index in (0, 7, 15):
            mine = dataset[where[names[index]]][1]
            assert same(mine, reference[index][1]), kind
    dataset = TokenLabelDataset(pairs, labels, key=names.__getitem__, truth="images")
    assert dataset[3][1].label == 7


def test_rows_are_found_whatever_the_order_of_the_pictures(images: Path, labels: Path) -> None:
    reference = TokenLabelDataset(images, labels, grid=GRID)
    order = [5, 6, 7, 8, 2, 3, 4, 15, 0, 1, 11, 12, 13]  # runs, in which rows are guessed
    dataset = TokenLabelDataset(Subset(ImageFolder(images), order), labels, grid=GRID, truth="maps")
    for index, original in enumerate(order):
        assert same(dataset[index][1], reference[original][1])


def test_hugging_face_datasets(images: Path, labels: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = ImageFolder(images)
    names = [Path(path).relative_to(images).as_posix() for path, _ in folder.samples]
    table = datasets.Dataset.from_dict(
        {"image": [str(images / name) for name in names], "label": [-1] * len(names)}
    ).cast_column("image", datasets.Image())
    dataset = TokenLabelDataset(table, labels, grid=GRID, key=names.__getitem__)
    reference = TokenLabelDataset(images, labels, grid=GRID)
    assert same(dataset[5][1], reference[5][1])


def test_classes_that_are_numbered_otherwise_are_refused(images: Path, labels: Path) -> None:
    with pytest.raises(ValueError, match=r"is of class 0 in the images and \d+ in the label maps"):
        TokenLabelDataset(ImageFolder(images), labels)[0]


def test_pictures_that_were_transformed_are_refused(images: Path, labels: Path) -> None:
    crop = v2.CenterCrop(10)
    for source in (ImageFolder(images, crop), Subset(ImageFolder(images, crop), [1, 2])):
        with pytest.raises(ValueError, match="must come untransformed, but ImageFolder has a 'tra"):
            TokenLabelDataset(source, labels)
    names = [Path(path).relative_to(images).as_posix() for path, _ in ImageFolder(images).samples]
    small = [(crop(read(images / name)), -1) for name in names]
    dataset = TokenLabelDataset(small, labels, key=names.__getitem__)
    with pytest.raises(ValueError, match=r"\d+ x \d+ pixels, this one is 10 x 10\. Remedy: use"):
        dataset[0]


def test_sources_that_cannot_be_matched(images: Path, labels: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter([])

    with pytest.raises(TypeError, match="map-style data set"):
        TokenLabelDataset(Stream(), labels)
    with pytest.raises(
        TypeError, match=r"does not tell the files of its pictures. Remedy: pass key"
    ):
        TokenLabelDataset([(1, 2)], labels)
    picture = PIL.Image.new("RGB", (4, 4))
    cases: list[tuple[Any, str]] = [
        ((picture, 1, 2), "items must be"),
        ({"a": 1}, "a row needs a picture in a column called image"),
        ((picture, torch.ones(3)), "class must be an integer"),
    ]
    for item, message in cases:
        with pytest.raises(TypeError, match=message):
            TokenLabelDataset([item], labels, key=str)[0]
    with pytest.raises(ValueError, match="missing must be one of"):
        TokenLabelDataset(images, labels, missing="skip")  # type: ignore[arg-type]


def test_pictures_without_a_map(images: Path, labels: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(images, tmp_path / "train"))
    first = min(root.rglob("*.jpg"))
    shutil.copy(first, first.with_name("extra.jpg"))
    with pytest.raises(MissingMapError, match=r"no score map for 'n\d+/extra.jpg'"):
        TokenLabelDataset(root, labels)[0]
    dataset = TokenLabelDataset(
        root, labels, transform=transform(), grid=GRID, k=6, missing="ignore"
    )
    loader = DataLoader(dataset, batch_size=17)
    (pictures, targets) = next(iter(loader))
    assert pictures.shape == (17, 3, 64, 64)
    assert targets.weight.shape == (17, 12)
    assert (targets.weight[0] == 0).all() and (targets.rest[0] == 1).all()
    folder = first.parent.name
    classes = LabelStore(labels).attrs["class_names"]
    assert targets.label[0] == classes.index(folder), "ImageNet's class, not the folder's number"
    assert (targets.weight[1:] > 0).all()


def test_labels_of_another_split_do_not_train_silently(
    images: Path, labels: Path, tmp_path: Path
) -> None:
    above = tmp_path / "above"
    above.mkdir()
    (above / "split").symlink_to(images)
    with pytest.warns(UserWarning, match=r"none of 16 pictures .* such as 'split/n\d+.*Remedy"):
        TokenLabelDataset(above, labels, missing="ignore")
    with pytest.raises(FileNotFoundError, match=f"Remedy: name a split: {labels}"):
        TokenLabelDataset(images, labels.parent)


class Seeded(torch.utils.data.Dataset[Any]):
    """Every item with a seed of its own, so that where it is made does not matter."""

    def __init__(self, dataset: TokenLabelDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        torch.manual_seed(index)
        return self.dataset[index]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_give_what_the_main_process_gives(images: Path, labels: Path, method: str) -> None:
    pipeline = train_transform(64)
    dataset = Seeded(TokenLabelDataset(images, labels, transform=pipeline, grid=GRID))
    dataset[0]
    want = DataLoader(dataset, batch_size=5)
    loader = DataLoader(
        dataset, 5, num_workers=2, multiprocessing_context=method, persistent_workers=True
    )
    for _ in range(2):
        for (picture, targets), (want_picture, want_targets) in zip(loader, want, strict=True):
            assert torch.equal(picture, want_picture)
            assert isinstance(targets, TokenTargets)
            assert same(targets, want_targets)


def test_samplers_and_fields_on_a_device(images: Path, labels: Path) -> None:
    dataset = TokenLabelDataset(images, labels, transform=transform(), grid=GRID)
    seen: list[int] = []
    for rank in range(2):
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=2, rank=rank)
        for _, targets in DataLoader(dataset, 4, sampler=sampler):
            moved = TokenTargets(*(field.to("cpu", non_blocking=True) for field in targets))
            seen += moved.label.tolist()
    assert sorted(seen) == sorted(LabelStore(labels).labels.tolist())


# torchdata 0.11 calls a function of torch that torch 2.14 wants nobody to call.
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_loader_goes_on_where_it_stopped(images: Path, labels: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    dataset = Seeded(TokenLabelDataset(images, labels, transform=transform(), grid=GRID))
    loader = stateful.StatefulDataLoader(dataset, 4, num_workers=1)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    want = [targets.label for _, targets in batches]
    again = stateful.StatefulDataLoader(dataset, 4, num_workers=1)
    again.load_state_dict(state)
    assert same([targets.label for _, targets in again], want)
