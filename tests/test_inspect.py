"""The summary of a split, and how well crops of its maps agree with the teacher."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.jobs import config
from tests.maps import write_split
from tests.painted import invoke, painted, write_class_names, write_store
from tokenlabel.annotate import annotate
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.store import LabelStore
from tokenlabel.errors import FormatError
from tokenlabel.inspection import summary
from tokenlabel.inspection.agreement import SCALES, measure_agreement
from tokenlabel.inspection.compare import compare
from tokenlabel.inspection.label_sets import ClassNames
from tokenlabel.inspection.statistics import Histogram
from tokenlabel.inspection.summary import summarise

COUNTS = {"labelled": 8, "top1": 4, "top5": 6, "mass": 4.0}


@pytest.fixture(scope="session")
def labels(sample: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """Labels of the sample's 4 validation images by the real job, with 3 x 3 maps."""
    out = tmp_path_factory.mktemp("inspect")
    annotate(config(sample, out, split="val", input_size=96, k=5))
    return out / "val"


def made_up(folder: Path, rows: int, **more: object) -> Path:
    layout = MapLayout(("identity",), (3, 4), 4, 50, residual=6)
    keys = [f"{n:05d}.jpg" for n in range(rows)]
    write_split(folder, keys, layout, 8, label_space="teacher", **(COUNTS | more))
    return folder


def test_statistics_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """Over all patches, dense, one by one."""
    facts = summarise(made_up(tmp_path, 21))
    store = LabelStore(tmp_path)
    mass, entropy, top, distinct, missing, hits = [], [], [], [], [], 0
    for key in store.keys:
        entry = store[key]
        classes, probs, _ = entry.probabilities()
        best = classes[..., 0]
        top += best.ravel().tolist()
        distinct.append(len({*best.ravel().tolist()}))
        hits += int((best == entry.label).sum())
        if entry.label not in classes[probs > 0]:
            missing.append(key)
        for stored, whole in zip(probs.reshape(-1, 4), entry.dense().reshape(-1, 50), strict=True):
            mass.append(stored.sum())
            entropy.append(-(whole * np.log(np.maximum(whole, 1e-30))).sum())
    assert facts["sampled"] == facts["images"] == 21
    assert facts["topk_mass_of_patches"]["mean"] == pytest.approx(np.mean(mass), abs=1e-4)
    assert facts["topk_mass_of_patches"]["p50"] == pytest.approx(np.median(mass), abs=2e-3)
    assert facts["entropy"]["mean"] == pytest.approx(np.mean(entropy), abs=1e-3)
    assert facts["distinct_classes"]["mean"] == pytest.approx(np.mean(distinct))
    assert facts["distinct_classes"]["p50"] == np.median(distinct)
    assert facts["patches_with_label_on_top"] == pytest.approx(hits / (21 * 12))
    counts = np.bincount(top, minlength=50)
    first = facts["frequent_classes"][0]
    assert first["share"] == counts.max() / len(top) and counts[first["class"]] == counts.max()
    assert facts["never_on_top"] == (counts == 0).sum()
    assert facts["images_without_their_label"] == len(missing)
    listed = facts["images_without_their_label_list"]
    assert {entry["key"] for entry in listed} == {*missing}
    assert [e["share"] for e in listed] == sorted((e["share"] for e in listed), reverse=True)
    for chart in ("topk_mass_histogram", "entropy_histogram"):
        assert sum(facts[chart]["counts"]) == 21 * 12
        assert len(facts[chart]["edges"]) == len(facts[chart]["counts"]) + 1


def test_large_sets_are_sampled_evenly_unless_all_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "SAMPLE_IMAGES", 10)
    made_up(tmp_path, 21)
    assert summarise(tmp_path)["sampled"] == 10
    seen: list[tuple[int, int]] = []
    facts = summarise(tmp_path, True, lambda done, total: seen.append((done, total)))
    assert facts["sampled"] == 21 and seen[-1] == (21, 21)
    assert "a sample of 10 images; --all reads every one" in invoke("inspect-labels", tmp_path)
    assert "all 21 images" in invoke("inspect-labels", tmp_path, "--all")


def test_errors_are_counted_by_reason_and_named(tmp_path: Path) -> None:
    layout = MapLayout(("identity",), (2, 2), 3, 50, residual=4)
    keys = [f"{n:02d}.jpg" for n in range(20)]
    errors = {key: f"truncated after {n} bytes" for n, key in enumerate(keys[:12])}
    errors[keys[15]] = "not an image"
    write_split(tmp_path, keys, layout, 8, errors=errors, **COUNTS)
    facts = summarise(tmp_path)
    assert facts["error_reasons"] == {"truncated after N bytes": 12, "not an image": 1}
    assert facts["error_list"] == [[key, errors[key]] for key in keys[:10]]
    text = invoke("inspect-labels", tmp_path)
    assert "20 in 3 shards, 13 errors" in text and "and 3 more errors" in text


def test_a_split_without_a_single_map_has_a_summary(tmp_path: Path) -> None:
    layout = MapLayout(("identity",), (2, 2), 3, 50, residual=4)
    write_split(tmp_path, ["a.jpg"], layout, errors={"a.jpg": "empty"}, **COUNTS)
    facts = summarise(tmp_path)
    assert facts["sampled"] == 0 and facts["entropy"] is None
    json.dumps(facts, allow_nan=False)
    assert "no map 'a.jpg': empty" in invoke("inspect-labels", tmp_path)


