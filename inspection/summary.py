"""Facts about a split, and about a single map, as JSON-able values."""

import json
import math
import re
from collections import Counter
from typing import Any

import numpy as np

from ..dataset.format.shard import Shard
from ..dataset.storage.remote_path import AnyPath
from ..dataset.store import LabelStore
from ..errors import FormatError
from ..terminal import Watch
from .label_sets import ClassNames, patch_map
from .statistics import MapStatistics

#: Maps read for the statistics of patches, unless all are asked for.
SAMPLE_IMAGES = 5000
#: A class is over-predicted when it is on top this many times as often as images have the label.
TIMES = 5.0
_LISTED = 10
_COUNTS = ("labelled", "top1", "top5", "mass", "errors")
#: Attributes that differ from shard to shard, or that are facts of their own.
_OWN = ("first_row", "shard", "sha256", "format", "version", "class_names", *_COUNTS)


def summarise(
    root: AnyPath, everything: bool = False, watch: Watch = lambda *_: None
) -> dict[str, Any]:
    """Facts about a split, for a person to decide whether it is good.

    Accuracy, errors and top-k mass come from the shards' headers, hence from all images; what
    depends on single patches comes from `sampled` images, evenly spaced over the split. Memory
    does not grow with the split.

    Args:
        root: folder of the split.
        everything: read every map.
        watch: called with (maps read, maps to read).

    Raises:
        FormatError: the split is damaged or incomplete, or lacks the statistics of its shards.
    """
    store = LabelStore(root)
    totals, reasons = _headers(store)
    labelled, failed, names = totals["labelled"], store.failed, ClassNames(store.classes)
    picked = good = np.flatnonzero(~failed)
    if not everything and len(good) > SAMPLE_IMAGES:
        picked = np.linspace(0, len(failed) - 1, SAMPLE_IMAGES).astype(int)
        picked = picked[~failed[picked]]
    found = MapStatistics(store.grid, store.num_classes, names)
    for done, row in enumerate(picked.tolist(), 1):
        found.add(row, patch_map(store, row))
        watch(done, len(picked))
    shards, nbytes = store.shards, store.nbytes
    never = np.flatnonzero(found.top == 0)
    return {
        "folder": str(root),
        "attrs": {key: value for key, value in store.attrs.items() if key not in _OWN},
        "preprocessing": _json_object(store.attrs.get("preprocessing")),
        "libraries": _json_object(store.attrs.get("libraries")),
        "images": len(store),
        "errors": totals["errors"],
        "error_reasons": reasons,
        "error_list": [
            [store.keys[row], store.error(row)] for row in np.flatnonzero(failed)[:_LISTED].tolist()
        ],
        "shards": len(shards),
        "grid": list(store.grid),
        "k": store.k,
        "views": list(store.views),
        "folders": store.folders,
        "num_classes": store.num_classes,
        "labelled": labelled,
        "teacher_top1": totals["top1"] / labelled if labelled else None,
        "teacher_top5": totals["top5"] / labelled if labelled else None,
        "topk_mass": totals["mass"] / len(good) if len(good) else None,
        "bytes": nbytes,
        "bytes_per_image": nbytes / len(store),
        "sampled": len(picked),
        "patches_with_label_on_top": (
            found.hits / (found.labelled * math.prod(store.grid)) if found.labelled else None
        ),
        "topk_mass_of_patches": found.mass.facts(),
        "topk_mass_histogram": found.mass.chart(),
        "entropy": found.entropy.facts(),
        "entropy_histogram": found.entropy.chart(),
        "distinct_classes": found.distinct.facts(),
        # Few images come near the highest possible number.
        "distinct_classes_histogram": found.distinct.chart(trimmed=True),
        "frequent_classes": found.frequent(_LISTED),
        "overpredicted_classes": found.overpredicted(TIMES, _LISTED),
        "never_on_top": len(never),
        "never_on_top_list": [
            {"class": class_id, "name": names[class_id]} for class_id in never[:_LISTED].tolist()
        ],
        "never_listed": int((~found.listed).sum()),
        "sampled_with_label": found.labelled,
        "images_without_their_label": found.misses,
        "images_without_their_label_list": [
            {"key": store.keys[-row], **facts} for _, row, facts in reversed(found.suspects)
        ],
    }


def summarise_map(store: LabelStore, key: str) -> dict[str, Any]:
    """Facts about one image's map: the top-1 class and its probability for each patch."""
    patches, names = patch_map(store, key), ClassNames(store.classes)
    return {
        "key": key,
        "size": list(patches.entry.size),
        "label": patches.entry.label,
        "label_name": names[patches.label] if patches.label >= 0 else None,
        "classes": patches.best.tolist(),
        "probs": np.round(patches.probs[..., 0].astype(np.float64), 4).tolist(),
        "names": {class_id: names[class_id] for class_id in np.unique(patches.best).tolist()},
    }


def _headers(store: LabelStore) -> tuple[dict[str, Any], dict[str, int]]:
    """Sums over the headers of all shards, and errors by reason."""
    totals: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
    reasons: Counter[str] = Counter()
    for path in store.shards:
        with Shard(path) as shard:
            if missing := {*_COUNTS} - shard.attrs.keys():
                raise FormatError(
                    f"{path}: the header lacks {', '.join(sorted(missing))}, which a summary "
                    "needs. Remedy: none is needed to train with these labels"
                )
            for name in _COUNTS:
                value = shard.attrs[name]
                if not isinstance(value, int | float):
                    raise FormatError(f"{path}: {name} must be a number, got {value!r}")
                totals[name] += value
            if shard.attrs["errors"]:
                # Numbers in them (bytes, pixels) would make a reason of each image.
                texts = (re.sub(r"\d+", "N", text) for text in shard.texts("error") if text)
                reasons.update(texts)
                reasons = Counter(dict(reasons.most_common(1000)))
    return totals, dict(reasons.most_common())


def _json_object(text: Any) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
