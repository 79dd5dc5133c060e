"""The examples that the docstrings of the main classes begin with run on real labels."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import tokenlabel as tl
from tests.jobs import config
from tokenlabel.annotate import annotate
from tokenlabel.dataset.format.shard import write_shard
from tokenlabel.dataset.sources.folder import FolderSource

OBJECTS = {name: getattr(tl, name) for name in tl.__all__}
OBJECTS |= {"write_shard": write_shard, "FolderSource": FolderSource}


def example(documented: Any) -> str:
    """The indented block that follows the summary of a docstring; empty where there is none."""
    _, _, rest = (inspect.getdoc(documented) or "").partition("\n\n")
    block = []
    for line in rest.splitlines():
        if line and not line.startswith("    "):
            break
        block.append(line)
    return textwrap.dedent("\n".join(block)).strip()


EXAMPLES = {name: text for name, one in OBJECTS.items() if (text := example(one))}


@pytest.fixture(scope="module")
def folder(sample: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """What the examples find: images, and their labels."""
    root = tmp_path_factory.mktemp("docstrings")
    annotate(config(sample, root / "labels", input_size=160))
    (root / "imagenet").symlink_to(sample)
    return root


def test_main_classes_begin_with_an_example() -> None:
    main = {"LabelStore", "TokenLabelDataset", "TokenLabelMap", "TokenLabels", "TokenWindows"}
    main |= {"TokenTargets", "ToTokenLabels", "train_transform", "write_shard"}
    assert main <= set(EXAMPLES)


# An example may have more workers than the machine has cores.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    transform = tl.train_transform(224, auto_augment=None)
    dataset = tl.TokenLabelDataset("imagenet/train", "labels/train", transform=transform)
    loader = DataLoader(dataset, batch_size=4)
    images, labels = next(iter(loader))
    leaf = tl.LabelStore("labels/train").leaf(0)
    height, width = leaf.canvas_size
    model = timm.create_model("vit_tiny_patch16_224")
    given = {
        **{"tl": tl, "np": np, "torch": torch, "torchvision": torchvision, "v2": v2, "PIL": PIL},
        **{"Path": Path, "DataLoader": DataLoader},
        **{"dataset": dataset, "loader": loader, "images": images, "labels": labels, "leaf": leaf},
        "image": PIL.Image.new("RGB", (width, height)),
        "device": "cpu",
        "model": model,
        "student": tl.TokenStudent(model),
        "criterion": tl.TokenLabelLoss(),
        "folder": tmp_path,
    }
    exec(compile(EXAMPLES[name], f"docstring of {name}", "exec"), OBJECTS | given)
