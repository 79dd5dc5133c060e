"""Somebody's own network: the file that docs/teachers.md shows, in a real job, and bad files."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.jobs import config, digests
from tokenlabel.annotate import Teacher, annotate
from tokenlabel.annotate.teacher.annotator import Annotator
from tokenlabel.annotate.teacher.identity import build_teacher, load_teacher
from tokenlabel.annotate.teacher.module_teacher import MODULE_MODE
from tokenlabel.annotate.teacher.rebuild import rebuild_teachers
from tokenlabel.dataset.store import LabelStore
from tokenlabel.errors import ConfigError, FingerprintError, TeacherError

PAGE = Path(__file__).parents[1] / "docs" / "teachers.md"
(CODE,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's file, beside weights that are no network's in particular."""
    path = tmp_path_factory.mktemp("own") / "my_teacher.py"
    path.write_text(CODE)
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    torch.manual_seed(0)
    torch.save(namespace["MyNetwork"]().state_dict(), path.with_suffix(".pth"))
    return path


@pytest.fixture(scope="module")
def labels(file: Path, sample: Path, ray_here: None) -> Path:
    out = file.parent / "labels"
    assert annotate(own(sample, out, file)).ok
    return out


def own(data: Path, out: Path, file: Path, **options: Any) -> Any:
    given = {"weights": "pretrained", "input_size": None, "precise": True, "k": 20, **options}
    given.setdefault("numbering", "folders")  # ImageNet's folders are no classes of this network
    return config(data, out, model=f"{file}:build", **given)


