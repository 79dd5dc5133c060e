"""How the job scales: teachers side by side, and the driver's memory with the number of images.

    python benchmarks/scaling.py teachers                         # 1, 2, 4 and 8: 4 minutes
    python benchmarks/scaling.py memory --images 1000000 10000000   # 10 minutes, 3 GB in TMPDIR
    python benchmarks/scaling.py reader                           # what opening a shard costs
    python benchmarks/scaling.py decode --data /path/to/imagenet

`teachers` runs the real job on tiny images with a teacher that sleeps, as a driver sees one that
computes on a GPU, so that the cores of this machine are not the limit. All teachers start at the
same moment, when each has its first batch; a rate is that of all images until the last shard is
written, so the tail counts. Efficiency is the rate over that of one teacher times their number.

`memory` runs each part of the driver, and what a reader opens, in a process of its own: first on
some thousands of images, then on the wanted number. Bytes an image are the peak resident set of the
second run (mapped pages of files included) beyond what the process had before it. Only `os.scandir`
is simulated, which lists images that are not there: either in 1,000 class folders or in a single
one. The shards are real files with 1 x 2 maps, the first one copied and its directory given other
keys.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import numpy as np
import ray
import torch
from PIL import Image
from torch import nn

from tokenlabel.annotate import AnnotateConfig, annotate
from tokenlabel.annotate.cluster import actor
from tokenlabel.annotate.cluster.pool import Pool
from tokenlabel.annotate.cluster.session import Resources, ray_session
from tokenlabel.annotate.images import decode_batch
from tokenlabel.annotate.plan import Identity, Plan, make_plan, unfinished
from tokenlabel.annotate.report import Progress, Tally
from tokenlabel.annotate.sample import sample_folder
from tokenlabel.annotate.teacher.encode import encode
from tokenlabel.dataset import LabelStore
from tokenlabel.dataset.format.directory import HEAD, MAGIC
from tokenlabel.dataset.format.index import NAME as INDEX
from tokenlabel.dataset.format.index import build_index
from tokenlabel.dataset.format.keys import canonical_name
from tokenlabel.dataset.format.manifest import NAME as MANIFEST
from tokenlabel.dataset.format.manifest import Manifest, Numbered, open_manifest, write_manifest
from tokenlabel.dataset.format.score_map import MapLayout
from tokenlabel.dataset.format.shard import shard_name, write_shard
from tokenlabel.dataset.sources.folder import FolderSource
from tokenlabel.dataset.sources.image_source import Entry as SourceEntry
from tokenlabel.dataset.sources.image_source import ImageSource
from tokenlabel.dataset.sources.open_source import open_split
from tokenlabel.dataset.sources.scan import manifest_blocks, scan_all

# ---- teachers ----


class Sleeper(nn.Module):
    """A network that waits for the other teachers, and then sleeps in each batch."""

    num_classes, input_size, mean, std = 16, (32, 32), (0.5,) * 3, (0.5,) * 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, self.num_classes, 16, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) == BATCH:  # the start-up check has fewer
            go = Path(os.environ["SLEEPER_GO"])
            if not go.exists():
                go.with_name(f"waiting-{os.getpid()}").touch()
            while not go.exists():
                time.sleep(0.001)
            time.sleep(float(os.environ["SLEEPER_SECONDS"]))
        return self.features(images)


BATCH, BATCHES = 16, 4  # images a batch, batches a shard


def tiny_images(folder: Path, count: int) -> None:
    """Images of 32 px under `folder`/train: few, with many names."""
    rng = np.random.default_rng(0)
    for number in range(16):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    for number, source in enumerate(islice(cycle(range(16)), count)):
        link = folder / "train" / f"{number % 10}" / f"{number:06d}.png"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder / f"{source}.png")


def rate_of(teachers: int, folder: Path, shards: int) -> float:
    """Images a second of so many teachers."""
    count, go = teachers * shards * BATCH * BATCHES, Path(os.environ["SLEEPER_GO"])
    tiny_images(folder, count)
    for path in go.parent.glob("waiting-*"):
        path.unlink()
    go.unlink(missing_ok=True)
    config = AnnotateConfig(
        data=str(folder),
        out=str(folder / "out"),
        model=f"{__file__}:Sleeper",
        k=5,
        batch_size=BATCH,
        shard_size=BATCH * BATCHES,
        teachers=teachers,
        threads=1,
    )

    def start_together(*_: object) -> None:
        if len(list(go.parent.glob("waiting-*"))) == teachers and not go.exists():
            go.touch()

    report = annotate(config, start_together)
    assert report.ok and report.images == count and report.lost_actors == 0, report
    ends = [path.stat().st_mtime for path in config.folder.glob("shard-*.h5")]
    return count / (max(ends) - go.stat().st_mtime)


def measure_teachers(options: argparse.Namespace) -> None:
    print("| teachers | images/s | efficiency | of what sleeping allows |", flush=True)
    print("|---|---|---|---|", flush=True)
    single, most = 0.0, BATCH / options.sleep
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        os.environ |= {"SLEEPER_GO": f"{folder}/go", "SLEEPER_SECONDS": str(options.sleep)}
        with ray_session(None, num_cpus=4):
            for teachers in options.counts:
                (folder / str(teachers)).mkdir()
                rate = rate_of(teachers, folder / str(teachers), options.shards)
                each = rate / teachers
                single = single or each
                parts = f"{rate:.1f} | {each / single:.3f} | {each / most:.3f}"
                print(f"| {teachers} | {parts} |", flush=True)


# ---- memory ----

SHARD, CLASSES, WARM_UP = 4096, 1000, 8192
KEPT = (MANIFEST, INDEX)


class Entry(NamedTuple):
    """An image that a listing names."""

    name: str

    def is_dir(self) -> bool:
        return False


def name_of(number: int) -> str:
    return f"n01440764_{number:010d}.JPEG"


@contextmanager
def listings(root: Path, images: int) -> Iterator[None]:
    """Have the folders without folders under `root` list `images` images in all, unsorted."""
    real = os.scandir
    leaves = [path for path in root.iterdir() if path.is_dir()] or [root]
    each = images // len(leaves)

    @contextmanager
    def scandir(path: str) -> Iterator[Iterator[Any]]:
        if Path(path) in leaves:
            # 7919 is prime, so each number comes once, in an order that is far from sorted.
            yield (Entry(name_of(i * 7919 % each)) for i in range(each))
        else:
            with real(path) as entries:
                yield entries

    with mock.patch.object(os, "scandir", scandir):
        yield


def identity() -> Identity:
    return Identity("sleeper", "0" * 64, {}, (1, 2), CLASSES, None, "cpu", "rule", True, 0.0)


def plan_of(folder: Path) -> Plan:
    config = AnnotateConfig(data=str(folder), out=str(folder), split="out", k=1)
    manifest = open_manifest(folder / "out" / MANIFEST)
    return make_plan(config, "run", manifest, identity())


def make_shards(folder: Path, images: int) -> None:
    """All shards of the manifest there: the first is written, the others are copies of it."""
    plan, keys = plan_of(folder), open_manifest(folder / "out" / MANIFEST).keys
    attrs = {**plan.attrs, "shard": 0, "first_row": 0}
    attrs |= {"labelled": 0, "top1": 0, "top5": 0, "mass": 0.0}
    first: dict[int, bytes] = {}
    for number in range(plan.shards):
        path, row = plan.folder / shard_name(number, plan.shards), SHARD * number
        size = min(SHARD, plan.rows - row)
        if size not in first:
            labels = np.zeros(size, int)
            with write_shard(path, plan.layout, keys[:size], labels, attrs) as writer:
                planes = plan.layout.planes().items()
                blank = {name: np.zeros((size, *shape), dtype) for name, (dtype, shape) in planes}
                columns = blank_columns(size)
                writer.append(blank, *columns, [""] * size)
            first[size] = path.read_bytes()
        path.write_bytes(renumbered(first[size], number, row, keys[row : row + size]))


def blank_columns(rows: int) -> list[np.ndarray]:
    """Sizes of one pixel, any digests, and no thumbprint and orientation."""
    zeros, digests = np.zeros((rows, 64), np.uint8), np.random.default_rng(0).bytes(8 * rows)
    return [np.ones((rows, 2), np.int32), np.frombuffer(digests, np.uint64), zeros, zeros[:, 0]]


def renumbered(data: bytes, number: int, row: int, keys: list[str]) -> bytes:
    """A shard whose directory says that it is another one, with keys that lie behind the rest."""
    found = json.loads(data[HEAD.size : HEAD.size + HEAD.unpack(data[: HEAD.size])[1]])
    column = found["columns"]["key"]
    stored = zlib.compress(np.array([key.encode() for key in keys], column["dtype"]).tobytes(), 1)
    column.update(offset=len(data), size=len(stored), crc=zlib.crc32(stored))
    found["attrs"].update(shard=number, first_row=row)
    found["size"] += len(stored)
    text = json.dumps(found, separators=(",", ":")).encode()
    head = HEAD.pack(MAGIC, len(text), zlib.crc32(text)) + text
    return head + data[len(head) :] + stored


def scan(folder: Path, images: int, classes: int = 0) -> None:
    """What `annotate` does with the manifest of a run before, and with a new one."""
    root = folder / f"{classes}-classes"
    root.mkdir()
    for number in range(classes):
        (root / f"class-{number:05d}").mkdir()
    with listings(root, images):
        manifest = manifest_of(FolderSource(root), folder)
    assert len(manifest.keys) == images // max(classes, 1) * max(classes, 1)


def manifest_of(source: ImageSource, folder: Path) -> Manifest:
    found = dict[str, int]()
    write_manifest(
        folder / "out" / MANIFEST,
        manifest_blocks(scan_all(source), source, found),
        lambda: Numbered("folders", None, {name: n for n, name in enumerate(found)}),
        str(source),
        source.parts(),
    )
    return open_manifest(folder / "out" / MANIFEST)


@dataclass(frozen=True)
class Tars:
    """The members that headers of 1,000 tars would name, one class each."""

    images: int
    numbered: ClassVar[None] = None
    in_blocks: ClassVar[bool] = False

    def parts(self) -> list[str]:
        return [f"n{part:08d}.tar" for part in range(CLASSES)]

    def scan(self, part: int) -> Iterator[SourceEntry]:
        for n in range(self.images // CLASSES):
            name = f"n{part:08d}/n{part:08d}_{n:07d}.JPEG"
            yield SourceEntry(name, f"n{part:08d}", part, 512 + n * 111_104, 110_000)


def scan_tars(folder: Path, images: int) -> None:
    manifest = manifest_of(Tars(max(images, CLASSES)), folder)
    count = len(manifest.keys)
    for row in range(0, count, count // 64 or 1):
        key = manifest.keys[row]
        assert manifest.keys.find(key) == row
        assert manifest.keys.find(f"{canonical_name(key)}.jpg") == row


def check_manifest(folder: Path, images: int) -> None:
    open_manifest(folder / "out" / MANIFEST, verify=True)


def find_unfinished(folder: Path, images: int) -> None:
    assert unfinished(plan_of(folder)) == []


class IdleActor(actor.TeacherActor):
    """Says at once that a shard is done: what is left is the driver's own work."""

    def __init__(self, *_: object) -> None:
        self._images = 0

    @ray.method(concurrency_group="control")
    def ready(self) -> Identity:
        return identity()

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        return Progress(self._images, 0, 1.0, 1.0, 2.0)

    @ray.method(concurrency_group="shards")
    def annotate(self, plan: Plan, shard: int) -> str:
        self._images += SHARD
        return "0" * 64


