"""The published training recipe: `examples/train_student.py --recipe`, run as a user runs it."""

import argparse
import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import yaml
from timm.scheduler import create_scheduler

from tests.jobs import config
from tests.test_examples import EXAMPLES, SCRIPT, load, rows, run, run_until, weights
from tokenlabel.annotate import annotate
from tokenlabel.supervise import lvvit_t

RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
#: LV-ViT of one narrow layer, on 2 x 2 patches. The rest of a recipe stays as it is.
MODEL = {"depth": 1, "width": 16, "heads": 2, "stem_width": 4}
SMALL: tuple[object, ...] = (
    *("--model-kwargs", *(f"{name}={value}" for name, value in MODEL.items())),
    *("--size", 32, "--batch-size", 8, "--workers", 0),
)
#: What README.md and main.py of zihangJiang/TokenLabeling say, by the names of main.py.
OFFICIAL: dict[str, Any] = {
    "opt": "adamw",
    "sched": "cosine",
    "lr": 1.6e-3,
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "epochs": 300,
    "decay_epochs": 30,
    "warmup_epochs": 5,
    "cooldown_epochs": 10,
    "patience_epochs": 10,
    "decay_rate": 0.1,
    "lr_noise": None,
    "lr_noise_pct": 0.67,
    "lr_noise_std": 1.0,
    "lr_cycle_mul": 1.0,
    "lr_cycle_limit": 1,
    "seed": 42,
}


@pytest.fixture(scope="module")
def labels(sample: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """Token labels of the embedded sample."""
    out = tmp_path_factory.mktemp("labels")
    assert annotate(config(sample, out)).ok
    return out / "train"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One 32 px image in each of two classes, to train on and to validate on."""
    root = tmp_path_factory.mktemp("tiny")
    for split in ("train", "val"):
        for number, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            image = PIL.Image.new("RGB", (32, 32), (200 * number, 90, 40))
            image.save(root / split / name / "0.png")
    return root


def test_the_rates_of_all_310_epochs_are_those_of_the_published_code(
    tiny: Path, tmp_path: Path
) -> None:
    """Also in a run that was killed in between."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=OFFICIAL["lr"])
    scheduler, epochs = create_scheduler(argparse.Namespace(**OFFICIAL), optimizer)
    expected = []
    for epoch in range(epochs):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1)
    command = [
        *(SCRIPT, "--data", tiny, "--out", tmp_path, "--recipe", "lvvit_s", *SMALL),
        *("--batch-size", 2, "--mix-token", 0),
    ]
    run_until(tmp_path / "checkpoint.pt", *command)
    assert "resuming" in run(*command)
    found = [float(row["lr"]) for row in rows(tmp_path)]
    assert len(expected) == 310 and max(expected) == pytest.approx(1.6e-3, rel=1e-2)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_recipe_trains(sample: Path, labels: Path, tmp_path: Path) -> None:
    """With float16 and its scaler, MixToken, averaged weights and smoothed maps."""
    command = [SCRIPT, "--data", sample, "--labels", labels, "--recipe", "lvvit_t", *SMALL]
    command += ["--epochs", 2, "--warmup-epochs", 1, "--cooldown-epochs", 0, "--ema", 0.5]
    run(*command, "--out", tmp_path)
    assert [float(row["lr"]) for row in rows(tmp_path)] == pytest.approx([1e-6, 8.05e-4], rel=1e-6)
    state = weights(tmp_path)
    assert state["scaler"]["scale"] > 0 and state["model"]["head.weight"].shape == (1000, 16)
    assert not torch.equal(state["model"]["head.weight"], state["model_ema"]["head.weight"])
    # 2 log C, of class token and patches with equal weight, where nothing is learned yet.
    assert float(rows(tmp_path)[0]["loss"]) == pytest.approx(2 * 6.9, rel=0.1)


@pytest.mark.parametrize("averaged", [False, True])
def test_finetuning_starts_from_weights_of_another_size(
    averaged: bool, sample: Path, labels: Path, tmp_path: Path
) -> None:
    """With nothing learned, the validation is that of the weights given: averaged ones or not."""
    model, ema = (lvvit_t(image_size=32, **MODEL) for _ in range(2))
    torch.save({"model": model.state_dict(), "model_ema": ema.state_dict()}, tmp_path / "w.pt")
    command = [SCRIPT, "--data", sample, "--labels", labels, "--recipe", "lvvit_s_384", *SMALL]
    command += ["--model", "lvvit_t", "--size", 64, "--weights", tmp_path / "w.pt", "--lr", 0]
    command += ["--warmup-lr", 0, "--min-lr", 0, "--epochs", 1, "--warmup-epochs", 0]
    run(*command, "--cooldown-epochs", 0, "--ema", 0.5 if averaged else 0, "--out", tmp_path)
    found = weights(tmp_path)["model"]
    own, other = (ema, model) if averaged else (model, ema)
    assert torch.equal(found["aux_head.weight"], own.aux_head.weight)
    assert not torch.equal(found["aux_head.weight"], other.aux_head.weight)
    assert found["pos_embed"].shape == (1, 17, 16)
    assert torch.equal(found["pos_embed"][:, :1], own.pos_embed[:, :1])


