"""Lists of images: what they may look like, and what is read through them."""

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.painted import painted
from tokenlabel.dataset.sources.listing import ListSource
from tokenlabel.errors import ConfigError, ImageError, StorageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of them in a folder."""
    (tmp_path / "n1").mkdir()
    (tmp_path / "n1/a.png").write_bytes(painted())
    (tmp_path / "b.png").write_bytes(painted((60, 40)))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("l.csv", b"\xef\xbb\xbfpath,label\r\n./n1/a.png,cat\r\n\r\nb.png,-1\r\n", "path"),
        ("l.csv", b"n1/a.png,cat\nb.png,", "path"),
        ("l.tsv", b"wnid\tid\tfile\ncat\tone\tn1/a.png\n\tt\xe2\x80\xa8wo\tb.png\n", "id"),
        ("l.csv", b'id,label,file\n"one",cat,n1/a.png\n"t\xe2\x80\xa8wo",,b.png\n', "id"),
        (
            "l.jsonl",
            b'{"image": "n1/a.png", "label": "cat", "id": "one"}\n\n'
            b'{"image": "b.png", "label": null, "id": "t\xe2\x80\xa8wo"}',
            "id",
        ),
    ],
)
def test_each_form_gives_keys_classes_and_bytes(
    folder: Path, name: str, text: bytes, expected: str
) -> None:
    (folder / name).write_bytes(text)
    source = pickle.loads(pickle.dumps(ListSource(str(folder / name))))
    entries = [*source.scan(0)]
    keys = ["n1/a.png", "b.png"] if expected == "path" else ["one", "t\u2028wo"]
    assert [(e.key, e.class_name) for e in entries] == [(keys[0], "cat"), (keys[1], "")]
    assert [*source.read(entries[::-1])] == [painted((60, 40)), painted()]


def test_a_parquet_list_finds_its_row_again(folder: Path) -> None:
    file = folder / "l.parquet"
    columns = {"path": ["b.png", str(folder / "n1/a.png")], "id": [7, 8], "label": [3, -1]}
    pq.write_table(pa.table(columns), file, row_group_size=1)
    source = ListSource(str(file))
    entries = [*source.scan(0)]
    assert [(e.key, e.class_name, e.start) for e in entries] == [("7", "3", 0), ("8", "", 1)]
    assert [*source.read(entries)] == [painted((60, 40)), painted()]


def test_paths_are_relative_to_the_root_that_is_given(folder: Path, tmp_path_factory) -> None:
    file = tmp_path_factory.mktemp("lists") / "l.csv"
    file.write_text("b.png\n")
    source = ListSource(str(file), str(folder))
    assert [*source.read([*source.scan(0)])] == [painted((60, 40))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", b"path,label\nb.png,a\nb.png\n", "line 3 of .* has 1 columns"),
        ("l.csv", b"path\nhf://x\n", "line 2 .*hf://"),
        ("l.csv", b"a,b,c\n1,2,3\n", "needs a column"),
        ("l.csv", b"path\n", "names no image"),
        ("l.csv", b"", "needs a column|names no image"),
        ("l.csv", b"\xff\xfe", "cannot be read"),
        ("l.csv", b"path\n" + b"a" * (1 << 17), "longer"),
        ("l.jsonl", b'{"path": "b.png"}\n{"pa', "line 2"),
        ("l.jsonl", b'{"path": ["b.png"]}\n', "line 1 .*neither text"),
        ("l.jsonl", b'{"path": "b.png"}\n{"label": 1}\n', "line 2 .*names no image"),
        ("l.parquet", b"PAR1", "whole and readable"),
    ],
)
def test_a_bad_list_is_an_error_of_the_configuration(
    folder: Path, name: str, text: bytes, message: str
) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        [*ListSource(str(folder / name)).scan(0)]


def test_faults_of_files_and_of_the_list(folder: Path) -> None:
    (folder / "empty.png").touch()
    (folder / "link.png").symlink_to("nowhere")
    file = folder / "l.csv"
    file.write_text("id,path\n1,empty.png\n2,link.png\n3,gone.png\n")
    source = ListSource(str(file))
    empty, link, gone = source.scan(0)
    assert [str(e) for e in source.read([empty, link]) if isinstance(e, ImageError)] == [
        "the file is empty",
        "cannot be read: No such file or directory",
    ]
    with pytest.raises(StorageError, match=r"gone\.png"):
        [*source.read([gone])]
    file.write_text("id,path\n4,empty.png\n")
    with pytest.raises(StorageError, match="changed"):
        [*source.read([empty])]
