"""The job on a real Ray: what it stores, resumes, refuses and reports."""

import doctest
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.jobs import assert_nearly_equal, config, digests
from tokenlabel.annotate import annotate, job
from tokenlabel.annotate.report import Tally
from tokenlabel.annotate.teacher.timm_teacher import wordnet_ids
from tokenlabel.annotate.teacher.weights import load_weights
from tokenlabel.dataset.format.lock import HOLDER, folder_lock
from tokenlabel.dataset.format.score_map import DROPPED, MapLayout
from tokenlabel.dataset.format.sums import file_sha256, read_sums
from tokenlabel.dataset.store import LabelStore
from tokenlabel.errors import (
    ConfigError,
    FingerprintError,
    FormatError,
    JobError,
    LockedError,
    TeacherError,
)

pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture(scope="session")
def labels(
    sample: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None
) -> tuple[Path, dict[str, str]]:
    """An undisturbed run over the sample's 16 training images, and its digests."""
    out = tmp_path_factory.mktemp("labels")
    report = annotate(config(sample, out))
    assert report.ok and (report.written, report.skipped, report.errors) == (2, 0, 0)
    return out, digests(out / "train")


@pytest.fixture
def copy(labels: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    """A copy of that run's folder, to disturb."""
    return Path(shutil.copytree(labels[0], tmp_path / "labels"))


def test_maps_are_those_of_a_plain_loop_over_timm(
    sample: Path, labels: tuple[Path, dict[str, str]]
) -> None:
    """Written without any code of ours but the weights' loader: resize, normalise, model, top-k."""
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    load_weights(model, "sample")
    data = timm.data.resolve_model_data_config(model)
    mean, std = torch.tensor(data["mean"]), torch.tensor(data["std"])
    store = LabelStore(labels[0] / "train")
    assert list(store.keys) == sorted(
        p.relative_to(sample / "train").as_posix() for p in (sample / "train").rglob("*.jpg")
    )
    assert store.layout == MapLayout(("identity",), (2, 2), 16, 1000, 64, 0.25)
    for key in store.keys:
        image = Image.open(sample / "train" / key).convert("RGB")
        pixels = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))
        x = (torch.tensor(pixels) / 255 - mean) / std
        with torch.no_grad():
            features = model.forward_features(x.permute(2, 0, 1)[None])
            logits = model.classifier(features.permute(0, 2, 3, 1))[0]
        entry, probs = store[key], logits.softmax(-1)
        classes = entry.probabilities()[0]
        kept = entry.codes[0].transpose(1, 2, 0) != DROPPED
        assert kept[..., 0].all()
        at_stored = probs.gather(-1, torch.tensor(classes.astype(np.int64))).numpy()
        nats = entry.codes[0].transpose(1, 2, 0) * 0.25
        np.testing.assert_allclose(nats[kept], -np.log(at_stored[kept]), atol=0.126)
        assert (at_stored[kept & (np.arange(16) > 0)] > 0.003 * 0.999).all()
        top = probs.topk(16).values.numpy()
        assert (top[~kept] < 0.003 * 1.001).all(), "what is dropped is improbable"
        np.testing.assert_allclose(entry.level[0], logits.logsumexp(-1), rtol=2e-3)
        assert entry.size == image.size
        assert timm.data.ImageNetInfo().index_to_label_name(entry.label) == key.split("/")[0]


