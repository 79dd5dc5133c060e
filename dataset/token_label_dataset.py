"""`TokenLabelDataset`: pictures with the token targets of what their augmentation left of them."""

import os
import warnings
from collections.abc import Callable
from typing import Any, Literal

import PIL.Image
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from tokenlabel.dataset.label_map import TokenLabelMap
from tokenlabel.dataset.sources import Pictures
from tokenlabel.dataset.store import LabelStore, MissingMapError, ScoreMap
from tokenlabel.dataset.targets import TokenTargets, ToTokenTargets

#: Pictures whose keys are looked up at the start, where missing maps are no error.
_LOOKED_AT = 100
Truth = Literal["auto", "images", "maps"]


class TokenLabelDataset(Dataset[tuple[Any, TokenTargets]]):
    """A map-style data set of (picture, TokenTargets), for any DataLoader with its default collate.

    Args:
        images: folder of the split (read as torchvision's ImageFolder), or any map-style data set
            of (PIL image or tensor, class): ImageFolder, timm's ImageDataset, a Hugging Face image
            data set, a Subset of these. It must not transform its pictures itself.
        labels: folder of the split's shards, OUT/SPLIT, or a `LabelStore`.
        transform: any pipeline of torchvision.transforms.v2, called with (picture, TokenLabelMap)
            and giving the same; `train_transform()` makes one. None leaves the picture as it is.
        grid: the student's patches, (h, w), or one number for a square.
        k: classes kept for each patch.
        key: index to key, where `images` does not tell the files of its pictures.
        missing: what to do about a picture without a map: "error", or "ignore", which gives
            targets of weight 0, so that the loss falls back on the label; with a warning if no
            picture seems to have one.
        truth: where `TokenTargets.label` comes from: the classes of `images`, the ground truth in
            the "maps", or "auto": that of the maps for a folder, else that of `images`, which must
            then agree with the maps where these know it.
        to_targets: the last step, where it must differ from `ToTokenTargets(grid, k)`.

    Raises:
        FileNotFoundError, FormatError: as `LabelStore`.
        TypeError, ValueError: `images` is of a kind that cannot be matched with maps.
    """

    def __init__(
        self,
        images: Any,
        labels: str | os.PathLike[str] | LabelStore,
        *,
        transform: Callable[..., Any] | None = None,
        grid: int | tuple[int, int] = 14,
        k: int = 10,
        key: Callable[[int], str] | None = None,
        missing: Literal["error", "ignore"] = "error",
        truth: Truth = "auto",
        to_targets: ToTokenTargets | None = None,
    ) -> None:
        for name, value, choices in (
            ("missing", missing, ("error", "ignore")),
            ("truth", truth, ("auto", "images", "maps")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        self.pictures = Pictures(images, key)
        self.store = labels if isinstance(labels, LabelStore) else LabelStore(labels)
        self.transform = transform
        self.to_targets = to_targets or ToTokenTargets(grid, k)
        self._ignore_missing = missing == "ignore"
        # By how much the row of the last picture's map was beyond its index, and that of the one
        # before it as well.
        self._shift, self._steady = 0, True
        is_folder = isinstance(images, str | os.PathLike)
        self._truth: Truth = "maps" if truth == "auto" and is_folder else truth
        if self._ignore_missing:
            self._warn_if_nothing_matches()

    def _warn_if_nothing_matches(self) -> None:
        step = max(1, len(self) // _LOOKED_AT)
        keys = [self.pictures.key(index) for index in range(0, len(self), step)]
        if keys and not any(key in self.store for key in keys):
            warnings.warn(
                f"none of {len(keys)} pictures looked at has a map, such as {keys[0]!r}; the "
                f"labels have {next(iter(self.store.keys), None)!r}. Remedy: check that images and "
                "labels are of one split; missing='ignore' trains such pictures on labels alone",
                stacklevel=3,
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Any, TokenTargets]:
        """One augmented picture and its targets.

        Raises:
            MissingMapError: the picture has no map, and `missing` is "error".
            TypeError: `transform` gave back no map.
            ValueError: the picture is not the annotated one: another size, or another class.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} pictures")
        index = index + len(self) if index < 0 else index
        picture, label = self.pictures[index]
        key = self.pictures.key(index)
        try:
            entry = self.store[self._row(key, index)]
        except MissingMapError:
            if not self._ignore_missing:
                raise
            label = self._known_class(key, label)
            picture = self.transform(picture) if self.transform else picture
            return picture, _no_targets(label, self.to_targets.grid, self.to_targets.k)
        score_map = self._map(entry, key, picture, self._label(entry, key, label))
        if self.transform:
            picture, score_map = self.transform(picture, score_map)
        return picture, self._targets(picture, score_map)

    def _row(self, key: str, index: int) -> int:
        """Row of a picture's map. Where a folder was annotated whole, no key has to be searched."""
        row = self.store.row(key, index + self._shift if self._steady else -1)
        self._steady, self._shift = row - index == self._shift, row - index
        return row

    def _targets(self, picture: Any, score_map: Any) -> TokenTargets:
        if not isinstance(score_map, TokenLabelMap):
            raise TypeError(
                "transform must give back (picture, TokenLabelMap), as it got them; the second is "
                f"{type(score_map).__name__}. Remedy: leave ToTokenTargets out of it; options of "
                "its own go to TokenLabelDataset(to_targets=...)"
            )
        # Its two steps themselves: finding the leaves of a sample, which __call__ does, costs more.
        if _size(picture) != score_map.canvas_size:
            self.to_targets.check_inputs([picture, score_map])
        return self.to_targets.transform(score_map, {})

    def _label(self, entry: ScoreMap, key: str, label: int) -> int:
        if self._truth == "images":
            return label
        if self._truth == "auto" and label >= 0 and entry.label >= 0 and label != entry.label:
            raise ValueError(
                f"{key!r} is of class {label} in the images and {entry.label} in the label maps: "
                "the two number their classes differently (ImageFolder over some of ImageNet's "
                'folders does). Remedy: truth="maps" takes the maps\', truth="images" the images\''
            )
        return entry.label if entry.label >= 0 else self._known_class(key, label)

    def _known_class(self, key: str, label: int) -> int:
        """Class of a picture of which the maps say nothing, in the numbering of the maps.

        A folder's own number is of no use where the maps hold the teacher's classes: of some of
        ImageNet's folders, ImageFolder numbers the first 0.
        """
        if self._truth != "maps" or self.store.attrs.get("label_space") != "teacher":
            return label
        names = self.store.attrs.get("class_names", [])
        folder = key.partition("/")[0]
        return names.index(folder) if folder in names else -1

    def _map(self, entry: ScoreMap, key: str, picture: Any, label: int) -> TokenLabelMap:
        height, width = _size(picture)
        if (width, height) != entry.size:
            raise ValueError(
                f"{key!r} must be the picture that was annotated; that was {entry.size[0]} x "
                f"{entry.size[1]} pixels, this one is {width} x {height}. Remedy: use the same "
                "files, untransformed, or annotate these"
            )
        return TokenLabelMap.stored(
            entry.scores,
            entry.classes,
            entry.rest,
            canvas_size=(height, width),
            extent=entry.extent,
            label=label,
        )


def _size(picture: Any) -> tuple[int, int]:
    """(h, w) of a picture in pixels: torchvision's get_size, without its dispatch where plain."""
    if isinstance(picture, PIL.Image.Image):
        return picture.height, picture.width
    if type(picture) in (torch.Tensor, tv_tensors.Image):
        return picture.shape[-2], picture.shape[-1]
    height, width = F.get_size(picture)
    return height, width


def _no_targets(label: int, grid: tuple[int, int], k: int) -> TokenTargets:
    """Targets that say nothing: weight 0, all mass on `rest`."""
    patches = grid[0] * grid[1]
    return TokenTargets(
        label=torch.tensor(label),
        classes=torch.zeros(patches, k, dtype=torch.int32),
        probs=torch.zeros(patches, k),
        rest=torch.ones(patches),
        weight=torch.zeros(patches),
        crop_classes=torch.zeros(k, dtype=torch.int32),
        crop_probs=torch.zeros(k),
        crop_rest=torch.tensor(1.0),
    )
