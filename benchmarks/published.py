"""What importing a published label set costs: CPU time an image, and memory.

    python benchmarks/published.py --images /path/to/images          # folder with CLASS/NAME.jpg
    python benchmarks/published.py --images ... --counts 2000 8000

A set of as many labels as asked for is written as a .zip, its images are links to those given, and
each import runs in a process of its own. Labels have the shape of the published ones,
[2, 5, 18, 18] in float16. Memory that does not grow with the count is that of the libraries.
"""

import argparse
import logging
import multiprocessing as mp
import resource
import tempfile
import time
import zipfile
from io import BytesIO
from pathlib import Path

import torch

from tokenlabel.annotate.config import AnnotateConfig
from tokenlabel.published.importer import import_labels


def label(seed: int) -> bytes:
    torch.manual_seed(seed)
    scores, ids = (2 * torch.randn(18, 18, 1000)).topk(5)
    file = BytesIO()
    torch.save(torch.stack([scores, ids.float()]).half().permute(0, 3, 1, 2), file)
    return file.getvalue()


def measure(folder: Path, count: int, results: "mp.Queue[tuple[float, float]]") -> None:
    torch.set_num_threads(1)
    logging.disable()
    options = AnnotateConfig(
        out=str(folder / "out"), num_classes=1000, numbering="folders", shard_size=1024
    )
    begin = time.process_time()
    import_labels(folder / "set.zip", folder / "train", options, geometry="centre:576")
    seconds = time.process_time() - begin
    results.put((seconds / count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[2000, 8000])
    options = parser.parse_args()
    images = sorted(options.images.resolve().rglob("*.[jJ]*"))
    labels = [label(seed) for seed in range(16)]
    print("| images | ms of CPU an image | MB at most |\n|---|---|---|")
    for count in options.counts:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            with zipfile.ZipFile(folder / "set.zip", "w") as file:
                for number in range(count):
                    name = f"n{number % 100:08d}/image_{number}"
                    link = folder / "train" / f"{name}.JPEG"
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(images[number % len(images)])
                    file.writestr(f"set/{name}.pt", labels[number % len(labels)])
            context = mp.get_context("spawn")
            results: mp.Queue[tuple[float, float]] = context.Queue()
            process = context.Process(target=measure, args=(folder, count, results))
            process.start()
            cpu, memory = results.get()
            process.join()
            print(f"| {count} | {cpu * 1e3:.3f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
