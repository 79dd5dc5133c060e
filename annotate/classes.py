"""Ground truth: which class of the teacher each folder of a split is.

The class of a folder is decided once, when a job starts, and stored with the labels.
"""

import difflib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..dataset.format.manifest import Manifest
from ..errors import ConfigError, TeacherError

_WNID = re.compile(r"n\d{8}")
_LISTED = 3
_SHOWN = 20
#: Probability below which a difference between two numberings is not taken for chance.
_CHANCE = 0.01
#: Fewer images do not show that a numbering is no better than chance.
_ENOUGH = 16
_TWO_WAYS = (
    "Remedy: a teacher of these classes, or class_names with the names of the folders, in order of "
    "the teacher's class ids; or numbering: folders, which numbers the folders from 0 and keeps "
    "these labels apart from the teacher's classes in training"
)


class Numbering(NamedTuple):
    """The class of each top-level folder of a split.

    Attributes:
        rule: how the classes were found: "names" or "numeric", by the names of the folders;
            "string" or "natural", by their order; "folders", numbers that are no class of the
            teacher. Empty where there are no folders.
        classes: folder to class id, -1 where it has none.
        others: further rules that are possible where `rule` was chosen among several, and what
            each would give.
        is_sure: whether folders carry the names that come with the teacher.
        is_doubtful: whether folders are called otherwise than the classes, though these have names.
        notes: what the user has to know before hours are spent.
    """

    rule: str
    classes: dict[str, int]
    others: dict[str, dict[str, int]]
    is_sure: bool
    is_doubtful: bool = False
    notes: tuple[str, ...] = ()

    @property
    def label_space(self) -> str:
        """What the manifest and the shards call it: whose numbers the labels are."""
        return "folders" if self.rule == "folders" else "teacher"


def number_folders(
    folders: Sequence[str],
    names: Sequence[str] | None,
    num_classes: int,
    rule: str = "auto",
    own_names: bool = False,
    numbered: Sequence[str] | None = None,
) -> Numbering:
    """Find the teacher's class of each folder.

    Args:
        folders: top-level folders that hold images, sorted.
        names: of the teacher's classes; one that begins with a WordNet id goes by the id and by the
            rest too. None where unknown.
        num_classes: how many classes the teacher has.
        rule: "auto" takes the first rule that is possible. "names": folders are called like
            classes; "numeric": they are numbers, and mean class ids; "string", "natural": the
            teacher was trained on as many folders, numbered in string order, as torchvision's
            ImageFolder does, or in natural order (2 before 10), as timm does.
        own_names: whether the user gave the names.
        numbered: names of the images' classes by number, where their data set numbers them: then
            "numeric" means these numbers, and is preferred to names that leave a class out.

    Raises:
        ConfigError: `rule` is not possible, or "auto" finds none but "folders".
    """
    if not folders:
        note = "no image lies in a class folder, so that none has a label"
        return Numbering("", {}, {}, True, notes=(note,))
    by_name, unknown = _by_name(folders, names or [])
    possible: dict[str, dict[str, int]] = {}
    if len(unknown) < len(folders):
        possible["names"] = by_name
    if numbered:
        own = {name: number for number, name in enumerate(numbered)}
        numbers = [own[folder] for folder in folders]
    else:
        numbers = [int(folder) if re.fullmatch(r"[0-9]+", folder) else -1 for folder in folders]
    are_numbers = min(numbers) >= 0 and len({*numbers}) == len(folders)
    if are_numbers and max(numbers) < num_classes:
        possible["numeric"] = dict(zip(folders, numbers, strict=True))
    in_order = _ranks(folders, sorted(folders))
    if len(folders) == num_classes and (are_numbers or not names):
        possible["string"] = in_order
        possible["natural"] = _ranks(folders, sorted(folders, key=_natural))
    possible["folders"] = dict(zip(folders, numbers, strict=True)) if numbered else in_order

    if numbered and unknown and "numeric" in possible:  # names stand behind numbers
        possible |= {"names": possible.pop("names")} if "names" in possible else {}
    chosen = next(iter(possible)) if rule == "auto" else rule
    if rule != "auto" and rule not in possible:
        raise ConfigError(
            f"numbering {rule} is not possible: {_why_not(rule, folders, names, num_classes)}. "
            f"Remedy: numbering auto, or one of {', '.join(possible)}"
        )
    hints = _near_misses(unknown, names or [])
    if rule == "auto" and chosen == "folders":
        known = f"such as {_quoted(names)}" if names else "whose names are not known"
        raise ConfigError(
            f"the folders must be classes of the teacher; it has {num_classes} classes, {known}, "
            f"and the {len(folders)} folders are {_quoted(folders)}{hints}. {_TWO_WAYS}"
        )
    notes = []
    if chosen == "names" and unknown:
        notes.append(
            f"{len(unknown)} of {len(folders)} folders are no class of the teacher, and their "
            f"images have no label: {_quoted(unknown)}{hints}"
        )
    if len(folders) == 1:
        notes.append(
            f"all images lie in one folder, {folders[0]!r}, and have its label. Remedy, if it is "
            "no class: name the folder of the split, which holds a folder for each class"
        )
    classes = possible.pop(chosen)
    possible.pop("folders", None)
    others = {} if chosen in ("names", "folders") else possible
    others = {name: ids for name, ids in others.items() if ids != classes}
    by_names = chosen == "names"
    is_sure, is_doubtful = by_names and not own_names, bool(names) and not by_names
    return Numbering(chosen, classes, others, is_sure, is_doubtful, tuple(notes))


