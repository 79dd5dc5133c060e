"""The examples, run as a user runs them, on a few small images."""

import contextlib
import csv
import importlib.util
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL.Image
import pytest
import torch

from tests.jobs import environment
from tests.jobs import run as run_command
from tokenlabel.annotate import annotate
from tokenlabel.annotate.config import load_config
from tokenlabel.dataset import LabelStore

EXAMPLES = Path(__file__).parents[1] / "examples"
CIFAR = EXAMPLES / "cifar10"
CLASSES = ["even", "odd"]
STUDENT = [
    *("--model", "vit_tiny_patch16_224", "--size", "32", "--batch-size", "8", "--workers", "0"),
    *("--model-kwargs", "img_size=32", "patch_size=8", "embed_dim=32", "depth=1", "num_heads=1"),
    # A class token starts at nearly 0 and is normalised: it turns last bits into first ones.
    *("global_pool=avg", "class_token=False"),
    *("--warmup-epochs", "0", "--precision", "float32"),
]


def load(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_until(path: Path, *command: object) -> None:
    """Run a script in a process of its own, and kill that as soon as the script has written a file.

    One thread, as in this process: sums of floats depend on it.
    """
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    while not path.exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert path.exists()


def run(path: Path, *arguments: object) -> str:
    """Run a script in this process; return what it prints."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        load(path).main()
    return said.getvalue()


@pytest.fixture(scope="module")
def data(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 32 px images, cut from the sample's photographs: 32 of train, 8 of val."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for number, path in enumerate(sorted((sample / split).rglob("*.jpg"))):
            image = PIL.Image.open(path).resize((64, 64))
            folder = root / split / CLASSES[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            for corner in (0, 32):
                tile = image.crop((corner, corner, corner + 32, corner + 32))
                tile.save(folder / f"{number:02d}-{corner}.png")
    return root


@pytest.fixture(scope="module")
def work(data: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """Steps 2 and 3 of the CIFAR-10 example: teacher and labels, at 64 px instead of 256."""
    work = tmp_path_factory.mktemp("work")
    small = ("--size", 64, "--views", 2, "--epochs", 1, "--batch-size", 8)
    run(CIFAR / "fit_teacher.py", "--data", data, "--out", work, *small)
    for split in ("train", "val"):
        given: dict[str, Any] = {
            "data": str(data),
            "split": split,
            "out": str(work / "labels"),
            "weights": str(work / "teacher.pth"),
            "class_names": str(work / "classes.txt"),
            "num_classes": 2,
            "k": 2,
            "input_size": 64,
            "batch_size": 8,
        }
        assert annotate(load_config(str(CIFAR / "annotate.yaml"), given)).ok
    return work


def test_the_images_are_exported_once(tmp_path: Path) -> None:
    export = load(CIFAR / "prepare.py").export
    images = [(PIL.Image.new("RGB", (4, 4), (i, 0, 0)), i % 2) for i in range(7)]
    assert export(images, CLASSES, 2, tmp_path / "train") == 4
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == [f"train/{c}/0000{i}.png" for c in CLASSES for i in range(2)]
    assert PIL.Image.open(tmp_path / "train/odd/00001.png").getpixel((0, 0)) == (3, 0, 0)
    assert export([], CLASSES, 2, tmp_path / "train") == 4
    assert export(images, CLASSES, 0, tmp_path / "val") == 7


def test_the_fitted_teacher_annotates(work: Path) -> None:
    store = LabelStore(work / "labels" / "train")
    assert (len(store), store.grid, store.num_classes) == (32, (2, 2), 2)
    assert store.attrs["label_space"] == "teacher" and store.classes == CLASSES
    assert json.loads((work / "labels" / "val" / "report.json").read_text())["top1"] is not None


#: Small students in the table's place, on as many threads as a killed process has.
SMALL = ("--width", 32, "--depth", 1, "--batch-size", 8, "--threads", 1)


def test_the_table_resumes(data: Path, work: Path) -> None:
    table = (CIFAR / "compare.py", "--data", data, "--work", work, *SMALL, "--seeds", 2)
    table = (*table, "--epochs", 2)
    first = run(*table)
    names = re.findall(r"^\| \((.)\) .* \| [\d.]+ \| [\d.]+ \| ", first, re.MULTILINE)
    assert names == ["a", "b", "c", "d"] and "annotator itself" in first
    assert first.count("epoch 2/2") == 2

    results = work / "results.jsonl"
    lines = results.read_text().split("\n")
    assert [json.loads(line)["arm"] for line in lines[1:]] == [*"abcdabcd"]
    # Killed in the middle of the last line: that arm and seed alone are redone, and the same.
    results.write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    second = run(*table)
    assert second.count("epoch 1/2") == 1 and "(d)" in second and "(c) 0" not in second
    end = first[first.index("| supervision") :]
    assert second.endswith(end)
    assert run(*table) == end


def test_a_killed_comparison_ends_as_an_undisturbed_one(data: Path, work: Path) -> None:
    given = ("--data", data, "--work", work, *SMALL, "--seeds", 1, "--epochs", 3, "--arms", "bd")
    state = work / "seed-0.pt"
    state.unlink(missing_ok=True)
    run_until(state, CIFAR / "compare.py", *given)
    assert "epoch 1/3" not in run(CIFAR / "compare.py", *given)
    killed = torch.load(state, weights_only=True)
    state.unlink()
    (work / "results.jsonl").unlink()
    run(CIFAR / "compare.py", *given)
    whole = torch.load(state, weights_only=True)
    for arm in "bd":
        for name, value in whole[arm]["student"].items():
            assert torch.equal(value, killed[arm]["student"][name]), (arm, name)


def test_settings_are_chosen_on_a_part_of_train(data: Path, work: Path) -> None:
    apart = ("--seeds", 1, "--epochs", 1, "--held-out", 0.25, "--arms", "a")
    said = run(CIFAR / "compare.py", "--data", data, "--work", work, *SMALL, *apart)
    assert "annotator" not in said and said.count("epoch 1/1") == 1


def test_boxes_are_where_the_crops_come_from(data: Path) -> None:
    """On an image whose colours are coordinates."""
    module = load(CIFAR / "compare.py")
    source = module.InMemory(data / "train")
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    source.images = [torch.stack([x, y, x]).mul(8).to(torch.uint8)]
    source.rows = [0]
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        crop, row, box, mirrored = module.Crops(source, [0], 0.2)[0]
        across, down = crop[0].float().mean(0) / 8, crop[1].float().mean(1) / 8
        x0, y0, x1, y1 = (box * 32).tolist()
        start, end = (x1, x0) if mirrored else (x0, x1)
        points = (torch.arange(32) + 0.5) / 32  # of pixels, whose value stands half a pixel before
        torch.testing.assert_close(across, start + (end - start) * points - 0.5, atol=0.6, rtol=0)
        torch.testing.assert_close(down, y0 + (y1 - y0) * points - 0.5, atol=0.6, rtol=0)
        seen.add((row, mirrored))
    assert seen == {(0, False), (0, True)}


SCRIPT = EXAMPLES / "train_student.py"


def weights(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return state


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("mix", [0, 1])
def test_labels_are_the_only_difference(mix: int, data: Path, work: Path, tmp_path: Path) -> None:
    """With labels that weigh nothing, the student becomes the one without labels."""
    # Plain and slow, so that the last bits of two ways to the same loss stay the last bits.
    common = ["--data", data, *STUDENT, "--epochs", 2, "--opt", "sgd", "--lr", 1e-3, "--mix", mix]
    labels = ["--labels", work / "labels" / "train"]
    run(SCRIPT, *common, "--out", tmp_path / "without")
    run(SCRIPT, *common, "--out", tmp_path / "with", *labels)
    run(SCRIPT, *common, "--out", tmp_path / "zero", *labels, "--dense-weight", 0)
    losses = {
        n: [float(row["loss"]) for row in rows(tmp_path / n)] for n in ("without", "with", "zero")
    }
    assert losses["zero"] == pytest.approx(losses["without"], rel=1e-5)
    assert losses["with"] != pytest.approx(losses["without"], rel=1e-2)
    without, zero = (weights(tmp_path / n)["model"] for n in ("without", "zero"))
    for name, value in without.items():
        torch.testing.assert_close(value, zero[f"model.{name}"], rtol=1e-4, atol=1e-4)


def test_a_killed_run_ends_as_an_undisturbed_one(data: Path, work: Path, tmp_path: Path) -> None:
    labels = work / "labels" / "train"
    command = [
        *(SCRIPT, "--data", data, "--labels", labels, *STUDENT),
        *("--epochs", 4, "--ema", 0.9, "--mix", 0.5),
    ]
    run(*command, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    run_until(out / "checkpoint.pt", *command, "--out", out)
    epoch = weights(out)["epoch"]
    assert f"resuming after epoch {epoch} " in run(*command, "--out", out)
    one, other = weights(tmp_path / "whole"), weights(out)
    for part in ("model", "model_ema"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())
    logs = [
        [(row["epoch"], row["loss"], row["ema_top1"]) for row in rows(tmp_path / n)]
        for n in ("whole", "killed")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    with pytest.raises(SystemExit, match=r"(?s)lr: 0.001 then, 0.5 now.*Remedy"):
        run(*command, "--out", out, "--lr", "0.5")


def test_two_processes(data: Path, work: Path, tmp_path: Path) -> None:
    command = [
        *("-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone"),
        *("--local-addr", "127.0.0.1", SCRIPT),
        *("--data", data, "--labels", work / "labels" / "train"),
        *(*STUDENT, "--epochs", 2, "--ema", 0.5, "--out", tmp_path / "out"),
    ]
    done = run_command(sys.executable, *map(str, command))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("epoch 2, ") == 1  # by the first process alone
    assert [row["epoch"] for row in rows(tmp_path / "out")] == ["1", "2"]
    assert weights(tmp_path / "out")["epoch"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "no nowhere/train"),
        (["--model", "vit_tinny"], "there is no 'vit_tinny'"),
        (["--epochs", 0], "--epochs must be at least 1"),
        (["--mix", 2], "--mix is a probability"),
        (["--ema", 1], "--ema is a decay below 1"),
        (["--batch-size", 1000], "fewer than 1 x 1000"),
        (["--labels", "nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments_are_reported(
    arguments: list[object],
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(SCRIPT, "--data", data, "--out", tmp_path, *STUDENT, *arguments)
    assert stopped.value.code not in (0, None)
    assert message in capsys.readouterr().err + str(stopped.value.code)


def test_classes_that_no_label_knows_are_refused(data: Path, work: Path, tmp_path: Path) -> None:
    other = tmp_path / "data"
    for split in ("train", "val"):
        (other / split).mkdir(parents=True)
        (other / split / "strange").symlink_to(data / split / "odd")
    given = ["--data", other, "--out", tmp_path / "out", *STUDENT]
    with pytest.raises(SystemExit, match="strange are not"):
        run(SCRIPT, *given, "--labels", work / "labels" / "train")


def test_hidden_and_empty_folders_are_no_classes(data: Path, work: Path, tmp_path: Path) -> None:
    other = tmp_path / "data"
    for split in ("train", "val"):
        for name in ("@eaDir", "__MACOSX", ".cache", "empty"):
            (other / split / name).mkdir(parents=True)
        (other / split / "@eaDir" / "thumb.jpg").write_bytes(b"")
        for name in CLASSES:
            (other / split / name).symlink_to(data / split / name)
    given = ["--data", other, *STUDENT, "--epochs", 1]
    run(SCRIPT, *given, "--out", tmp_path / "without")
    run(SCRIPT, *given, "--out", tmp_path / "with", "--labels", work / "labels" / "train")
    assert weights(tmp_path / "without")["model"]["head.weight"].shape[0] == 2
