"""Images in tables that `datasets` and pyarrow wrote."""

import json
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.painted import painted
from tokenlabel.dataset.sources.parquet import TableSource, holds_images
from tokenlabel.errors import ConfigError, ImageError, StorageError

IMAGES = [painted((20 + i, 10)) for i in range(7)]
NAMES = [f"n01440764_{i}_n01440764.JPEG" for i in range(7)]


@pytest.fixture(scope="module")
def table() -> datasets.Dataset:
    """Seven images of two classes, the last one of none."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    images = [{"bytes": data, "path": name} for data, name in zip(IMAGES, NAMES, strict=True)]
    labels = [0, 1, 0, 1, 0, 1, -1]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.mark.parametrize("form", ["parquet", "folder", "folder of splits"])
def test_what_datasets_writes_is_read(tmp_path: Path, table, form: str) -> None:
    if form == "parquet":
        table.to_parquet(str(tmp_path / "t.parquet"), batch_size=3)
        source = TableSource.at("t", [str(tmp_path / "t.parquet")])
    elif form == "folder":
        table.save_to_disk(tmp_path / "t", num_shards=2)
        source = TableSource.saved(str(tmp_path / "t"))
    else:
        datasets.DatasetDict(val=table).save_to_disk(tmp_path / "t")
        source = TableSource.saved(str(tmp_path / "t"), "val")
    source = pickle.loads(pickle.dumps(source))
    assert source.numbered == ["cat", "dog"]
    entries = [entry for part in range(len(source.parts())) for entry in source.scan(part)]
    assert [entry.key for entry in entries] == NAMES
    assert [entry.class_name for entry in entries] == ["cat", "dog"] * 3 + [""]
    assert [*source.read(entries[::-1])] == IMAGES[::-1]


def test_plain_columns_and_rows_without_bytes(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    columns = {"jpg": [IMAGES[0], None, b""], "key": ["a", None, "c"], "cls": ["x", None, "y"]}
    pq.write_table(pa.table(columns), file)
    source = TableSource.at("t", [str(file)])
    entries = [*source.scan(0)]
    assert [(e.key, e.class_name) for e in entries] == [("a", "x"), ("t/1", ""), ("c", "y")]
    data, missing, empty = source.read(entries)
    assert data == IMAGES[0]
    assert isinstance(missing, ImageError) and str(missing) == "the row holds no bytes"
    assert isinstance(empty, ImageError) and str(empty) == "the file is empty"
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "/x.png"}]}), file)
    kind = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "/x.png"}]}, schema=kind), file)
    (found,) = source.read([*source.scan(0)])
    assert isinstance(found, ImageError) and "only the path '/x.png'" in str(found)
    with pytest.raises(StorageError, match="no longer has row 1"):
        [*source.read(entries)]
    pq.write_table(pa.table({"image": ["x.png"]}), file)
    assert not holds_images(str(file))
    with pytest.raises(ConfigError, match="a table needs the bytes"):
        TableSource.at("t", [str(file)])


def test_an_order_apart_from_the_rows_is_refused(tmp_path: Path, table) -> None:
    table.save_to_disk(tmp_path / "t")
    state = json.loads((tmp_path / "t/state.json").read_text())
    state["_indices_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "t/state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="flatten_indices"):
        TableSource.saved(str(tmp_path / "t"))


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_files_that_are_cut_anywhere_are_errors(tmp_path: Path, table, ending: str) -> None:
    if ending == ".parquet":
        file = tmp_path / "t.parquet"
        table.to_parquet(str(file))
    else:
        table.save_to_disk(tmp_path / "t")
        (file,) = (tmp_path / "t").glob("*.arrow")
    source = TableSource.at("t", [str(file)])
    entries, whole = [*source.scan(0)], file.read_bytes()
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="whole and readable"):
            [*source.scan(0)]
        if size < len(whole) - 8:
            with pytest.raises(StorageError):
                [*source.read(entries)]