def hand_out(folder: Path, images: int) -> None:
    """Two idle actors: the Ray session and they are started by the first, small, run."""
    plan = plan_of(folder)
    if not POOLS:
        STACK.enter_context(ray_session(None, num_cpus=2))
        STACK.enter_context(mock.patch.object(actor, "TeacherActor", IdleActor))
        config = AnnotateConfig(data=str(folder))
        pool = Pool((config, FolderSource(folder), 1), Resources(2, 0.0, 1, fixed=True))
        POOLS.append(STACK.enter_context(pool))
        POOLS[0].identify(2)
    tally = Tally()
    POOLS[0].run(plan, range(plan.shards), 3, tally)
    assert len(tally.written) == plan.shards


POOLS: list[Pool] = []
STACK = ExitStack()  # closed as the process ends


def index_shards(folder: Path, images: int) -> None:
    build_index(folder / "out")


def open_store(folder: Path, images: int) -> None:
    """Open, and read some maps at random."""
    store, rng = LabelStore(folder / "out"), random.Random(0)
    for row in rng.sample(range(len(store)), 64):
        assert store[store.keys[row]].codes.shape == (1, 1, 1, 2)


#: Each with the title of its row; all but `shards` are measured.
STEPS: dict[str, tuple[Callable[[Path, int], None], str]] = {
    "scan-single": (scan, "manifest, all in one folder"),
    "scan-classes": (partial(scan, classes=CLASSES), "manifest, 1,000 class folders"),
    "scan-tars": (scan_tars, "manifest, 1,000 tars"),
    "check": (check_manifest, "manifest, verified on resuming"),
    "shards": (make_shards, ""),
    "unfinished": (find_unfinished, "headers of finished shards"),
    "pool": (hand_out, "shards handed to idle actors"),
    "index": (index_shards, "index built"),
    "store": (open_store, "LabelStore opened, 64 maps read"),
}


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) << 10


