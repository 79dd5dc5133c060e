"""The page in a real browser: it shows what the label set holds; no untrusted input runs in it."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.jobs import config
from tests.maps import write_split
from tests.painted import GRID, painted, painted_map, write_class_names, write_store
from tokenlabel.annotate import annotate
from tokenlabel.dataset import LabelStore
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.errors import ConfigError, FormatError, ImageError, MissingMapError, OutputError
from tokenlabel.inspection.label_sets import ClassNames, patch_map
from tokenlabel.inspection.page.page import IMAGE_BYTES, PageReport, SplitData, jpeg, save_page
from tokenlabel.inspection.pictures.map_facts import viridis

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
#: What people can call their files. The first is in folders called `<` and `script><script>…<`.
HOSTILE = [
    "</script><script>alert(1)</script>.jpg",
    "<img src=x onerror=alert(1)>.jpg",
    "<!--<script>.jpg",
    "\"'`&amp;${alert(1)}.jpg",
    "two\nlines\u2028.jpg",
    "left\u202egpj.exe.jpg",
    "100%41#?a=b&c.jpg",
    f"{'long' * 60}.jpg",
    "javascript:alert(1).jpg",
]
MASTIFF = "n02108422/imagenet_00_243.jpg"


@pytest.fixture(scope="module")
def data(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, and images with hostile names, one of them wide, and one that is broken."""
    data = tmp_path_factory.mktemp("page") / "data"
    shutil.copytree(sample / "train", data / "train")
    wide = data / "train" / "n02108422" / "wide.png"
    wide.write_bytes(painted((420, 90)))
    for number, name in enumerate(HOSTILE):
        target = data / "train" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(painted((60 + number, 80)))
    (data / "train" / "broken <b>.jpg").touch()
    return data


@pytest.fixture(scope="module")
def stores(data: Path, ray_here: None) -> list[LabelStore]:
    """A split of 3 x 5 patches, and one of 4 x 6 over a part of each image, other classes."""
    out = data.parent / "labels"
    annotate(config(data, out, input_size=[[96, 160]], max_errors=1))
    files = {f"painted/{side}.png": painted((side, 90)) for side in (80, 200, 400)}
    val = write_store(out / "val", data / "val", files, extent=[0.2, 0.1, 0.9, 1.0])
    return [LabelStore(out / "train"), val]


@pytest.fixture(scope="module")
def report(stores: list[LabelStore], data: Path) -> PageReport:
    return save_page(stores, data.parent / "page.html", data)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Watched:
    """A page in its own browser context; collects console output, errors and requests as faults."""

    def __init__(self, browser: Any, report: PageReport, **options: Any) -> None:
        self.context = browser.new_context(
            **{"viewport": {"width": 1300, "height": 850}, **options}
        )
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(300_000)  # also on a busy machine
        self.faults: list[str] = []
        self.url = report.path.as_uri()
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.faults.append("dialog"), dialog.dismiss()))
        self.page.on("request", self._request)
        self.page.goto(self.url)
        self.page.wait_for_selector(".card")

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
        assert self.faults == []

    def _request(self, request: Any) -> None:
        if not request.url.startswith(("data:", self.url)):
            self.faults.append(request.url)

    def open(self, key: str) -> None:
        """Open an image by its card, as a person would who searches for it."""
        self.page.fill("#search", key)
        self.page.locator(".card").first.click()
        self.page.wait_for_selector("#viewer[open]")

    def titles(self) -> list[str]:
        """Splits and keys of the images in the gallery, as it shows them."""
        found = self.page.locator(".card .name").all()
        return [name.get_attribute("title") for name in found]

    def keys(self) -> list[str]:
        return [title.partition("/")[2] for title in self.titles()]


@pytest.fixture
def watched(browser: Any, report: PageReport) -> Iterator[Watched]:
    with Watched(browser, report) as opened:
        yield opened