def read_class_names(path: Path) -> list[str]:
    """Read a file of class names, one a line, in order of the class ids.

    A byte order mark, blanks around a name, and a class id before or after each name do not count.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"class_names: {path} cannot be read: {error}. Remedy: a text file in UTF-8"
        ) from error
    names = [unicodedata.normalize("NFC", line.strip()) for line in text.rstrip().splitlines()]
    for pattern in (
        r"(?P<id>\d+)(?:\s*[:,;=]\s*|\s+)(?P<name>.+)",
        r"(?P<name>.+?)[\s,]+(?P<id>\d+)",
    ):
        found = [re.fullmatch(pattern, name) for name in names]
        if all(match and int(match["id"]) == row for row, match in enumerate(found)):
            without = [match["name"] for match in found if match]
            if len({*without}) == len({*names}):  # not "class 0", "class 1"
                return without
    return names


def chosen_names(
    path: str | None, known: Sequence[str] | None, num_classes: int, whose: str
) -> list[str] | None:
    """The names of a teacher's classes: those of a file, or those that come with it.

    Args:
        path: a file of class names, or None.
        known: the names that come with the teacher; None where unknown.
        num_classes: how many it has.
        whose: the teacher's name, for errors.

    Raises:
        TeacherError: there is not one different name for each class.
        ConfigError: the file cannot be read.
    """
    names = read_class_names(Path(path)) if path else known
    different = {name for name in names or () if isinstance(name, str) and name}
    if names is not None and not len(names) == len(different) == num_classes:
        raise TeacherError(
            f"class_names must be a different name for each of the teacher's {num_classes} "
            f"classes; {path or f'those of {whose}'} has {len(names)}, {len(different)} different. "
            "Remedy: one name a line, in order of the class ids"
        )
    return None if names is None else list(names)


def sampled_rows(manifest: Manifest, count: int) -> list[int]:
    """Rows of up to `count` images, evenly spaced over the split."""
    rows: list[int] = np.unique(np.linspace(0, len(manifest.keys) - 1, count).astype(int)).tolist()
    return rows


def check_numbering(
    numbering: Numbering,
    folders: Sequence[str],
    answers: Sequence[int],
    num_classes: int,
    asked: bool,
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Compare a numbering with what the teacher says of some images.

    Args:
        numbering: to be tested, with its alternatives.
        folders: class folder of each of the images; empty where it has none.
        answers: the teacher's top class of each; -1: it could not be read.
        num_classes: how many classes the teacher has.
        asked: whether the user named the rule, so that doubts are notes and no errors.

    Returns:
        (right answers, images) by rule, and notes for the user.

    Raises:
        ConfigError: another rule fits the answers clearly better; or none fits, and the classes
            have other names.
    """
    truth = {numbering.rule: numbering.classes, **numbering.others}
    asked_of = [
        (folder, answer)
        for folder, answer in zip(folders, answers, strict=True)
        if answer >= 0 and numbering.classes.get(folder, -1) >= 0
    ]
    right = {
        rule: np.array([ids[folder] == answer for folder, answer in asked_of], bool)
        for rule, ids in truth.items()
    }
    fits = {rule: (int(hits.sum()), len(asked_of)) for rule, hits in right.items()}
    text = ", ".join(f"{rule} {hits} of {count}" for rule, (hits, count) in fits.items())
    notes, mine = [], right[numbering.rule]
    for rule in numbering.others:
        theirs = right[rule]
        if is_clear(int((theirs & ~mine).sum()), int((theirs ^ mine).sum()), 0.5):
            problem = (
                f"the folders' numbers do not fit the teacher's answers by numbering "
                f"{numbering.rule}; the teacher is right on {text} sampled images. Remedy: "
                f"numbering: {rule}"
            )
            if not asked:
                raise ConfigError(problem)
            notes.append(problem)
    hits, count = fits[numbering.rule]
    if count >= _ENOUGH and not is_clear(hits, count, 1 / num_classes):
        problem = (
            f"by numbering {numbering.rule} the teacher is right on {hits} of {count} sampled "
            f"images, no better than chance among {num_classes} classes"
        )
        if numbering.is_doubtful and not asked:
            raise ConfigError(
                f"{problem}, and no folder is called like a class. {_TWO_WAYS}. numbering: "
                f"{numbering.rule} takes the numbers all the same"
            )
        notes.append(
            f"{problem}. Remedy: check the order of class_names, or give the folders the names of "
            "the teacher's classes"
        )
    return fits, notes


