"""How often thumbprints take the same image for another, and another for the same.

    python benchmarks/thumbprint.py --data /path/to/imagenet

Each image below `--data` (default: the embedded sample) is compared with copies that are the same
and with candidates that are not. Every second image, by path: the limits in
dataset/sources/thumbprint.py were chosen on the others, which `--all` adds. OpenCV's rows need
opencv-python.
"""

import argparse
import io
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import WORK
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from tokenlabel.annotate.sample import sample_folder
from tokenlabel.dataset.sources.thumbprint import difference, thumbprint
from tokenlabel.dataset.transforms.recipe import IMAGENET_MEAN, IMAGENET_STD

try:
    import cv2
except ImportError:
    cv2 = None

Cases = Iterator[tuple[str, Any]]
TURNS = {
    Image.Transpose.FLIP_LEFT_RIGHT: "mirrored left to right",
    Image.Transpose.FLIP_TOP_BOTTOM: "mirrored top to bottom",
    Image.Transpose.ROTATE_180: "turned by 180 degrees",
    Image.Transpose.ROTATE_270: "turned by 90 degrees clockwise",
    Image.Transpose.ROTATE_90: "turned by 90 degrees counter-clockwise",
    Image.Transpose.TRANSVERSE: "mirrored, then turned by 90 degrees clockwise",
    Image.Transpose.TRANSPOSE: "mirrored, then turned by 90 degrees counter-clockwise",
}


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return decode(data.getvalue())


def same_images(data: bytes, image: Image.Image) -> Cases:
    """Copies of an image that must pass."""
    for quality in (50, 75, 95):
        yield f"JPEG, quality {quality}", jpeg(image, quality)
    small = functional.resize(image, 256)
    yield "shorter side 256 px", small
    yield "shorter side 256 px, JPEG, quality 75", jpeg(small, 75)
    yield "squashed to 256 x 256 px", image.resize((256, 256), Image.Resampling.BICUBIC)
    yield "enlarged by 1.5", image.resize([side * 3 // 2 for side in image.size])
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    tensor = decode_image(encoded, ImageReadMode.RGB)
    yield "torchvision's decoder", tensor
    floats = functional.to_dtype(tensor, torch.float32, scale=True)
    yield "floats, normalised", functional.normalize(floats, IMAGENET_MEAN, IMAGENET_STD)
    for factor in (2, 4):
        draft = Image.open(io.BytesIO(data))
        draft.draft("RGB", (image.width // factor, image.height // factor))
        yield f"Pillow's draft mode, 1/{factor}", draft.convert("RGB")
    if cv2:
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        yield "OpenCV's decoder, BGR", pixels
        yield "OpenCV, 256 px, bilinear without antialias", cv2.resize(pixels, small.size)


def other_images(image: Image.Image) -> Cases:
    """Candidates that must not pass."""
    for turn, name in TURNS.items():
        yield name, image.transpose(turn)
    yield (
        "Resize(256), CenterCrop(224)",
        functional.center_crop(functional.resize(image, 256), [224, 224]),
    )
    for part in (0.875, 0.95):
        size = [round(image.height * part), round(image.width * part)]
        yield f"centre crop, {part} of each side", functional.center_crop(image, size)
    yield "RandomResizedCrop, .08 to 1", v2.RandomResizedCrop(224)(image)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder with train/ and val/")
    parser.add_argument("--all", action="store_true", help="every image, not every second one")
    options = parser.parse_args()
    root = options.data or sample_folder(WORK)
    torch.manual_seed(0)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    seen: dict[str, Counter[str | None]] = {}
    seconds: dict[str, list[float]] = {"decode": [], "thumbprint": [], "check": []}

    def check(name: str, candidate: Any) -> None:
        seen.setdefault(name, Counter())[difference(stored, candidate)] += 1

    for row in range(0 if options.all else 1, len(files), 1 if options.all else 2):
        data = files[row].read_bytes()
        times = [time.process_time()]
        image = decode(data)
        times.append(time.process_time())
        stored = thumbprint(image)
        times.append(time.process_time())
        difference(stored, image)
        times.append(time.process_time())
        for spent, first, last in zip(seconds.values(), times, times[1:], strict=False):
            spent.append(last - first)

        check("same: the file itself", image)
        for name, candidate in same_images(data, image):
            check(f"same: {name}", candidate)
        for name, candidate in other_images(image):
            check(name, candidate)
        check("the next image", decode(files[(row + 1) % len(files)].read_bytes()))
        split, name = files[row].relative_to(root).parts[0], files[row].relative_to(root).parts[1:]
        for other in root.iterdir():
            twin = other.joinpath(*name)
            if other.name != split and twin.is_file():
                check("the same name in another split", decode(twin.read_bytes()))

    print(f"{'candidate':<53} {'images':>6} {'refused':>8} {'named':>8}")
    for name, counts in seen.items():
        total = counts.total()
        named = f"{counts[name] / total:>8.2%}" if name in TURNS.values() else ""
        print(f"{name:<53} {total:>6} {1 - counts[None] / total:>8.2%} {named}")
    for name, spent in seconds.items():
        print(f"{name}: median {statistics.median(spent) * 1e6:.0f} us of CPU time")


if __name__ == "__main__":
    main()