def check_patch(page: Any, store: LabelStore, key: str, row: int, column: int) -> None:
    """The page shows of a patch what the label set holds."""
    assert page.inner_text("#patch-title") == f"Patch in row {row + 1}, column {column + 1}"
    names = ClassNames(store.classes)
    classes, probs, _ = (part[row, column] for part in store[key].probabilities())
    want = [(names[int(c)], p) for c, p in zip(classes, probs, strict=True) if p > 0][:10]
    lines = [line.split("\n") for line in page.locator("#patch li").all_inner_texts()]
    assert len(lines) == len(want) + 1
    for (name, chance), (shown, percent) in zip(want, lines, strict=False):
        assert re.sub(r" \(\d+\)$", "", shown) == name
        assert float(percent.strip("<%")) == pytest.approx(100 * chance, abs=0.11)
    rest = 100 * (1 - sum(chance for _, chance in want))
    assert lines[-1][0] == f"{store.num_classes - len(want)} other classes together"
    assert float(lines[-1][1].strip("<%")) == pytest.approx(rest, abs=0.15)
    best = page.locator(".cell.here").get_attribute("aria-label")
    assert best.startswith(f"row {row + 1}, column {column + 1}: {want[0][0]}")


@pytest.mark.parametrize("key", [MASTIFF, "n02108422/wide.png", "painted/400.png"])
def test_hovering_shows_the_patch_under_the_pointer(
    watched: Watched, stores: list[LabelStore], key: str
) -> None:
    (store,) = (store for store in stores if key in store)
    watched.open(key)
    page = watched.page
    box = page.locator("#image").bounding_box()
    width, height = store[key].size
    assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.02)
    rows, columns = store.grid
    x0, y0, x1, y1 = store[key].extent
    assert rows != columns
    for row, column in [(0, 0), (0, 4), (1, 3), (2, 1), (2, 4)]:
        page.mouse.move(
            box["x"] + (x0 + (column + 0.5) / columns * (x1 - x0)) * box["width"],
            box["y"] + (y0 + (row + 0.5) / rows * (y1 - y0)) * box["height"],
        )
        check_patch(page, store, key, row, column)


def test_keyboard_alone(watched: Watched, stores: list[LabelStore]) -> None:
    page = watched.page
    keys = watched.keys()
    focused, press = "document.activeElement.querySelector('.name').title", page.keyboard.press
    page.focus("#sort")
    press("Tab")  # the gallery is one stop
    assert page.evaluate(focused).endswith(keys[0])
    for arrow in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        press(arrow)
    assert page.evaluate(focused).endswith(keys[1])
    press("ArrowDown")
    below = page.evaluate(
        "[...document.querySelectorAll('#gallery li')].filter((item, i, all) =>"
        " item.offsetTop === all[0].offsetTop).length"
    )
    assert page.evaluate(focused).endswith(keys[1 + below])
    press("Home")
    press("Enter")
    page.wait_for_selector("#viewer[open]")
    assert page.inner_text("#title") == keys[0].replace("\n", " ")
    key = page.evaluate("location.hash")
    press("n")
    assert page.evaluate("location.hash") != key
    press("p")
    assert page.evaluate("location.hash") == key
    press("n")
    press("Escape")
    assert not page.locator("#viewer").is_visible()
    # The browser puts the focus back where it was, and tells the page of the closing after that.
    page.wait_for_function(f"name => {focused}.endsWith(name)", arg=keys[1])
    watched.open(MASTIFF)
    check_patch(page, stores[0], MASTIFF, 1, 2)  # it starts in the middle
    for step, row, column in (
        ("ArrowUp", 0, 2),
        ("ArrowLeft", 0, 1),
        ("Home", 0, 0),
        ("ArrowDown", 1, 0),
        ("End", 1, 4),
        ("ArrowRight", 1, 4),  # the edge
    ):
        press(step)
        check_patch(page, stores[0], MASTIFF, row, column)
    frame = "getComputedStyle(document.activeElement, '::after').borderColor"
    assert page.evaluate(frame) == "rgb(255, 212, 0)"
    page.focus("#opacity")
    press("Tab")
    style = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(style) == "solid", "the focus is visible elsewhere too"


