"""A page to browse label maps: one HTML file that needs no network and no server."""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ...dataset.store import LabelStore
from ...errors import ConfigError, FormatError, ImageError, TokenLabelError
from ...terminal import Watch
from ..label_sets import ClassNames, patch_map
from ..pictures.image_files import ImageFiles
from ..pictures.map_facts import COLOURS, LETTERS, OTHER, VIRIDIS, legend, map_facts
from ..pictures.output import output_file

#: Longer side of an image on the page, in pixels.
IMAGE_SIDE = 480
#: Limit for its JPEG: with the map's bytes, it keeps 200 images under 20 MB, whatever they show.
IMAGE_BYTES = 52_000
#: Classes of a patch that the page lists, and of all patches of a map: fine maps list fewer.
PATCH_CLASSES, MAP_CLASSES = 10, 4096
_QUALITIES = (80, 65, 50, 30, 15)
#: Images without a map that a page lists by name.
LISTED_ERRORS = 1000
#: In the order in which they make up the one script.
_SCRIPTS = ("data.js", "summary.js", "gallery.js", "viewer.js", "patches.js", "start.js")


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


class PageReport(NamedTuple):
    """What a page holds.

    Attributes:
        path: the file.
        shown: images on it, of `total` that have a map.
        errors: images without a map, and those whose file or map cannot be read.
        size: of the file, in bytes.
    """

    path: Path
    shown: int
    total: int
    errors: int
    size: int


def save_page(
    stores: Sequence[LabelStore],
    path: Path,
    images: str | None = None,
    *,
    limit: int = 200,
    keys: Sequence[str] | None = None,
    watch: Watch = lambda *_: None,
) -> PageReport:
    """Write a page with images and label maps to browse.

    Args:
        stores: label sets, one for each split.
        path: HTML file to write; it is replaced as a whole or not at all.
        images: DATA/SPLIT or DATA, or as `open_images` takes them; None for the embedded sample.
        limit: images to show, evenly spaced over all that have a map.
        keys: images to show, instead.
        watch: called with (images done, images to do).

    Raises:
        ConfigError: the images are not found, or there is nothing to show.
        MissingMapError: one of `keys` is unknown or has no map.
        ImageError, FormatError: there is none whose file and map can be read; with others,
            those that cannot are listed on the page.
        OutputError: the file cannot be written.
    """
    if limit < 1:
        raise ConfigError(f"a page must show at least 1 image, got {limit}. Remedy: raise it")
    numbers = [np.broadcast_arrays(n, np.flatnonzero(~s.failed)) for n, s in enumerate(stores)]
    good = np.concatenate([np.stack(pair, 1) for pair in numbers])  # (store, row) of all maps
    spread = np.linspace(0, len(good) - 1, min(limit, len(good))).round().astype(int)
    chosen = good[spread].tolist() if keys is None else [_find(stores, key) for key in keys]
    if not chosen:
        raise ConfigError(
            "a page needs an image that has a map; there is none in "
            f"{', '.join(str(store.root) for store in stores)}. Remedy: see their errors with "
            "inspect-labels"
        )
    # Splits in folders of the same name are named by their whole paths.
    names = [store.root.absolute().name for store in stores]
    if len({*names}) < len(names):
        names = [str(store.root) for store in stores]
    splits = [SplitData(store, name) for store, name in zip(stores, names, strict=True)]
    shown: list[dict[str, Any]] = []
    unreadable: list[dict[str, Any]] = []
    fault: TokenLabelError | None = None
    files: dict[int, ImageFiles] = {}  # of splits with an image to show: others may lack theirs
    for done, (number, row) in enumerate(chosen, 1):
        if number not in files:
            files[number] = ImageFiles(stores[number], images)
        key = stores[number].keys[row]
        try:
            image = splits[number].image(key, files[number].read(key))
        except (ImageError, FormatError) as error:
            fault = fault or error
            unreadable.append({"split": number, "key": key, "error": str(error)})
        else:
            shown.append({"split": number, **image})
        watch(done, len(chosen))
    if not shown and fault:
        raise fault
    failures = (
        {"split": number, "key": store.keys[row], "error": store.error(row)}
        for number, store in enumerate(stores)
        for row in np.flatnonzero(store.failed).tolist()
    )
    failed = sum(len(store) for store in stores) - len(good) + len(unreadable)
    data = {
        "splits": [split.facts() for split in splits],
        "images": shown,
        "errors": [*unreadable, *islice(failures, LISTED_ERRORS)],
        "failed": failed,
        "total": len(good),
        "picked": keys is not None,
        "colours": COLOURS,
        "letters": LETTERS,
        "other": OTHER,
        "viridis": VIRIDIS,
    }
    with output_file(path) as temporary:
        temporary.write_text(_document(data), encoding="utf-8")
    return PageReport(path, len(shown), len(good), failed, path.stat().st_size)


def _find(stores: Sequence[LabelStore], key: str) -> tuple[int, int]:
    """(store, row) of an image by its key; raises MissingMapError where it has no map."""
    number = next((number for number, store in enumerate(stores) if key in store), 0)
    row = stores[number].row(key)
    if stores[number].failed[row]:
        stores[number][key]  # raises with the reason
    return number, row


def _document(data: dict[str, Any]) -> str:
    """The template with style, script and data in it, and a policy that allows nothing else."""

    def source(text: str) -> str:
        return f"sha256-{encoded(hashlib.sha256(text.encode()).digest())}"

    folder = resources.files(__package__) / "assets"
    html, style = ((folder / name).read_text("utf-8") for name in ("page.html", "page.css"))
    script = "\n".join((folder / name).read_text("utf-8") for name in _SCRIPTS)
    policy = (
        f"default-src 'none'; script-src '{source(script)}'; style-src '{source(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    )
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # Names in the data must not end the script element that it is in, or start a comment there.
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Template(html).substitute(policy=policy, style=style, script=script, data=text)
