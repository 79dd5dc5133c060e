"""What a page of labels holds: images, quantised maps and facts, as JSON-able values."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from ...dataset.store import LabelStore
from ..names import ClassNames
from ..patch_map import patch_map
from ..pictures.map_facts import legend, map_facts

#: Longer side of an image on the page, in pixels.
PICTURE_SIDE = 480
#: Of its JPEG: with the map's, what keeps 200 images under 20 MB, whatever they show.
PICTURE_BYTES = 52_000
#: Classes of a patch that the page lists, and of all patches of a map: fine maps list fewer.
PATCH_CLASSES, MAP_CLASSES = 10, 4096
_QUALITIES = (80, 65, 50, 30, 15)


class SplitData:
    """What the images of one split have in common; gathers the names of the classes shown.

    Args:
        store: the label set.
        name: of the split, for people.
    """

    def __init__(self, store: LabelStore, name: str) -> None:
        self.store = store
        self.name = name
        height, width = store.grid
        self.listed = max(min(store.k, PATCH_CLASSES, MAP_CLASSES // (height * width)), 1)
        self._comparable = store.attrs.get("label_space") == "teacher"
        self._names = ClassNames(store.classes)
        self._places: dict[int, int] = {}

    def place(self, class_id: int) -> int:
        """Place of a class among those of this split that the page names."""
        return self._places.setdefault(class_id, len(self._places))

    def image(self, key: str, picture: Image.Image) -> dict[str, Any]:
        """One image: its pixels, its map and what the map says."""
        entry = self.store[key]
        patches = patch_map(entry)
        label = entry.label if self._comparable else -1
        facts = map_facts(patches, label)
        best, probs = patches.classes[..., 0], patches.probs[..., 0]
        classes = patches.classes[..., : self.listed]
        ids, inverse = np.unique(classes, return_inverse=True)
        return {
            "key": key,
            "size": entry.size,
            "extent": entry.extent,
            "label": self.place(label) if label >= 0 else -1,
            "folderLabel": entry.label,
            "picture": "data:image/jpeg;base64," + encoded(jpeg(picture)),
            "classes": [self.place(class_id) for class_id in ids.tolist()],
            "ranks": encoded(inverse.astype("<u2").tobytes()),
            "probs": encoded(_quantised(patches.probs[..., : self.listed])),
            "masses": encoded(_quantised(patches.mass)),
            "legend": [self.place(item.class_id) for item in legend(best, probs)],
            **facts._asdict(),
            "seen": self.place(facts.seen),
        }

    def facts(self) -> dict[str, Any]:
        """Of the split, once all its images are there."""
        return {
            "name": self.name,
            "teacher": self.store.attrs["teacher"],
            "fingerprint": self.store.attrs["fingerprint"],
            "grid": self.store.grid,
            "k": self.store.k,
            "listed": self.listed,
            "numClasses": self.store.num_classes,
            "images": len(self.store),
            "classes": [[class_id, self._names[class_id]] for class_id in self._places],
        }


def _quantised(values: np.ndarray) -> bytes:
    """Probabilities in steps of 1/65535."""
    steps: bytes = np.rint(np.clip(values, 0, 1) * 65535).astype("<u2").tobytes()
    return steps


def jpeg(picture: Image.Image) -> bytes:
    """An image small enough for a page, in at most `PICTURE_BYTES`."""
    side = PICTURE_SIDE
    while True:
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        for quality in _QUALITIES:
            target = io.BytesIO()
            small.save(target, "JPEG", quality=quality, optimize=True)
            if target.tell() <= PICTURE_BYTES:
                return target.getvalue()
        side //= 2


def encoded(data: bytes) -> str:
    """Base64."""
    return base64.b64encode(data).decode("ascii")
