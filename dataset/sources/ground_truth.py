"""The classes of images that are in no class folder, from a file beside them."""

import csv
import io
import posixpath
import tarfile
from functools import lru_cache

import numpy as np

from ...errors import ConfigError
from ..storage.remote_path import as_path

#: The devkit of ILSVRC2012, and what it holds.
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


@lru_cache(1)
def ground_truth(path: str) -> dict[str, str]:
    """Class by name of the image, without folders and ending.

    Args:
        path: or URL, of ILSVRC2012's devkit as downloaded (it needs SciPy), or of a table with a
            line for each image: its name and its class, such as `val.txt` of Caffe and
            `LOC_val_solution.csv` of Kaggle. What follows the class does not count.

    Raises:
        ConfigError: it cannot be read, or is no such file.
    """
    try:
        data = as_path(path).read_bytes()
        return _of_devkit(data) if path.endswith((".tar.gz", ".tgz")) else _of_table(data.decode())
    except (OSError, EOFError, KeyError, IndexError, ValueError, tarfile.TarError) as error:
        raise ConfigError(
            f"{path} must name the class of each image: the devkit {DEVKIT}, or a line with name "
            f"and class for each: {error}. Remedy: another file with `ground_truth`"
        ) from error


def _of_table(text: str) -> dict[str, str]:
    found = {}
    for number, row in enumerate(csv.reader(io.StringIO(text.removeprefix("\ufeff")))):
        fields = " ".join(row).split()
        if not fields or (number == 0 and fields[0] == "ImageId"):
            continue
        if len(fields) < 2:
            raise ValueError(f"line {number + 1} is {' '.join(row)[:99]!r}")
        found[posixpath.splitext(posixpath.basename(fields[0]))[0]] = fields[1]
    return found


def _of_devkit(data: bytes) -> dict[str, str]:
    """The validation images' WordNet ids: the devkit numbers the classes in an order of its own."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ConfigError(f"{DEVKIT} needs the package SciPy. Remedy: pip install scipy") from error
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = {posixpath.basename(member.name): member for member in tar if member.isreg()}
        text, meta = (tar.extractfile(files[name]) for name in (_TRUTH, _META))
        if text is None or meta is None:
            raise KeyError(_TRUTH)
        numbers = np.loadtxt(text, dtype=int).tolist()
        synsets = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
    wnids = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
    names = (f"ILSVRC2012_val_{place:08d}" for place in range(1, len(numbers) + 1))
    return {name: str(wnids[number]) for name, number in zip(names, numbers, strict=True)}
