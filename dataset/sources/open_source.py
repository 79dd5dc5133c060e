"""Find out what kind of source a path, a URL or a pattern of them is."""

import glob
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ...errors import ConfigError
from ..storage.remote_path import RemotePath, as_path
from .folder import FolderSource, ObjectFolder
from .ground_truth import DEVKIT
from .image_source import ImageSource
from .listing import ListSource
from .parquet import TableSource, holds_images
from .tar import TarSource

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_TABLES, _LISTS = (".parquet", ".arrow"), (".csv", ".tsv", ".jsonl")
#: Where the images of a split are in a folder that holds no folder of the split's name.
_IN_FOLDER = (
    "ILSVRC2012_img_{split}.tar",
    "{split}-*.parquet",
    "data/{split}-*.parquet",
    "*-{split}-*.tar",
    "{split}-*.tar",
    "{split}.csv",
    "{split}.tsv",
    "{split}.jsonl",
    "{split}.parquet",
    "{split}.tar",
)


def open_split(data: str, split: str, truth: str = "") -> ImageSource:
    """The images of a split of a data set.

    Args:
        data: a folder or URL that holds a folder for each split (of class folders, of tars, of
            Parquet or Arrow files), or files as they are downloaded (ILSVRC2012_img_train.tar;
            `train-*.parquet`, also in data/; `*-train-*.tar`; train.csv, .tsv, .jsonl or .parquet);
            or what `open_images` takes, in which `{split}` stands for the split's name.
        split: name of the split.
        truth: as in `open_images`.

    Raises:
        ConfigError: it is not there, or of no known kind.
        StoreError: a store refuses.
    """
    if "{split}" in data:
        return open_images(data.replace("{split}", split), truth)
    root = as_path(data)
    is_file = isinstance(root, Path) and root.is_file()
    if is_file or _is_pattern(data) or root.name.endswith((".tar", *_TABLES, *_LISTS)):
        return open_images(data, truth)
    names = {path.name for path in root.iterdir()} if _is_folder(root) else set()
    if split in names and _is_folder(root / split):
        return open_images(str(root / split), truth)
    for pattern in _IN_FOLDER:
        path = root / pattern.format(split=split)
        if [*_matching(str(path))] if "*" in pattern else path.is_file():
            return open_images(str(path), truth)
    raise ConfigError(
        f"no images of the split {split!r} in {data}: it must hold a folder of that name, or files "
        f"such as {', '.join(p.format(split=split) for p in _IN_FOLDER[:4])}; it holds "
        f"{', '.join(sorted(names)[:5]) or 'nothing'}. Remedy: check `data` and `split`"
    )


def open_images(images: str, truth: str = "") -> ImageSource:
    """The images of one split.

    Args:
        images: a folder of class folders; one of tars, or of Parquet or Arrow files; such files
            themselves, a list of paths (.csv, .tsv, .jsonl, .parquet), or a pattern of files:
            `…-{0000..1023}.tar`, `{a,b}.tar`, `*.parquet`. Local, or a URL: `s3://`, `gs://`,
            `az://`, `https://` (which lists nothing: name files, or a pattern with braces).
        truth: file that names the class of each image of a tar, see `ground_truth`. By default
            ILSVRC2012's devkit, if it lies beside ILSVRC2012_img_val.tar.

    Raises:
        ConfigError: it is not there, or of no known kind.
        StoreError: a store refuses.
    """
    root = as_path(images).absolute()  # processes of a job may run in other folders
    images = str(root)
    if _is_pattern(images):
        files = [*_matching(images)]
    elif _is_folder(root):
        if (root / "state.json").is_file():
            return TableSource.saved(images)
        names = sorted(path.name for path in root.iterdir())
        files = [str(root / name) for name in names if name.endswith((".tar", *_TABLES))]
        if not files:
            return ObjectFolder.at(root) if isinstance(root, RemotePath) else FolderSource(root)
    else:
        files = [images]
    endings = {Path(file).suffix for file in files}
    if not files or (isinstance(root, Path) and not all(Path(file).exists() for file in files)):
        raise ConfigError(
            f"{images} is not there: images are a folder, or files that end in .tar, "
            f"{', '.join((*_TABLES, *_LISTS))}. Remedy: check the path"
        )
    if endings == {".tar"}:
        if not truth and "ILSVRC2012_img_val" in files[0]:
            beside = as_path(files[0]).with_name(DEVKIT)
            truth = str(beside) if beside.is_file() else ""
        return TarSource(images, tuple(files), truth)
    if endings == {".parquet"} and len(files) == 1 and not holds_images(files[0]):
        return ListSource(files[0])
    if endings in ({".parquet"}, {".arrow"}):
        return TableSource.at(images, files)
    if endings <= {*_LISTS} and len(files) == 1:
        return ListSource(files[0])
    raise ConfigError(
        f"{images} must be one kind of files, .tar, {', '.join((*_TABLES, *_LISTS))}; it is "
        f"{', '.join(sorted(endings))}. Remedy: name files of one kind; make .tar.gz a .tar"
    )


def _is_folder(path: Path | RemotePath) -> bool:
    if isinstance(path, Path):
        return path.is_dir()
    return not path.name.endswith((".tar", *_TABLES, *_LISTS)) and path.url.split(":")[0] not in (
        "http",
        "https",
    )


def _is_pattern(text: str) -> bool:
    return bool(_BRACES.search(text)) or "*" in text


def _matching(pattern: str) -> Iterator[str]:
    """The files of a pattern, in order: braces first, then stars."""
    for text in _expanded(pattern):
        path = as_path(text)
        if "*" not in text:
            yield text
        elif isinstance(path, RemotePath):
            below = path.parent
            if "*" in str(below):
                raise ConfigError(f"{pattern}: only the last part of a URL may have a *")
            yield from (str(p) for p in below.iterdir() if fnmatchcase(p.name, path.name))
        else:
            yield from sorted(glob.glob(text))


def _expanded(pattern: str) -> Iterator[str]:
    """`a-{08..10}.tar` as a-08.tar, a-09.tar, a-10.tar; `{a,b}` as a, b."""
    match = _BRACES.search(pattern)
    if not match:
        yield pattern
        return
    if numbers := _RANGE.fullmatch(match[1]):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _expanded(pattern[: match.start()] + choice + pattern[match.end() :])