def test_overlay_opacity_and_highlight(watched: Watched, stores: list[LabelStore]) -> None:
    watched.open(MASTIFF)
    page = watched.page
    fills = "[...document.querySelectorAll('.cell i')].map((fill) => getComputedStyle(fill).{})"
    best = stores[0][MASTIFF].classes[0, 0].ravel()
    colours = page.evaluate(fills.format("backgroundColor"))
    frequent = {c for c in best.tolist() if (best == c).sum() > 1}
    pairs = {(best[i], colours[i]) for i in range(15) if best[i] in frequent}
    assert len(pairs) == len({colour for _, colour in pairs}) == len(frequent)
    page.locator("#opacity").fill("80")
    assert set(page.evaluate(fills.format("opacity"))) == {"0.8"}
    page.keyboard.press("o")
    assert set(page.evaluate(fills.format("opacity"))) == {"0"}
    page.locator("input[value=mass]").check()
    assert page.locator("#scale").is_visible()
    masses = patch_map(stores[0], MASTIFF).mass.ravel().tolist()
    for colour, mass in zip(page.evaluate(fills.format("backgroundColor")), masses, strict=True):
        shown = np.array(re.findall(r"\d+", colour), int)
        assert np.abs(shown - viridis(mass)).max() <= 1
    first = page.locator("#legend button").first
    first.click()
    assert first.get_attribute("aria-pressed") == "true"
    lit = page.evaluate(
        "[...document.querySelectorAll('.cell.match')].map((c) => +c.dataset.patch)"
    )
    names = ClassNames(stores[0].classes)
    name = first.locator("span:nth-child(2)").inner_text().removesuffix(" (the label)")
    assert lit == [i for i in range(15) if names[int(best[i])] == name] != []
    first.click()
    assert page.locator(".cell.match").count() == 0


def test_search_and_sort(watched: Watched, stores: list[LabelStore]) -> None:
    page = watched.page
    everything = watched.keys()
    assert len(everything) == len(stores[0]) - 1 + len(stores[1])
    page.select_option("#sort", "key")
    assert watched.titles() == sorted(watched.titles())
    page.select_option("#sort", "mass")
    masses = [
        float(text.rpartition("mass ")[2])
        # Not inner texts: those of cards that are not rendered yet are empty.
        for text in page.locator(".card p.numbers:nth-of-type(3)").all_text_contents()
    ]
    assert len(masses) == len(everything) and masses == sorted(masses)
    page.select_option("#sort", "agreement")
    shares = []
    for key in watched.keys():
        entry = next(store[key] for store in stores if key in store)
        known = entry.label >= 0
        shares.append((entry.classes[0, 0] == entry.label).mean() if known else np.inf)
    assert shares == sorted(shares) and np.isinf(shares[-1]) and not np.isinf(shares[0])
    page.fill("#search", "BULL mastiff")
    assert MASTIFF in watched.keys() and len(watched.keys()) < 8
    assert page.inner_text("#count") == f"{len(watched.keys())} of {len(everything)} images"
    page.fill("#search", "val/")
    assert sorted(watched.keys()) == list(stores[1].keys)
    page.fill("#search", "no such thing")
    assert watched.keys() == []
    page.fill("#search", "")
    name = page.locator(".bars button").first.inner_text()
    page.locator(".bars button").first.click()
    assert page.input_value("#search") == name
    assert 0 < len(watched.keys()) < len(everything)


def test_single_images_have_addresses_and_hostile_names_are_text(watched: Watched) -> None:
    page = watched.page
    assert set(HOSTILE) <= set(watched.keys())
    count = "(selector) => document.querySelectorAll(selector).length"
    assert page.evaluate(count, "script") == 2
    assert page.evaluate(count, "[onerror], b b, b script, #failure-list b") == 0
    failures = page.evaluate("document.getElementById('failure-list').textContent")
    assert failures == "train/broken <b>.jpg: the file is empty"
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(overflow) <= 0, "a long name does not widen the page"
    for key in [MASTIFF, *HOSTILE]:
        watched.open(key)
        address = page.url
        page.locator("#close").click()
        assert not page.locator("#viewer").is_visible()
        while page.evaluate("location.hash"):  # cleared by the close event, a little later
            page.wait_for_timeout(20)
        page.goto(address)
        page.wait_for_selector("#viewer[open]")
        assert page.evaluate("document.getElementById('title').textContent") == key
        page.go_back()
        page.wait_for_selector("#viewer:not([open])", state="attached")
    page.goto(f"{watched.url}#train/%E0%A4%A")
    page.reload()
    assert not page.locator("#viewer").is_visible(), "an address of no image"


