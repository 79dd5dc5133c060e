"""The embedded sample: 20 labelled ImageNet photographs, laid out as a data set of two splits.

The images are those that the PyPI package foolbox ships for its examples; the class is in each
file's name, imagenet_NN_CLASS.jpg.
"""

import importlib.util
import re
import shutil
from pathlib import Path

from ..dataset.format.files import replacing
from ..errors import ConfigError

#: Photographs from this number on are the split `val`.
FIRST_VAL = 16
_NAME = re.compile(r"imagenet_(\d\d)_(\d{1,3})\.jpg")


def sample_folder(parent: Path) -> Path:
    """Lay the sample out under `parent`/sample, where it is not yet, and return that folder.

    16 images in train/, 4 in val/, each in a folder named by its WordNet id.

    Raises:
        ConfigError: the extra `sample` is not installed.
    """
    from .teacher.timm_teacher import wordnet_ids

    spec = importlib.util.find_spec("foolbox")  # finds it without importing it
    places = spec.submodule_search_locations if spec else None
    images = sorted(Path(places[0]).glob("data/imagenet_*.jpg")) if places else []
    if not images:
        raise ConfigError(
            "the embedded sample needs the package foolbox. Remedy: pip install "
            "'tokenlabel[sample]', or name your own images with `data`"
        )
    classes = wordnet_ids()
    folder = parent / "sample"
    for image in images:
        match = _NAME.fullmatch(image.name)
        assert match, image.name
        split = "train" if int(match[1]) < FIRST_VAL else "val"
        target = folder / split / classes[int(match[2])] / image.name
        if not (target.is_file() and target.stat().st_size == image.stat().st_size):
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                shutil.copyfile(image, temporary)
    return folder
