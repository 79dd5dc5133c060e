"""Files that somebody made to do harm: label sets, images, keys."""

import ast
import io
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, PngImagePlugin

from tests.faults.attacks import ATTACKS, attack, parsed, with_directory
from tests.faults.table import Observed
from tests.maps import attrs, entries, manifest_of, random_rows, write_split
from tokenlabel.annotate.images import decode_batch
from tokenlabel.cli import main
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.format.shard import Shard, shard_name, write_shard
from tokenlabel.dataset.sources.folder import FolderSource
from tokenlabel.dataset.store import LabelStore
from tokenlabel.errors import ConfigError, FormatError, visible
from tokenlabel.inspection.verify.verify import verify

LAYOUT = MapLayout(("identity",), (2, 3), 2, 10, residual=3)
KEYS = ["a/b.jpg", "b/c.jpg", "c/d.jpg"]
FIRST = shard_name(0, 1)
#: What a process may take beyond what it has, for a hostile file of some kilobytes.
MEMORY = 128 << 20


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail instead of hanging: of computing time, so that a loaded machine is no fault."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s of computing")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def grown_by(work: Callable[[], Any]) -> int:
    """Bytes by which the process's peak grew."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10


@pytest.fixture
def split(tmp_path: Path) -> Path:
    write_split(tmp_path / "labels", KEYS, LAYOUT)
    return tmp_path / "labels"


def test_hostile_directories_are_refused(split: Path, observed: Observed) -> None:
    """By the shard reader, by the store, and by --verify; and no room is made for claims."""
    whole, peak = (split / FIRST).read_bytes(), 0

    def look() -> None:
        with pytest.raises(FormatError, match="Remedy: "):
            with Shard(split / FIRST) as shard:
                for part in ("key", "label", "codes", "classes"):
                    shard.read(part)
        with pytest.raises(FormatError, match="Remedy: "):
            store = LabelStore(split)
            [store[row] for row in range(3)]

    for name in ATTACKS:
        print(name)  # shown where it fails
        (split / FIRST).write_bytes(whole)
        (split / "index").unlink(missing_ok=True)
        attack(split / FIRST, name)
        with within(20):
            if name == "later":
                store = LabelStore(split)
                assert [store[row].label for row in range(3)] == [0, 1, 2], name
            else:
                peak = max(peak, grown_by(look))
                assert not verify(split).ok, name
    assert peak < MEMORY
    observed(
        "directories with a right checksum: terabytes declared, offsets outside, wrong types, "
        "nesting, other headers",
        len(ATTACKS),
        "FormatError; no memory taken",
        f"{len(ATTACKS) - 1} refused, what a later release may add read; "
        f"{peak / (1 << 20):.0f} MB at most",
    )


def test_streams_of_another_size_fill_no_memory(split: Path) -> None:
    """A map, and a column, that inflate to 100 MB, in a file whose checksums are all right."""
    whole = (split / FIRST).read_bytes()
    bomb = zlib.compress(bytes(100 << 20), 9)
    for part in ("maps", "key"):
        found = parsed(whole)
        entry = found["maps"] if part == "maps" else found["columns"]["key"]
        entry.update(offset=len(whole), size=len(bomb), crc=zlib.crc32(bomb))
        data = bytearray(whole + bomb)
        bounds = found["columns"]["bounds"]
        if part == "maps":
            table = np.array([0, *[len(bomb)] * (bounds["shape"][0] - 1)], "<u4").tobytes()
            data[bounds["offset"] : bounds["offset"] + len(table)] = table
            bounds["crc"] = zlib.crc32(table)
        found["size"] = len(data)
        (split / FIRST).write_bytes(with_directory(bytes(data), found))

        def look() -> None:
            with pytest.raises(FormatError, match=r"cannot lie at|must inflate to|cannot be"):
                with Shard(split / FIRST) as shard:
                    shard.planes(0)
                    shard.read("key")

        assert grown_by(look) < 16 << 20


@pytest.mark.parametrize("name", [FIRST, "index", "manifest", "SHA256SUMS"])
def test_what_is_no_file_does_not_hang_its_reader(split: Path, name: str) -> None:
    LabelStore(split)
    (split / name).unlink(missing_ok=True)
    os.mkfifo(split / name)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tokenlabel.dataset.store import LabelStore\n"
        "from tokenlabel.inspection.verify.verify import verify\n"
        "from tokenlabel.errors import FormatError\n"
        "split = Path(sys.argv[1])\n"
        "assert verify(split).ok is False or sys.argv[2] == 'index'\n"
        "try:\n    print(len(LabelStore(split)))\n"
        "except (FormatError, OSError) as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(split), name],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ("not a regular file" in done.stdout) == (name == FIRST), done.stdout


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that declares a size, with no more pixels than a few."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + 3 * 64) * 64))
    parts = (chunk(b"IHDR", head), *more, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(data, kind, **options)
    return data.getvalue()


def gif(frames: int) -> bytes:
    first = Image.new("P", (64, 64), 1)
    data = io.BytesIO()
    rest = [Image.new("P", (64, 64), 2 + n % 200) for n in range(frames - 1)]
    first.save(data, "GIF", save_all=True, append_images=rest)
    return data.getvalue()


def with_zip(image: bytes) -> bytes:
    data = io.BytesIO(image)
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("run.py", "print('harm')")
    return data.getvalue()


def large_icc() -> bytes:
    return saved("JPEG", icc_profile=bytes(3 << 20))


def hostile_images() -> dict[str, bytes]:
    """By name; those that begin with "good" are images all the same."""
    jpeg = saved("JPEG")
    bomb = zlib.compress(bytes(200 << 20), 9)
    huge = PngImagePlugin.PngInfo()
    huge.add_text("more", "x" * 1000)
    tiff = saved("TIFF")
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    return {
        "bomb.png": png(60_000, 60_000),
        "wide.png": png(2**31 - 1, 1),
        "none.png": png(0, 0),
        "text.png": png(64, 64, chunk(b"zTXt", b"a\0\0" + bomb)),
        "itxt.png": png(64, 64, chunk(b"iTXt", b"a\0\1\0\0\0" + bomb)),
        "iccp.png": png(64, 64, chunk(b"iCCP", b"a\0\0" + bomb)),
        "good-text.png": saved("PNG", pnginfo=huge),
        "good-frames.gif.jpg": gif(1000),
        "good-zip.jpg": with_zip(jpeg),
        "good-html.jpg": jpeg + b"<html><script>alert(1)</script></html>",
        "good-icc.jpg": large_icc(),
        "good-exif.jpg": saved("JPEG", exif=exif),
        "good-name.webp": jpeg,
        "html.jpg": b"<html><script>alert(1)</script></html>",
        "zip.jpg": with_zip(b""),
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.webp": saved("WEBP")[:60],
        "cut.tiff": tiff[: len(tiff) // 3],
        "size.webp": saved("WEBP")[:26] + b"\xff\xff\xff\xff" + saved("WEBP")[30:],
        "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run",
        "svg.jpg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///"/></svg>',
        "head.jpg": b"\xff\xd8\xff\xe0" + b"\xff" * 100_000,
    }


def test_hostile_images_become_rows(tmp_path: Path, observed: Observed) -> None:
    files = hostile_images()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "terminal.jpg").symlink_to("/dev/tty")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(tmp_path, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/socket.jpg")  # its path must be short
        os.close(here)
        others = ["pipe.jpg", "folder.jpg", "device.jpg", "loop.jpg", "terminal.jpg", "socket.jpg"]
        names = [*files, *others]
        batches: list[Any] = []
        with within(30):
            grown = grown_by(
                lambda: batches.append(
                    decode_batch(FolderSource(tmp_path), entries(names), ((8, 8),), "bilinear")
                )
            )
    (batch,) = batches
    for name, error in zip(names, batch.errors, strict=True):
        assert (not error) == name.startswith("good"), (name, error)
        assert str(tmp_path) not in error and error == visible(error)
    assert grown < MEMORY
    observed(
        "images: bombs, 1,000 frames, polyglots, cut, huge chunks, pipes, devices, sockets",
        len(names),
        "an error row, or the image that ImageFolder gives; no hang",
        f"{sum(map(bool, batch.errors))} error rows, {batch.errors.count('')} images, "
        f"{grown / (1 << 20):.0f} MB at most",
    )


def test_only_the_first_frame_is_decoded(tmp_path: Path) -> None:
    for frames in (2, 1000):
        (tmp_path / f"{frames}.gif").write_bytes(gif(frames))

    def seconds(name: str) -> float:
        start = time.thread_time()
        assert decode_batch(
            FolderSource(tmp_path), entries([name]), ((8, 8),), "bilinear"
        ).errors == [""]
        return time.thread_time() - start

    few, many = (min(seconds(f"{n}.gif") for _ in range(9)) for n in (2, 1000))
    assert many < 20 * few + 0.01


def test_folders_that_lead_in_circles_or_away(tmp_path: Path) -> None:
    """Links are followed, as ImageFolder does, but not in circles; keys stay below the split."""
    data, away = tmp_path / "data", tmp_path / "away"
    (data / "a").mkdir(parents=True)
    away.mkdir()
    for folder in (data / "a", away):
        (folder / "x.jpg").write_bytes(b"")
    (data / "a" / "up").symlink_to(data)
    (data / "a" / "self").symlink_to("self")
    (data / "away").symlink_to(away)
    (away / "back").symlink_to(data / "a")
    with within(20):
        keys = list(manifest_of(data, tmp_path / "manifest").keys)
    assert keys == ["a/x.jpg", "away/back/x.jpg", "away/x.jpg"]


ODD_NAMES = {
    "newline": "a\nb.jpg",
    "escape": "\x1b[2J\x1b]0;owned\x07.jpg",
    "csi": "\x9b31m.jpg",
    "bidi": "gpj.\u202exe.jpg",
    "long": "/".join(["d" * 250] * 15) + "/" + "e" * 250 + ".jpg",
    "quote": "'; rm -rf ~; '.jpg",
    "markup": "[red]x.jpg",
}


def test_odd_names_are_keys_like_others(tmp_path: Path) -> None:
    """4 KB, newlines, terminal escapes: stored, found, and told apart; never a lone surrogate."""
    data = tmp_path / "data"
    data.mkdir()
    short = [name for key, name in ODD_NAMES.items() if key != "long"]
    for name in short:
        (data / name).write_bytes(b"")
    manifest = manifest_of(data, tmp_path / "manifest")
    assert list(manifest.keys) == sorted(short, key=str.encode)
    keys = sorted(ODD_NAMES.values(), key=str.encode)
    assert max(map(len, keys)) > 4000
    write_split(tmp_path / "labels", keys, LAYOUT, shard_size=3)
    store = LabelStore(tmp_path / "labels")
    assert [store.row(key) for key in keys] == list(range(len(keys)))
    assert "\ud800.jpg" not in store and "a\0" not in store
    (data / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"keys are UTF-8.*caf\\xe9.*Remedy: rename it"):
        manifest_of(data, tmp_path / "manifest")


def hostile_split(folder: Path, keys: list[str], text: str) -> None:
    """A whole, valid split in which every text that somebody may see is hostile."""
    header = attrs(
        0,
        1,
        0,
        more=[text] * 10,
        dense_rule=text,
        label_space="teacher",
        preprocessing=json.dumps({text: text}),
        libraries=json.dumps({text: text}),
        settings=json.dumps({"x": text}),
    ) | {"teacher": text}
    folder.mkdir(parents=True)
    rows = random_rows(LAYOUT, len(keys))
    rows.errors[0] = text
    with write_shard(folder / FIRST, LAYOUT, keys, [0] * len(keys), header) as writer:
        writer.append(*rows)


def commands(labels: Path, key: str, images: Path) -> list[list[str]]:
    inspect = ["inspect-labels", str(labels)]
    return [
        inspect,
        [*inspect, "--all"],
        [*inspect, "--json"],
        [*inspect, "--key", key],
        [*inspect, "--key", "missing" + key],
        [*inspect, "--verify", "--workers", "1", "--images", str(images)],
        [*inspect, "--key", key, "--png", str(images / "x.png"), "--images", str(images)],
        ["compare-labels", str(labels), str(labels)],
    ]


@pytest.mark.parametrize("text", ["\x1b[31mred\x1b]0;owned\x07", "a\nError: \x9b2J", "\u202egpj"])
def test_no_text_of_a_file_steers_the_terminal(tmp_path: Path, text: str) -> None:
    keys = sorted([f"a{text}.jpg", f"b{text}.jpg", "c.jpg"])
    hostile_split(tmp_path / "labels" / "train", keys, text)
    for words in commands(tmp_path / "labels" / "train", keys[1], tmp_path):
        result = CliRunner().invoke(main, words)
        assert result.exit_code in (0, 1, 2), (words, result.exc_info)
        assert isinstance(result.exception, SystemExit | None), (words, result.exc_info)
        assert visible(result.output) == result.output, words
        assert "\nError: \\x9b" not in result.output, words


@pytest.mark.parametrize(
    "key", ["../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "a\0b.jpg", "x/pipe.jpg"]
)
def test_keys_never_lead_out_of_the_folder(tmp_path: Path, key: str) -> None:
    """What joins a key of a label set to a folder: images, page, --verify, --agreement."""
    images = tmp_path / "images"
    (images / "x").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(saved("JPEG"))
    os.mkfifo(images / "x" / "pipe.jpg")
    hostile_split(tmp_path / "train", sorted([" .jpg", key, "~"]), "no")
    opened: list[str] = []
    audited = [True]

    def note(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and audited[0]:
            opened.append(os.fsdecode(given[0]) if isinstance(given[0], str | bytes) else "")

    sys.addaudithook(note)
    page = ["inspect-labels", str(tmp_path / "train"), "--html", str(tmp_path / "p.html")]
    folder = ["--images", str(images)]
    try:
        for words in (*commands(tmp_path / "train", key, images), [*page, *folder]):
            with within(60):
                result = CliRunner().invoke(main, words)
            assert isinstance(result.exception, SystemExit | None), (words, result.exc_info)
    finally:
        audited[0] = False
    real = {os.path.realpath(path) for path in opened if "\0" not in path}
    assert not real & {str(tmp_path / "secret.jpg"), "/etc/passwd"}
    assert not verify(tmp_path / "train", images).ok


ROOT = Path(__file__).parents[2]
#: Where HDF5 itself opens a file to read or change it, and how often: the writer opens its own file
#: again, and what HDF5 sees is read in a process of its own.
HDF5 = {"new_file.py": 1, "shard_check.py": 1}


def unsafe(source: str) -> list[str]:
    """Calls that would run what a file holds, or let HDF5 parse it."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {option.arg: ast.unparse(option.value) for option in call.keywords}
        mode = ast.unparse(call.args[1]) if len(call.args) > 1 else given.get("mode")
        if (
            (
                name in ("torch.load", "load_state_dict_from_url")
                and given.get("weights_only") != "True"
            )
            or (name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False")
            or (name.endswith("h5py.File") and mode not in ("'w'", "'x'"))
        ):
            found.append(ast.unparse(call))
    return found


def test_nothing_that_is_read_can_be_run() -> None:
    """`make check` refuses pickle, eval, shells and the like; this test what ruff does not know."""
    folders = ("annotate", "dataset", "inspection", "supervise", "configs", "examples")
    files = [ROOT / "cli.py", *(path for name in folders for path in (ROOT / name).rglob("*.py"))]
    found = {path.name: unsafe(path.read_text(encoding="utf-8")) for path in files}
    assert {name: len(calls) for name, calls in found.items() if calls} == HDF5
    for bad in (
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "h5py.File(p, 'r')",
        "h5py.File(p)",
        "h5py.File(p, mode='r+')",
    ):
        assert unsafe(bad), bad
    assert not unsafe("torch.load(f, weights_only=True); h5py.File(p, 'w')")
