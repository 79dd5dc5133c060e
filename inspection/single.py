"""One image's map as a grid of letters."""

from collections import Counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..dataset.store import LabelStore
from ..terminal import escape, one_line
from .names import ClassNames
from .patch_map import patch_map

#: Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
_LETTERS = "ABCDEFGHIJKL"


def map_facts(store: LabelStore, key: str) -> dict[str, Any]:
    """One image's map: top-1 class and its probability for each patch, as JSON-able values."""
    entry = store[key]
    patches = patch_map(entry)
    names = ClassNames(store.classes)
    best, probs = patches.classes[..., 0], patches.probs[..., 0].astype(np.float64)
    return {
        "key": key,
        "size": list(entry.size),
        "label": entry.label,
        "label_name": names[entry.label] if _has_name(store, entry.label) else None,
        "classes": best.tolist(),
        "probs": np.round(probs, 4).tolist(),
        "names": {int(c): names[int(c)] for c in np.unique(best)},
    }


def _has_name(store: LabelStore, label: int) -> bool:
    return label >= 0 and store.attrs.get("label_space") == "teacher"


def print_map(facts: dict[str, Any], console: Console) -> None:
    """One image's top-1 classes as a grid of coloured letters, the most frequent first."""
    classes, probs = np.array(facts["classes"]), np.array(facts["probs"])
    order = [c for c, _ in Counter(classes.ravel().tolist()).most_common(len(_LETTERS))]
    width, height = facts["size"]
    name = facts["label_name"] or ("unknown" if facts["label"] < 0 else str(facts["label"]))
    console.print(
        f"[bold]{escape(repr(facts['key']))}[/bold] {width} x {height} px, label: {escape(name)}"
    )
    for row, chances in zip(classes.tolist(), probs.tolist(), strict=True):
        line = Text("  ")
        for class_id, chance in zip(row, chances, strict=True):
            line.append(_cell(order, class_id, chance), _style(order, class_id))
        console.print(line, no_wrap=True, crop=False)
    for class_id in order:
        where = classes == class_id
        line = Text("  ").append(_cell(order, class_id, 1), _style(order, class_id))
        line.append(
            f" {class_id:>5}  {one_line(facts['names'][class_id])}: {int(where.sum())} patches, "
            f"mean probability {probs[where].mean():.2f}"
        )
        console.print(line)
    others = len(facts["names"]) - len(order)
    console.print(f"  upper case: probability of one half or more; dots: {others} other classes")


def _cell(order: list[int], class_id: int, chance: float) -> str:
    letter = _LETTERS[order.index(class_id)] if class_id in order else "."
    return f" {letter if chance >= 0.5 else letter.lower()} "


def _style(order: list[int], class_id: int) -> Style:
    if class_id not in order[: len(_COLOURS)]:
        return Style()
    return Style(color="black", bgcolor=_COLOURS[order.index(class_id)])
