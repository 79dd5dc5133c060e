"""The PNG of one map: it shows what the label set holds, and labels move with images."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torchvision.transforms.v2 import functional as F

from tests.painted import GRID, PAINT, QUADRANTS, painted, painted_map, write_store
from tokenlabel.dataset import LabelStore
from tokenlabel.errors import ConfigError, ImageError, MissingMapError
from tokenlabel.inspection.label_sets import patch_map
from tokenlabel.inspection.pictures.augmentations import GRID as PATCHES
from tokenlabel.inspection.pictures.augmentations import angle_of, augmentations, outline_of
from tokenlabel.inspection.pictures.image_files import ImageFiles
from tokenlabel.inspection.pictures.map_facts import (
    OTHER,
    VIRIDIS,
    legend,
    letters_of,
    map_facts,
    viridis,
)
from tokenlabel.inspection.pictures.overlay import class_overlay, mass_overlay, shortened
from tokenlabel.inspection.pictures.sheet import save_png

KEY = "a/painted.png"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LabelStore:
    root = tmp_path_factory.mktemp("images")
    return write_store(root / "labels" / "train", root / "data" / "train", {KEY: painted()})


@pytest.fixture(scope="module")
def images(store: LabelStore) -> Path:
    return store.root.parents[1] / "data"


def test_targets_are_what_the_augmented_image_shows(store: LabelStore, images: Path) -> None:
    image = ImageFiles(store, images).read(KEY)
    found = augmentations(image, store, KEY, count=6, seed=3)
    assert {"mirrored" in augmentation.title for augmentation in found} == {True, False}
    for augmentation in found:
        pixels = np.asarray(augmentation.image).astype(int)
        cells = pixels.reshape(PATCHES, len(pixels) // PATCHES, PATCHES, -1, 3)
        pure = (np.ptp(cells, axis=(1, 3)) < 12).all(-1)  # patches that show one colour
        colours = cells.mean((1, 3))
        compared = 0
        for class_id, colour in zip(QUADRANTS, PAINT, strict=True):
            one = pure & (np.abs(colours - colour) < 12).all(-1)
            assert (augmentation.best[one] == class_id).all()
            compared += int(one.sum())
        assert compared > 50
        grey = pure & (np.abs(colours - 128) < 6).all(-1)
        assert not augmentation.shown[grey].any(), "what the rotation left empty has no target"
        assert np.allclose(augmentation.probs[augmentation.shown & pure], 0.7, atol=0.35)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("angle", [-20.0, 12.0])
def test_turns_are_named_as_they_look(store: LabelStore, mirror: bool, angle: float) -> None:
    moved = store.leaf(0, (100, 180))
    moved = F.resized_crop(moved, 10, 20, 60, 100, [224, 224])
    moved = F.horizontal_flip(moved) if mirror else moved
    moved = F.rotate(moved, angle)  # counter-clockwise, says torchvision
    assert angle_of(outline_of(moved), moved.path.is_mirrored) == pytest.approx(angle)


def test_probabilities_and_facts(store: LabelStore) -> None:
    patches = patch_map(store, KEY)
    assert np.array_equal(patches.best, painted_map())
    assert np.allclose(patches.probs, [0.7, 0.2], atol=1e-3)
    facts = map_facts(patches)
    dense = np.full((*GRID, 50), 0.1 / 48)
    np.put_along_axis(dense, patches.classes, patches.probs, -1)
    assert facts["mass"] == pytest.approx(0.9, abs=1e-3)
    assert facts["entropy"] == pytest.approx(-(dense * np.log(dense)).sum(-1).mean(), abs=1e-3)
    assert facts["agreement"] == 0.25
    assert facts["label_prob"] == pytest.approx(0.7 / 4, abs=1e-3)
    assert facts["seen"] == 7
    assert facts["suspicion"] == pytest.approx(0, abs=1e-3), "four classes, equally probable"
    wrong = map_facts(patches._replace(label=49))  # not in the map at all
    assert wrong["seen"] == 3
    assert (wrong["agreement"], wrong["label_prob"]) == (0, 0)
    assert wrong["suspicion"] == pytest.approx(0.7 / 4, abs=1e-3)
    unknown = map_facts(patches._replace(label=-1))
    assert {unknown[name] for name in ("agreement", "label_prob", "suspicion")} == {None}


def test_legend_lists_the_most_frequent_classes_first() -> None:
    best = np.array([[5, 5, 5, 2], [2, 9, 9, 1]])
    probs = np.array([[0.9, 0.9, 0.3, 0.5], [0.1, 0.4, 0.4, 0.2]])
    entries = legend(best, probs)
    found = [(entry.class_id, entry.letter, entry.patches) for entry in entries]
    # 9 before 2, whose probabilities are lower.
    assert found == [(5, "A", 3), (9, "B", 2), (2, "C", 2), (1, "D", 1)]
    assert entries[0].mean == pytest.approx(0.7)
    assert letters_of(best, probs, entries[:3]) == [list("AAaC"), list("cbb·")]
    many = legend(np.arange(30), np.ones(30))
    assert len(many) == len({entry.colour for entry in many}) == 8
    more = legend(np.arange(30), np.ones(30), 12)
    assert more[:8] == many and {entry.colour for entry in more[8:]} == {OTHER}


def test_overlay_tints_each_patch_with_its_classs_colour() -> None:
    best = np.array([[4, 8, 6], [6, 4, 99]])
    probs = np.full(best.shape, 0.6)
    entries = [entry for entry in legend(best, probs) if entry.class_id != 99]
    image = Image.new("RGB", (400, 200), (100, 100, 100))
    shown = np.array([[True, True, False], [True, True, True]])
    drawn = np.asarray(class_overlay(image, best, probs, entries, (0.25, 0.0, 1.0, 0.5), shown))
    colours = {entry.class_id: np.array(ImageColor.getrgb(entry.colour)) for entry in entries}
    for row, column in np.argwhere(shown):
        corner = drawn[row * 50 + 3, 100 + column * 100 + 3].astype(int)
        tint = colours.get(int(best[row, column]), np.array([0x99] * 3))
        assert np.abs(corner - (100 + tint) / 2).max() <= 1
    assert (drawn[100:] == 100).all() and (drawn[:, :100] == 100).all(), "outside the map"
    hatched = drawn[:50, 300:]
    assert set(np.unique(hatched)) == {150, 225}
    middle = drawn[:50, 100:200].reshape(-1, 3)
    assert (middle == 255).all(1).any(), "a letter, for who cannot tell the colours"


def test_mass_overlay_is_viridis() -> None:
    black, mass = Image.new("RGB", (20, 10)), np.array([[0.0, 1.0]])
    drawn = np.asarray(mass_overlay(black, mass, (0, 0, 1, 1)))
    for x, colour in ((5, VIRIDIS[0]), (15, VIRIDIS[-1])):
        assert np.abs(drawn[5, x] - 0.75 * np.array(ImageColor.getrgb(colour))).max() <= 1
    lightness = [sum(viridis(value)) for value in np.linspace(0, 1, 50)]
    assert viridis(-1) == viridis(0) and viridis(2) == viridis(1)
    assert lightness == sorted(lightness)


def test_png_shows_image_overlay_mass_and_augmentations(
    store: LabelStore, images: Path, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    state = torch.random.get_rng_state()
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        save_png(store, KEY, path, images, seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    first, same, other = (path.read_bytes() for path in paths)
    assert first == same != other, "the seed decides the augmentations"
    with Image.open(paths[0]) as sheet:
        assert sheet.format == "PNG"
        pixels = np.asarray(sheet.convert("RGB"))
    for colour in PAINT:  # in the plain image; resampling leaves flat areas as they are
        assert (np.abs(pixels.astype(int) - colour).max(-1) == 0).sum() > 1000
    patches = patch_map(store, KEY)
    for entry in legend(patches.best, patches.probs[..., 0]):
        swatch = (pixels == ImageColor.getrgb(entry.colour)).all(-1)
        assert swatch.sum() > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 900)])
def test_odd_shapes_are_drawn(tmp_path: Path, size: tuple[int, int]) -> None:
    store = write_store(tmp_path / "labels", tmp_path / "images", {"a.png": painted(size)})
    save_png(store, "a.png", tmp_path / "a.png", tmp_path / "images")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width == 1920


def test_images_are_found_in_the_split_or_the_data_set(store: LabelStore, images: Path) -> None:
    for place in (images, images / "train"):
        assert ImageFiles(store, place).read(KEY).size == (180, 100)
    with pytest.raises(ConfigError, match=r"but there is no .*Remedy: name what was"):
        ImageFiles(store, images.parent / "nowhere")
    with pytest.raises(ConfigError, match="does not record where its images are"):
        ImageFiles(store)


def test_the_embedded_samples_images_need_no_folder(sample: Path, tmp_path: Path) -> None:
    path = next((sample / "train").rglob("*.jpg"))
    key = path.relative_to(sample / "train").as_posix()
    store = write_store(tmp_path / "renamed", tmp_path / "copies", {key: path.read_bytes()})
    with Image.open(path) as image:
        assert ImageFiles(store).read(key).size == image.size


def test_another_image_is_refused(store: LabelStore, images: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(images, tmp_path / "data")
    target = tmp_path / "out.png"
    target.write_text("as it was")
    (copy / "train" / KEY).write_bytes(painted((180, 101)))
    with pytest.raises(ImageError, match=r"digest [0-9a-f]{16}; its digest is [0-9a-f]{16}"):
        save_png(store, KEY, target, copy)
    files = ImageFiles(store, copy)
    (copy / "train" / KEY).unlink()
    with pytest.raises(ImageError, match="cannot read the image"):
        files.read(KEY)
    assert target.read_text() == "as it was" and len([*tmp_path.iterdir()]) == 2


def test_damaged_files_and_keys_that_lead_elsewhere(tmp_path: Path) -> None:
    files = {"a.png": painted(), "b.png": painted()}
    store = write_store(tmp_path / "labels", tmp_path / "images", files)
    with pytest.raises(MissingMapError, match=r"no score map for 'c\.png'"):
        ImageFiles(store, tmp_path / "images").read("c.png")
    cut = write_store(tmp_path / "cut", tmp_path / "images", {"c.png": painted((99, 99))[:-100]})
    with pytest.raises(ImageError, match="cannot be decoded: image file is truncated"):
        ImageFiles(cut, tmp_path / "images").read("c.png")
    outside = write_store(tmp_path / "evil", tmp_path / "images" / "x", {"../a.png": painted()})
    with pytest.raises(ImageError, match="no path inside the split's folder"):
        ImageFiles(outside, tmp_path / "images" / "x").read("../a.png")


def test_names_on_the_sheet_are_harmless_text() -> None:
    assert shortened("a\u202eb\nc\u2028", 20, 300) == r"a\u202eb\nc\u2028"
    assert shortened("x" * 5000, 20, 300).startswith("xx")
    assert "..." in shortened("x" * 5000, 20, 300)
    assert shortened("short", 20, 300) == "short"