def test_damaged_values_end_in_a_message(tmp_path: Path) -> None:
    store = write_store(
        tmp_path / "nan", tmp_path / "images", {"a.png": painted()}, best=np.nan, **COUNTS
    )
    with pytest.raises(FormatError, match=r"without NaN; row 0 of .*nan has others"):
        summarise(store.root)
    with pytest.raises(FormatError, match="without NaN"):
        compare(store.root, store.root)
    made_up(tmp_path / "other", 8, mass="much")
    with pytest.raises(FormatError, match="mass must be a number, got 'much'"):
        summarise(tmp_path / "other")


def test_hostile_names_are_not_markup(tmp_path: Path) -> None:
    made_up(tmp_path, 8, teacher="[red]x[/nothing]")
    write_class_names(tmp_path, [f"[b]{n}[/x]" for n in range(50)])
    text = invoke("inspect-labels", tmp_path)
    assert "[red]x[/nothing]" in text and "[b]" in text


def test_class_names() -> None:
    names = ClassNames(["n02108422", "tench, a fish"])
    assert (names[0], names[1], names[2]) == ("bull mastiff", "tench, a fish", "2")
    assert ClassNames(None)[7] == "7"


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=200), st.floats(0.01, 0.99))
def test_quantiles_are_within_a_bin(values: list[float], share: float) -> None:
    array = np.array(values)
    histogram, logarithmic = Histogram.even(1.0), Histogram.logarithmic()
    histogram.add(array)
    logarithmic.add(array)
    want = np.sort(array)[max(int(np.ceil(share * len(array))) - 1, 0)]
    assert histogram.quantile(share) == pytest.approx(want, abs=1.1e-3)
    assert logarithmic.quantile(share) == pytest.approx(want, rel=0.014, abs=1e-9)


def test_agreement_knows_the_cost_of_storage_and_the_noise_floors(
    labels: Path, sample: Path
) -> None:
    """The map as stored, and the teacher against itself, are the rows whose order is known."""
    result = measure_agreement(labels, 2, sample)
    assert result["images"] == 2 and result["teacher"] == "tf_efficientnet_lite0"
    rows = {(row["target"], *row["scale"]): row for row in result["rows"]}
    kinds = {target for target, *_ in rows}
    assert {"stored", "map", "map, mirrored", "one label", "teacher, other size"} < kinds
    assert len(rows) == 6 * len(SCALES) + 1
    stored = rows["stored", 1.0, 1.0]
    assert stored["top1"] == 1 and 0 < stored["kl"] < 0.5
    assert stored["kl"] == min(row["kl"] for key, row in rows.items() if key[0] != "teacher")
    for scale in SCALES:
        itself = rows["teacher", *scale]
        assert itself["kl"] < 1e-5 and itself["tv"] < 1e-5 and itself["top1"] == 1
        for kind in kinds - {"teacher", "stored"}:
            row = rows[kind, *scale]
            assert 0 < row["tv"] < 1 and row["kl"] > 0 and row["label_top1"] in (0, 0.5, 1)
            # Pinsker's inequality, which holds for means too.
            assert 2 * row["tv"] ** 2 <= row["kl"]
    smallest = SCALES[-1]
    floor = rows["teacher, mirrored", *smallest]["kl"]
    assert floor < rows["map", *smallest]["kl"] and floor < rows["one label", *smallest]["kl"]
    command = ("inspect-labels", labels, "--agreement", 2, "--images", sample)
    assert json.loads(invoke(*command, "--json")) == [result], "the seed decides"
    text = invoke(*command, "--seed", 1)
    assert "teacher, mirrored" in text and "8%-20%" in text and "total variation" in text
    assert f"{stored['kl']:.3f}" not in text


def test_with_all_classes_stored_nothing_is_lost(sample: Path, tmp_path: Path) -> None:
    """KL of the stored map is then float16's rounding alone."""
    annotate(config(sample, tmp_path, split="val", k=1000, precise=True))
    rows = measure_agreement(tmp_path / "val", 1, sample)["rows"]
    assert rows[0]["target"] == "stored" and rows[0]["kl"] < 1e-5 and rows[0]["top1"] == 1


def test_agreement_finds_the_teacher_or_says_what_is_missing(
    labels: Path, sample: Path, tmp_path: Path
) -> None:
    state = tmp_path / "other.pth"
    import timm

    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), state)
    command = ("inspect-labels", labels, "--agreement", 1)
    text = invoke(*command, "--images", sample, "--weights", state, code=2)
    assert "these weights have the digest" in text and "--weights" in text
    assert "--images" in invoke(*command, "--images", tmp_path, code=2)
    images = Path(shutil.copytree(sample / "val", tmp_path / "val"))
    for path in images.rglob("*.jpg"):
        path.write_bytes(path.read_bytes() + b"\0")
    assert "must be the image that was annotated" in invoke(*command, "--images", images, code=1)
    made_up(tmp_path / "made", 8)
    assert "only labels of `annotate`" in invoke(
        "inspect-labels", tmp_path / "made", "--agreement", 1, "--images", sample, code=1
    )
