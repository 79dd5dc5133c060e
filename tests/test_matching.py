"""Images and label maps of one split: their classes, keys and kinds; and maps that are missing."""

import shutil
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import create_dataset
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from tests.jobs import config
from tokenlabel.annotate import annotate
from tokenlabel.dataset import (
    LabelStore,
    TokenLabelDataset,
    TokenLabels,
    aligned,
    validation_dataset,
)
from tokenlabel.errors import MissingMapError

CAFE = "caf\u00e9"
TO_TENSOR = v2.Compose([v2.Resize((32, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


@pytest.fixture(scope="module")
def wordnet(sample, tmp_path_factory, ray_here):
    """Maps of the sample's training images: WordNet folders, classes of the teacher."""
    out = tmp_path_factory.mktemp("wordnet")
    annotate(config(sample, out))
    return out / "train"


@pytest.fixture(scope="module")
def own(sample, tmp_path_factory):
    """Folders of somebody's own: bird, café, dog."""
    root = tmp_path_factory.mktemp("own")
    for number, image in enumerate(sorted(sample.rglob("*.jpg"))[:6]):
        folder = root / "train" / ("bird", CAFE, "dog")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / f"{CAFE} {number}.jpg")
    return root


@pytest.fixture(scope="module")
def own_labels(own, tmp_path_factory, ray_here):
    """Maps of these by a teacher of other classes."""
    out = tmp_path_factory.mktemp("own-labels")
    annotate(config(own, out, numbering="folders"))
    return out / "train"


def test_numbers_of_folders_never_meet_the_teachers_classes_unasked(own, own_labels):
    for images in (own / "train", ImageFolder(own / "train")):
        with pytest.raises(
            ValueError,
            match=r"must be classes of the teacher.*\(bird 0, café 1, dog 2\).*1000 classes are "
            r"others \(class 0 is 'n01440764'\).*annotate with a teacher of these classes.*"
            r'label_source="none"',
        ):
            TokenLabelDataset(images, own_labels)
    without = TokenLabelDataset(own / "train", own_labels, label_source="none")
    assert [int(row.label) for _, row in without.__getitems__([0, 3, 5])] == [-1] * 3
    asked = TokenLabelDataset(own / "train", own_labels, label_source="maps")
    assert [int(row.label) for _, row in asked.__getitems__([0, 3, 5])] == [0, 1, 2]


def test_validation_never_takes_numbers_of_folders_for_classes(own, own_labels, sample, wordnet):
    with pytest.raises(ValueError, match="must be classes of the teacher"):
        validation_dataset(own / "train", own_labels)
    store = LabelStore(wordnet)
    folder = sorted(path.name for path in (sample / "val").iterdir())[0]
    store.classes = [folder, *store.classes[1:]]  # of two classes, as ImageNet's "crane"
    with pytest.raises(ValueError, match=rf"each folder must be a class of .*'{folder}' is none"):
        validation_dataset(sample / "val", store)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_folder_in_either_unicode_form_has_its_class(own, own_labels, tmp_path, form):
    store = LabelStore(own_labels)
    store.attrs["label_space"] = "teacher"  # as by a teacher of these three
    folder = tmp_path / unicodedata.normalize(form, CAFE)
    shutil.copytree(own / "train" / CAFE, folder)
    assert validation_dataset(tmp_path, store).targets == [1, 1]
    (tmp_path / folder / "new.jpg").write_bytes(next(folder.iterdir()).read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one has no map
        dataset = TokenLabelDataset(tmp_path, store, missing="ignore", transform=TO_TENSOR)
        assert {int(row.label) for _, row in dataset.__getitems__([0, 1, 2])} == {1}


def test_class_to_idx_is_compared_at_once(sample, wordnet):
    """ImageFolder numbers the 15 folders that are there, the maps ImageNet's 1000."""
    images = ImageFolder(sample / "train")
    folder = images.classes[0]
    for given in (images, Subset(images, [0, 2]), create_dataset("", sample, "train")):
        with pytest.raises(
            ValueError, match=rf"folder '{folder}' is class 0 in the images and \d\d+ in the"
        ):
            TokenLabelDataset(given, wordnet)
    for source in ("maps", "images", "none"):
        TokenLabelDataset(images, wordnet, label_source=source)
    images.class_to_idx = LabelStore(wordnet).folders
    images.samples = [
        (path, images.class_to_idx[Path(path).parent.name]) for path, _ in images.samples
    ]
    assert TokenLabelDataset(images, wordnet)[0][1].label == images.samples[0][1]


def test_a_subset_of_folders_called_like_classes_is_no_change(sample, wordnet, tmp_path):
    for name in sorted(path.name for path in (sample / "train").iterdir())[3:6]:
        (tmp_path / name).symlink_to(sample / "train" / name)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "@eaDir").mkdir()
    shutil.copy(next(sample.rglob("*.jpg")), tmp_path / "@eaDir" / "thumbnail.jpg")
    dataset = TokenLabelDataset(tmp_path, wordnet)
    assert len(dataset.images.class_to_idx) == 3
    assert dataset[0][1].label == dataset.store.folders[sorted(dataset.images.class_to_idx)[0]]


def test_folders_numbered_by_their_order_must_all_be_there(own, sample, tmp_path, ray_here):
    """A teacher of three classes without names, trained on the folders in this order."""
    file = tmp_path / "net.py"
    file.write_text(
        "import torch\n"
        "class Net(torch.nn.Conv2d):\n"
        "    num_classes, input_size, mean, std = 3, (32, 32), (0.5,) * 3, (0.5,) * 3\n"
        "def build():\n    torch.manual_seed(0)\n    return Net(3, 3, 16, 16)\n"
    )
    given = {"model": f"{file}:build", "weights": "pretrained", "input_size": None}
    annotate(config(own, tmp_path / "labels", k=3, **given))
    labels = tmp_path / "labels" / "train"
    assert LabelStore(labels).folders == {"bird": 0, CAFE: 1, "dog": 2}
    assert TokenLabelDataset(own / "train", labels)[5][1].label == 2
    shutil.copytree(own / "train", tmp_path / "train")
    shutil.rmtree(tmp_path / "train" / "bird")
    with pytest.raises(ValueError, match=r"annotated 3; there are 2, .*one side has 'bird'"):
        TokenLabelDataset(tmp_path / "train", labels)
    kept = TokenLabelDataset(tmp_path / "train", labels, label_source="maps")
    assert kept[len(kept) - 1][1].label == 2


def test_labels_without_any_ground_truth_are_said_once(sample, tmp_path, ray_here):
    (tmp_path / "train").mkdir()
    for image in sorted(sample.rglob("*.jpg"))[:3]:
        shutil.copy(image, tmp_path / "train")
    annotate(config(tmp_path, tmp_path / "labels"))
    store = LabelStore(tmp_path / "labels" / "train")
    assert store.folders == {} and (store.ground_truth == -1).all()
    images = [(PIL.Image.open(tmp_path / "train" / key).convert("RGB"), 0) for key in store.keys]
    with pytest.warns(UserWarning, match=r'no image has a label.*cls_target="crop"'):
        TokenLabelDataset(images, store, key=store.keys.__getitem__, label_source="maps")


def test_names_in_other_unicode_forms_are_found(own, own_labels, tmp_path):
    """As macOS writes them: letter and accent apart."""
    decomposed = unicodedata.normalize("NFD", CAFE)
    assert decomposed != CAFE
    for path in sorted(own.rglob("*.jpg")):
        target = tmp_path / unicodedata.normalize("NFD", str(path.relative_to(own / "train")))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    dataset = TokenLabelDataset(tmp_path, own_labels, label_source="maps", check="always")
    assert [int(row.label) for _, row in dataset.__getitems__(range(6))] == [0, 0, 1, 1, 2, 2]
    store = dataset.store
    assert f"{decomposed}/{decomposed} 1.jpg" in store
    with pytest.raises(
        MissingMapError, match=r"'caf\\xe9/cafe\\u0301 9.jpg'.*such as 'bird/caf\\x"
    ):
        store[f"{CAFE}/{decomposed} 9.jpg"]


def test_a_root_above_the_split_is_matched(sample, wordnet):
    """As torchvision.datasets.ImageNet has it, whose samples lie in a folder of its root."""
    inner = ImageFolder(sample / "train")
    for root in (sample, sample.parent):
        images = ImageFolder(sample / "train")
        images.root, images.split_folder = root, sample / "train"
        for given in (images, Subset(images, range(3, 9))):
            dataset = TokenLabelDataset(given, wordnet, label_source="maps", check="always")
            dataset.__getitems__(range(len(dataset)))
    assert TokenLabelDataset(inner, wordnet, label_source="maps").images.key(0).count("/") == 1
    images.samples = [(str(sample / "train" / "no" / "where.jpg"), 0)]
    with pytest.raises(MissingMapError, match=r"no score map for 'sample/train/no/where\.jpg'"):
        TokenLabelDataset(images, wordnet, label_source="maps")[0]


@pytest.mark.parametrize("grey", [False, True])
def test_numpy_images_of_an_opencv_loader(sample, wordnet, grey):
    def load(path):
        image = PIL.Image.open(path).convert("L" if grey else "RGB")
        return np.asarray(image) if grey else np.asarray(image)[..., ::-1]  # BGR

    images = ImageFolder(sample / "train", loader=load)
    dataset = TokenLabelDataset(images, wordnet, label_source="maps", check="always")
    image, _ = dataset[4]
    expected = load(images.samples[4][0])
    assert image.dtype == torch.uint8 and image.shape[0] == (1 if grey else 3)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.atleast_3d(expected))
    dataset.transform = aligned(v2.RandomResizedCrop(32))
    assert dataset[4][0].shape[1:] == (32, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_of_whole_batches(sample, wordnet, workers):
    dataset = TokenLabelDataset(sample / "train", wordnet, transform=TO_TENSOR)
    sampler = BatchSampler(RandomSampler(dataset), 5, drop_last=False)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=workers)
    sizes = []
    for images, labels in loader:
        assert type(labels) is TokenLabels and len(images) == len(labels)
        assert labels.targets(2).weight.shape == (len(images), 4)
        sizes.append(len(images))
    assert sizes == [5, 5, 5, 1]
    for indices in ([1, 2], (1, 2), torch.tensor([1, 2]), np.array([1, 2])):
        assert torch.equal(dataset[indices][1], torch.stack([dataset[1][1], dataset[2][1]]))


@pytest.fixture
def strangers(sample, tmp_path):
    """The sample's training images, and four that have no map."""
    shutil.copytree(sample / "train", tmp_path / "train")
    (tmp_path / "train" / "n01440764").mkdir()
    for number in range(4):
        data = next(sample.rglob("*.jpg")).read_bytes() + b"\0"  # of no file that has a map
        (tmp_path / "train/n01440764" / f"{number}.jpg").write_bytes(data)
    return tmp_path / "train"


def test_images_without_a_map_are_counted_over_an_epoch(strangers, wordnet):
    with pytest.warns(UserWarning, match=r"4 of 20 images sampled have no map, such as 'n014407"):
        dataset = TokenLabelDataset(strangers, wordnet, transform=TO_TENSOR, missing="ignore")
    loader = DataLoader(dataset, batch_size=4)
    with pytest.warns(UserWarning, match=r"4 of 20 images given in an epoch had no map \(20\.0%\)"):
        for _ in loader:
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in loader:  # said once
            pass


WORKERS = """
import sys, warnings
from torch.utils.data import DataLoader
from torchvision.transforms import v2
import tokenlabel as tl

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    dataset = tl.TokenLabelDataset(
        sys.argv[1], sys.argv[2], missing="ignore",
        transform=v2.Compose([v2.Resize((32, 32)), v2.ToImage()]),
    )
    warnings.simplefilter("default")
    context = sys.argv[3]
    loader = DataLoader(
        dataset, 4, num_workers=2, multiprocessing_context=context, persistent_workers=True
    )
    for epoch in range(2):
        for images, labels in loader:
            pass
"""


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_count_together(strangers, wordnet, tmp_path, context):
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, "-W", "default", script, strangers, wordnet, context],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.count("had no map") == 1, done.stderr
    assert "4 of 20 images given in an epoch had no map (20.0%)" in done.stderr
