"""Which class of the teacher a folder is: by name, number, order, and the teacher's answers."""

import json
import logging
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo

from tests.jobs import arguments, config, run
from tests.painted import invoke
from tokenlabel.annotate import annotate
from tokenlabel.annotate.classes import check_numbering, number_folders, read_class_names
from tokenlabel.dataset import LabelStore
from tokenlabel.dataset.sources.folder import FolderSource
from tokenlabel.errors import ConfigError

WNIDS = ImageNetInfo("imagenet-1k").label_names()
NUMBERS = [str(number) for number in range(12)]
IN_STRING_ORDER = [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]  # 0 1 10 11 2 …
PADDED = [f"{number:03d}" for number in range(1000)]


@pytest.mark.parametrize(
    ("folders", "names", "count", "rule", "want"),
    [
        ([WNIDS[7], WNIDS[243], "n99999999"], WNIDS, 1000, "names", [7, 243, -1]),
        (sorted(WNIDS[::10]), sorted(WNIDS[::10]), 100, "names", range(100)),
        # ImageNet-100 and its teacher, without names; ImageNet-100 under a teacher of all 1000.
        (sorted(WNIDS[::10]), None, 100, "string", range(100)),
        (WNIDS[::10], WNIDS, 1000, "names", range(0, 1000, 10)),
        (["cat", "dog"], ["dog", "cat", "bird"], 3, "names", [1, 0]),
        (["cafe\u0301"], ["tea", "caf\u00e9"], 2, "names", [1]),
        (["tench", "n01443537"], [f"{WNIDS[0]} tench, Tinca tinca", f"{WNIDS[1]} goldfish"], 2,
         "names", [0, 1]),
        # Two classes of one name: a folder of that name is neither.
        (["crane", WNIDS[517]], [f"{WNIDS[134]} crane", f"{WNIDS[517]} crane"], 2, "names",
         [-1, 1]),
        (["cat", "dog"], None, 2, "string", [0, 1]),
        # ImageNetV2's folders; some of them; zero-padded; as many as the teacher has, or not.
        (sorted(map(str, range(1000))), WNIDS, 1000, "numeric", sorted(range(1000), key=str)),
        (["10", "7", "999"], WNIDS, 1000, "numeric", [10, 7, 999]),
        (PADDED, WNIDS, 1000, "numeric", range(1000)),
        (sorted(NUMBERS), None, 12, "numeric", sorted(range(12), key=str)),
        (["1", "2"], None, 2, "string", [0, 1]),
    ],
)  # fmt: skip
def test_the_first_possible_rule_is_taken(folders, names, count, rule, want):
    found = number_folders(folders, names, count)
    assert (found.rule, found.label_space) == (rule, "teacher")
    assert list(found.classes) == list(folders)
    assert [*found.classes.values()] == list(want)


def test_orders_that_are_possible_too_are_kept_to_be_tested():
    found = number_folders(sorted(NUMBERS), None, 12)
    assert found.rule == "numeric" and not found.is_sure
    assert {*found.others} == {"string"}, "natural order gives the numbers themselves"
    assert [found.others["string"][name] for name in NUMBERS] == [0, 1, *range(4, 12), 2, 3]
    shifted = number_folders(sorted(str(n + 1) for n in range(12)), None, 12)
    assert shifted.rule == "string", "12 is no class id"
    assert [*shifted.others["natural"].values()] == [0, 9, 10, 11, *range(1, 9)]
    assert number_folders(PADDED, WNIDS, 1000).others == {}, "all the same"


@pytest.mark.parametrize(
    ("folders", "names", "count", "text"),
    [
        (["bird", "cat", "dog"], WNIDS, 1000,
         r"must be classes of the teacher; it has 1000 classes, such as 'n01440764'.*'bird', 'cat'"
         r".*class_names with the names of the folders.*or numbering: folders"),
        (WNIDS[:5], None, 7, r"whose names are not known, and the 5 folders are 'n01440764'"),
        (["Dog", "tabby cat"], ["tabby_cat", "dog"], 2,
         r"'Dog' is nearly 'dog'; 'tabby cat' is nearly 'tabby_cat'"),
        (["5000", "7"], WNIDS, 1000, "numbering: folders"),
    ],
)  # fmt: skip
def test_folders_that_are_no_classes_are_refused_unless_asked_for(folders, names, count, text):
    with pytest.raises(ConfigError, match=text):
        number_folders(folders, names, count)
    found = number_folders(folders, names, count, "folders")
    assert found.label_space == "folders"
    assert [*found.classes.values()] == list(range(len(folders)))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("names", "no folder is called like a class, such as 'n01440764'"),
        ("numeric", "each folder must be a different number below 1000; they are 'bird'"),
        ("natural", "as many classes as there are folders.*it has 1000, and there are 2 folders"),
    ],
)
def test_a_rule_that_is_not_possible_says_why(rule, text):
    with pytest.raises(ConfigError, match=rf"numbering {rule} is not possible: .*{text}"):
        number_folders(["bird", "cat"], WNIDS, 1000, rule)