def run_step(options: argparse.Namespace) -> None:
    """In a process of its own: warm up, measure, and say what came out."""
    step, _ = STEPS[options.name]
    with STACK:
        step(options.small, WARM_UP)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        start = (time.perf_counter(), time.process_time())
        step(options.large, options.images)
        seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        peak = resident("VmHWM") - before
        print(json.dumps({"bytes": peak, "seconds": seconds, "cpu": cpu}), flush=True)


def measure_memory(options: argparse.Namespace) -> None:
    print("| images | part | seconds | of these CPU | images a CPU second | bytes an image |")
    print("|---|---|---|---|---|---|", flush=True)
    for images in options.images:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folders = [Path(name) / "small", Path(name) / "large"]
            for folder in folders:
                folder.mkdir()
            for step, (_, title) in STEPS.items():
                # `shards` takes the manifest of the class folders, which is there by then.
                if step not in options.parts and step != "shards":
                    continue
                command = [sys.executable, __file__, "step", step, *map(str, folders), str(images)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                if not title:
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"| {images:,} | {title} | {found['seconds']:.2f} | {found['cpu']:.2f} "
                    f"| {images / found['cpu']:,.0f} | {found['bytes'] / images:.1f} |",
                    flush=True,
                )
            kept = [path for path in (folder / "out").iterdir() if path.name in KEPT]
            parts = (f"{path.name} {path.stat().st_size / images:.1f}" for path in kept)
            print(f"\nBytes an image on disk: {', '.join(sorted(parts))}\n", flush=True)


