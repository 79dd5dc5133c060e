"""Step 1: CIFAR-10 as image folders, DATA/train/CLASS/*.png and DATA/val/CLASS/*.png.

    python examples/cifar10/prepare.py --out DATA

Downloads CIFAR-10 (170 MB) with torchvision and writes the first images of each class as files.
Not needed where you have image folders already, of these classes or any others.
"""

import argparse
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL.Image import Image
from torchvision.datasets import CIFAR10


def export(images: Iterable[tuple[Image, int]], names: list[str], count: int, to: Path) -> int:
    """Write the first `count` images of each class as files; return how many there are.

    Args:
        images: (image, class) pairs.
        names: of the classes, by number.
        count: images a class, 0 for all.
        to: folder to make; it appears when it is complete.
    """
    if to.exists():
        return sum(1 for _ in to.rglob("*.png"))
    half = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    for name in names:
        (half / name).mkdir(parents=True)
    written: Counter[int] = Counter()
    for image, label in images:
        if not count or written[label] < count:
            image.save(half / names[label] / f"{written[label]:05d}.png")
            written[label] += 1
    half.rename(to)
    return written.total()


def main() -> None:
    """Parse the command line, download, write."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write train/ and val/ to")
    add("--download", type=Path, default=Path("data/download"), help="where to keep the download")
    add("--train", type=int, default=1000, help="training images a class; 0: all 5000")
    add("--val", type=int, default=200, help="validation images a class; 0: all 1000")
    args = parser.parse_args()
    for split, count in (("train", args.train), ("val", args.val)):
        images = CIFAR10(str(args.download), train=split == "train", download=True)
        total = export(images, images.classes, count, args.out / split)
        print(f"{args.out / split}: {total} images")


if __name__ == "__main__":
    main()