def test_policy_blocks_all_traffic_and_markup(watched: Watched) -> None:
    page = watched.page
    page.evaluate("""() => {
        window.blocked = [];
        addEventListener("securitypolicyviolation", (e) => blocked.push(e.effectiveDirective));
        document.body.append(Object.assign(new Image(), { src: "https://example.com/x.png" }));
        const style = document.createElement("style");
        style.textContent = "body { display: none }";
        document.head.append(style);
        fetch("https://example.com").catch(() => {});
    }""")
    page.wait_for_function("blocked.length >= 3")
    assert sorted(page.evaluate("blocked")) == ["connect-src", "img-src", "style-src-elem"]
    refused = (
        "() => { try { document.body.innerHTML = '<p>'; } catch (error) { return error.name } }"
    )
    assert page.evaluate(refused) == "TypeError"
    watched.faults.clear()  # what the policy blocked, as the console reports it


def test_dark_mode_and_phone(browser: Any, report: PageReport) -> None:
    brightness = (
        "(() => { const [r, g, b] = getComputedStyle(document.body)"
        ".backgroundColor.match(/\\d+/g).map(Number); return r + g + b })()"
    )
    with Watched(browser, report, color_scheme="dark") as dark:
        assert dark.page.evaluate(brightness) < 150
        dark.page.locator("#dark").click()
        assert dark.page.evaluate(brightness) > 600
        assert dark.page.locator("#dark").get_attribute("aria-pressed") == "false"
    size = {"width": 360, "height": 740}
    with Watched(browser, report, viewport=size, is_mobile=True, has_touch=True) as phone:
        page = phone.page
        overflow = "document.documentElement.scrollWidth - innerWidth"
        assert page.evaluate(overflow) <= 0
        page.locator("#summary summary").first.tap()
        assert page.evaluate(overflow) <= 0
        page.fill("#search", MASTIFF)
        page.locator(".card").tap()
        page.wait_for_selector("#viewer[open]")
        page.locator(".cell").nth(7).tap()
        assert page.inner_text("#patch-title") == "Patch in row 2, column 3"
        viewer = "document.getElementById('viewer')"
        assert page.evaluate(f"{viewer}.scrollWidth - {viewer}.clientWidth") <= 0


def test_report_and_charts_in_words(
    watched: Watched, report: PageReport, stores: list[LabelStore]
) -> None:
    page = watched.page
    labels = [
        svg.get_attribute("aria-label") for svg in page.locator("#charts svg[role=img]").all()
    ]
    total = len(stores[0]) - 1 + len(stores[1])
    assert report.size == report.path.stat().st_size
    assert (report.shown, report.total, report.errors) == (total, total, 1)
    assert len(labels) == 3 and labels[0].startswith(f"Histogram of {total} images: Top-k mass")
    assert re.search(r"Median \d\.\d\d; 10%", labels[0])
    counts = page.locator("#charts figure").first.locator("td:last-child").all_text_contents()
    assert sum(map(int, counts)) == total
    assert page.inner_text("#about").startswith(f"{total} of {total} images with a map. train: ")


def embedded(path: Path) -> dict[str, Any]:
    text = path.read_text()
    assert "http:" not in text.replace("http://www.w3.org/2000/svg", "") and "https:" not in text
    (block,) = re.findall(r'<script type="application/json" id="data">([^<>]*)</script>', text)
    data: dict[str, Any] = json.loads(block)
    return data


