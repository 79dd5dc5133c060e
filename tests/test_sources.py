"""Images where they are: tars, WebDataset, Parquet, lists and a store; labels found from all."""

import gc
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import scipy.io
import webdataset
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from tests.forms import FORMS, pack
from tests.jobs import config, digests
from tests.s3 import s3_server
from tokenlabel.annotate import annotate
from tokenlabel.annotate.cluster.scan import scan
from tokenlabel.dataset import LabelStore, TokenLabelDataset, TokenLabelMapper
from tokenlabel.dataset.format.keys import canonical_name
from tokenlabel.dataset.format.manifest import open_manifest
from tokenlabel.dataset.sources.image_source import Entry, ImageSource
from tokenlabel.dataset.sources.image_table import ImageTable
from tokenlabel.dataset.sources.open_source import open_images, open_split
from tokenlabel.dataset.sources.scan import scan_all
from tokenlabel.errors import ConfigError, FormatError, ImageError, MissingMapError, StorageError
from tokenlabel.inspection.verify.verify import verify


def entries(source: ImageSource) -> list[Entry]:
    return [entry for part in range(len(source.parts())) for entry in source.scan(part)]


@pytest.fixture(scope="module")
def photographs(sample: Path) -> dict[str, bytes]:
    """The sample's training images under ImageNet's kind of names, in an order of their own."""
    paths = sorted((sample / "train").glob("*/*"), key=lambda path: path.stat().st_size)
    return {
        f"{p.parent.name}/{p.parent.name}_{n}.JPEG": p.read_bytes() for n, p in enumerate(paths)
    }


@pytest.fixture(scope="module")
def forms(
    photographs: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """`data` of each form of the same images."""
    root = tmp_path_factory.mktemp("forms")
    return {name: make(root / name.replace(" ", "-"), photographs) for name, make in FORMS.items()}


@pytest.fixture(scope="module")
def labelled(
    forms: dict[str, str], tmp_path_factory: pytest.TempPathFactory, ray_here: None
) -> dict[str, LabelStore]:
    """The labels of a job on each form."""
    stores = {}
    for name, data in forms.items():
        out = tmp_path_factory.mktemp("labels")
        report = annotate(config(Path(data), out))
        assert report.ok and report.images == 16 and report.errors == 0
        assert report.top1 == stores["folder"].attrs["top1_of_report"] if stores else True
        stores[name] = LabelStore(out / "train")
        stores[name].attrs["top1_of_report"] = report.top1
    return stores


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_same_maps_and_classes(
    form: str, labelled: dict[str, LabelStore]
) -> None:
    want, got = labelled["folder"], labelled[form]
    assert len(got) == len(want)
    for row, key in enumerate(want.keys):
        found = got.row(key)
        for name in want.layout.planes():
            np.testing.assert_array_equal(getattr(got[found], name), getattr(want[row], name))
        assert got[found].label == want[row].label >= 0
        np.testing.assert_array_equal(got.thumbprint(found), want.thumbprint(row))


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_in_the_order_in_which_images_are_stored(
    form: str, labelled: dict[str, LabelStore], photographs: dict[str, bytes]
) -> None:
    keys = [canonical_name(key) for key in labelled[form].keys]
    if form == "folder":
        assert list(labelled[form].keys) == sorted(photographs)
    elif form == "tar of tars":
        assert sorted(keys) == sorted(map(canonical_name, photographs))
    else:
        assert keys == [canonical_name(key) for key in photographs]


@pytest.mark.parametrize("made_from", FORMS)
@pytest.mark.parametrize("read_as", FORMS)
def test_labels_of_one_form_are_found_from_every_other(
    made_from: str, read_as: str, forms: dict[str, str], labelled: dict[str, LabelStore]
) -> None:
    source = open_split(forms[read_as], "train")
    images = str(source)
    dataset = TokenLabelDataset(images, labelled[made_from], check="always")
    assert len(dataset) == 16
    want = labelled["folder"]
    for index, (image, labels) in enumerate(dataset):
        row = want.row(dataset.images.key(index))
        assert image.size == tuple(want.sizes[row].tolist())
        assert labels.hard_label().item() == want.ground_truth[row]


def test_loader_workers_read_tars(forms: dict[str, str], labelled: dict[str, LabelStore]) -> None:
    images = forms["webdataset"]
    dataset = TokenLabelDataset(images, labelled["webdataset"], transform=v2.Resize((8, 8)))
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=list)
    keys = [labels.hard_label().item() for batch in loader for _, labels in batch]
    assert keys == labelled["webdataset"].ground_truth.tolist()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_and_hugging_face_streams(
    forms: dict[str, str], labelled: dict[str, LabelStore]
) -> None:
    mapper = TokenLabelMapper(labelled["folder"], check="always")
    stream = webdataset.WebDataset(
        sorted(map(str, Path(forms["webdataset"]).parent.glob("*.tar"))), shardshuffle=False
    )
    seen = [mapper(sample["jpg"], sample["__key__"])[1].hard_label() for sample in stream]
    assert len(seen) == 16 and all(label >= 0 for label in seen)
    del stream
    gc.collect()  # WebDataset leaves its files to the garbage collector
    table = datasets.load_dataset(
        "parquet", data_files=f"{forms['parquet']}/data/*.parquet", split="train", streaming=True
    ).cast_column("image", datasets.Image(decode=False))
    for row in table:
        _, labels = mapper(row["image"]["bytes"], row["image"]["path"])
        assert labels.hard_label() >= 0


