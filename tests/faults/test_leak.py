"""Eight epochs in spawned workers: no memory is lost, and no label differs from our own."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from timm.utils import random_seed
from torch.utils.data import DataLoader, Dataset

from tests.jobs import config, repeat_images
from tokenlabel.annotate import annotate
from tokenlabel.dataset import TokenLabelDataset, train_transform

EPOCHS = 8
SETTLED = 2  # epochs after which caches, pools and open shards are all there
IMAGES = 40
#: Megabytes of a worker's own memory (USS) in 6 epochs of 20 images each. Allocators wander by
#: about 3; a decoded image of 0.17 MB kept for each sample would be 20.
TOLERANCE = 8.0


@pytest.fixture(scope="module")
def data(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repeat_images(sample, tmp_path_factory.mktemp("leak"), IMAGES)


@pytest.fixture(scope="module")
def labels(data: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    out = tmp_path_factory.mktemp("leak-labels")
    annotate(config(data, out, input_size=128))
    return out / "train"


class Seeded(Dataset[Any]):
    """Every item with a seed of its own, and with its index."""

    def __init__(self, dataset: TokenLabelDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        random_seed(index)
        image, labels = self.dataset[index]
        return index, image, labels


def own_memory(loader: "DataLoader[Any]") -> list[float]:
    """Megabytes that each worker shares with nobody."""
    return [
        psutil.Process(worker.pid).memory_full_info().uss / 1e6
        for worker in loader._iterator._workers  # type: ignore[union-attr]
    ]


def test_epochs_in_spawned_workers(data: Path, labels: Path) -> None:
    pipeline = train_transform(64)
    dataset = Seeded(TokenLabelDataset(data / "train", labels, transform=pipeline, grid=4))
    want = [dataset[index][1:] for index in range(IMAGES)]
    loader = DataLoader(
        dataset,
        batch_size=5,
        shuffle=True,
        num_workers=2,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    used = []
    for _ in range(EPOCHS):
        seen = []
        for indices, images, records in loader:
            for place, index in enumerate(indices.tolist()):
                image, expected = want[index]
                assert torch.equal(images[place], image)
                assert torch.equal(records[place], expected)
                seen.append(index)
        assert sorted(seen) == list(range(IMAGES))
        used.append(own_memory(loader))
    growth = [late - early for early, late in zip(used[SETTLED - 1], used[-1], strict=True)]
    assert max(growth) < TOLERANCE, f"USS of the workers in MB, epoch by epoch: {used}"