def test_a_student_of_timm_starts_from_one_of_this_script(
    sample: Path, labels: Path, tmp_path: Path
) -> None:
    small = ["img_size=32", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=1"]
    command = [SCRIPT, "--data", sample, "--labels", labels, "--model", "vit_tiny_patch16_224"]
    command += ["--model-kwargs", *small, "--size", 32, "--batch-size", 8, "--workers", 0]
    command += ["--epochs", 1, "--warmup-epochs", 0, "--lr", 0]
    run(*command, "--seed", 1, "--out", tmp_path / "one")
    other = ["--seed", 2, "--weights", tmp_path / "one" / "checkpoint.pt"]
    run(*command, *other, "--out", tmp_path / "other")
    one, two = (weights(tmp_path / name)["model"] for name in ("one", "other"))
    same = {name for name, value in one.items() if torch.equal(value, two[name])}
    assert one.keys() - same == {"patch_head.weight"}  # its bias starts at 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_accepted_and_yields_to_the_command_line(
    path: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = load(SCRIPT).arguments
    given = ["--data", str(tiny), "--out", str(tmp_path), "--labels", "labels", "--seed", "7"]
    options = yaml.safe_load(path.read_text())
    for recipe in (path.stem, str(path)):
        monkeypatch.setattr("sys.argv", ["train", *given, "--recipe", recipe, "--epochs", "3"])
        args = vars(arguments(""))
        assert (args["epochs"], args["seed"]) == (3, 7)
        for name in options.keys() - {"epochs"}:
            value = args[name.replace("-", "_")]
            assert value == type(value)(options[name]), name


def test_recipes_hold_the_published_settings() -> None:
    """By main.py and README.md: defaults, then what the command of each model adds."""
    defaults = {
        "lr": 1.6e-3, "min-lr": 1e-5, "warmup-lr": 1e-6, "warmup-epochs": 5, "cooldown-epochs": 10,
        "weight-decay": 0.05, "cls-weight": 1, "dense-weight": 1, "label-smoothing": 0.1,
        "map-smoothing": 0.1, "erase-prob": 0.25, "color-jitter": 0.4, "mix": 0, "mix-token": 1,
        "ema": 0.99992, "drop-path": 0.1, "min-scale": 0.08, "size": 224, "epochs": 300,
        "batch-size": 128, "auto-augment": "rand-m9-mstd0.5-inc1", "sched-step": "epoch",
        "crop": "last", "cls-target": "crop", "crop-pct": 0.9, "precision": "float16",
        "opt": "adamw", "workers": 8,
    }  # fmt: skip
    large = {"lr": 1e-3, "auto-augment": "rand-n3-m9-mstd0.5-inc1", "drop-path": 0.3, "crop-pct": 1}
    tuned = {"lr": 5e-6, "min-lr": 5e-6, "weight-decay": 1e-8, "batch-size": 64, "size": 384}
    changes: dict[str, dict[str, Any]] = {
        "lvvit_t": {},
        "lvvit_s": {},
        "lvvit_m": {"drop-path": 0.2, "crop-pct": 1},
        "lvvit_l": large,
        "lvvit_s_384": tuned | {"ema": 0, "epochs": 30},
    }
    assert [path.stem for path in RECIPES] == sorted(changes)
    for path in RECIPES:
        found = yaml.safe_load(path.read_text())
        assert path.stem.startswith(found.pop("model"))
        assert found == defaults | changes[path.stem], path.stem


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"learning-rate": 1, "data_set": 2, "lr": 1}, [], "data_set, learning-rate are none"),
        ({"recipe": "lvvit_s"}, [], "recipe are none"),
        ([1], [], "must map names of options"),
        ({"lr": "fast"}, [], "--lr: invalid float value: 'fast'"),
        ({"crop": "middle"}, [], "invalid choice: 'middle'"),
        (None, ["--recipe", "lvvit_xl"], "one of lvvit_l, lvvit_m, lvvit_s, lvvit_s_384, lvvit_t"),
        ({"mix-token": 1}, [], "Remedy: --labels, or --mix-token 0"),
        ({"mix-token": 1, "mix": 1}, ["--labels", "nowhere"], "both mix a batch"),
        ({"mix-token": 2}, [], "--mix-token is a probability"),
        ({"weights": "nowhere.pth", "model": "lvvit_t"}, [], "nowhere.pth"),
    ],
)
def test_wrong_recipes_are_reported(
    content: Any,
    arguments: list[object],
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stopped:
        given = ["--data", tiny, "--out", tmp_path / "out", "--recipe", recipe, *arguments]
        run(SCRIPT, *given, "--batch-size", 2, "--workers", 0)
    assert message in capsys.readouterr().err + str(stopped.value.code)