def test_keys_that_say_nothing_are_found_by_the_digest_of_the_file(
    photographs: dict[str, bytes], labelled: dict[str, LabelStore], tmp_path: Path
) -> None:
    images = {f"{n:09d}.jpg": data for n, data in enumerate(photographs.values())}
    path = pack(tmp_path / "00000.tar", images)
    dataset = TokenLabelDataset(str(path), labelled["folder"], check="always")
    names = [labels.hard_label().item() for _, labels in dataset]
    want = [labelled["folder"].ground_truth[labelled["folder"].row(k)] for k in photographs]
    assert names == want
    damaged = next(iter(photographs.values()))[:-2] + b"\xff\xd9\0"
    with pytest.raises(MissingMapError, match=r"no score map for .x\.jpg."):
        dataset.mapper(damaged, "x.jpg")


def test_an_ambiguous_name_finds_nothing(tmp_path: Path, photographs: dict[str, bytes]) -> None:
    one, other, *_ = photographs.values()
    path = pack(tmp_path / "t.tar", {"a/1.jpg": one, "b/1.jpg": other, "b/2.jpg": one})
    table = ImageTable(open_images(str(path)))
    assert [table.find(key) for key in ("a/1.jpg", "b/1.jpg", "b/2.jpg")] == [0, 1, 2]
    assert [table.find(key) for key in ("1.jpg", "c/1.jpg", "1", "c/2.jpg", "2")] == [
        *(-1, -1, -1),
        *(2, 2),
    ]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764_10026"),
        ("n01440764_10026.jpg", "n01440764_10026"),
        ("n01440764_10026", "n01440764_10026"),
        ("n01440764_10026_n01440764.JPEG", "n01440764_10026"),
        ("ILSVRC2012_val_00000293_n02129165.JPEG", "ILSVRC2012_val_00000293"),
        ("val/ILSVRC2012_val_00000293.JPEG", "ILSVRC2012_val_00000293"),
        ("a/b_n01440764.png", "b_n01440764"),
        ("a/v1.2", "v1.2"),
        ("e\u0301.jpg", "\u00e9"),
    ],
)
def test_canonical_names(key: str, name: str) -> None:
    assert canonical_name(key) == name


def test_many_keys_are_found(tmp_path: Path) -> None:
    images = {f"{n % 7}/{n // 3:05d}.{n % 3}.jpg": b"x" for n in range(30_000)}
    path = pack(tmp_path / "t.tar", images, tarfile.GNU_FORMAT)
    os.environ["TOKENLABEL_CACHE"] = str(tmp_path / "cache")
    try:
        table = ImageTable(open_images(str(path)))
        keys = list(images)
        for row in range(0, len(keys), 371):
            assert table.find(keys[row]) == row and table.key(row) == keys[row]
        assert table.find("7/00000.0.jpg") == 0, "the only one of that name"
        assert table.find("nothing.jpg") == -1
        before = [*(tmp_path / "cache").iterdir()]
        again = ImageTable(open_images(str(path)))
        assert len(again) == 30_000 and [*(tmp_path / "cache").iterdir()] == before
    finally:
        del os.environ["TOKENLABEL_CACHE"]


