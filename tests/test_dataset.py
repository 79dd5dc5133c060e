"""TokenLabelDataset: data sets and loaders of all sorts, and images that do not match."""

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import create_dataset
from timm.utils import random_seed
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from tests.jobs import config
from tokenlabel.annotate import annotate
from tokenlabel.dataset import (
    LabelStore,
    TokenLabelDataset,
    TokenLabels,
    ToTokenLabels,
    train_transform,
)
from tokenlabel.dataset.keyed_images import KeyedImages
from tokenlabel.errors import MissingMapError

GRID = (3, 4)


@pytest.fixture(scope="module")
def labels(sample: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """Real maps, 4 x 4, of both views of the sample's training images."""
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
    with PIL.Image.open(path) as image:
        return image.convert("RGB")


def same(one: TokenLabels, other: TokenLabels) -> bool:
    return type(one) is type(other) is TokenLabels and torch.equal(one, other)


def test_a_folder(images: Path, labels: Path) -> None:
    dataset = TokenLabelDataset(images, labels, transform=transform(), grid=GRID)
    assert len(dataset) == 16
    for index in (0, 15, -1):
        image, record = dataset[index]
        assert image.shape == (3, 64, 64)
        assert type(record) is TokenLabels and record.ndim == 1
        found = record[None].targets()
        assert found.weight.shape == (1, 12)
        torch.testing.assert_close(found.dense().sum(-1), torch.ones(1, 12))
        key = dataset.images.key(index % 16)
        assert record.label == dataset.store[key].label, "ImageNet's class, not the folder's number"
    with pytest.raises(IndexError, match="index 16 is outside the 16 images"):
        dataset[16]


def test_a_batch_at_a_time_is_the_same(images: Path, labels: Path) -> None:
    dataset = TokenLabelDataset(images, labels, transform=train_transform(64), grid=GRID)
    order = [3, -1, 3, 0, 14]
    random_seed(0)
    together = dataset.__getitems__(order)
    random_seed(0)
    for (image, record), index in zip(together, order, strict=True):
        expected_image, expected = dataset[index]
        assert torch.equal(image, expected_image)
        assert same(record, expected)
    torch.manual_seed(0)
    loaded_image, loaded = next(iter(DataLoader(dataset, sampler=order, batch_size=5)))
    assert torch.equal(loaded.label, torch.stack([record.label for _, record in together]))
    assert type(loaded) is TokenLabels and loaded.grid == GRID and len(loaded_image) == 5


def test_without_transform_the_whole_image_is_the_whole_map(images: Path, labels: Path) -> None:
    dataset = TokenLabelDataset(images, labels, grid=4, label_source="maps")
    image, record = dataset[0]
    assert isinstance(image, PIL.Image.Image)
    entry = dataset.store[dataset.images.key(0)]
    best = torch.from_numpy(entry.classes[0, 0].astype("i4")).ravel()
    assert (record[None].targets().dense()[0].argmax(1) == best).float().mean() >= 0.75


def test_the_mirrored_view_serves_mirrored_crops(images: Path, labels: Path) -> None:
    flip = v2.RandomHorizontalFlip(1)
    _, got = TokenLabelDataset(images, labels, transform=flip, grid=4)[0]
    entry = LabelStore(labels)[0]
    assert (entry.codes[0] != entry.codes[1][:, :, ::-1]).any()
    best = torch.from_numpy(entry.classes[1, 0].astype("i4")).ravel()
    assert (got[None].targets().dense()[0].argmax(1) == best).float().mean() >= 0.75


def test_shrink_and_grid_reach_the_records(images: Path, labels: Path) -> None:
    crop = v2.CenterCrop(16)
    plain, drawn = (
        TokenLabelDataset(images, labels, transform=crop, grid=None, shrink=shrink)[0][1][None]
        for shrink in (0.0, 0.3)
    )
    assert plain.grid is None
    with pytest.raises(ValueError, match="do not say it"):
        plain.targets()
    mean = LabelStore(labels)[0].dense().mean((0, 1))
    expected = (plain.targets(2).dense() + torch.from_numpy(mean)) / 2
    torch.testing.assert_close(drawn.targets(2).dense(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 0}, "grid must be"),
        ({"shrink": -1.0}, "shrink must"),
        ({"label_source": "x"}, "label_source must be one of"),
        ({"missing": "skip"}, "missing must be one of"),
    ],
)
def test_bad_options(images: Path, labels: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLabelDataset(images, labels, **options)


def test_a_transform_gives_back_the_map(images: Path, labels: Path) -> None:
    ended = v2.Compose([v2.CenterCrop(64), ToTokenLabels(4)])
    with pytest.raises(TypeError, match=r"TokenLabelMap.*is TokenLabels.*leave ToTokenLabels out"):
        TokenLabelDataset(images, labels, transform=ended)[0]

    def alone(image: Any, leaf: Any) -> Any:
        return v2.functional.center_crop(image, 64), leaf

    with pytest.raises(ValueError, match="must lie on its image"):
        TokenLabelDataset(images, labels, transform=alone)[0]


def test_keys_are_relative_to_the_root_however_it_is_spelt(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)
    folder = ImageFolder(images)
    name = Path(folder.samples[3][0]).relative_to(images)
    for root in (str(images), f"{images}/", images.name, f"./{images.name}/"):
        assert KeyedImages(root, None, lambda key: True).key(3) == name.as_posix()
    folder.samples[3] = (images.parent / ".." / images.parent.name / images.name / name, 0)
    assert KeyedImages(folder, None, lambda key: True).key(3) == name.as_posix()


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
        dataset = TokenLabelDataset(
            source, LabelStore(labels), grid=GRID, key=key, label_source="maps"
        )
        assert len(dataset) == 16
        where = {dataset.images.key(index): index for index in range(16)}
        for index in (0, 7, 15):
            mine = dataset[where[names[index]]][1]
            assert same(mine, reference[index][1]), kind
    dataset = TokenLabelDataset(pairs, labels, key=names.__getitem__, label_source="images")
    assert dataset[3][1].label == 7


def test_hugging_face_tables_name_their_files(images: Path, labels: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder, reference = ImageFolder(images), TokenLabelDataset(images, labels, grid=GRID)
    paths = [path for path, _ in folder.samples]
    columns = {"image": paths, "label": [label for _, label in folder.samples]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=folder.classes)}
    table = datasets.Dataset.from_dict(columns, datasets.Features(kinds))
    shuffled = table.shuffle(seed=0).select(range(9)).with_transform(dict)
    options: dict[str, Any] = {"grid": GRID, "label_source": "maps"}
    for source in (table, shuffled, Subset(table, [5, 3, 11])):
        dataset = pickle.loads(pickle.dumps(TokenLabelDataset(source, labels, **options)))
        where = {reference.images.key(index): index for index in range(16)}
        found = [dataset.images.key(index) for index in range(len(dataset))]
        assert len({*found}) == len(source) <= 16
        for index, key in enumerate(found):
            assert same(dataset[index][1], reference[where[key]][1])
    with pytest.raises(ValueError, match=r"the two number their classes differently"):
        TokenLabelDataset(table, labels)  # some of ImageNet's folders, numbered from 0
    nameless = datasets.Dataset.from_dict(
        {"image": [read(Path(paths[0]))], "label": [0]}, datasets.Features(kinds)
    )
    with pytest.raises(TypeError, match=r"Dataset does not name the files of its images\."):
        TokenLabelDataset(nameless, labels, **options)
    dataset = TokenLabelDataset(nameless, labels, key=lambda index: found[index], **options)
    assert dataset.images.key(0) == found[0]


def test_classes_that_are_numbered_otherwise_are_refused(images: Path, labels: Path) -> None:
    keys = LabelStore(labels).keys
    pairs = [(read(images / keys[0]), 0)]
    with pytest.raises(ValueError, match=r"is of class 0 in the images and \d+ in the label maps"):
        TokenLabelDataset(pairs, labels, key=keys.__getitem__)[0]


def test_the_transform_of_the_images_is_taken_over(images: Path, labels: Path) -> None:
    crop = v2.Compose([v2.RandomResizedCrop(48), v2.RandomHorizontalFlip()])
    options: dict[str, Any] = {"grid": GRID, "label_source": "maps"}
    given = TokenLabelDataset(ImageFolder(images), labels, transform=crop, **options)
    folder = ImageFolder(images, crop)
    for source, rows in ((folder, range(3)), (Subset(Subset(folder, [2, 1, 0]), [2, 0]), [0, 2])):
        taken = TokenLabelDataset(source, labels, **options)
        for number, row in enumerate(rows):
            torch.manual_seed(row)
            image, found = taken[number]
            torch.manual_seed(row)
            expected, wanted = given[row]
            assert same(found, wanted) and image.tobytes() == expected.tobytes()
    assert folder.transform is crop, "the caller's own data set stays as it is"
    with pytest.raises(ValueError, match="transform is given twice"):
        TokenLabelDataset(folder, labels, transform=crop)
    with pytest.raises(ValueError, match="must give their own classes, but ImageFolder has a 'tar"):
        TokenLabelDataset(ImageFolder(images, crop, lambda label: label + 1), labels)


def test_images_that_were_cropped_before_are_refused(images: Path, labels: Path) -> None:
    crop = v2.CenterCrop(10)
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
    with pytest.raises(TypeError, match=r"does not name the files of its images. Remedy: pass key"):
        TokenLabelDataset([(1, 2)], labels)
    image = PIL.Image.new("RGB", (4, 4))
    cases: list[tuple[Any, str]] = [
        ((image, 1, 2), "items must be"),
        ({"a": 1}, "a row needs an image in a column called image"),
        ((image, torch.ones(3)), "class must be an integer"),
    ]
    for item, message in cases:
        with pytest.raises(TypeError, match=message):
            TokenLabelDataset([item], labels, key=LabelStore(labels).keys.__getitem__)[0]


def test_images_without_a_map(images: Path, labels: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(images, tmp_path / "train"))
    first = min(root.rglob("*.jpg"))
    first.with_name("extra.jpg").write_bytes(first.read_bytes() + b"\0")
    with pytest.raises(MissingMapError, match=r"no score map for 'n\d+/extra.jpg'"):
        TokenLabelDataset(root, labels)[0]
    with pytest.warns(UserWarning, match=r"1 of 17 images sampled have no map"):
        dataset = TokenLabelDataset(
            root, labels, transform=transform(), grid=GRID, missing="ignore"
        )
    with pytest.warns(UserWarning, match=r"1 of 17 images given in an epoch had no map"):
        images_, records = next(iter(DataLoader(dataset, batch_size=17)))
    assert images_.shape == (17, 3, 64, 64)
    assert records.has_map.tolist() == [False] + [True] * 16
    weight = records.targets().weight
    assert weight.shape == (17, 12)
    assert (weight[0] == 0).all() and (weight[1:] > 0).all()
    folder = first.parent.name
    classes = LabelStore(labels).attrs["class_names"]
    assert records.label[0] == classes.index(folder), "ImageNet's class, not the folder's number"


def test_images_that_could_not_be_annotated(sample: Path, tmp_path: Path, ray_here: None) -> None:
    root = Path(shutil.copytree(sample / "train", tmp_path / "data" / "train"))
    broken = min(root.rglob("*.jpg"))
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    annotate(config(tmp_path / "data", tmp_path / "out", max_errors=1))
    broken.write_bytes(whole)
    maps = tmp_path / "out" / "train"
    with pytest.raises(MissingMapError, match=r"has no score map: .*Remedy: repair"):
        TokenLabelDataset(root, maps)[0]
    dataset = TokenLabelDataset(root, maps, transform=transform(), missing="ignore")
    image, record = dataset[0]
    assert image.shape == (3, 64, 64)
    assert not record.has_map and record.label == dataset.store.ground_truth[0]
    assert dataset[1][1].has_map


def test_labels_of_another_split_do_not_train_silently(
    sample: Path, images: Path, labels: Path
) -> None:
    with pytest.warns(UserWarning, match=r"4 of 4 images sampled .* such as 'n\d+.*Remedy"):
        TokenLabelDataset(sample / "val", labels, missing="ignore")
    with pytest.raises(FileNotFoundError, match=f"Remedy: name a split: {labels}"):
        TokenLabelDataset(images, labels.parent)


class Seeded(torch.utils.data.Dataset[Any]):
    """Every item with a seed of its own, so that where it is made does not matter."""

    def __init__(self, dataset: TokenLabelDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        random_seed(index)
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
        for (image, found), (want_image, want_found) in zip(loader, want, strict=True):
            assert torch.equal(image, want_image)
            assert same(found, want_found)


# torchdata 0.11 calls a function of torch that torch 2.14 wants nobody to call.
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_loader_resumes(images: Path, labels: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    dataset = Seeded(TokenLabelDataset(images, labels, transform=transform(), grid=GRID))
    loader = stateful.StatefulDataLoader(dataset, 4, num_workers=1)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    want = [found.label.tolist() for _, found in batches]
    again = stateful.StatefulDataLoader(dataset, 4, num_workers=1)
    again.load_state_dict(state)
    assert [found.label.tolist() for _, found in again] == want