# ---- readers and decoders ----


def measure_reader(options: argparse.Namespace) -> None:
    """What a shard of 4,096 maps of 18 x 18, k = 16, costs a process when it is read first."""
    shards, rng = 12, np.random.default_rng(0)
    layout = MapLayout(("identity",), (18, 18), 16, CLASSES)
    logits = torch.from_numpy(rng.normal(0, 3, (64, 18, 18, CLASSES)).astype(np.float32))
    maps = {name: plane.numpy()[:, None] for name, plane in encode(logits, layout, 0.003).items()}
    columns = blank_columns(64)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        attrs = {"fingerprint": "f", "shards": shards, "extent": [0.0, 0.0, 1.0, 1.0]}
        for shard in range(shards):
            first = shard * SHARD
            keys = [name_of(row) for row in range(first, first + SHARD)]
            given = {**attrs, "shard": shard, "first_row": first}
            path = Path(name) / shard_name(shard, shards)
            with write_shard(path, layout, keys, np.zeros(SHARD, int), given) as writer:
                for _ in range(SHARD // 64):
                    writer.append(maps, *columns, [""] * 64)
        store = LabelStore(name)
        before = resident("VmRSS")
        first_reads = [cpu_seconds(lambda row=n * SHARD + 5: store[row]) for n in range(shards)]
        used = (resident("VmRSS") - before) / shards
        later = [
            cpu_seconds(lambda row=row: store[row])
            for row in rng.integers(0, len(store), 2000).tolist()
        ]
    print(f"first read of a shard: {1e3 * statistics.median(first_reads):.1f} ms, {used:,.0f} B")
    print(f"later reads: {1e6 * statistics.median(later):.0f} us")


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_decoding(options: argparse.Namespace) -> None:
    """Photographs that one core reads, decodes and squashes a second."""
    source = open_split(str(options.data or sample_folder(Path(tempfile.gettempdir()))), "train")
    keys = list(islice(source.scan(0), 300))
    for side in (224, 576):
        seconds = cpu_seconds(
            lambda side=side: decode_batch(source, keys, ((side, side),), "bicubic")
        )
        print(f"{side} px: {len(keys) / seconds:.0f} images a CPU second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to write (default: TMPDIR)")
    commands = parser.add_subparsers(required=True)

    def command(name: str, measure: Callable[..., None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text)
        added.set_defaults(measure=measure)
        return added

    teachers = command("teachers", measure_teachers, "teachers side by side")
    teachers.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    teachers.add_argument("--sleep", type=float, default=1.0, help="seconds a batch of 16")
    teachers.add_argument("--shards", type=int, default=8, help="shards of 64 images a teacher")
    memory = command("memory", measure_memory, "memory of the driver and of a reader")
    memory.add_argument("--images", type=int, nargs="+", default=[1_000_000])
    memory.add_argument("--parts", choices=STEPS, nargs="+", default=list(STEPS))
    command("reader", measure_reader, "what opening a shard costs")
    decode = command("decode", measure_decoding, "images a core decodes")
    decode.add_argument("--data", type=Path, help="folder with train/ (default: the sample)")
    step = command("step", run_step, "one part, for `memory`")
    step.add_argument("name", choices=STEPS)
    step.add_argument("small", type=Path)
    step.add_argument("large", type=Path)
    step.add_argument("images", type=int)
    options = parser.parse_args()
    options.measure(options)


if __name__ == "__main__":
    main()