def test_bytes_do_not_depend_on_teachers_or_window_and_progress_reaches_the_end(
    sample: Path, labels: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    seen: list[tuple[int, int, int]] = []
    annotate(
        config(sample, tmp_path, teachers=2, window=1),
        lambda tally, images, rows: seen.append((tally.images, images, rows)),
    )
    assert digests(tmp_path / "train") == labels[1]
    assert seen[-1] == (16, 16, 16)
    assert [images for images, _, _ in seen] == sorted(images for images, _, _ in seen)


def test_a_job_of_mixed_machines_resumes_and_says_it_once(
    sample: Path,
    labels: tuple[Path, dict[str, str]],
    copy: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another number of threads divides the terms of a sum otherwise, as another processor does."""
    (copy / "train" / "shard-00000-of-00002.h5").unlink()
    report = annotate(config(sample, copy, threads=2))
    assert (report.written, report.skipped) == (1, 1)
    assert_nearly_equal(labels[0] / "train", copy / "train")
    [warning] = caplog.messages
    assert warning.startswith("the shards were made on 2 kinds of machines")
    assert re.search(r"\(processor: [^;]*, 1 thread; [^;]*, 2 threads\)$", warning), warning
    saved = json.loads((copy / "train" / "report.json").read_text())
    assert saved["libraries"] == report.libraries
    assert [one["torch"] for one in report.libraries] == [version("torch")] * 2


def test_the_docstring_s_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(job) == (0, 3), "failures, attempts"


def test_resume_makes_only_what_is_missing(
    sample: Path, labels: tuple[Path, dict[str, str]], copy: Path
) -> None:
    lost, kept = (copy / "train" / f"shard-0000{i}-of-00002.h5" for i in (0, 1))
    lost.unlink()
    (copy / "train" / ".shard-00000-of-00002.h5.host-1-ab.tmp").write_bytes(b"half")
    # Wrong for the lost shard, none for the other, as after SIGKILL.
    (copy / "train" / "SHA256SUMS").write_text(f"{'0' * 64}  {lost.name}\n")
    stamp = kept.stat().st_mtime_ns
    report = annotate(config(sample, copy))
    assert (report.written, report.skipped) == (1, 1)
    assert kept.stat().st_mtime_ns == stamp
    assert digests(copy / "train") == labels[1]
    assert (report.images, report.labelled) == (16, 16), "the report is of the whole split"
    assert report.images_per_second and report.busy and 0 < report.busy <= 1


def test_a_stopped_job_lists_the_checksums_of_what_it_wrote(sample: Path, tmp_path: Path) -> None:
    def stop(tally: Tally, *_: int) -> None:
        if tally.written:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        annotate(config(sample, tmp_path, shard_size=5), stop)
    listed = read_sums(tmp_path / "train")
    assert listed and listed == {name: file_sha256(tmp_path / "train" / name) for name in listed}


def test_a_finished_split_needs_no_ray(
    sample: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr("tokenlabel.annotate.job.ray_session", refuse)
    report = annotate(config(sample, copy))
    assert (report.written, report.skipped) == (0, 2)
    saved = json.loads((copy / "train" / "report.json").read_text())
    assert saved["ok"] and saved["top1"] == report.top1


def test_another_fingerprint_is_refused_with_all_values(
    sample: Path, labels: tuple[Path, dict[str, str]], copy: Path
) -> None:
    changed = {"k": 5, "input_size": 96, "batch_size": 8, "shard_size": 4, "step": 0.125}
    with pytest.raises(FingerprintError, match=r"(?s)has fingerprint \w{64}, .*Remedy") as caught:
        annotate(config(sample, copy, compact=True, level=False, **changed))
    for message in (
        "k: 16 there, 5 now",
        "preprocessing: ",
        "batch_size: 5 there, 8 now",
        "shard_size: 8 there, 4 now",
        "step: 0.25 there, 0.125 now",
        "floor: 0.003 there, 0.01 now",
        "level: True there, False now",
    ):
        assert message in str(caught.value)
    assert digests(copy / "train") == labels[1], "nothing was touched"


def test_changed_images_are_refused(sample: Path, copy: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(sample, tmp_path / "data"))
    first = min((data / "train").rglob("*.jpg"))
    shutil.copy(first, first.with_name("zz.jpg"))
    with pytest.raises(FingerprintError, match=r"16 then .* 17 now .*: 'n\d+/.*' then, 'n\d+/zz"):
        annotate(config(data, copy))
    first.with_name("zz.jpg").unlink()
    assert annotate(config(data, copy)).skipped == 2
    shutil.copy(first, first.with_name("zz.jpg"))
    assert annotate(config(data, copy, rescan=False)).skipped == 2, "the manifest is trusted"


def test_a_damaged_manifest_and_checksums_are_rebuilt(
    sample: Path, labels: tuple[Path, dict[str, str]], copy: Path
) -> None:
    path = copy / "train" / "manifest"
    damaged = path.read_bytes().replace(b"imagenet_00_243", b"Xmagenet_00_243")
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    (copy / "train" / "SHA256SUMS").write_text("damaged")
    (copy / "train" / "shard-00000-of-00002.h5").unlink()
    assert annotate(config(sample, copy)).errors == 0
    assert digests(copy / "train") == labels[1]


def test_changed_class_names_do_not_blame_the_images(
    sample: Path, copy: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join([*wordnet_ids()[1:], "n01440764"]))
    with pytest.raises(FingerprintError, match="ground truth of the images has changed"):
        annotate(config(sample, copy, class_names=str(names)))


def test_a_damaged_shard_is_refused_by_name(sample: Path, copy: Path) -> None:
    path = copy / "train" / "shard-00001-of-00002.h5"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(FormatError, match=r"shard-00001-of-00002.h5 is damaged, cut short"):
        annotate(config(sample, copy))


@pytest.mark.parametrize("name", ["index", "report.json"])
def test_a_folder_in_a_file_s_place_is_named(sample: Path, copy: Path, name: str) -> None:
    (copy / "train" / name).unlink()
    (copy / "train" / name).mkdir()
    with pytest.raises(JobError, match=rf"{name} is a folder where a file must be.* remove it"):
        annotate(config(sample, copy))


def test_a_locked_folder_is_refused(sample: Path, copy: Path) -> None:
    with folder_lock(copy / "train"), pytest.raises(LockedError, match="another job is writing"):
        annotate(config(sample, copy))


def test_a_job_that_lost_its_lock_ends_and_leaves_the_checksums(
    sample: Path, tmp_path: Path
) -> None:
    def steal(*_: object) -> None:
        (tmp_path / "train" / HOLDER).write_text('{"run": "of another job"}')

    with pytest.raises(LockedError, match="belongs to another job now"):
        annotate(config(sample, tmp_path, shard_size=2), steal)
    assert not (tmp_path / "train" / "SHA256SUMS").exists()


def test_bad_images_become_rows(sample: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(sample / "val", data / "train")
    folder = data / "train" / "n99999999"
    folder.mkdir()
    good = next((sample / "val").rglob("*.jpg")).read_bytes()
    (folder / "cut.jpg").write_bytes(good[:5000])
    (folder / "empty.JPEG").touch()
    (folder / "no image.png").write_text("hello")
    Image.new("CMYK", (50, 20), (9, 99, 0, 0)).save(folder / "cmyk.jpg")
    options = {"views": ["identity", "hflip"], "input_size": [64, 96]}
    report = annotate(config(data, tmp_path / "out", max_errors=3, **options))
    assert report.ok and (report.images, report.errors) == (8, 3)
    assert dict(report.error_list).keys() == {
        "n99999999/cut.jpg",
        "n99999999/empty.JPEG",
        "n99999999/no image.png",
    }
    assert report.labelled == 4
    store = LabelStore(tmp_path / "out" / "train")
    assert store.failed.sum() == 3
    assert store["n99999999/cmyk.jpg"].size == (50, 20)
    assert store["n99999999/cmyk.jpg"].label == -1
    assert store.views == ("identity", "hflip")
    with pytest.raises(KeyError, match="the file is empty"):
        store["n99999999/empty.JPEG"]
    again = annotate(config(data, tmp_path / "out", max_errors=0.3, **options))
    assert not again.ok and again.max_errors_exceeded


def test_labels_of_folders_that_no_teacher_knows(sample: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted((sample / "val").rglob("*.jpg"))):
        target = tmp_path / "data" / "train" / f"class {number}" / path.name
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
    report = annotate(config(tmp_path / "data", tmp_path / "out", numbering="folders"))
    assert (report.labelled, report.top1) == (0, None)
    store = LabelStore(tmp_path / "out" / "train")
    assert store.ground_truth.tolist() == [0, 1, 2, 3]
    assert store.attrs["label_space"] == "folders"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": "/nope.pth"}, TeacherError, "/nope.pth"),
        ({"input_size": 20}, TeacherError, "more than one patch"),
        ({"split": "test"}, ConfigError, "holds train, val"),
    ],
)
def test_faults_are_reported_before_anything_is_written(
    sample: Path, tmp_path: Path, change: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        annotate(config(sample, tmp_path / "out", **change))
    assert message in str(caught.value)
    assert not list((tmp_path / "out").rglob("shard-*"))
