"""The manifest: order, names, links, classes, and the same rows as torchvision's ImageFolder."""

import os
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from timm.data import ImageNetInfo
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from tests.maps import manifest_of
from tokenlabel.dataset.format.keys import EXTENSIONS
from tokenlabel.dataset.format.manifest import Manifest, open_manifest
from tokenlabel.dataset.sources.folder import FolderSource
from tokenlabel.errors import ConfigError, FormatError

WNIDS = ImageNetInfo("imagenet-1k").label_names()


def build(root: Path, names: list[str] | None = None, num_classes: int = 0) -> Manifest:
    return manifest_of(root, root.parent / "out" / "manifest", names, num_classes)


def fill(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def test_extensions_are_torchvisions() -> None:
    assert set(EXTENSIONS) == set(IMG_EXTENSIONS)


def test_nested_odd_names_and_links(tmp_path: Path) -> None:
    outside = fill(tmp_path / "outside", "far.jpg")
    root = fill(
        tmp_path / "train",
        "b/2.JPEG",
        "b/with space.jpg",
        "b/dots.in.name.Png",
        "b/deep/er/x.webp",
        "a/ü-新.bmp",
        "a/not an image.txt",
        "a/.jpg/y.jpg",
        "b.jpg",
        "b-.jpg",
        "b/new\nline.jpg",
    )
    (root / "c").symlink_to(outside)
    (root / "b" / "loop").symlink_to(root / "b")
    (root / "self").symlink_to("self")
    (root / "a" / "self").symlink_to("self")
    (root / "b" / "link.jpg").symlink_to(outside / "far.jpg")
    (root / "b" / "broken.jpg").symlink_to("nowhere")
    manifest = build(root)
    keys = list(manifest.keys)
    assert keys == sorted(keys, key=str.encode)
    assert set(keys) == {
        "b/2.JPEG",
        "b/with space.jpg",
        "b/dots.in.name.Png",
        "b/deep/er/x.webp",
        "a/ü-新.bmp",
        "b.jpg",
        "b-.jpg",
        "b/new\nline.jpg",
        "c/far.jpg",
        "b/link.jpg",
        "b/broken.jpg",
    }
    label = dict(zip(keys, manifest.labels().tolist(), strict=True))
    assert (label["a/ü-新.bmp"], label["b/2.JPEG"], label["c/far.jpg"]) == (0, 1, 2)
    assert label["b.jpg"] == -1, "no class folder, no ground truth"


def test_same_rows_and_labels_as_image_folder(tmp_path: Path) -> None:
    root = fill(tmp_path / "train", "x/b.jpg", "x/a/c.png", "y.z/b.JPG", "y/b.tif", "Z/é.ppm")
    manifest = build(root)
    folder = ImageFolder(root)
    want = {os.path.relpath(path, root): label for path, label in folder.samples}
    assert dict(zip(manifest.keys, manifest.labels().tolist(), strict=True)) == want


def test_a_subset_of_imagenet_is_not_renumbered(tmp_path: Path) -> None:
    root = fill(tmp_path / "train", f"{WNIDS[7]}/a.jpg", f"{WNIDS[243]}/b.jpg", "n99999999/c.jpg")
    manifest = build(root, WNIDS, 1000)
    assert manifest.labels().tolist() == [7, 243, -1]
    assert manifest.label_space == "teacher"


def test_digest_tells_keys_and_labels(tmp_path: Path) -> None:
    root = fill(tmp_path / "train", "cat/a.jpg", "dog/b.jpg")
    first = build(root)
    assert build(root).digest == first.digest
    assert build(root, ["dog", "cat"], 2).digest != first.digest
    fill(root, "dog/c.jpg")
    assert build(root).digest != first.digest
    reopened = open_manifest(tmp_path / "out" / "manifest")
    assert list(reopened.keys) == ["cat/a.jpg", "dog/b.jpg", "dog/c.jpg"]
    assert (reopened.label_space, reopened.class_names) == ("folders", None)
    assert build(root, ["dog", "cat", "ü"], 3).class_names == ["dog", "cat", "ü"]


def test_nothing_to_annotate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope cannot be listed: No such file"):
        build(tmp_path / "nope")
    with pytest.raises(ConfigError, match=r"no images found in .* Remedy: check the path"):
        build(fill(tmp_path / "train", "a/readme.txt"))
    assert not list((tmp_path / "out").glob("*")), "nothing half-written"


def test_damaged_manifest(tmp_path: Path) -> None:
    build(fill(tmp_path / "train", *(f"a/{i:03d}.jpg" for i in range(300))))
    path = tmp_path / "out" / "manifest"
    content = path.read_bytes()
    for damaged in (content[:-500], content + b"x", content[:100], b""):
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            open_manifest(path)
    path.write_bytes(content.replace(b"a/042.jpg", b"a/0X2.jpg"))
    open_manifest(path)
    with pytest.raises(FormatError, match="bytes of it were changed"):
        open_manifest(path, verify=True)


names = st.text(st.sampled_from("a.-/0Z é"), min_size=1, max_size=6)


@given(st.sets(names, min_size=1, max_size=12))
def test_scan_is_sorted_by_bytes_whatever_the_names(
    tmp_path_factory: pytest.TempPathFactory, texts: set[str]
) -> None:
    root = tmp_path_factory.mktemp("scan")
    for text in texts:
        parts = [part for part in text.split("/") if part.strip(".")] or ["x"]
        path = root.joinpath(*parts)
        path = path.with_name(path.name + ".jpg")
        if not any(parent.is_file() for parent in path.parents) and not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    paths = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    shown = [p for p in paths if not any(name.startswith(".") for name in p.parts[:-1])]
    assume(shown)
    want = [os.fsdecode(name) for name in sorted(map(os.fsencode, shown))]
    assert [entry.key for entry in FolderSource(root).scan()] == want


def test_a_flipped_byte_is_found_on_verifying(tmp_path: Path) -> None:
    root = fill(tmp_path / "train", *(f"a/{i:03d}.jpg" for i in range(100)))
    build(root)
    path = tmp_path / "out" / "manifest"
    path.write_bytes(path.read_bytes().replace(b"a/042.jpg", b"a/0X2.jpg"))
    open_manifest(path)
    with pytest.raises(FormatError, match="bytes of it were changed"):
        open_manifest(path, verify=True)


def test_a_folder_of_many_names_is_merged_from_sorted_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenlabel.dataset.sources.folder._RUN", 3)
    names = [f"{number * 7 % 10}{tail}.png" for number in range(10) for tail in ("", "/a", "-")]
    root = fill(tmp_path / "train", *names)
    assert list(build(root).keys) == sorted(names, key=str.encode)
