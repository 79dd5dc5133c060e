"""What a page of labels holds: images, quantised maps and facts, as JSON-able values."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from ...dataset.store import LabelStore
from ..label_sets import ClassNames, patch_map
from ..pictures.map_facts import legend, map_facts

#: Longer side of an image on the page, in pixels.
IMAGE_SIDE = 480
#: Limit for its JPEG: with the map's bytes, it keeps 200 images under 20 MB, whatever they show.
IMAGE_BYTES = 52_000
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
        self._names = ClassNames(store.classes)
        self._indices: dict[int, int] = {}

    def index(self, class_id: int) -> int:
        """Index of a class among those of this split that the page names."""
        return self._indices.setdefault(class_id, len(self._indices))

    def image(self, key: str, image: Image.Image) -> dict[str, Any]:
        """One image: its pixels, its map and facts about the map."""
        patches = patch_map(self.store, key)
        facts = map_facts(patches)
        ids, ranks = np.unique(patches.classes[..., : self.listed], return_inverse=True)
        return {
            "key": key,
            "size": patches.entry.size,
            "extent": patches.entry.extent,
            "label": self.index(patches.label) if patches.label >= 0 else -1,
            "folderLabel": patches.entry.label,
            "src": "data:image/jpeg;base64," + encoded(jpeg(image)),
            "classes": [self.index(class_id) for class_id in ids.tolist()],
            "ranks": encoded(ranks.astype("<u2").tobytes()),
            "probs": _quantised(patches.probs[..., : self.listed]),
            "masses": _quantised(patches.mass),
            "legend": [
                self.index(entry.class_id) for entry in legend(patches.best, patches.probs[..., 0])
            ],
            **facts,
            "seen": self.index(facts["seen"]),
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
            "classes": [[class_id, self._names[class_id]] for class_id in self._indices],
        }


def _quantised(values: np.ndarray) -> str:
    """Probabilities in steps of 1/65535, in base64."""
    return encoded(np.rint(np.clip(values, 0, 1) * 65535).astype("<u2").tobytes())


def jpeg(image: Image.Image) -> bytes:
    """An image small enough for a page, in at most `IMAGE_BYTES`."""
    side = IMAGE_SIDE
    while True:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        for quality in _QUALITIES:
            target = io.BytesIO()
            small.save(target, "JPEG", quality=quality, optimize=True)
            if target.tell() <= IMAGE_BYTES:
                return target.getvalue()
        side //= 2  # noise


def encoded(data: bytes) -> str:
    """Base64."""
    return base64.b64encode(data).decode("ascii")
