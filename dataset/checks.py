"""What keeps images and label maps together: the same classes, the same pixels, no map missing."""

import os
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from ..errors import ImageError
from .sources.thumbprint import difference
from .store import LabelStore

#: With check="sample": so many images of a process at first, and then one in so many.
_FIRST, _EVERY = 8, 128
#: Workers that count apart from one another.
_SLOTS = 256
_LISTED = 3


def folder_classes(store: LabelStore) -> dict[str, int]:
    """Class of each folder of the label maps, -1 where it has none; names in Unicode's NFC."""
    return {unicodedata.normalize("NFC", name): number for name, number in store.folders.items()}


def check_classes(
    store: LabelStore, numbers: Mapping[str, int] | None = None, is_folder: bool = False
) -> None:
    """Refuse labels that a loss would take for other classes.

    Args:
        store: the label maps.
        numbers: class number of each folder of the images, as ImageFolder has in `class_to_idx`;
            None where the data set does not say.
        is_folder: whether labels come from the maps, and `numbers` only name the folders.

    Raises:
        ValueError: the maps' ground truth are numbers of folders; or both sides number a folder
            differently, or have other folders where their order decides.
    """
    table = folder_classes(store)
    if store.attrs.get("label_space") == "folders":
        known = ", ".join(f"{name} {number}" for name, number in [*table.items()][:_LISTED])
        first = f" (class 0 is {store.classes[0]!r})" if store.classes else ""
        raise ValueError(
            f"labels must be classes of the teacher; those of {store.root} number the folders "
            f"({known or 'in sorted order'}), and the teacher's {store.num_classes} classes are "
            f"others{first}, so a loss would mix them. Remedy: annotate with a teacher of these "
            'classes, or with class_names; or label_source="none", which trains on the maps alone '
            'with TokenLabelLoss(cls_target="crop"). label_source="maps" or "images" takes these '
            "numbers all the same"
        )
    if numbers is None or not table:
        return
    given = {unicodedata.normalize("NFC", name): number for name, number in numbers.items()}
    if is_folder:
        # Where the order decides, other folders would have got other numbers.
        by_order = store.attrs.get("numbering") in ("string", "natural")
        if by_order and (changed := sorted(given.keys() ^ table.keys())):
            raise ValueError(
                f"the maps' classes are the folders' order, so the folders must be the annotated "
                f"{len(table)}; there are {len(given)}, and only one side has "
                f"{', '.join(map(ascii, changed[:_LISTED]))}. Remedy: restore them, or annotate "
                'again; label_source="maps" keeps the numbers of the maps'
            )
        return
    for name, number in given.items():
        if table.get(name, number) not in (number, -1):
            raise ValueError(
                f"the folder {name!a} is class {number} in the images and {table[name]} in the "
                "label maps: the two number their classes differently (ImageFolder over some of "
                'ImageNet\'s folders does). Remedy: label_source="maps" takes those of the maps, '
                'label_source="images" those of the images'
            )


class ImageCheck:
    """Compares some of the images, or all, with the thumbprints of the annotated ones.

    Args:
        store: the label maps.
        mode: "sample": the first images of each process, and one in some hundred after that;
            "always" or "never".
    """

    def __init__(self, store: LabelStore, mode: str) -> None:
        self._store, self._mode = store, mode
        self._process, self._given = 0, 0

    def compare(self, key: str, image: Any) -> None:
        """Look at the image of this key, if it is one of those.

        Raises:
            ImageError: it is not the annotated one.
        """
        if not self._is_sampled():
            return
        wrong = difference(self._store.thumbprint(key), image)
        if wrong is None:
            return
        if wrong.startswith("another image"):
            wrong += ", or its colours were changed"
            remedy = (
                "check that images and labels are of one split, and that the data set gives the "
                "whole image of each key (timm's gives the next one for one that it cannot read; "
                "Pillow makes white of 16-bit greyscale); annotate the images that you train on"
            )
        else:
            remedy = (
                "find the transform inside the data set, its wrappers or its loader, and give it "
                "to TokenLabelDataset(transform=...) instead" + self.orientation_hint(key)
            )
        raise ImageError(
            f"{key!a} must be the image that was annotated, untransformed; this one is {wrong}. "
            f"Remedy: {remedy}"
        )

    def _is_sampled(self) -> bool:
        if self._mode != "sample":
            return self._mode == "always"
        if self._process != os.getpid():  # a worker, which has its parent's count
            self._process, self._given = os.getpid(), 0
        number = self._given
        self._given += 1
        return number < _FIRST or number % _EVERY == 0

    def orientation_hint(self, key: str) -> str:
        """What ends the remedy where EXIF may be the cause."""
        orientation = self._store.orientation(key)
        if orientation < 2:
            return ""
        return (
            f". The annotated file has EXIF orientation {orientation}, which ImageFolder does not "
            "apply: use a loader that does not either"
        )


class MissingCount:
    """Counts images without a map over all workers, and warns once when an epoch is through."""

    def __init__(self) -> None:
        # (images, images without a map) of each worker, in memory that workers share.
        self._counts = torch.zeros(_SLOTS, 2, dtype=torch.int64).share_memory_()
        self._example = ""
        self._warned = torch.zeros(1, dtype=torch.bool).share_memory_()

    def add(self, images: int, lost: Sequence[str], epoch: int) -> None:
        """Count some images.

        Args:
            images: how many were given.
            lost: keys of those without a map.
            epoch: images of the data set; each process of a distributed job sees its part.
        """
        worker = get_worker_info()
        mine = self._counts[worker.id % _SLOTS if worker else -1]
        mine += torch.tensor([images, len(lost)])
        self._example = self._example or next(iter(lost), "")
        if self._warned:
            return
        given, without = self._counts.sum(0).tolist()
        group = torch.distributed
        world = group.get_world_size() if group.is_available() and group.is_initialized() else 1
        if without and given * world >= epoch:
            self._warned.fill_(True)
            example = f", such as {self._example!a}" if self._example else ""
            warnings.warn(
                f"{without} of {given} images given in an epoch had no map ({without / given:.1%})"
                f"{example}. Remedy: annotate or leave out these images; missing='ignore' trains "
                "them on their classes alone",
                stacklevel=2,
            )
