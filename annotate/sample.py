"""The embedded sample: 20 labelled ImageNet photographs, laid out as a data set of two splits.

The images are those that the PyPI package foolbox ships for its examples; the class is in each
file's name, imagenet_NN_CLASS.jpg.
"""

import importlib.util
import shutil
from pathlib import Path

from ..dataset.format.files import replacing
from ..errors import ConfigError

#: Photographs from this number on are the split `val`.
FIRST_VAL = 16


def sample_images() -> list[Path]:
    """The photographs where foolbox is installed, by number; ConfigError where it is not."""
    spec = importlib.util.find_spec("foolbox")  # finds it without importing it
    folders = spec.submodule_search_locations if spec else None
    images = sorted(Path(folders[0]).glob("data/imagenet_*.jpg")) if folders else []
    if not images:
        raise ConfigError(
            "the embedded sample needs the package foolbox. Remedy: pip install "
            "'tokenlabel[sample]', or name your own images with `data`"
        )
    return images


def sample_folder(parent: Path) -> Path:
    """Lay the sample out under `parent`/sample, where it is not yet, and return that folder.

    16 images in train/, 4 in val/, each in a folder named by its WordNet id.

    Raises:
        ConfigError: the extra `sample` is not installed.
    """
    from .teacher.timm_teacher import wordnet_ids

    classes, folder = wordnet_ids(), parent / "sample"
    for number, image in enumerate(sample_images()):
        label = int(image.stem.split("_")[2])
        split = "train" if number < FIRST_VAL else "val"
        target = folder / split / classes[label] / image.name
        if not (target.is_file() and target.stat().st_size == image.stat().st_size):
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                shutil.copyfile(image, temporary)
    return folder
