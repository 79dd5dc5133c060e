"""The image files that a label set was made of, each checked against the shards."""

import io
import tempfile
import warnings
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ...annotate.images import FORMATS, file_digest
from ...annotate.sample import sample_folder
from ...dataset.format.shard import Shard
from ...dataset.sources.image_source import MAX_FILE_BYTES
from ...dataset.store import LabelStore
from ...errors import ConfigError, ImageError

_SAMPLE_NAME = "imagenet_[0-9][0-9]_*.jpg"


class PictureFiles:
    """The images of a label set, by key.

    Args:
        store: the label set.
        images: folder of its split, or the folder of the data set, which holds a folder for each
            split. None: only the embedded sample's images are found by themselves.

    Raises:
        ConfigError: the images are not there, or not where None looks for them.
    """

    def __init__(self, store: LabelStore, images: Path | None = None) -> None:
        self._store = store
        annotated = np.flatnonzero(~store.failed)
        self._example = store.keys[int(annotated[0])] if len(annotated) else store.keys[0]
        self._embedded = self._sample() if images is None else None
        self._root = Path() if images is None else self._given(images)

    def _given(self, images: Path) -> Path:
        places = [images, images / self._store.root.name]
        for place in places:
            if _below(place, self._example).is_file():
                return place
        tried = " and no ".join(repr(str(place / self._example)) for place in places)
        raise ConfigError(
            f"the images of {self._store.root} must lie in {images} under the keys of the labels, "
            f"but there is no {tried}. "
            "Remedy: name the folder that was annotated, DATA/SPLIT or DATA, with --images"
        )

    def _sample(self) -> dict[str, bytes]:
        if Path(self._example).match(_SAMPLE_NAME) and self._example in _sample_pictures():
            return _sample_pictures()
        raise ConfigError(
            f"the images must be found to be shown, and {self._store.root} does not record where "
            "its images are. Remedy: name their folder with --images"
        )

    def read(self, key: str) -> Image.Image:
        """The image in RGB, as the student sees it (EXIF orientation not applied).

        Raises:
            MissingMapError: the label set has no such key.
            ImageError: the file is not there, is not the annotated one, or cannot be decoded.
        """
        row = self._store.row(key)
        data, name = self._bytes(key)
        digest, annotated = file_digest(data), int(self._digests[row])
        if annotated not in (0, digest):  # 0: of a label set that does not record digests
            raise ImageError(
                f"{name!r} must be the image that was annotated, with digest "
                f"{annotated:016x}; its digest is {digest:016x}. Remedy: name the folder that was "
                "annotated with --images, or annotate these images"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd EXIF and large images are no news here
                with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                    picture = file.convert("RGB")
        except Exception as error:  # decoders raise nearly anything
            raise ImageError(f"cannot decode the image {name!r}: {error}") from error
        if picture.size != (size := tuple(self._store.sizes[row].tolist())):
            raise ImageError(
                f"{name!r} must be the image that was annotated, of {size} pixels; it has "
                f"{picture.size}. Remedy: name the folder that was annotated with --images"
            )
        return picture

    def _bytes(self, key: str) -> tuple[bytes, str]:
        """Of an image's file, and the file's name."""
        if self._embedded is not None:
            if key not in self._embedded:
                raise ImageError(
                    f"{key!r} is none of the embedded sample's images. Remedy: name the folder "
                    "that was annotated with --images"
                )
            return self._embedded[key], key
        path = _below(self._root, key)
        try:
            if not path.is_file():  # a named pipe would hang
                raise FileNotFoundError("no such file")
            if path.stat().st_size > MAX_FILE_BYTES:
                raise OSError(f"larger than {MAX_FILE_BYTES} bytes")
            return path.read_bytes(), str(path)
        except OSError as error:
            raise ImageError(
                f"cannot read the image {str(path)!r}: {error}. Remedy: name the folder that was "
                "annotated with --images"
            ) from error

    @cached_property
    def _digests(self) -> np.ndarray:
        """Of the files of all rows, uint64 [n]."""
        parts = []
        for path in self._store.shards:
            with Shard(path) as shard:
                parts.append(shard.read("digest"))
        return np.concatenate(parts)


@cache
def _sample_pictures() -> dict[str, bytes]:
    """The files of the embedded sample by key, of both splits."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            path.relative_to(split).as_posix(): path.read_bytes()
            for split in sample_folder(Path(folder)).iterdir()
            for path in split.glob("*/*")
        }


def _below(root: Path, key: str) -> Path:
    path = root / key
    if Path(key).is_absolute() or ".." in Path(key).parts:
        raise ImageError(f"a key is a path below the split's folder; got {key!r}")
    return path
