"""Decoding: the images that ImageFolder shows the student, and a row for each bad file."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import pil_loader

from tests.maps import entries
from tokenlabel.annotate.images import decode_batch, join_batches
from tokenlabel.dataset.format.keys import digest64
from tokenlabel.dataset.sources import image_source
from tokenlabel.dataset.sources.folder import FolderSource
from tokenlabel.dataset.sources.thumbprint import thumbprint
from tokenlabel.errors import StorageError


def image(mode: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(0)
    if mode.startswith("I;16"):
        return Image.fromarray(rng.integers(0, 65536, size[::-1], dtype="u2"))
    rgb = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype="u1"))
    return rgb.convert(mode)


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    image("RGB").save(data, "JPEG", exif=exif)
    return data.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "JPEG"),
        ("CMYK", "JPEG"),
        ("L", "JPEG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("1", "PNG"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("P", "GIF"),
        ("RGB", "AVIF"),
        ("RGB", "JPEG2000"),
        ("RGB", "TGA"),
        ("RGB", "PCX"),
        ("RGB", "SGI"),
        ("RGB", "QOI"),
        ("RGB", "DDS"),
        ("RGB", "MPO"),
    ],
)
def test_readable_images_are_what_the_student_sees(tmp_path: Path, mode: str, kind: str) -> None:
    path = tmp_path / "a.jpg"  # the ending does not decide
    image(mode).save(path, kind)
    batch = decode_batch(FolderSource(tmp_path), entries(["a.jpg"]), [(24, 20), (9, 30)], "bicubic")
    assert batch.errors == [""]
    assert batch.sizes.tolist() == [[40, 30]]
    assert [images.shape for images in batch.images] == [(1, 24, 20, 3), (1, 9, 30, 3)]
    for images, size in zip(batch.images, [(20, 24), (30, 9)], strict=True):
        want = pil_loader(str(path)).resize(size, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(images[0], np.asarray(want))
    assert batch.digests[0] == digest64(path.read_bytes())
    assert (batch.thumbprints[0] == thumbprint(pil_loader(str(path)))).all()


@pytest.mark.parametrize("kind", ["ICO", "ICNS"])
def test_icons_are_what_the_student_sees(tmp_path: Path, kind: str) -> None:
    """Files of several sizes, of which Pillow shows the largest."""
    path = tmp_path / "a.png"
    image("RGBA", (64, 64)).save(path, kind)
    batch = decode_batch(FolderSource(tmp_path), entries(["a.png"]), [(16, 16)], "bicubic")
    want = pil_loader(str(path))
    assert batch.errors == [""] and tuple(batch.sizes[0]) == want.size
    squashed = np.asarray(want.resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(batch.images[0][0], squashed)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greyscale_keeps_its_upper_8_bits(tmp_path: Path, kind: str) -> None:
    """Pillow's own conversion, and so ImageFolder's, makes white of it."""
    for name, array in (
        ("16.png", np.arange(0, 65536, 64, "u2").reshape(32, 32)),
        ("8.png", np.arange(256, dtype="u2").repeat(4).reshape(32, 32)),
    ):
        Image.fromarray(array).save(tmp_path / name, kind)
    assert np.asarray(pil_loader(str(tmp_path / "16.png"))).mean() > 250
    batch = decode_batch(
        FolderSource(tmp_path), entries(["16.png", "8.png"]), [(32, 32)], "nearest"
    )
    assert batch.errors == ["", ""]
    np.testing.assert_array_equal(batch.images[0][0, ..., 0], np.arange(1024).reshape(32, 32) // 4)
    np.testing.assert_array_equal(batch.images[0][1], batch.images[0][0])


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(rotated_jpeg())
    batch = decode_batch(FolderSource(tmp_path), entries(["a.jpg"]), [(30, 40)], "nearest")
    assert batch.sizes.tolist() == [[40, 30]]
    want = np.asarray(pil_loader(str(tmp_path / "a.jpg")))
    np.testing.assert_array_equal(batch.images[0][0], want)
    assert batch.orientations.tolist() == [6]


def test_odd_exif_is_no_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    for number, data in enumerate((exif, b"Exif\0\0II*\0" + b"\xff" * 30)):
        image("RGB").save(tmp_path / f"{number}.jpg", "JPEG", exif=data)
    batch = decode_batch(FolderSource(tmp_path), entries(["0.jpg", "1.jpg"]), [(8, 8)], "bicubic")
    assert batch.errors == ["", ""] and batch.orientations.tolist() == [0, 0]


def test_pillow_applies_the_orientation_of_a_tiff(tmp_path: Path) -> None:
    """So that nothing is left for another reader to apply."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image("RGB").save(tmp_path / "a.tif", exif=exif)
    batch = decode_batch(FolderSource(tmp_path), entries(["a.tif"]), [(8, 8)], "bicubic")
    assert batch.sizes.tolist() == [[30, 40]] and batch.orientations.tolist() == [0]


