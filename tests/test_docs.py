"""Every example of the documentation and of docstrings runs, on real labels, and is true."""

import ast
import doctest
import gc
import importlib
import io
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

import tokenlabel as tl
from tests.jobs import config
from tokenlabel.annotate import annotate

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: str
    section: str
    line: int
    language: str
    text: str


def blocks(page: str, language: str) -> list[Block]:
    """The fenced blocks of a page in one language."""
    text = (ROOT / page).read_text()
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        (section,) = re.findall(r"^## (.*)$", before, re.MULTILINE)[-1:] or [""]
        found.append(Block(page, section, before.count("\n") + 1, match[1], match[2]))
    return [block for block in found if block.language == language]


class Checks(ast.NodeTransformer):
    """Turns each line `expression  # value` into a check, where it stands.

    The comment begins with a Python literal, perhaps followed by a colon and prose.
    """

    def __init__(self, source: str) -> None:
        self.lines: list[int] = []
        self.comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        said = self.comments.get(node.lineno, "").partition(":")[0]
        try:
            ast.literal_eval(said)
        except (SyntaxError, ValueError):
            return node
        self.lines.append(node.lineno)
        message = f"line {node.lineno}: {ast.unparse(node)} is not {said}"
        check = ast.parse(f"assert {ast.unparse(node)} == {said}, {message!r}").body[0]
        return ast.copy_location(check, node)


def execute(block: Block, text: str | None = None) -> tuple[dict[str, Any], int]:
    """Run a block in a namespace of its own; return that, and how many lines `Checks` checked."""
    # Its lines keep their numbers in the page, so that a traceback points there.
    source = "\n" * block.line + (block.text if text is None else text)
    checks = Checks(source)
    tree = ast.fix_missing_locations(checks.visit(ast.parse(source)))
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(tree, str(ROOT / block.page), "exec"), namespace)
    return namespace, len(checks.lines)