def test_what_users_must_know_is_noted():
    assert "no image lies in a class folder" in number_folders([], WNIDS, 1000).notes[0]
    assert (
        "all images lie in one folder, 'n01440764'"
        in number_folders([WNIDS[0]], WNIDS, 1000).notes[0]
    )
    noted = number_folders([WNIDS[0], "n0144353"], WNIDS, 1000).notes[0]
    assert "1 of 2 folders are no class" in noted and "is nearly 'n01443537'" in noted


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffdog\r\ncat\r\n\r\n",
        "  dog \ncat\t\n",
        "0 dog\n1 cat\n",
        "0: dog\n1: cat",
        "dog 0\ncat 1\n",
        "0,dog\n1,cat\n",
    ],
)
def test_class_name_files_of_all_kinds(text, tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(text.encode())
    assert read_class_names(path) == ["dog", "cat"]


def test_names_that_hold_numbers_stay_whole(tmp_path):
    path = tmp_path / "names.txt"
    for names in (["mk 2", "mk 1"], ["class 0", "class 1"]):
        path.write_text("\n".join(names))
        assert read_class_names(path) == names
    path.write_bytes("dog\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"cannot be read.*Remedy: a text file in UTF-8"):
        read_class_names(path)


def test_folders_of_editors_and_systems_are_no_class(tmp_path):
    for name in ("cat/1.jpg", "dog/a/2.jpg", ".ipynb_checkpoints/1.jpg", "@eaDir/cat/1.jpg",
                 "__MACOSX/cat/._1.jpg", "empty/readme.txt", "cat/@eaDir/1.jpg/T.jpg"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "nothing" / "loop").mkdir(parents=True)
    (tmp_path / "nothing" / "loop" / "back").symlink_to(tmp_path / "nothing")
    source = FolderSource(tmp_path)
    assert source.classes() == ["cat", "dog"]
    found = [(entry.key, entry.class_name) for entry in source.scan()]
    assert found == [("cat/1.jpg", "cat"), ("dog/a/2.jpg", "dog")]


def images_of(folders, answers):
    """The folder of four images of each, and the teacher's answers."""
    return np.repeat(folders, 4).tolist(), np.repeat(answers, 4).tolist()


def test_a_numbering_that_another_beats_clearly_is_refused():
    found = number_folders(sorted(NUMBERS), None, 12)
    images, answers = images_of(sorted(NUMBERS), range(12))  # a teacher of ImageFolder's order
    with pytest.raises(ConfigError, match=r"numeric 8 of 48, string 48 of 48.*numbering: string"):
        check_numbering(found, images, answers, 12, asked=False)
    fits, notes = check_numbering(found, images, answers, 12, asked=True)
    assert fits == {"numeric": (8, 48), "string": (48, 48)}
    assert "Remedy: numbering: string" in notes[0]
    right = [found.classes[folder] for folder in images]
    assert check_numbering(found, images, right, 12, asked=False)[1] == []


def test_few_images_and_weak_teachers_decide_nothing():
    found = number_folders(sorted(NUMBERS), None, 12)
    images, answers = images_of(["10", "3"], [2, 5])
    answers = [*answers[:3], 0, 0, -1, -1, -1]  # three for string order, and unreadable ones
    fits, notes = check_numbering(found, images, answers, 12, asked=False)
    assert fits == {"numeric": (0, 5), "string": (3, 5)} and notes == []


def test_answers_no_better_than_chance_are_said():
    found = number_folders(["bird", "cat"], ["cat", "bird"], 1000, own_names=True)
    assert not found.is_sure
    images, _ = images_of(["bird", "cat"], [0, 0])
    fits, notes = check_numbering(found, images * 2, [77] * 16, 1000, asked=False)
    assert fits == {"names": (0, 16)} and "no better than chance among 1000 classes" in notes[0]
    assert number_folders(WNIDS[:2], WNIDS, 1000).is_sure


def test_numbers_that_are_no_class_ids_are_refused_under_a_teacher_with_names():
    """The numbered folders of a web crawl, say."""
    folders = [f"{n:05d}" for n in range(8)]
    found = number_folders(folders, WNIDS, 1000)
    images, answers = images_of(folders, [500] * 8)
    with pytest.raises(ConfigError, match=r"right on 0 of 32 .*like a class.*g: folders, wh"):
        check_numbering(found, images, answers, 1000, asked=False)
    _, notes = check_numbering(found, images, answers, 1000, asked=True)
    assert "no better than chance" in notes[0]


TEACHER = """
import torch
from torch import nn

class Nearest(nn.Module):
    '''Class n for images of colour n: what a network trained on folders in some order does.'''
    num_classes, input_size = 12, (32, 32)
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        self.register_buffer("colours", torch.tensor(COLOURS).view(1, 12, 3, 1, 1))

    def forward(self, images):
        cells = nn.functional.avg_pool2d(images * 0.5 + 0.5, 16)
        return -200 * (cells.unsqueeze(1) - self.colours).square().sum(2)

def build():
    return Nearest()
"""
COLOURS = [[r / 2, g / 2, b] for r in range(3) for g in range(2) for b in range(2)]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Folders 0 to 11, each of one colour."""
    root = tmp_path_factory.mktemp("numbered")
    for number, colour in enumerate(COLOURS):
        folder = root / "train" / str(number)
        folder.mkdir(parents=True)
        for n in range(3):
            pixels = np.full((24, 24, 3), colour) * 255 + n
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{n}.png")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    return root


def teacher(path: Path, order: list[str]) -> str:
    """A teacher that was trained on the folders in this order."""
    path.write_text(f"COLOURS = {[COLOURS[int(name)] for name in order]}\n{TEACHER}")
    return f"{path}:build"


def options(model):
    return {"model": model, "weights": "pretrained", "input_size": None, "batch_size": 16}


def test_natural_order_is_right_at_once_and_the_table_is_stored(
    numbered, tmp_path, ray_here, caplog
):
    caplog.set_level(logging.INFO, "tokenlabel.annotate.plan")
    model = teacher(tmp_path / "net.py", NUMBERS)
    report = annotate(config(numbered, tmp_path / "labels", **options(model)))
    assert report.numbering == "numeric"
    assert report.class_fits == {"numeric": (36, 36), "string": (6, 36)} and report.top1 == 1
    assert "12 folders and their classes of the teacher, by numbering numeric:" in caplog.text
    assert "right on numeric 36 of 36, string 6 of 36 sampled images" in caplog.text
    assert "  10 -> 10\n" in caplog.text
    store = LabelStore(tmp_path / "labels" / "train")
    table = {name: int(name) for name in NUMBERS}
    assert store.folders == table and store.attrs["numbering"] == "numeric"
    with h5py.File(store.shards[0]) as shard:
        stored = zip(shard["folders"].asstr()[:], shard["folder_class"][:], strict=True)
        assert dict(stored) == table
    assert json.loads((store.root / "report.json").read_text())["class_fits"]["numeric"] == [36, 36]
    again = annotate(config(numbered, tmp_path / "labels", **options(model)))
    assert again.written == 0 and again.numbering == "numeric"


def test_string_order_is_refused_until_it_is_named(numbered, tmp_path, ray_here):
    model = teacher(tmp_path / "net.py", sorted(NUMBERS))
    with pytest.raises(ConfigError, match=r"numeric 6 of 36, string 36 of 36.*numbering: string"):
        annotate(config(numbered, tmp_path / "labels", **options(model)))
    assert [path.name for path in (tmp_path / "labels" / "train").iterdir()] == [".lock"]
    named = {**options(model), "numbering": "string"}
    report = annotate(config(numbered, tmp_path / "labels", **named))
    assert (report.numbering, report.top1) == ("string", 1)
    store = LabelStore(tmp_path / "labels" / "train")
    assert [store.folders[name] for name in NUMBERS] == [0, 1, *range(4, 12), 2, 3]
    assert store["10/0.png"].label == 2


def test_own_classes_under_an_imagenet_teacher(sample, tmp_path):
    """Refused with the two ways out, on the command line too; or numbered by choice."""
    for number, image in enumerate(sorted(sample.rglob("*.jpg"))[:3]):
        folder = tmp_path / "data" / "train" / ("bird", "cat", "dog")[number]
        folder.mkdir(parents=True)
        (folder / "1.jpg").symlink_to(image)
    command = arguments(tmp_path / "data", tmp_path / "labels")
    done = run(*command)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = " ".join(done.stderr.split())
    assert "the folders must be classes of the teacher; it has 1000 classes" in said
    assert "or numbering: folders" in said
    done = run(*command, "--numbering=folders")
    assert done.returncode == 0 and "bird -> 0" in done.stderr
    store = LabelStore(tmp_path / "labels" / "train")
    assert store.attrs["label_space"] == "folders"
    assert store.folders == {"bird": 0, "cat": 1, "dog": 2}
    shown = invoke("inspect-labels", tmp_path / "labels")
    assert "folders" in shown and "bird" in shown
    (facts,) = json.loads(invoke("inspect-labels", tmp_path / "labels", "--json"))
    assert facts["folders"] == store.folders and facts["attrs"]["numbering"] == "folders"


def test_a_split_inside_a_split_is_said(sample, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "train").symlink_to(sample / "train")
    done = run(*arguments(tmp_path, tmp_path / "labels"))
    assert done.returncode == 2
    assert "in folders of 'train'. Remedy: split: train/train" in " ".join(done.stderr.split())
