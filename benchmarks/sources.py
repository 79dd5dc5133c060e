"""What images cost where they are: bytes, requests and CPU of each form against an image folder.

    python benchmarks/sources.py forms --data /path/to/imagenet --images 500
    python benchmarks/sources.py decode --data /path/to/imagenet
    python benchmarks/sources.py busy --data /path/to/imagenet

`forms` annotates the same images as folder, tar of tars, WebDataset, Parquet and list, compares all
that is stored, and looks the labels of each form up from all others. `decode` compares the CPU time
of a job's decode tasks, batches of 64 in turns in this process, and counts what an S3 server is
asked. `busy` is the share of time that the teacher computes. The S3 server is seaweedfs, on this
machine, behind a proxy that counts.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
from common import ratio, sample_config, take_turns

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.forms import FORMS, pack
from tests.s3 import Proxy, s3_proxy
from tokenlabel.annotate import annotate
from tokenlabel.annotate.cluster.session import ray_session
from tokenlabel.annotate.images import decode_batch, fetch_block
from tokenlabel.dataset import LabelStore
from tokenlabel.dataset.format.keys import canonical_name
from tokenlabel.dataset.sources.folder import FolderSource
from tokenlabel.dataset.sources.image_source import Entry, ImageSource
from tokenlabel.dataset.sources.open_source import open_split
from tokenlabel.dataset.storage.remote_path import RemotePath

SIZES, BATCH = [(320, 320), (448, 448)], 64


def photographs(options: argparse.Namespace) -> dict[str, bytes]:
    """Images by `WNID/WNID_NUMBER.JPEG`, as ImageNet names them, in the folders' order."""
    root = options.data / "train"
    keys = [entry.key for entry in FolderSource(root).scan()][: options.images]
    return {
        f"{(wnid := key.partition('/')[0])}/{wnid}_{n}.JPEG": (root / key).read_bytes()
        for n, key in enumerate(keys)
    }


def same(one: LabelStore, other: LabelStore) -> int:
    """How many rows of the other, by any name, hold exactly what the first one's do."""
    count = 0
    for row in range(len(one)):
        found = other.row(one.keys[row])
        planes = all(
            np.array_equal(getattr(one[row], name), getattr(other[found], name))
            for name in one.layout.planes()
        )
        facts = [
            (store.digest(at), store.ground_truth[at], store.thumbprint(at).tobytes())
            for store, at in ((one, row), (other, found))
        ]
        count += planes and facts[0] == facts[1]
    return count


def measure_forms(options: argparse.Namespace, work: Path) -> None:
    images, stores = photographs(options), dict[str, LabelStore]()
    data = {name: make(work / name.replace(" ", "-"), images) for name, make in FORMS.items()}
    with ray_session(None):
        for name, text in data.items():
            out = work / "labels" / name.replace(" ", "-")
            report = annotate(sample_config(text, out=str(out), input_size=224, shard_size=128))
            assert report.ok and report.errors == 0 and report.images == len(images)
            stores[name] = LabelStore(out / "train")
            print(f"{name}: {report.images} images, teacher right on {report.top1:.3f}", flush=True)
    for one, other in product(stores, stores):
        found = same(stores[one], stores[other])
        print(f"labels of {other} looked up by the keys of {one}: {found} of {len(images)} equal")


@contextmanager
def on_s3(work: Path, images: dict[str, bytes]) -> Iterator[tuple[Proxy, str]]:
    """A server that holds the images in tars of 250."""
    (work / "server").mkdir()
    with s3_proxy(work / "server") as proxy:
        os.environ.update(proxy.environment)
        names = list(images)
        for part, start in enumerate(range(0, len(names), 250)):
            some = {name: images[name] for name in names[start : start + 250]}
            tar = pack(work / "one.tar", some)
            RemotePath(f"s3://bucket/t-train-{part:04d}.tar").put(tar)
        yield proxy, f"s3://bucket/t-train-{{0000..{part:04d}}}.tar"


def entries(source: ImageSource) -> list[Entry]:
    return [entry for part in range(len(source.parts())) for entry in source.scan(part)]


def measure_decoding(options: argparse.Namespace, work: Path) -> None:
    images = photographs(options)
    with on_s3(work, images) as (proxy, remote):
        data = {name: FORMS[name](work / name.replace(" ", "-"), images) for name in FORMS}
        sources = {name: open_split(text, "train") for name, text in data.items()}
        local = {
            f"plain-{part}.tar": dict(list(images.items())[start : start + 250])
            for part, start in enumerate(range(0, len(images), 250))
        }
        for name, some in local.items():
            pack(work / name, some)
        sources["tars"] = open_split(str(work / "plain-*.tar"), "train")
        sources["tars on S3"] = open_split(remote, "train")
        listed = {name: entries(source) for name, source in sources.items()}
        # The same images in each batch, so that the pixels to decode are the same.
        names = [canonical_name(name) for name in images][:BATCH]
        batches = {
            name: [e for e in found if canonical_name(e.key) in set(names)]
            for name, found in listed.items()
        }

        def way(name: str) -> object:
            source, batch = sources[name], batches[name]
            fetched = fetch_block(source, batch, [len(batch)]) if source.in_blocks else None
            return decode_batch(source, batch, SIZES, "bicubic", *([fetched] if fetched else []))

        ways = {name: (lambda name=name: way(name)) for name in sources}
        seconds = take_turns(ways, options.rounds)
        for name in sources:
            print(
                f"CPU of decoding / of a folder, {name}: {ratio(seconds[name], seconds['folder'])}"
            )
        proxy.gets.clear()
        proxy.bytes = 0
        rows = listed["tars on S3"]
        for start in range(0, len(rows), BATCH):
            for _ in sources["tars on S3"].read(rows[start : start + BATCH]):
                pass
        size = sum(map(len, images.values()))
        print(
            f"tars on S3: {sum(proxy.gets.values()) / len(rows):.4f} GET an image, "
            f"{proxy.bytes / size:.4f} of the images' bytes"
        )


def measure_busy(options: argparse.Namespace, work: Path) -> None:
    images = photographs(options)
    with on_s3(work, images) as (_, remote):
        data = {name: FORMS[name](work / name.replace(" ", "-"), images) for name in FORMS}
        data["tars on S3"] = remote
        with ray_session(None):
            for name, text in data.items():
                out = str(work / "labels" / name.replace(" ", "-"))
                report = annotate(sample_config(text, out=out, input_size=320, shard_size=1000))
                assert report.ok and report.busy
                print(f"{name}: teacher busy {report.busy:.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["forms", "decode", "busy"])
    parser.add_argument("--data", type=Path, required=True, help="image folder with train/")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    measure = {"forms": measure_forms, "decode": measure_decoding, "busy": measure_busy}[given.what]
    with tempfile.TemporaryDirectory(prefix="tokenlabel-") as folder:
        measure(given, Path(folder))
