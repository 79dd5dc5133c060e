"""TokenLabelMapper in the streams of others; grids by name; validation in the maps' numbers."""

import io
import pickle
import tarfile
from functools import partial
from pathlib import Path

import PIL.Image
import pytest
import timm
import torch
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

from tests.jobs import config
from tokenlabel.annotate import annotate
from tokenlabel.dataset import (
    LabelStore,
    TokenLabelDataset,
    TokenLabelMapper,
    TokenLabels,
    eval_transform,
    validation_dataset,
)
from tokenlabel.dataset.targets.token_labels import student_grid
from tokenlabel.errors import ImageError, MissingMapError
from tokenlabel.supervise import TokenStudent

CROP = v2.Compose([v2.Resize((32, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


@pytest.fixture(scope="module")
def labels(sample, tmp_path_factory, ray_here):
    out = tmp_path_factory.mktemp("mapper")
    annotate(config(sample, out))
    return out / "train"


def test_one_sample_is_what_the_data_set_gives(sample, labels):
    dataset = TokenLabelDataset(sample / "train", labels, transform=CROP, label_source="maps")
    mapper = pickle.loads(pickle.dumps(TokenLabelMapper(labels, transform=CROP)))
    for index in (0, 7):
        key = dataset.images.key(index)
        expected_image, expected = dataset[index]
        with PIL.Image.open(sample / "train" / key) as image:
            got_image, got = mapper(image, key)
        assert torch.equal(got_image, expected_image) and torch.equal(got, expected)
    assert type(got) is TokenLabels and got.label == mapper.store.folders[key.partition("/")[0]]
    with pytest.raises(MissingMapError):
        mapper(got_image, "n0/nothing.jpg")
    flipped = PIL.Image.open(sample / "train" / key).transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    with pytest.raises(ImageError, match="mirrored left to right"):
        TokenLabelMapper(labels, check="always")(flipped, key)
    with pytest.raises(ValueError, match=r"is of class 3 in the images and \d+ in the label maps"):
        mapper(PIL.Image.open(sample / "train" / key), key, 3)


def apply(mapper, row):
    return mapper(PIL.Image.open(io.BytesIO(row["jpg"])).convert("RGB"), row["__key__"] + ".jpg")


def test_webdataset(sample, labels, tmp_path):
    import webdataset

    files = sorted((sample / "train").rglob("*.jpg"))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in files:
            tar.add(file, file.relative_to(sample / "train"))
    mapper = TokenLabelMapper(labels, transform=CROP)
    stream = webdataset.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False)
    loader = DataLoader(stream.map(partial(apply, mapper)), batch_size=5, num_workers=1)
    batches = list(loader)
    assert [len(batch) for _, batch in batches] == [5, 5, 5, 1]
    store, keys = mapper.store, [file.relative_to(sample / "train").as_posix() for file in files]
    found = torch.cat([batch.label for _, batch in batches])
    assert found.tolist() == [store[key].label for key in keys]


def mapped(mapper, names, rows):
    pairs = [mapper(image, names[n]) for image, n in zip(rows["image"], rows["n"], strict=True)]
    return {"pixel_values": [image for image, _ in pairs], "labels": [row for _, row in pairs]}


@pytest.mark.parametrize("streamed", [False, True])
def test_hugging_face_streams_and_transforms(sample, labels, streamed):
    import datasets

    files = sorted((sample / "train").rglob("*.jpg"))
    names = [file.relative_to(sample / "train").as_posix() for file in files]
    table = datasets.Dataset.from_dict(
        {"image": list(map(str, files)), "n": list(range(len(files)))}
    ).cast_column("image", datasets.Image())
    mapper = TokenLabelMapper(labels, transform=CROP)
    if streamed:
        stream = table.to_iterable_dataset().map(
            lambda row: dict(zip(("x", "y"), mapper(row["image"], names[row["n"]]), strict=True)),
            remove_columns=["image", "n"],
        )
        batch = next(iter(DataLoader(stream, batch_size=4)))["y"]
        batch = TokenLabels.wrap(batch)
    else:
        table.set_transform(partial(mapped, mapper, names))
        batch = next(iter(DataLoader(table, batch_size=4)))["labels"]
        assert type(batch) is TokenLabels
    assert batch.label.tolist() == [mapper.store[name].label for name in names[:4]]


@pytest.mark.parametrize("prefetcher", [False, True])
def test_timms_own_loader(sample, labels, prefetcher):
    """`create_loader` sets the transform; the prefetcher normalises bytes on the device."""
    images = create_dataset("", root=str(sample), split="train")
    dataset = TokenLabelDataset(images, labels, label_source="maps")
    loader = create_loader(
        dataset, (3, 64, 64), 4, is_training=True, use_prefetcher=prefetcher, num_workers=1,
        auto_augment="rand-m5-n2", re_prob=0.5, re_mode="pixel", device=torch.device("cpu"),
        collate_fn=default_collate, pin_memory=False, persistent_workers=False,
    )  # fmt: skip
    seen = 0
    for pixels, batch in loader:
        assert pixels.shape == (4, 3, 64, 64) and pixels.is_floating_point()
        assert pixels.min() < -0.5 and 0.5 < pixels.abs().max() < 8, "normalised"
        assert type(batch) is TokenLabels and batch.targets(4).weight.shape == (4, 16)
        seen += len(batch)
    assert seen == 16


def test_the_grid_of_a_student_or_of_a_model_by_name(sample, labels):
    net = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96))
    assert student_grid(TokenStudent(net)) == student_grid(net) == (4, 6)
    assert student_grid("deit_tiny_patch16_224") == (14, 14)
    dataset = TokenLabelDataset(sample / "train", labels, transform=CROP, grid=TokenStudent(net))
    assert next(iter(DataLoader(dataset, 2)))[1].grid == (4, 6)
    with pytest.raises(ValueError, match=r"grid must be patches.*Remedy: grid=student"):
        student_grid(torch.nn.Linear(1, 1))


def test_validation_is_numbered_as_the_maps_are(sample, labels):
    store = LabelStore(labels)
    validation = validation_dataset(sample / "val", store, eval_transform(32))
    assert len(validation) == 4
    for index, (path, label) in enumerate(validation.samples):
        assert label == store.classes.index(Path(path).parent.name) == validation.targets[index]
        assert validation[index][1] == label
    dataset = TokenLabelDataset(sample / "train", store)
    assert dataset.classes[label] == Path(path).parent.name


def test_a_validation_folder_that_is_no_class_is_named(sample, labels, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").symlink_to(next(sample.rglob("*.jpg")))
    with pytest.raises(ValueError, match=r"each folder must be a class of .*; 'cat' is none"):
        validation_dataset(tmp_path, labels)