@pytest.fixture(scope="module")
def folder(sample: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """What the pages find: the sample, and its labels as `make annotate` makes them."""
    root = tmp_path_factory.mktemp("docs")
    annotate(config(sample, root / "labels", input_size=[320, 448], batch_size=8))
    (root / "data").mkdir()
    (root / "data" / "sample").symlink_to(sample)
    return root


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return folder


def sections() -> dict[str, list[Block]]:
    found = defaultdict(list)
    for block in blocks("docs/plug-in.md", "python"):
        found[block.section].append(block)
    return found


#: How many statements in comments are checked.
CHECKED = {
    "The student and the loss": 4,
    "albumentations, kornia, and augmentation on the device": 4,
    "LV-ViT, and published weights": 1,
    "Your own loss": 1,
    "Any pipeline or stream": 1,
    "Your own crops": 1,
    "The student's grid": 4,
    "Class numbers": 5,
    "Workers, several GPUs, resuming": 2,
    "The published rule, for comparison": 1,
}


# As in test_dataset: timm's reader leaves its files to the garbage collector; torchdata 0.11
# calls a function of torch that torch 2.14 wants nobody to call.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
# Hugging Face's Trainer pins memory where there is no GPU to send it to.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
# Lightning calls what torch deprecates, and gives advice on workers as a warning.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("section", sections())
def test_plug_in(section: str, here: Path) -> None:
    torch.manual_seed(0)
    checked = 0
    for block in sections()[section]:
        namespace, checks = execute(block)
        checked += checks
        if "loss" in namespace:
            assert torch.isfinite(namespace["loss"])
        if "dataset" in namespace:
            _, labels = default_collate([namespace["dataset"][0]])
            targets = labels.targets(14)
            mass = targets.dense().sum(-1)
            torch.testing.assert_close(mass, (targets.weight > 0).float())
    assert checked == CHECKED.get(section, 0)


def test_the_diff_leads_from_a_script_that_runs_to_the_one_shown(here: Path) -> None:
    diff = blocks("docs/plug-in.md", "diff")[0]  # the other is of a script of timm
    sides = {
        side: "".join(
            line[1:] or "\n"
            for line in diff.text.splitlines(keepends=True)
            if line[0] in (" ", "\n", side)
        )
        for side in "-+"
    }
    (after,) = sections()[diff.section]
    assert sides["+"] == after.text
    added = [line for line in diff.text.splitlines() if re.match(r"\+(?!import|$)", line)]
    assert len(added) == 3
    execute(diff, sides["-"])


def test_the_published_rule_keeps_what_the_page_says(here: Path) -> None:
    (block,) = sections()["The published rule, for comparison"]
    torch.manual_seed(0)
    labels = execute(block)[0]["labels"]
    dense = {
        k: labels.sparse(14, k, rule="published").windows(1000).dense() for k in (10, 64, 1000)
    }
    moved = {k: (dense[k] - dense[1000]).abs().sum(-1).max().item() / 2 for k in (10, 64)}
    assert moved[64] < 1e-5
    assert 0.05 < moved[10] < 0.15


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_images_in_tars_and_streams(here: Path) -> None:
    checked = 0
    for block in blocks("docs/sources.md", "python"):
        namespace, checks = execute(block)
        checked += checks
        if "labels" in namespace:
            assert namespace["labels"].has_map.all()
    gc.collect()  # WebDataset leaves its files to the garbage collector
    assert checked == 6


def test_the_readme_reads_labels(here: Path) -> None:
    reading, training = [b for b in blocks("README.md", "python") if b.section == "Read the labels"]
    assert execute(reading)[1] == 1
    assert execute(training)[1] == 1


def test_the_readme_trains_a_student(here: Path) -> None:
    (block,) = [b for b in blocks("README.md", "python") if b.section == "Train a student"]
    assert torch.isfinite(execute(block)[0]["loss"])


def test_the_format_is_read_with_h5py_alone(here: Path) -> None:
    reading, finding = blocks("docs/format.md", "python")
    script = f"""{reading.text}
for number in range(2):
    computed, stored = content_digest(f"labels/train/shard-0000{{number}}-of-00002.h5")
    assert computed == stored
np.save("dense.npy", probabilities("labels/train/shard-00001-of-00002.h5", 7))
"""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dense = tl.LabelStore("labels/train")[15].dense()
    np.testing.assert_allclose(np.load("dense.npy"), dense, rtol=1e-4, atol=1e-7)

    reader: dict[str, Any] = {}
    exec(finding.text, reader)
    store = tl.LabelStore("labels/train")
    for file in ("labels/train/index", "labels/train/manifest"):
        for row, key in enumerate(store.keys):
            name = key.rpartition("/")[2]
            for form in (key, name, f"other/{name}", name.replace(".jpg", ".PNG")):
                assert reader["find"](file, form) == store.row(form) == row
        assert [reader["find"](file, key) for key in ("", "x.jpg", f"{key}.jpg")] == [-1] * 3
    computed, stored = reader["manifest_digest"]("labels/train/manifest")
    assert computed == stored


def test_links_lead_to_files() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
    links = [
        page.parent / link
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    ]
    assert len(links) > 30
    assert [link for link in links if not link.exists()] == []


def modules_with_examples() -> list[str]:
    """Modules of the package whose docstrings have examples."""
    rooms = ("annotate", "dataset", "inspection", "supervise")
    paths = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return [
        ".".join(("tokenlabel", *path.relative_to(ROOT).with_suffix("").parts))
        for path in paths
        if ">>> " in path.read_text()
    ]


@pytest.mark.parametrize("module", modules_with_examples())
def test_examples_in_docstrings(module: str, here: Path) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    names = {"np": np, "tl": tl, "torch": torch}
    result = doctest.testmod(importlib.import_module(module), extraglobs=names, optionflags=flags)
    assert result.attempted and not result.failed
