"""Summaries of a label set, for a person to decide whether it is good."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.style import Style
from rich.table import Table
from rich.text import Text
from timm.data import ImageNetInfo

from tokenlabel.annotate.errors import ConfigError
from tokenlabel.dataset.errors import FormatError
from tokenlabel.dataset.shard import Shard, parse_shard_name
from tokenlabel.dataset.store import LabelStore, MissingMapError

#: Maps read for the statistics of patches, unless all are asked for.
SAMPLE_IMAGES = 2000
_LISTED = 10
#: Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
_LETTERS = "ABCDEFGHIJKL"


def find_splits(labels: Path) -> list[Path]:
    """Folders with shards: `labels` itself, or those inside it.

    Raises:
        ConfigError: there are none.
    """
    if not labels.is_dir():
        raise ConfigError(
            f"no folder {labels}. Remedy: make labels with `annotate`, or name their folder"
        )
    places = [labels, *sorted(path for path in labels.rglob("*") if path.is_dir())]
    splits = [place for place in places if any(map(parse_shard_name, os.listdir(place)))]
    if not splits:
        raise ConfigError(
            f"no shards in {labels} or its folders. Remedy: make labels with `annotate`, or name "
            "the folder that `out` named"
        )
    return splits


class ClassNames:
    """Names of a label set's classes: WordNet ids become words."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self._names = names
        self._info = ImageNetInfo("imagenet-22k-ms")

    def __getitem__(self, class_id: int) -> str:
        if not self._names or class_id >= len(self._names):
            return str(class_id)
        name = self._names[class_id]
        try:
            # Of the synonyms, the first.
            return str(self._info.label_name_to_description(name)).split(",")[0]
        except KeyError:
            return name


def summarise(root: Path, everything: bool = False) -> dict[str, Any]:
    """Facts about a split, as JSON-able values.

    Accuracy, errors and top-k mass come from the shards' headers, hence from all images; what
    depends on single patches comes from `sampled` images, evenly spaced over the split.
    """
    store = LabelStore(root)
    headers = [_header(path) for path in store.shards]
    totals = {
        name: sum(header[name] for header in headers)
        for name in ("labelled", "top1", "top5", "mass", "errors")
    }
    rows, labelled = len(store), totals["labelled"]
    good = np.flatnonzero(~store.failed)
    picked = good
    if not everything and len(good) > SAMPLE_IMAGES:
        picked = good[np.linspace(0, len(good) - 1, SAMPLE_IMAGES).astype(int)]
    top1, hits, patches = _patch_counts(store, picked)
    names = ClassNames(store.attrs.get("class_names"))
    attrs = {key: value for key, value in store.attrs.items() if key != "class_names"}
    for key in ("first_row", "shard", "labelled", "top1", "top5", "mass", "errors", "sha256"):
        attrs.pop(key, None)
    return {
        "folder": str(root),
        "attrs": attrs,
        "images": rows,
        "errors": totals["errors"],
        "error_list": [[store.keys[row], store.error(row)] for row in _first(store.failed)],
        "shards": len(headers),
        "grid": list(store.grid),
        "k": store.k,
        "views": list(store.views),
        "num_classes": store.num_classes,
        "labelled": labelled,
        "teacher_top1": totals["top1"] / labelled if labelled else None,
        "teacher_top5": totals["top5"] / labelled if labelled else None,
        "topk_mass": totals["mass"] / len(good) if len(good) else None,
        "bytes_per_image": sum(path.stat().st_size for path in store.shards) / rows,
        "sampled": len(picked),
        "patches_with_label_on_top": hits / patches if patches else None,
        "frequent_classes": [
            {"class": int(c), "name": names[int(c)], "share": n / top1.total()}
            for c, n in top1.most_common(_LISTED)
        ],
    }


def _header(path: Path) -> dict[str, Any]:
    with Shard(path) as shard:
        missing = {"labelled", "top1", "top5", "mass", "errors"} - shard.attrs.keys()
        if missing:
            raise FormatError(f"{path}: the header lacks {', '.join(sorted(missing))}")
        return shard.attrs


def _first(flags: np.ndarray) -> list[int]:
    rows: list[int] = np.flatnonzero(flags)[:_LISTED].tolist()
    return rows


