"""A list of images: CSV, TSV, JSONL or Parquet with the path and the class of each."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, ClassVar

from ...errors import ConfigError, ImageError, StorageError
from ..storage.remote_path import RemotePath, as_path
from .folder import read_file
from .image_source import Entry, size_fault
from .parquet import first, scanned_table, table_rows, unreadable

_PATHS = ("path", "filename", "file_name", "file", "image", "url")
_LABELS = ("label", "class", "target", "cls", "wnid")
_KEYS = ("key", "id")
#: A line of a list that is longer is no line.
_MOST_LINE = 1 << 16
#: Objects that are read at the same time, and images that are in memory at the same time.
_AT_ONCE, _IN_MEMORY = 16, 64


@dataclass(frozen=True)
class ListSource:
    """The images that a list names: .csv, .tsv, .jsonl or .parquet.

        source = ListSource("imagenet/train.csv")  # path,label / n01440764/a.JPEG,n01440764

    The path is in a column `path`, `filename`, `file_name`, `file`, `image` or `url`; the class in
    `label`, `class`, `target`, `cls` or `wnid`, if at all. A CSV or TSV without such a header holds
    paths, or paths and classes. Paths are relative to the list's folder, absolute, or URLs.

    The key is what a column `key` or `id` holds; without one, the path as the list has it, without
    `./` at its beginning.

    Attributes:
        file: path or URL of the list.
        root: the folder that paths are relative to, if not the list's.
    """

    file: str
    root: str = ""
    numbered: ClassVar[list[str] | None] = None
    in_blocks: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.file

    def parts(self) -> list[str]:
        """The list."""
        return [self.file]

    def scan(self, part: int = 0) -> Iterator[Entry]:
        """The images in the order of the list, of which a line is in memory at a time.

        Raises:
            ConfigError: the list cannot be read, a line is not as the first one says, or there is
                no image.
            StoreError: a store refuses.
        """
        empty = True
        rows = self._table_rows() if self.file.endswith(".parquet") else self._text_rows()
        for where, start, size, row in rows:
            try:
                path, label, key = (_value(row.get(name)) for name in _named(list(row)))
            except ValueError as error:
                raise _bad_row(where, f"cannot be read: {error}") from error
            path = _plain(path)
            scheme, separator, _ = path.partition("://")
            if not path or "\0" in path:
                raise _bad_row(where, "names no image")
            if separator and isinstance(as_path(path), Path):
                raise _bad_row(where, f"names a URL of an unknown kind, {scheme}://")
            if _named(list(row))[2] and not key:
                raise _bad_row(where, "has no key, which is a column of the list")
            yield Entry(key or path, "" if label == "-1" else label, part, start, size)
            empty = False
        if empty:
            raise ConfigError(f"{self.file} names no image. Remedy: check the list")

    def read(self, entries: Sequence[Entry]) -> Iterator[bytes | ImageError]:
        """The bytes of each image; those in a store some at a time.

        Raises:
            StorageError: a file or the list cannot be read; StoreError where a store refuses.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for at in range(0, len(entries), _IN_MEMORY):
                paths = list(map(self._path, entries[at : at + _IN_MEMORY]))
                remote = pool.map(_read_object, [p for p in paths if isinstance(p, RemotePath)])
                for path in paths:
                    if isinstance(path, RemotePath):
                        yield next(remote)
                    else:
                        yield read_file(str(path), self._folder(path))

    def _folder(self, path: Path) -> Path:
        root = as_path(self.root) if self.root else as_path(self.file).parent
        return root if isinstance(root, Path) and path.is_relative_to(root) else path.parent

    def _path(self, entry: Entry) -> Path | RemotePath:
        """Where an image is: in its key, or in the row of the list that it came from."""
        name = entry.key
        if _named(_columns(self.file))[2]:
            row = self._row(entry)
            path, _, key = (_value(row.get(name)) for name in _named(list(row)))
            name = _plain(path)
            if key != entry.key or not name:
                raise StorageError(
                    f"{self.file} no longer has {entry.key!a} where it had it when it was scanned: "
                    "it has changed. Remedy: restore the list, and run the same command again"
                )
        found = as_path(name)
        if isinstance(found, RemotePath) or found.is_absolute():
            return found
        return (as_path(self.root) if self.root else as_path(self.file).parent) / name

    def _row(self, entry: Entry) -> dict[str, Any]:
        """A row again, by its offset and bytes, or its row group and row."""
        faults: tuple[type[Exception], ...] = (*_unreadable(self.file), StopIteration)
        try:
            if self.file.endswith(".parquet"):
                return _table_row(self.file, entry.start, entry.size)
            path = as_path(self.file)
            if isinstance(path, RemotePath):
                (data,) = path.ranges([entry.start], [entry.size])
            else:
                with path.open("rb") as file:
                    file.seek(entry.start)
                    data = file.read(entry.size)
            lines = io.StringIO(data.decode(), newline="")
            return _parsed(self.file, _columns(self.file), lines)
        except faults as error:
            raise StorageError(
                f"the list {self.file} cannot be read again, or has changed since it was scanned: "
                f"{_short(error)}. Remedy: restore it, and run the same command again"
            ) from error

    def _table_rows(self) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        columns = list(filter(None, _named(_columns(self.file))))
        with scanned_table(self.file) as table:
            for block in table.blocks():
                for number, row in enumerate(table_rows(table, block, columns)):
                    where = f"{self.file}, row {number} of row group {block},"
                    yield where, block, number, dict(zip(columns, row, strict=True))

    def _text_rows(self) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
        columns = _columns(self.file)
        where = self.file
        try:
            with closing(_opened(self.file)) as file:
                lines = _Lines(file)
                if _has_header(self.file):
                    next(csv.reader(lines, delimiter=_delimiter(self.file)))
                while True:
                    start, where = lines.offset, f"line {lines.number + 1} of {self.file}"
                    try:
                        row = _parsed(self.file, columns, lines)
                    except StopIteration:
                        return
                    if row:
                        yield where, start, lines.offset - start, row
        except (OSError, EOFError) as error:
            raise ConfigError(
                f"the list {self.file} cannot be read: {_short(error)}. Remedy: check the path"
            ) from error
        except (ValueError, csv.Error) as error:
            raise _bad_row(where, f"cannot be read: {_short(error)}") from error