def test_a_plain_module_annotates(file: Path, sample: Path, labels: Path) -> None:
    """Each map against the network, run by hand on the photograph."""
    store = LabelStore(labels / "train")
    assert (store.grid, store.num_classes, len(store)) == ((6, 6), 20, 16)
    assert store.attrs["teacher"] == "my_teacher.py:build"
    assert store.attrs["dense_rule"] == MODULE_MODE
    namespace: dict[str, Any] = {"__file__": str(file)}
    exec(file.read_text(), namespace)
    network = namespace["build"]().eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (network.mean, network.std))
    for key in store.keys:
        with Image.open(sample / "train" / key) as image:
            small = image.convert("RGB").resize((96, 96), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
        with torch.inference_mode():
            (want,) = network(((pixels - mean) / std)[None]).softmax(1).movedim(1, -1).numpy()
        np.testing.assert_allclose(store[key].dense(), want, atol=2e-3)


def test_another_file_is_another_teacher(file: Path, sample: Path, labels: Path) -> None:
    before = digests(labels / "train")
    assert annotate(own(sample, labels, file)).ok
    other = file.with_name("moved") / file.name
    other.parent.mkdir()
    other.with_suffix(".pth").symlink_to(file.with_suffix(".pth"))
    other.write_text(CODE)
    assert annotate(own(sample, labels, other)).ok  # only its folder differs
    other.write_text(CODE + "# changed\n")
    with pytest.raises(FingerprintError, match="weights: '"):
        annotate(own(sample, labels, other))
    assert digests(labels / "train") == before


def test_the_teacher_of_a_label_set_is_rebuilt_from_a_file_that_the_user_names(
    file: Path, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attrs = LabelStore(labels / "train").attrs
    teachers = rebuild_teachers(attrs, f"{file}:build")
    assert teachers.annotator.weights_digest == attrs["weights_digest"]
    assert teachers.other is not None and teachers.other.input_sizes == ((128, 128),)
    monkeypatch.chdir(file.parent)  # even where the file lies at hand
    with pytest.raises(ConfigError, match=r"somebody's own.*--weights /path/to/my_teacher\.py:"):
        rebuild_teachers(attrs)
    with pytest.raises(ConfigError, match=r"is not: .*/nowhere\.py: No such file"):
        rebuild_teachers(attrs, f"{tmp_path}/nowhere.py:build")
    changed = file.with_name("changed.py")
    changed.write_text(CODE + "# changed\n")
    with pytest.raises(ConfigError, match="these weights have the digest"):
        rebuild_teachers(attrs, f"{changed}:build")


HEAD = """
from torch import nn
class Net(nn.Conv2d):
    num_classes, input_size = 4, 32
    mean = std = (0.5, 0.5, 0.5)
def build():
    return Net(3, 4, 8, stride=8)
"""
BAD: dict[str, tuple[str, str]] = {
    "one attribute missing": (HEAD.replace("mean = std", "std"), "gives a Net without mean"),
    "no attributes": ("from torch.nn import Identity as build", "without num_classes, input_size"),
    "no number of classes": (HEAD.replace("4, 32", "'4', 32"), "num_classes '4'"),
    "no input size": (HEAD.replace("4, 32", "4, None"), "input_size None"),
    "mean of one channel": (HEAD.replace("(0.5, 0.5, 0.5)", "[0.5]"), "three non-negative numbers"),
    "unknown interpolation": (HEAD.replace("mean =", "interpolation = mean ="), "must be one of"),
    "too few names": (HEAD.replace("mean =", "class_names = mean ="), "each of the teacher's 4"),
    "numbers as names": (
        HEAD.replace("mean =", "class_names = range(4); mean ="),
        "4, 0 different",
    ),
    "pooled logits": (
        HEAD.replace("def", "    forward = lambda self, x: x.mean((2, 3))\ndef"),
        r"gives \(1, 3\) for B = 1",
    ),
    "one patch": (HEAD.replace("8, stride=8", "32"), r"gives \(1, 4, 1, 1\)"),
    "no tensor": (HEAD.replace("def", "    forward = lambda self, x: [x]\ndef"), "gives list"),
    "not a module": ("def build(): return 3", "of type int"),
    "a class, not an instance": (HEAD.replace("Net(3, 4, 8, stride=8)", "Net"), "of type type"),
    "not a function": ("build = 3", "names none in"),
    "an error when run": ("\n1 / 0", r"raises ZeroDivisionError in line 2: division by zero"),
    "an error when built": ("def build():\n    open('gone.pth')", "FileNotFoundError in line 2"),
    "no Python": ("def build(:", r"raises SyntaxError: .*line 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_file_is_said(case: str, tmp_path: Path) -> None:
    code, message = BAD[case]
    (tmp_path / "net.py").write_text(code)
    with pytest.raises(TeacherError, match=message) as caught:
        build_teacher(own(tmp_path, tmp_path, tmp_path / "net.py", device="cpu"))
    assert re.search(r" must .*Remedy: ", str(caught.value), re.DOTALL)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("gone.py:build", {}, r"is not: .*/gone\.py: No such file.*correct the path"),
        ("folder.py:build", {}, r"/folder\.py: Is a directory"),
        ("net.py", {}, r"net\.py: names none in .*FILE\.py:FUNCTION"),
        ("net.py:build", {"weights": "sample"}, "leave them out, and load weights in build"),
        ("net.py:build", {"num_classes": 4}, "leave them out"),
    ],
)
def test_what_is_wrong_with_the_options_is_said(
    model: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "net.py").write_text(HEAD)
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(TeacherError, match=message):
        load_teacher(f"{tmp_path}/{model}", **options)


def test_a_file_may_give_a_whole_teacher(tmp_path: Path) -> None:
    code = """
import timm
from tokenlabel.annotate.teacher.timm_teacher import TimmTeacher
def build():
    return TimmTeacher(timm.create_model("test_resnet", num_classes=4), "ours")
"""
    (tmp_path / "net.py").write_text(code)
    teacher, found = load_teacher(f"{tmp_path}/net.py:build")
    assert isinstance(teacher, Teacher) and found == code.encode()
    annotator = Annotator(teacher, code=found, device="cpu")
    assert (annotator.name, annotator.grid) == ("ours", (5, 5))
    assert annotator.weights_digest != Annotator(teacher, device="cpu").weights_digest