def test_equal_keys_are_refused(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {"1.jpg": b"x", "1.cls": b"0"})
    pack(tmp_path / "b.tar", {"2.jpg": b"x", "1.jpg": b"y"})
    with pytest.raises(FormatError, match=r"rows 0 and 2 both have '1.jpg'"):
        len(ImageTable(open_images(str(tmp_path / "{a,b}.tar"))))


def test_the_class_of_a_sample(tmp_path: Path) -> None:
    files = {
        "./0.cls": b"7\n",
        "./0.jpg": b"x",
        "1.png": b"x",
        "1.seg.png": b"x",
        "1.json": json.dumps({"label": 3, "caption": "a cat"}).encode(),
        "2.webp": b"x",
        "2.json": b"broken",
        "cat/3.jpg": b"x",
        "n01440764_4.jpg": b"x",
        "5.jpg": b"",
        "6.txt": b"no image",
        "a.b.jpg": b"x",
        "a.c.jpg": b"x",
    }
    source = open_images(str(pack(tmp_path / "t.tar", files, tarfile.USTAR_FORMAT)))
    found = entries(source)
    assert {entry.key: entry.class_name for entry in found} == {
        "0.jpg": "7",
        "1.png": "3",
        "2.webp": "",
        "cat/3.jpg": "cat",
        "n01440764_4.jpg": "n01440764",
        "5.jpg": "",
        "a.b.jpg": "",
        "a.c.jpg": "",
    }
    data = [*source.read(found)]
    assert data[0] == b"x" and isinstance(data[5], ImageError) and "is empty" in str(data[5])


VAL = {f"ILSVRC2012_val_{n:08d}.JPEG": b"x%d" % n for n in range(1, 5)}


def test_the_validation_tar_and_its_devkit(tmp_path: Path) -> None:
    pack(tmp_path / "ILSVRC2012_img_val.tar", VAL)
    source = open_split(str(tmp_path), "val")
    assert [entry.class_name for entry in entries(source)] == [""] * 4
    # As the devkit is: ids in an order of their own, 1-based, and classes that are no leaves.
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = [(1, "n02", 0), (2, "n01", 0), (3, "n09", 2)]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(rows, kinds)})
    text = b"2\n1\n1\n2\n"
    inside = {"t/data/meta.mat": meta.getvalue()}
    inside["t/data/ILSVRC2012_validation_ground_truth.txt"] = text
    plain = pack(tmp_path / "devkit.tar", inside)
    devkit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(plain) as tar, tarfile.open(devkit, "w:gz") as packed:
        for member in tar:
            packed.addfile(member, tar.extractfile(member))
    source = open_split(str(tmp_path), "val")
    assert [entry.class_name for entry in entries(source)] == ["n01", "n02", "n02", "n01"]
    assert [entry.key for entry in entries(source)] == list(VAL)


@pytest.mark.parametrize(
    "text",
    [
        "ILSVRC2012_val_00000001.JPEG 65\nILSVRC2012_val_00000002.JPEG 9\n",
        "ImageId,PredictionString\nILSVRC2012_val_00000001,65 1 2 3 4 9 1 1 1 1\n"
        "ILSVRC2012_val_00000002,9 3 3 3 3 \n",
    ],
)
def test_a_ground_truth_file_of_lines(text: str, tmp_path: Path) -> None:
    pack(tmp_path / "val.tar", VAL)
    (tmp_path / "truth.txt").write_text(text)
    source = open_split(str(tmp_path / "val.tar"), "val", str(tmp_path / "truth.txt"))
    assert [entry.class_name for entry in entries(source)] == ["65", "9", "", ""]