class _Lines:
    """Lines of a file as text; knows the offset and the number of lines of what it gave.

    Each is read when it is asked for, so that the offset is that of the row after the last one.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.number = file, 0
        self.offset = len(b"\xef\xbb\xbf") if bytes(file.read(3)) == b"\xef\xbb\xbf" else 0
        file.seek(self.offset)

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = bytes(self._file.readline(_MOST_LINE + 1))
        if not line:
            raise StopIteration
        if len(line) > _MOST_LINE:
            raise ValueError(f"longer than {_MOST_LINE} bytes")
        self.offset, self.number = self.offset + len(line), self.number + 1
        return line.decode()


@lru_cache(maxsize=16)
def _columns(file: str) -> list[str]:
    """Names of the columns of a list.

    Raises:
        ConfigError: it has none of paths, or cannot be read.
        StoreError: a store refuses.
    """
    if file.endswith(".parquet"):
        with scanned_table(file) as table:
            columns = list(table.schema.names)
    else:
        row = _first_row(file)
        columns = [name.strip() for name in row]
        if not file.endswith(".jsonl") and not first(_PATHS, columns):
            if len(row) > 2 or first((*_LABELS, *_KEYS), columns):
                columns = []
            else:
                return ["path", "label"][: len(row)]
    if not first(_PATHS, columns):
        raise ConfigError(
            f"{file} needs a column called {', '.join(_PATHS)}. Remedy: name the column of the "
            "paths so in its first line"
        )
    return columns


def _has_header(file: str) -> bool:
    return not file.endswith(".jsonl") and bool(
        first(_PATHS, [name.strip() for name in _first_row(file)])
    )


def _first_row(file: str) -> list[str]:
    """Cells of the first line, or names of its fields."""
    try:
        with closing(_opened(file)) as opened:
            lines = _Lines(opened)
            if file.endswith(".jsonl"):
                return list(next(filter(None, (_object(line) for line in lines)), {}))
            return next(filter(None, csv.reader(lines, delimiter=_delimiter(file))), [])
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise ConfigError(
            f"the list {file} cannot be read: {_short(error)}. Remedy: check the path; lists are "
            "UTF-8"
        ) from error


def _parsed(file: str, columns: list[str], lines: Iterator[str]) -> dict[str, Any]:
    """The next row of a list; empty for a blank line."""
    if file.endswith(".jsonl"):
        return _object(next(lines))
    row = next(csv.reader(lines, delimiter=_delimiter(file), strict=True))
    if not any(map(str.strip, row)):
        return {}
    if len(row) != len(columns):
        raise ValueError(f"it has {len(row)} columns, the first line {len(columns)}")
    return dict(zip(columns, row, strict=True))


def _object(line: str) -> dict[str, Any]:
    if not line.strip():
        return {}
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _table_row(file: str, block: int, number: int) -> dict[str, Any]:
    columns = list(filter(None, _named(_columns(file))))
    with scanned_table(file) as table:
        row = next(islice(table_rows(table, block, columns), number, None))
    return dict(zip(columns, row, strict=True))


def _named(columns: list[str]) -> tuple[str, str, str]:
    """Names of the columns of path, class and key; empty where there is none."""
    return first(_PATHS, columns), first(_LABELS, columns), first(_KEYS, columns)


def _value(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str | int):
        raise ValueError(f"{str(value)[:40]!a} is neither text nor an integer")
    return str(value).strip()


def _plain(path: str) -> str:
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return path


def _bad_row(where: str, what: str) -> ConfigError:
    return ConfigError(f"{where} {what}. Remedy: correct the list")


def _delimiter(file: str) -> str:
    return "\t" if file.endswith(".tsv") else ","


def _opened(file: str) -> IO[bytes]:
    path = as_path(file)
    return path.open() if isinstance(path, RemotePath) else path.open("rb")


def _read_object(path: RemotePath) -> bytes | ImageError:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ImageError("is not there")
    return size_fault(len(data)) or data


def _unreadable(file: str) -> tuple[type[Exception], ...]:
    if file.endswith(".parquet"):
        return (*unreadable(), ConfigError)
    return (OSError, EOFError, ValueError, csv.Error)


def _short(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
