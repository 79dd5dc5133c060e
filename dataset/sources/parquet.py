"""Images inside tables: Parquet files, and the Arrow files of a `datasets` folder."""

import json
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Protocol

from ...errors import ConfigError, ImageError, StorageError
from ..storage.remote_path import RemotePath, as_path
from .image_source import Entry, size_fault

#: Names of columns, the first that a table has counts.
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")
_KEY_COLUMNS = ("key", "__key__", "path", "filename", "file_name", "id")
#: Rows that are decoded at a time.
_ROWS = 256


@dataclass(frozen=True)
class TableSource:
    """The images of Parquet or Arrow files, in the order of their rows.

        source = TableSource.at("imagenet", sorted(glob("imagenet/train-*.parquet")))

    The image is in a column `image`, `img`, `jpg`, `png` or `webp`: bytes, or the struct of bytes
    and path that Hugging Face `datasets` writes. Its key is that path, or what a column `key`,
    `__key__`, `path`, `filename`, `file_name` or `id` holds; otherwise FILE/ROW, such as
    train-00000/17. Its class is in a column `label`, `labels`, `fine_label`, `cls`, `class` or
    `target`; numbers get the names that the schema of `datasets` gives them.

    A scan reads the columns of paths and labels only: of Parquet on S3, a request a row group.
    Arrow files cannot be read by column, so that a scan on S3 reads all their bytes.

    Attributes:
        name: what the user calls it.
        files: paths or URLs of the tables, in order.
        numbered: names of the classes by number, from the schema of the first file.
    """

    name: str
    files: tuple[str, ...]
    numbered: list[str] | None = field(hash=False)
    in_blocks: ClassVar[bool] = True

    @classmethod
    def at(cls, name: str, files: Sequence[str]) -> "TableSource":
        """The images of some files, of which the first one's schema is read.

        Raises:
            ConfigError: there is no file; the first one is no table, or holds no images.
            StoreError: a store refuses.
        """
        if not files:
            raise ConfigError(f"{name} holds no Parquet or Arrow file. Remedy: check the path")
        with scanned_table(files[0]) as table:
            return cls(name, tuple(files), _Columns(table.schema).class_names)

    @classmethod
    def saved(cls, folder: str, split: str = "") -> "TableSource":
        """The images of a folder that `Dataset.save_to_disk` wrote, or one of a `DatasetDict`.

        Args:
            folder: path or URL.
            split: name of the `DatasetDict`'s split; not needed for a `Dataset`.

        Raises:
            ConfigError: it is no such folder, has no such split, or was saved with an order of its
                rows apart from the rows.
            StoreError: a store refuses.
        """
        root = as_path(folder)
        if split and not (root / "state.json").is_file():
            root = root / split
        try:
            state = json.loads((root / "state.json").read_bytes())
            names = [str(one["filename"]) for one in state["_data_files"]]
            reordered = bool(state.get("_indices_files"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{root} must be a folder that Dataset.save_to_disk wrote: its state.json cannot "
                f"be read ({_short(error)}). Remedy: check the path and the split's name"
            ) from error
        if reordered:
            raise ConfigError(
                f"{root} was saved after shuffle, select or filter, with the rows in one file and "
                "their order in another. Remedy: dataset.flatten_indices().save_to_disk(...)"
            )
        if odd := [name for name in names if "/" in name or name in ("", ".", "..")]:
            raise ConfigError(
                f"{root}/state.json names {odd[0]!a}, which is no file in its folder. Remedy: save "
                "the data set again"
            )
        return cls.at(str(root), [str(root / name) for name in names])

    def __str__(self) -> str:
        return self.name

    def parts(self) -> list[str]:
        """The files."""
        return list(self.files)

    def scan(self, part: int) -> Iterator[Entry]:
        """The images of one file, by its columns of paths and labels.

        Raises:
            ConfigError: it is no such table, or is damaged; a label is no class.
            StoreError: a store refuses.
        """
        path = self.files[part]
        with scanned_table(path) as table:
            columns = _Columns(table.schema)
            row = 0
            for block in table.blocks():
                first_row = row
                for *keys, label in table_rows(table, block, [*columns.keys, columns.label]):
                    key = next(filter(None, map(_text, keys)), f"{PurePosixPath(path).stem}/{row}")
                    yield Entry(key, columns.class_name(label), part, block, row - first_row)
                    row += 1

    def read(self, entries: Sequence[Entry]) -> Iterator[bytes | ImageError]:
        """The bytes of each image; those of a row group that follow one another, in one fetch.

        Raises:
            StorageError: a file cannot be read, or no longer has a row; StoreError where a store
                refuses.
        """
        for (part, block), group in groupby(entries, lambda entry: (entry.part, entry.start)):
            rows = [entry.size for entry in group]
            found = self._rows(self.files[part], block, set(rows))
            yield from (found[row] for row in rows)

    def _rows(self, path: str, block: int, wanted: set[int]) -> dict[int, bytes | ImageError]:
        """The images of some rows of a row group."""
        found: dict[int, bytes | ImageError] = {}
        try:
            with open_table(path) as table:
                columns, first = _Columns(table.schema), 0
                for batch in table.batches(block, columns.image):
                    here = [row for row in wanted if first <= row < first + batch.num_rows]
                    for row in here:
                        values = [_column(batch, name)[row - first] for name in columns.image]
                        found[row] = _image(*values)
                    first += batch.num_rows
                    if len(found) == len(wanted):
                        break
        except unreadable() as error:
            raise StorageError(
                f"the images in {path} cannot be read: {_short(error)}. Remedy: fix the disk or "
                "mount, or download the file again, and run the same command again"
            ) from error
        if missing := wanted - found.keys():
            raise StorageError(
                f"{path} no longer has row {min(missing)} of its row group {block}: it has changed "
                "since it was scanned. Remedy: restore it, and run the same command again"
            )
        return found


def holds_images(file: str) -> bool:
    """Whether a table has a column of image bytes; else it may be a list of paths.

    Raises:
        ConfigError: it is no table.
        StoreError: a store refuses.
    """
    with scanned_table(file) as table:
        return bool(_image_column(table.schema))


class Table(Protocol):
    """A table in blocks: row groups of Parquet, record batches of an Arrow file."""

    schema: Any

    def blocks(self) -> Iterator[int]:
        """Numbers of the blocks: of row groups; of an Arrow file, the batch's first byte."""
        ...

    def batches(self, block: int, columns: Sequence[str]) -> Iterator[Any]:
        """Columns of a block, some rows at a time; `image.path` is a field of a struct."""
        ...


@contextmanager
def open_table(path: str) -> Iterator[Table]:
    """A Parquet or Arrow file, by its ending.

    Raises:
        ConfigError: pyarrow is missing.
        FileNotFoundError, EOFError, OSError, pyarrow.ArrowException: it cannot be read.
        StoreError: a store refuses.
    """
    _need_pyarrow()
    kind = _ArrowFile if path.endswith(".arrow") else _ParquetFile
    with kind(as_path(path)) as table:
        yield table


class _ParquetFile:
    def __init__(self, path: Path | RemotePath) -> None:
        from pyarrow.parquet import ParquetFile

        options = {"page_checksum_verification": True}
        if isinstance(path, RemotePath):
            # The columns of a row group in one request, and the footer once a process.
            size, footer = _footer(path)
            remote = path.open(0, size)
            self._file = ParquetFile(remote, metadata=footer, pre_buffer=True, **options)
        else:
            self._file = ParquetFile(path, **options)
        self.schema = self._file.schema_arrow

    def __enter__(self) -> "_ParquetFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self) -> Iterator[int]:
        return iter(range(self._file.num_row_groups))

    def batches(self, block: int, columns: Sequence[str]) -> Iterator[Any]:
        if block >= self._file.num_row_groups:
            raise EOFError(f"it has {self._file.num_row_groups} row groups, not {block + 1}")
        options: Any = {"columns": list(columns), "use_threads": False}
        yield from self._file.iter_batches(_ROWS, row_groups=[block], **options)


class _ArrowFile:
    def __init__(self, path: Path | RemotePath) -> None:
        import pyarrow

        if isinstance(path, RemotePath):
            self._file = pyarrow.PythonFile(path.open(0), "r")
        else:
            self._file = pyarrow.memory_map(str(path))
        self.schema = pyarrow.ipc.read_schema(self._file)
        self._start = self._file.tell()

    def __enter__(self) -> "_ArrowFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self) -> Iterator[int]:
        offset = self._start
        while self._message(offset) is not None:
            following = self._file.tell()
            yield offset
            offset = following

    def batches(self, block: int, columns: Sequence[str]) -> Iterator[Any]:
        import pyarrow

        message = self._message(block)
        if message is None:
            raise EOFError("it ends before this record batch")
        batch = pyarrow.ipc.read_record_batch(message, self.schema)
        for name in columns:  # unlike Parquet's, its offsets are as they stand in the file
            _column(batch, name).validate(full=True)
        yield batch

    def _message(self, offset: int) -> Any:
        """The record batch that begins there; None at the end."""
        import pyarrow

        self._file.seek(offset)
        try:
            message = pyarrow.ipc.read_message(self._file)
        except EOFError:
            if self._file.tell() - offset != 8:  # the mark of the end
                raise EOFError(f"it is cut short at byte {offset}") from None
            return None
        if message.type != "record batch":
            raise pyarrow.ArrowInvalid(f"it holds a {message.type}, not record batches only")
        return message


@lru_cache(maxsize=16)
def _footer(path: RemotePath) -> tuple[int, Any]:
    """Bytes of a Parquet file in a store, and its footer."""
    from pyarrow.parquet import read_metadata

    size = path.size()
    return size, read_metadata(path.open(0, size))


class _Columns:
    """Which columns of a table are what.

    Attributes:
        image: of the bytes, and of the path that may be there in their place.
        keys: of the key, the first that is not null counts.
        label: empty where the table has none.
        class_names: of the label's numbers; None where the schema has none.
    """

    def __init__(self, schema: Any) -> None:
        name = _image_column(schema)
        if not name:
            raise ConfigError(
                f"a table needs the bytes of its images in a column called "
                f"{', '.join(IMAGE_COLUMNS)}; it has {', '.join(schema.names)[:200]!a}. Remedy: "
                "rename the column, or embed the images (datasets' save_to_disk and push_to_hub do)"
            )
        self.image, self.keys = [name], list[str]()
        kind = schema.field(name).type
        if _is_struct(kind):
            self.image = [f"{name}.bytes"]
            if kind.get_field_index("path") >= 0:
                self.image.append(f"{name}.path")
                self.keys.append(f"{name}.path")
        if key := first(_KEY_COLUMNS, schema.names):
            self.keys.append(key)
        self.label = first(LABEL_COLUMNS, schema.names)
        self.class_names = _class_names(schema, self.label)

    def class_name(self, label: object) -> str:
        """Of what the label's column holds; empty for null and negative numbers."""
        if label is None or (isinstance(label, int) and label < 0):
            return ""
        if self.class_names is None or not isinstance(label, int):
            return str(label)
        if label >= len(self.class_names):
            raise ConfigError(
                f"the column {self.label!r} holds {label}, but names {len(self.class_names)} "
                "classes. Remedy: correct the ClassLabel of its schema"
            )
        return self.class_names[label]


def _class_names(schema: Any, label: str) -> list[str] | None:
    """Names of the numbers of a column, as `datasets` writes them into a schema."""
    try:
        text = (schema.metadata or {})[b"huggingface"]
        names = json.loads(text)["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return list(map(str, names)) if isinstance(names, list) else None


def _image_column(schema: Any) -> str:
    """The first column of images that holds bytes; empty where none does."""
    from pyarrow import types

    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if _is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            if types.is_binary(kind) or types.is_large_binary(kind):
                return name
    return ""


def _is_struct(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_struct(kind))


def table_rows(table: Table, block: int, columns: Sequence[str]) -> Iterator[list[Any]]:
    """The values of some columns, row by row; None for a column without a name."""
    named = [name for name in columns if name]
    for batch in table.batches(block, named):
        lists = [
            _column(batch, name).to_pylist() if name else [None] * batch.num_rows
            for name in columns
        ]
        yield from map(list, zip(*lists, strict=True))


def _column(batch: Any, name: str) -> Any:
    """A column of a batch; `image.path` is a field of one that is a struct."""
    from pyarrow.compute import struct_field

    name, _, inner = name.partition(".")
    return struct_field(batch.column(name), inner) if inner else batch.column(name)


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode()
    return "" if value is None else str(value)


def _image(data: Any, path: Any = None) -> bytes | ImageError:
    """What a row holds, pyarrow scalars."""
    if data.is_valid:
        return size_fault(len(data.as_buffer())) or data.as_py()
    if path is not None and path.is_valid:
        return ImageError(f"the row holds no bytes, only the path {path.as_py()!a}")
    return ImageError("the row holds no bytes")


def first(names: Sequence[str], columns: Container[str]) -> str:
    """The first of the names that is a column; empty where none is."""
    return next((name for name in names if name in columns), "")


@contextmanager
def scanned_table(path: str) -> Iterator[Table]:
    """A table whose faults are faults of the configuration."""
    try:
        with open_table(path) as table:
            yield table
    except unreadable() as error:
        raise ConfigError(
            f"{path} must be a Parquet file, or a .arrow file that Dataset.save_to_disk wrote, "
            f"whole and readable: {_short(error)}. Remedy: check the path; download it again"
        ) from error


def unreadable() -> tuple[type[Exception], ...]:
    """What pyarrow and files raise where a table cannot be read."""
    _need_pyarrow()
    from pyarrow import ArrowException

    return (ArrowException, OSError, EOFError, ValueError, KeyError)


def _need_pyarrow() -> None:
    try:
        import pyarrow.ipc  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "Parquet and Arrow files need the package pyarrow. Remedy: pip install "
            "'tokenlabel[tables]'"
        ) from error


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