def test_bad_files_become_rows_and_their_neighbours_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = rotated_jpeg()
    (tmp_path / "good.jpg").write_bytes(good)
    (tmp_path / "cut.jpg").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"hello" * 99)
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "link.jpg").symlink_to("nowhere")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(image_source, "MAX_FILE_BYTES", 100_000)
    (tmp_path / "huge.jpg").write_bytes(good + b"\0" * 100_000)
    reasons = {
        "bomb.png": "too many pixels: Image size (400000000 pixels) exceeds limit",
        "cut.jpg": "cannot be decoded: image file is truncated",
        "empty.jpg": "the file is empty",
        "folder.jpg": "cannot be read: Is a directory",
        "good.jpg": "",
        "huge.jpg": "the file has 10",
        "link.jpg": "cannot be read: No such file or directory",
        "pipe.jpg": "not a regular file",
        "script.jpg": "not an image, or its header is damaged",
        "text.jpg": "not an image, or its header is damaged",
    }
    batch = decode_batch(FolderSource(tmp_path), entries(list(reasons)), [(8, 8)], "bicubic")
    for error, (name, reason) in zip(batch.errors, reasons.items(), strict=True):
        assert error.startswith(reason) and bool(error) == bool(reason), name
        assert str(tmp_path) not in error and "0x" not in error
    bad = [bool(error) for error in batch.errors]
    assert not batch.thumbprints[bad].any() and not batch.orientations[bad].any()
    again = decode_batch(FolderSource(tmp_path), entries(list(reasons)), [(8, 8)], "bicubic")
    assert again.errors == batch.errors, "error texts belong to the bytes of a shard"
    alone = [
        decode_batch(FolderSource(tmp_path), entries([name]), [(8, 8)], "bicubic")
        for name in reasons
    ]
    joined = join_batches(alone)
    for got, want in zip((*joined.images, *joined[1:]), (*batch.images, *batch[1:]), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "TGA"]
)
def test_damaged_bytes_never_raise(tmp_path: Path, kind: str) -> None:
    data = io.BytesIO()
    image("RGB").save(data, kind)
    rng = np.random.default_rng(1)
    names = []
    for number in range(60):
        damaged = bytearray(data.getvalue())
        for place in rng.integers(0, len(damaged), 4).tolist():
            damaged[place] = int(rng.integers(0, 256))
        names.append(f"{number}.jpg")
        (tmp_path / names[-1]).write_bytes(damaged)
    batch = decode_batch(FolderSource(tmp_path), entries(names), [(8, 8)], "bilinear")
    for size, error in zip(batch.sizes, batch.errors, strict=True):
        assert bool(error) != bool(size.any())


def test_a_node_without_the_images_is_no_bad_image(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"is not there on this node. Remedy: mount it"):
        decode_batch(FolderSource(tmp_path / "nope"), entries(["a.jpg"]), [(8, 8)], "bicubic")