def test_limit_spreads_over_the_splits_and_keys_choose(
    stores: list[LabelStore], data: Path, tmp_path: Path
) -> None:
    done: list[tuple[int, int]] = []
    report = save_page(
        stores, tmp_path / "a.html", data, limit=6, watch=lambda *at: done.append(at)
    )
    assert report.shown == 6 and done == [(number, 6) for number in range(1, 7)]
    shown = embedded(report.path)["images"]
    assert {image["split"] for image in shown} == {0, 1}
    assert len({(image["split"], image["key"]) for image in shown}) == 6
    keys = [stores[1].keys[2], MASTIFF]
    report = save_page(stores, tmp_path / "b.html", data, keys=keys)
    assert [image["key"] for image in embedded(report.path)["images"]] == keys


def test_what_cannot_be_shown(stores: list[LabelStore], data: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    for key, message in (("x.jpg", "no score map for 'x"), ("broken <b>.jpg", "the file is empty")):
        with pytest.raises(MissingMapError, match=message):
            save_page(stores, path, data, keys=[key])
    with pytest.raises(ConfigError, match="at least 1 image, got 0"):
        save_page(stores, path, data, limit=0)
    with pytest.raises(ConfigError, match="or its split train, under the keys"):
        save_page(stores, path, tmp_path)
    for bad in (tmp_path / "nowhere" / "a.html", data):  # no such folder; a folder
        with pytest.raises(OutputError, match=rf"cannot write {bad}: .*Remedy"):
            save_page(stores, bad, data, limit=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["image", "map"])
def test_what_cannot_be_read_is_listed_not_shown(tmp_path: Path, damage: str) -> None:
    """An image that changed since it was annotated, and a damaged map."""
    files = {f"{name}.png": painted((50, 40)) for name in "abc"}
    best = np.nan if damage == "map" else 0.7
    store = write_store(tmp_path / "labels", tmp_path / "images", files, best=best)
    kind, message = FormatError, "without NaN"
    if damage == "image":
        (tmp_path / "images" / "a.png").write_bytes(painted((50, 42)))
        kind, message = ImageError, "must be the image that was annotated"
    report = save_page([store], tmp_path / "a.html", tmp_path / "images")
    assert (report.shown, report.total, report.errors) == (2, 3, 1)
    (error,) = embedded(report.path)["errors"]
    assert error["key"] == "a.png" and message in error["error"]
    with pytest.raises(kind, match=message):
        save_page([store], tmp_path / "a.html", tmp_path / "images", keys=["a.png"])


def test_class_names_from_the_file_are_data_too(tmp_path: Path) -> None:
    names = [f"</script><b>{number}</b>" for number in range(50)]
    root = write_store(tmp_path / "labels", tmp_path / "images", {"a.png": painted()}).root
    write_class_names(root, names)
    report = save_page([LabelStore(root)], tmp_path / "a.html", tmp_path / "images")
    found = embedded(report.path)
    (split,), (image,) = found["splits"], found["images"]
    assert [7, names[7]] in split["classes"]
    assert [split["classes"][index][0] for index in image["legend"]] == [3, 7, 21, 40]
    assert split["grid"] == list(GRID) and set(painted_map().ravel()) == {3, 7, 21, 40}


def test_200_images_fit_into_20_megabytes_whatever_they_show(tmp_path: Path) -> None:
    """Noise, under a map of 4000 random classes."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8))
    assert len(jpeg(noise)) <= IMAGE_BYTES
    write_split(tmp_path, ["a.jpg"], MapLayout(("identity",), (20, 20), 10, 1000))
    split = SplitData(LabelStore(tmp_path), "train")
    assert split.listed == 10
    record = split.image("a.jpg", noise)
    assert len(record.pop("src")) <= 4 * IMAGE_BYTES / 3 + 40
    largest = 4 * IMAGE_BYTES / 3 + len(json.dumps(record, separators=(",", ":")))
    assert 200 * (largest + 100) < 20e6
    finer = tmp_path / "finer"
    write_split(finer, ["a.jpg"], MapLayout(("identity",), (40, 40), 10, 1000))
    assert SplitData(LabelStore(finer), "train").listed == 2, "finer maps list fewer classes"