def _patch_counts(store: LabelStore, rows: np.ndarray) -> tuple[Counter[int], int, int]:
    """Top-1 class of each patch, counted; patches where it is the label; patches with a label."""
    counts: Counter[int] = Counter()
    hits = patches = 0
    comparable = store.attrs.get("label_space") == "teacher"
    for row in rows.tolist():
        entry = store[row]
        best = entry.classes[0, :, :, 0].ravel()
        counts.update(best.tolist())
        if comparable and entry.label >= 0:
            hits += int((best == entry.label).sum())
            patches += best.size
    return counts, hits, patches


def print_summary(facts: dict[str, Any], console: Console) -> None:
    """A summary as a table."""
    attrs = facts["attrs"]
    table = Table(show_header=False, box=None, pad_edge=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.title = f"[bold]{escape(facts['folder'])}[/bold]"
    height, width = facts["grid"]
    rows = [
        ("teacher", f"{attrs['teacher']} (weights {attrs['weights_digest'][:12]})"),
        ("fingerprint", attrs["fingerprint"]),
        ("images", f"{facts['images']:,} in {facts['shards']} shards, {facts['errors']} errors"),
        (
            "maps",
            f"{height} x {width} patches, top {facts['k']} of {facts['num_classes']} classes, "
            f"views {' + '.join(facts['views'])}",
        ),
        ("size", f"{facts['bytes_per_image']:,.0f} bytes an image"),
    ]
    if facts["teacher_top1"] is not None:
        rows.append(
            (
                "teacher accuracy",
                f"top-1 {facts['teacher_top1']:.1%}, top-5 {facts['teacher_top5']:.1%} of "
                f"{facts['labelled']:,} images with ground truth",
            )
        )
    else:
        rows.append(("teacher accuracy", "unknown: no ground truth among the teacher's classes"))
    if facts["topk_mass"] is not None:
        rows.append(("top-k mass", f"{facts['topk_mass']:.3f} of the probability, mean"))
    if facts["patches_with_label_on_top"] is not None:
        rows.append(
            ("patches", f"{facts['patches_with_label_on_top']:.1%} have the image's label on top")
        )
    for name, value in rows:
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)
    if facts["frequent_classes"]:
        console.print(f"[bold]most frequent top-1 classes of patches[/bold] ({_basis(facts)})")
        for entry in facts["frequent_classes"]:
            console.print(f"  {entry['share']:6.1%}  {entry['class']:>5}  {escape(entry['name'])}")
    for key, reason in facts["error_list"]:
        console.print(f"  [yellow]no map[/yellow] {escape(repr(key))}: {escape(reason)}")
    if facts["errors"] > len(facts["error_list"]):
        console.print(f"  … and {facts['errors'] - len(facts['error_list'])} more errors")
    console.print()


def _basis(facts: dict[str, Any]) -> str:
    everything = facts["sampled"] == facts["images"] - facts["errors"]
    return f"{'all' if everything else 'a sample of'} {facts['sampled']:,} images"


def map_facts(store: LabelStore, key: str) -> dict[str, Any]:
    """One image's map: top-1 class and its probability for each patch, as JSON-able values."""
    entry = store[key]
    scores = entry.scores[0].astype(np.float64)
    top = scores.max(-1, keepdims=True)
    # Of all classes: the stored ones, and what `rest` holds of the others.
    mass = np.exp(scores - top).sum(-1) + np.exp(entry.rest[0].astype(np.float64) - top[..., 0])
    names = ClassNames(store.attrs.get("class_names"))
    best = entry.classes[0, :, :, 0].astype(int)
    return {
        "key": key,
        "size": list(entry.size),
        "label": entry.label,
        "label_name": names[entry.label] if _has_name(store, entry.label) else None,
        "classes": best.tolist(),
        "probs": np.round(1 / mass, 4).tolist(),
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
            f" {class_id:>5}  {facts['names'][class_id]}: {int(where.sum())} patches, "
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


def find_key(splits: Sequence[Path], key: str) -> LabelStore:
    """The first of the splits that holds `key`; raises MissingMapError."""
    faults, example = [], ""
    for root in splits:
        try:
            store = LabelStore(root)
        except FormatError as error:
            faults.append(str(error))
            continue
        if key in store:
            return store
        example = f", such as {store.keys[0]!r}"
    raise MissingMapError(
        f"no image {key!r} in {', '.join(map(str, splits))}: keys are paths relative to the "
        f"split{example}. Remedy: check the key" + "".join(f"\n{fault}" for fault in faults)
    )