def test_a_wrong_ground_truth_file_is_named(tmp_path: Path) -> None:
    pack(tmp_path / "val.tar", VAL)
    (tmp_path / "truth.txt").write_text("1\n2\n")
    source = open_images(str(tmp_path / "val.tar"), str(tmp_path / "truth.txt"))
    with pytest.raises(ConfigError, match=r"truth.txt must name the class .* line 1 is '1'"):
        entries(source)


def test_damaged_tars_are_named(tmp_path: Path, photographs: dict[str, bytes]) -> None:
    path = pack(tmp_path / "t.tar", photographs)
    whole = path.read_bytes()
    for data in (b"", whole[:700], whole[: len(whole) // 2], b"x" * 4096, whole[3:]):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"t.tar must be a tar|no images found in"):
            len(ImageTable(open_images(str(path))))
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ConfigError, match=r"unpack .tar.gz to .tar"):
        entries(open_images(str(path)))


def test_a_tar_that_changes_is_the_storage_s_fault(tmp_path: Path) -> None:
    path = pack(tmp_path / "t.tar", {"a.jpg": b"x" * 5000})
    source = open_images(str(path))
    (entry,) = entries(source)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(StorageError, match="has changed since it was scanned"):
        list(source.read([entry]))
    path.unlink()
    with pytest.raises(StorageError, match=r"t.tar cannot be read: No such file"):
        list(source.read([entry]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nothing", "no images of the split 'train' in"),
        ("empty", "must hold a folder of that name, or files such as ILSVRC2012_img_train.tar"),
        ("a-{0..2}.tar", r"is not there: images are a folder, or files that end in .tar"),
        ("b-*.tar", r"is not there"),
        ("{a-0.tar,x.csv}", "must be one kind of files"),
        ("a.tar.gz", r"it is .gz. Remedy: name files of one kind; make .tar.gz a .tar"),
    ],
)
def test_data_that_is_not_there(data: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    pack(tmp_path / "a-0.tar", {"1.jpg": b"x"})
    pack(tmp_path / "a-1.tar", {"2.jpg": b"x"})
    (tmp_path / "x.csv").write_text("path\n1.jpg\n")
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(ConfigError, match=message):
        open_split(str(tmp_path / data), "train")


def test_patterns(tmp_path: Path) -> None:
    for name in ("a-08", "a-09", "a-10", "b-1", "train/c-0", "train/c-1"):
        pack(tmp_path / f"{name}.tar", {f"{name.rpartition('/')[2]}.jpg": b"x"})

    def keys(data: str, split: str = "train") -> list[str]:
        return [entry.key for entry in entries(open_split(str(tmp_path / data), split))]

    assert keys("a-{08..10}.tar") == ["a-08.jpg", "a-09.jpg", "a-10.jpg"]
    assert keys("{b-1,a-09}.tar") == ["b-1.jpg", "a-09.jpg"]
    assert keys("a-*.tar") == ["a-08.jpg", "a-09.jpg", "a-10.jpg"]
    assert keys("") == keys("{split}") == ["c-0.jpg", "c-1.jpg"]
    assert keys("a-{split}.tar", "10") == ["a-10.jpg"]


def test_parts_are_scanned_side_by_side_and_merged_in_order(tmp_path: Path, ray_here: None) -> None:
    for part in range(9):
        files = {f"{part}/{n:05d}.jpg": b"x" for n in range(9000 if part == 1 else 3)}
        pack(tmp_path / f"{part}.tar", files, tarfile.GNU_FORMAT)
    source = open_images(str(tmp_path / "*.tar"))
    for got, want in zip(scan(source), scan_all(source), strict=True):
        assert got.keys == want.keys and got.names == want.names
        for one, other in zip(got[2:], want[2:], strict=True):
            np.testing.assert_array_equal(one, other)
    (tmp_path / "7.tar").write_bytes(b"x" * 1024)
    with pytest.raises(ConfigError, match=r"7.tar must be a tar"):
        list(scan(source))


def test_a_row_group_is_fetched_once_a_shard(
    forms: dict[str, str], labelled: dict[str, LabelStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 5 over row groups of 3: 8 rows a shard."""
    from tokenlabel.annotate.cluster.window import fetched

    source = open_split(forms["parquet"], "train")
    rows = entries(source)[:8]
    batches, fetches = [rows[:5], rows[5:]], []

    def fetch(block: list[Entry], counts: list[int]) -> list[list[Any]]:
        fetches.append([entry.key for entry in block])
        data = source.read(block)
        return [list(islice(data, count)) for count in counts]

    got = [[data for part in parts for data in part] for parts in fetched(fetch, batches)]
    assert got == [[*source.read(batch)] for batch in batches]
    assert [len(keys) for keys in fetches] == [3, 3, 2]


def test_verify_and_command_line_from_tars(
    forms: dict[str, str], labelled: dict[str, LabelStore], tmp_path: Path
) -> None:
    store = labelled["webdataset"]
    for form in ("webdataset", "tar of tars", "parquet"):
        result = verify(store.root, str(open_split(forms[form], "train")))
        assert not result.faults, result.faults
    command = [sys.executable, "-m", "tokenlabel.cli", "inspect-labels", str(store.root)]
    shown = tmp_path / "a.png"
    key = labelled["parquet"].keys[3]
    done = subprocess.run(
        [*command, "--images", forms["webdataset"], "--key", key, "--png", str(shown)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with PIL.Image.open(shown) as image:
        assert image.width > 100
    page = tmp_path / "a.html"
    for form, asked, said in (
        ("parquet", ["--html", str(page)], "16 of 16 images"),
        ("tar of tars", ["--agreement", "2"], "on crops of 2 images"),
    ):
        more = ["--images", str(open_split(forms[form], "train")), *asked]
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout, done.stdout


def test_a_finished_split_of_tars_is_recognised_and_its_order_kept(
    forms: dict[str, str], labelled: dict[str, LabelStore], ray_here: None
) -> None:
    root = labelled["webdataset"].root
    before = digests(root)
    report = annotate(config(Path(forms["webdataset"]), root.parent))
    assert (report.written, report.skipped) == (0, 2)
    assert digests(root) == before
    manifest = open_manifest(root / "manifest")
    assert set(manifest.places["part"].tolist()) == {0, 1, 2, 3}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An S3 server, in this process's environment too."""
    with s3_server(tmp_path_factory.mktemp("s3")) as variables:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        yield variables
        for name, value in before.items():
            if value is None:
                del os.environ[name]


IN_CHILD = """
import sys
from pathlib import Path
from tokenlabel.annotate import annotate
from tests.jobs import config
from tokenlabel.dataset import TokenLabelDataset
from tokenlabel.dataset.sources.open_source import open_split
from tokenlabel.dataset.storage.remote_path import RemotePath

root, out, *forms = sys.argv[1:]
for path in Path(root).rglob("*"):
    if path.is_file():
        RemotePath(f"s3://images/{path.relative_to(root)}").put(path)
for number, form in enumerate(forms):
    data = form.replace(root, "s3://images")
    report = annotate(config(data, f"{out}/{number}").model_copy(update={"data": data}))
    assert report.ok and report.errors == 0, report
    images = str(open_split(data, "train"))
    dataset = TokenLabelDataset(images, f"{out}/{number}/train", check="always")
    assert len([*dataset]) == 16
"""


def test_images_on_s3_give_the_same_labels(
    forms: dict[str, str],
    labelled: dict[str, LabelStore],
    store: dict[str, str],
    tmp_path: Path,
) -> None:
    root = Path(forms["folder"]).parent
    chosen = ["folder", "tar of tars", "webdataset", "parquet"]
    # A process of its own: the store's threads do not survive the forks of other tests' loaders.
    code = [sys.executable, "-c", IN_CHILD, str(root), str(tmp_path), *(forms[f] for f in chosen)]
    done = subprocess.run(
        code,
        capture_output=True,
        text=True,
        check=False,
        env={**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, **store},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for number, form in enumerate(chosen):
        got, want = LabelStore(tmp_path / str(number) / "train"), labelled[form]
        assert list(got.keys) == list(want.keys)
        for row in range(len(want)):
            for name in want.layout.planes():
                np.testing.assert_array_equal(getattr(got[row], name), getattr(want[row], name))
        assert got.ground_truth.tolist() == want.ground_truth.tolist()
