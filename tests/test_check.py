"""`TokenLabelDataset(check=...)`: an image that is not the annotated one is an error."""

import io
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from timm.data import create_dataset
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from tests.jobs import config
from tokenlabel.annotate import annotate
from tokenlabel.annotate.teacher.timm_teacher import wordnet_ids
from tokenlabel.dataset import LabelStore, TokenLabelDataset
from tokenlabel.dataset.sources.thumbprint import thumbprint
from tokenlabel.errors import ImageError

#: What a loader that applies an EXIF orientation does to the image.
TURNS = {
    2: "mirrored left to right",
    3: "turned by 180 degrees",
    4: "mirrored top to bottom",
    5: "mirrored, then turned by 90 degrees counter-clockwise",
    6: "turned by 90 degrees clockwise",
    7: "mirrored, then turned by 90 degrees clockwise",
    8: "turned by 90 degrees counter-clockwise",
}
OTHER = "another image, or a crop of it, or its colours were changed"
MIRRORED = r"is mirrored left to right\. Remedy: find the transform inside the data set"


@pytest.fixture(scope="module")
def photographs(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 20 images of the sample."""
    root = tmp_path_factory.mktemp("photographs") / "train"
    for split in ("train", "val"):
        shutil.copytree(sample / split, root, dirs_exist_ok=True)
    return root


@pytest.fixture(scope="module")
def labels(photographs: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """Real maps of them."""
    out = tmp_path_factory.mktemp("labels")
    annotate(config(photographs.parent, out))
    return out / "train"


@pytest.fixture(scope="module")
def squares(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small photographs: train/a/0.jpg to 8.jpg, whose names are their EXIF orientations; and
    others of the same names and sizes in val/. All but 8.jpg are square, 0.jpg is grey.
    """
    root, files = tmp_path_factory.mktemp("squares"), sorted(sample.rglob("*.jpg"))
    for split, first in (("train", 0), ("val", 9)):
        (root / split / "a").mkdir(parents=True)
        for number in range(9):
            exif = Image.Exif()
            if number:
                exif[ExifTags.Base.Orientation] = number
            image = read(files[first + number]).resize((160, 120 if number == 8 else 160))
            image = image if number else image.convert("L")
            image.save(root / split / "a" / f"{number}.jpg", exif=exif)
    return root


@pytest.fixture(scope="module")
def square_labels(
    squares: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None
) -> LabelStore:
    """Real maps of squares/train."""
    out = tmp_path_factory.mktemp("square-labels")
    names = out / "names.txt"
    names.write_text("\n".join(["a", *wordnet_ids()[1:]]))
    annotate(config(squares, out, class_names=str(names)))
    return LabelStore(out / "train")


def read(path: Any) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def copy(path: str, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    return change(read(path))


def mirror(image: Any) -> Any:
    return F.horizontal_flip(image)


def names_of(folder: ImageFolder) -> list[str]:
    return [Path(path).relative_to(folder.root).as_posix() for path, _ in folder.samples]


class Wrapper(Dataset[Any]):
    """A data set of the user's own, which changes images."""

    def __init__(self, inner: Any, change: Callable[[Any], Any]) -> None:
        self.inner, self.change = inner, change

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        image, _ = self.inner[index]
        return self.change(image), -1


def refused(dataset: TokenLabelDataset, index: int, message: str) -> None:
    """The image is refused by its key."""
    key = dataset.images.key(index)
    with pytest.raises(ImageError, match=f"^'{key}' must be the image that was annotated, .*this "):
        dataset[index]
    with pytest.raises(ImageError, match=message):
        dataset.__getitems__([index])


# --- the annotated images pass ------------------------------------------------------------------


def jpeg_60(image: Image.Image) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=60)
    return read(data)


# timm's reader leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:The image decoding and encoding cap:DeprecationWarning")
def test_the_same_images_pass_however_they_were_read(photographs: Path, labels: Path) -> None:
    def tensor(path: str) -> torch.Tensor:
        return decode_image(path, ImageReadMode.RGB)

    root = photographs
    names = names_of(ImageFolder(root))
    for images in (
        root,
        ImageFolder(root),
        Subset(ImageFolder(root), [*range(len(names))][::-1]),
        create_dataset("", root=str(root)),
        ImageFolder(root, loader=tensor),
        ImageFolder(root, loader=lambda path: tensor(path) / 255),
        ImageFolder(root, loader=lambda path: jpeg_60(read(path))),
        ImageFolder(root, loader=lambda path: read(path).convert("RGBA")),
        ImageFolder(root, loader=lambda path: read(path).convert("CMYK")),
    ):
        dataset = TokenLabelDataset(images, labels, check="always", label_source="maps")
        assert len(dataset.__getitems__(range(len(names)))) == len(names) == 20


@pytest.mark.filterwarnings("ignore:The image decoding and encoding cap:DeprecationWarning")
def test_grey_images_pass(squares: Path, square_labels: LabelStore) -> None:
    def grey(path: str) -> torch.Tensor:
        return decode_image(path, ImageReadMode.GRAY)

    for loader in (Image.open, grey):
        folder = ImageFolder(squares / "train", loader=loader)
        dataset = TokenLabelDataset(folder, square_labels, check="always")
        dataset[0]


def test_copies_of_another_size_pass_when_allowed(photographs: Path, labels: Path) -> None:
    root = photographs
    whole = TokenLabelDataset(root, labels, grid=2)
    for change in (lambda image: F.resize(image, 128), lambda image: image.resize((96, 96))):
        folder = ImageFolder(root, loader=partial(copy, change=change))
        options: Any = {"grid": 2, "label_source": "maps"}
        with pytest.raises(ValueError, match=r"this one is .*resized=True allows copies"):
            TokenLabelDataset(folder, labels, **options)[0]
        small = TokenLabelDataset(folder, labels, resized=True, check="always", **options)
        for index in range(len(small)):
            image, record = small[index]
            assert image.size == change(whole[index][0]).size
            torch.testing.assert_close(
                record[None].targets().dense(), whole[index][1][None].targets().dense()
            )


def test_crops_do_not_pass_for_copies_of_another_size(photographs: Path, labels: Path) -> None:
    folder = ImageFolder(photographs)
    crops = Wrapper(folder, lambda image: F.center_crop(F.resize(image, 128), [112, 112]))
    key = names_of(folder).__getitem__
    dataset = TokenLabelDataset(crops, labels, key=key, resized=True)
    refused(dataset, 0, OTHER)
    with pytest.raises(ValueError, match=r'resized=True must be checked, .*check="sample"'):
        TokenLabelDataset(crops, labels, key=key, resized=True, check="never")


# --- others do not ------------------------------------------------------------------------------


def test_shards_hold_thumbprint_and_orientation(squares: Path, square_labels: LabelStore) -> None:
    for number, key in enumerate(square_labels.keys):
        assert square_labels.orientation(key) == number
        want = thumbprint(read(squares / "train" / key))
        np.testing.assert_array_equal(square_labels.thumbprint(key), want)


def test_exif_that_the_loader_applies(squares: Path, square_labels: LabelStore) -> None:
    def upright(path: str) -> Image.Image:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")

    folder = ImageFolder(squares / "train", loader=upright)
    with pytest.raises(
        ValueError, match=r"this one is 120 x 160\. .* has EXIF orientation 8, which"
    ):
        TokenLabelDataset(folder, square_labels)[8]
    dataset = TokenLabelDataset(folder, square_labels, check="always", resized=True)
    dataset.__getitems__([0, 1])
    for number, turn in TURNS.items():
        refused(dataset, number, f"is {turn}. Remedy: .* has EXIF orientation {number}, which")


def test_hugging_face_datasets(squares: Path, square_labels: LabelStore) -> None:
    datasets = pytest.importorskip("datasets")
    names = list(square_labels.keys)
    table = datasets.Dataset.from_dict(
        {"image": [str(squares / "train" / name) for name in names], "label": [0] * len(names)}
    ).cast_column("image", datasets.Image())
    key = names.__getitem__
    dataset = TokenLabelDataset(table, square_labels, key=key)
    dataset.__getitems__([0, 1])
    refused(dataset, 6, r"is turned by 90 degrees clockwise\. .* has EXIF orientation 6, which")

    def flipped(rows: dict[str, Any]) -> dict[str, Any]:
        return {**rows, "image": [mirror(image) for image in rows["image"]]}

    def tensors(rows: dict[str, Any]) -> dict[str, Any]:
        return {**rows, "image": [F.to_image(mirror(image)) / 255 for image in rows["image"]]}

    for change in (flipped, tensors):
        changed = table.with_transform(change)
        refused(TokenLabelDataset(changed, square_labels, key=key), 1, MIRRORED)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_neighbours_that_timm_gives_for_an_unreadable_image(
    squares: Path, square_labels: LabelStore, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(squares / "train", tmp_path / "train"))
    (root / "a" / "3.jpg").write_bytes((root / "a" / "3.jpg").read_bytes()[:2000])
    dataset = TokenLabelDataset(
        create_dataset("", root=str(root)), square_labels, label_source="maps"
    )
    dataset[2]
    refused(dataset, 3, f"is {OTHER}. Remedy: check that .*timm's gives the next one")


def test_images_of_another_split_under_the_same_names(
    squares: Path, square_labels: LabelStore
) -> None:
    for index in range(9):
        refused(TokenLabelDataset(squares / "val", square_labels), index, f"is {OTHER}")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_flips_inside_the_data_set(squares: Path, square_labels: LabelStore) -> None:
    root = squares / "train"
    key = list(square_labels.keys).__getitem__
    flipped = ImageFolder(root, mirror)
    half = len(flipped) // 2
    for images in (
        Wrapper(ImageFolder(root), mirror),
        Wrapper(ImageFolder(root), lambda image: mirror(F.to_image(image))),
        ConcatDataset([Subset(flipped, range(half)), Subset(flipped, range(half, 9))]),
    ):
        refused(TokenLabelDataset(images, square_labels, key=key), 1, MIRRORED)
    refused(
        TokenLabelDataset(ImageFolder(root, loader=lambda path: mirror(read(path))), square_labels),
        1,
        MIRRORED,
    )
    for inner in (ImageFolder(root), create_dataset("", root=str(root))):
        for images in (inner, Subset(inner, range(9))):
            dataset = TokenLabelDataset(images, square_labels, label_source="maps")
            dataset[0]
            inner.transform = mirror
            refused(dataset, 1, MIRRORED)
            inner.transform = None


# --- which images are compared ------------------------------------------------------------------


@pytest.fixture
def later(squares: Path, square_labels: LabelStore) -> Callable[..., TokenLabelDataset]:
    """200 times an image; those from index 8 on are mirrored."""
    image = read(squares / "train" / "a" / "1.jpg")
    rows = [(image, 0)] * 8 + [(mirror(image), 0)] * 192
    return lambda check: TokenLabelDataset(rows, square_labels, key=_second, check=check)


def _second(index: int) -> str:
    return "a/1.jpg"


def test_the_first_images_and_some_later_ones_are_compared(
    later: Callable[..., TokenLabelDataset],
) -> None:
    dataset = later("sample")
    dataset.__getitems__(range(128))
    with pytest.raises(ImageError, match=MIRRORED):
        dataset[128]
    later("never").__getitems__(range(200))
    with pytest.raises(ImageError, match=MIRRORED):
        later("always").__getitems__(range(9))
    with pytest.raises(ValueError, match="check must be one of"):
        later("some")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_worker_compares_its_first_images(
    later: Callable[..., TokenLabelDataset], method: str
) -> None:
    dataset = later("sample")
    dataset.__getitems__(range(20))  # the parent's count is not the worker's
    loader = DataLoader(
        dataset,
        4,
        sampler=range(16),
        num_workers=2,
        multiprocessing_context=method,
        collate_fn=list,
    )
    batches = iter(loader)
    next(batches)
    next(batches)
    with pytest.raises(ImageError, match=MIRRORED):  # the third is the first worker's second
        next(batches)
