"""The embedded sample: 20 labelled ImageNet photographs, laid out as a data set of two splits.

The pictures are those that the PyPI package foolbox ships for its examples; the class is in each
file's name, imagenet_NN_CLASS.jpg.
"""

import importlib.util
import re
import shutil
from pathlib import Path

from tokenlabel.annotate.errors import ConfigError
from tokenlabel.dataset.files import replacing

#: Photographs from this number on are the split `val`.
FIRST_VAL = 16
_NAME = re.compile(r"imagenet_(\d\d)_(\d{1,3})\.jpg")


def sample_folder(parent: Path) -> Path:
    """Lay the sample out under `parent`/sample, where it is not yet, and return that folder.

    16 pictures in train/, 4 in val/, each in a folder named by its WordNet id.

    Raises:
        ConfigError: the extra `sample` is not installed.
    """
    from timm.data import ImageNetInfo

    spec = importlib.util.find_spec("foolbox")  # finds it without importing it
    places = spec.submodule_search_locations if spec else None
    pictures = sorted(Path(places[0]).glob("data/imagenet_*.jpg")) if places else []
    if not pictures:
        raise ConfigError(
            "the embedded sample needs the package foolbox. Remedy: pip install "
            "'tokenlabel[sample]', or name your own images with `data`"
        )
    info = ImageNetInfo("imagenet-1k")
    folder = parent / "sample"
    for picture in pictures:
        match = _NAME.fullmatch(picture.name)
        assert match, picture.name
        split = "train" if int(match[1]) < FIRST_VAL else "val"
        target = folder / split / info.index_to_label_name(int(match[2])) / picture.name
        if not (target.is_file() and target.stat().st_size == picture.stat().st_size):
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                shutil.copyfile(picture, temporary)
    return folder