def describe(
    numbering: Numbering, names: Sequence[str] | None, fits: Mapping[str, tuple[int, int]]
) -> str:
    """The table folder -> class, a line each, at most 20; and how well it fits."""
    whose = "numbers of their own" if numbering.rule == "folders" else "classes of the teacher"
    lines = [f"{len(numbering.classes)} folders and their {whose}, by numbering {numbering.rule}:"]
    if fits:
        parts = (f"{rule} {hits} of {count}" for rule, (hits, count) in fits.items())
        lines.append(f"  the teacher is right on {', '.join(parts)} sampled images")
    for folder, number in islice(numbering.classes.items(), _SHOWN):
        known = names and numbering.rule != "folders" and 0 <= number
        name = f" {names[number]}" if names and known and names[number] != folder else ""
        lines.append(f"  {folder} -> {number if number >= 0 else 'none'}{name}")
    if (more := len(numbering.classes) - _SHOWN) > 0:
        lines.append(f"  and {more} more, listed by inspect-labels --json")
    return "\n".join(lines)


def is_clear(hits: int, count: int, chance: float) -> bool:
    """Whether so many hits or more, each of this chance, are improbable."""
    if chance == 1:  # a single class, which no answer can miss
        return True
    more = range(hits, count + 1)
    return (
        sum(math.comb(count, n) * chance**n * (1 - chance) ** (count - n) for n in more) < _CHANCE
    )


def _by_name(folders: Sequence[str], names: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Class of each folder by its name, and the folders that are called like no class."""
    aliases: dict[str, set[int]] = {}
    for number, name in enumerate(names):
        wnid, _, rest = name.partition(" ")
        if _WNID.fullmatch(wnid):
            for alias in (wnid, rest.strip(), rest.partition(",")[0].strip()):
                aliases.setdefault(alias, set()).add(number)
    # ImageNet has two cranes: what is no name of one class alone is none.
    known = {alias: min(numbers) for alias, numbers in aliases.items() if len(numbers) == 1}
    known |= {unicodedata.normalize("NFC", name): number for number, name in enumerate(names)}
    ids = {folder: known.get(unicodedata.normalize("NFC", folder), -1) for folder in folders}
    return ids, [folder for folder in folders if ids[folder] < 0]


def _ranks(folders: Sequence[str], in_order: Sequence[str]) -> dict[str, int]:
    rank = {folder: number for number, folder in enumerate(in_order)}
    return {folder: rank[folder] for folder in folders}


def _near_misses(unknown: Sequence[str], names: Sequence[str]) -> str:
    """What the first unknown folders may be called."""
    plain = {_plain(name): name for name in names}
    found = []
    for folder in unknown[:_LISTED]:
        near = difflib.get_close_matches(_plain(folder), plain, 1, 0.8)
        found += [f"{folder!r} is nearly {plain[name]!r}" for name in near]
    return f" ({'; '.join(found)})" if found else ""


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name)).casefold()


def _natural(folder: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by value, as timm's `natural_key` does."""
    parts = re.split(r"(\d+)", folder.lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _why_not(rule: str, folders: Sequence[str], names: Sequence[str] | None, count: int) -> str:
    if rule == "names":
        return (
            f"no folder is called like a class, such as {_quoted(names)}"
            if names
            else "the names of the teacher's classes are not known (class_names gives them)"
        )
    if rule == "numeric":
        return f"each folder must be a different number below {count}; they are {_quoted(folders)}"
    return (
        f"the teacher must have as many classes as there are folders, and no other names for "
        f"them; it has {count}, and there are {len(folders)} folders"
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_LISTED])) + ", …" * (len(names) > _LISTED)
