"""What a GPU makes of it: exactness, targets and the loss, a training step, annotation.

    python benchmarks/gpu.py                         # all, 8 minutes on one H200
    python benchmarks/gpu.py exact targets step      # of: exact, targets, step, annotate, compile
    python benchmarks/gpu.py --small --device cpu    # whether it runs, anywhere

Times are wall-clock of calls in a row with one synchronisation at the end, as a loop that never
waits for the device sees them: the median of `--repeats` such rows. Beside them stands how long the
GPU computed in one call, and in how many kernels. Memory is the peak beyond what was allocated
before. Teachers and students have random weights, which cost what others cost; those of `exact` are
the embedded sample's.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from loss import dense, log_softmax  # the script beside this one
from loss import records as made_up
from PIL import Image
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from tokenlabel.annotate.sample import sample_folder
from tokenlabel.annotate.teacher.encode import encode
from tokenlabel.annotate.teacher.timm_teacher import Teacher
from tokenlabel.dataset import MapLayout, TokenLabels
from tokenlabel.supervise import CutMix, MixToken, TokenLabelLoss, TokenStudent

GRID, CLASSES, FLOOR = 14, 1000, 0.003
#: Name, side in pixels and batch sizes, of which the second for all ways to run it.
TEACHERS = [
    ("convnext_large", 384, (32, 128)),
    ("eva02_large_patch14_448", 448, (32, 128)),
    ("dm_nfnet_f6", 576, (8, 32, 128)),
]
#: Precision, and whether channels last.
WAYS = [("float32", False), ("bfloat16", False), ("bfloat16", True)]
records = cache(made_up)


class Clock:
    """Times and memory of calls on one device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.repeats, self.cuda = options.repeats, options.device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, run: Callable[[], object]) -> float:
        seconds = []
        run()
        for _ in range(1 + self.repeats):  # the first does not count
            self.wait()
            start = time.perf_counter()
            for _ in range(self.repeats):
                run()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:]) / self.repeats * 1e3

    def busy(self, run: Callable[[], object]) -> tuple[float, int]:
        """Milliseconds that the GPU computed, and kernels."""
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            run()
            self.wait()
        on_device = [e for e in recorded.events() or () if e.device_type == DeviceType.CUDA]
        return sum(e.time_range.elapsed_us() for e in on_device) / 1e3, len(on_device)

    def peak(self, run: Callable[[], object]) -> float:
        """MB."""
        if not self.cuda:
            return 0.0
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def show(self, name: str, run: Callable[[], object], images: int = 0) -> float:
        took, (busy, kernels) = self.ms(run), self.busy(run) if self.cuda else (0.0, 0)
        rate = f"{images / took * 1e3:.0f}" if images else ""
        print(f"| {name} | {took:.2f} | {busy:.2f} | {kernels} | {self.peak(run):.0f} | {rate} |")
        return took


def header(title: str) -> None:
    print(f"\n| {title} | ms | GPU busy, ms | kernels | MB | images/s |\n|---|---|---|---|---|---|")


def largest(one: Tensor, other: Tensor) -> str:
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    return f"{float((one - other).abs().max()):.1e} of {float(other.abs().max()):.3g}"


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    """What part of codes and classes differs."""
    parts = []
    for name in ("codes", "classes"):
        off = (one[name].cpu().int() - other[name].cpu().int()).abs()
        parts.append(f"{name} {(off > 0).float().mean():.1e}")
        if name == "codes":
            parts.append(f"by more than a step {(off > 1).float().mean():.1e}")
    return ", ".join(parts)


def measure_exact(options: argparse.Namespace, clock: Clock) -> None:
    """The device against the CPU, which the tests hold to the definition."""
    device, labels = options.device, records(options.batch // 4)
    moved, truth = labels.to(device), labels.targets().dense()
    print("\nthe device against the CPU, largest difference of the largest value:")
    print("targets:", largest(moved.targets().dense(), truth))
    print("crop:", largest(moved.crop(), labels.crop()))
    sparse = moved.sparse(k=10)
    print("sparse:", largest(sparse.probs, labels.sparse(k=10).probs), end="; its classes have ")
    print(largest(truth.gather(-1, sparse.classes.cpu()), sparse.probs))
    inputs = logits_of(torch.device("cpu"), len(labels))
    there = [part.detach().to(device).requires_grad_() for part in inputs]
    loss = TokenLabelLoss(cls_target="both")
    print("loss:", largest(loss(*there, moved), loss(*inputs, labels)), end="; gradient: ")
    print(largest(backward(loss, there, moved), backward(loss, inputs, labels)))
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(sample_folder(Path(folder)).rglob("*.jpg"))
        images = [np.stack([Image.open(p).convert("RGB").resize((320, 320)) for p in paths])]
    build = partial(Teacher, "tf_efficientnet_lite0", weights="sample", input_size=320)
    reference = build(device="cpu")
    layout = MapLayout(("identity",), reference.grid, 16, CLASSES)
    logits, planes = reference.logits(images), reference.annotate(images, layout, FLOOR).planes
    print("encode:", differing(encode(logits.to(device), layout, FLOOR), encode(logits, layout, FLOOR)))
    for precision, tf32 in (("float32", True), ("float32", False), ("bfloat16", True)):
        torch.backends.cudnn.allow_tf32 = tf32
        teacher = build(device=str(device), precision=precision)
        found = teacher.logits(images)
        again = [teacher.annotate(images, layout, FLOOR).planes for _ in range(2)]
        same = all(torch.equal(plane, again[1][name]) for name, plane in again[0].items())
        logs = [part.cpu().log_softmax(-1) for part in (found, logits)]
        nats = functional.kl_div(*logs, log_target=True, reduction="sum") / logits[..., 0].numel()
        print(
            f"{precision}, TF32 {tf32}: logits {largest(found, logits)}, KL of a cell {nats:.1e}, "
            f"{differing(again[0], planes)}; twice the same: {same}"
        )
    torch.backends.cudnn.allow_tf32 = True


def logits_of(device: torch.device, batch: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((batch, CLASSES), (batch, GRID**2, CLASSES))
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def backward(loss: Callable[..., Tensor], inputs: list[Tensor], *labels: Any) -> Tensor:
    gradient: Tensor = torch.autograd.grad(loss(*inputs, *labels), inputs)[1]
    return gradient


def pinned(options: argparse.Namespace) -> TokenLabels:
    labels = records(options.batch)
    return labels.pin_memory() if options.device.type == "cuda" else labels


def measure_targets(options: argparse.Namespace, clock: Clock) -> None:
    host, loss, device = pinned(options), TokenLabelLoss(), options.device
    labels = host.to(device)
    mixed = CutMix()(torch.zeros(options.batch, 1, 224, 224, device=device), labels)[1]
    compiled = torch.compile(TokenLabelLoss(), fullgraph=True)
    header(f"batch {options.batch}, grid {GRID}, maps of 18 x 18, k 16")
    clock.show("records to the device", partial(host.to, device, non_blocking=True))
    clock.show("targets", labels.targets)
    clock.show("crop", labels.crop)
    clock.show("sparse, k 10", partial(labels.sparse, k=10))
    for dtype in (torch.float32, torch.bfloat16):
        inputs, name = logits_of(device, options.batch, dtype), str(dtype).partition(".")[2]
        gradient = torch.rand_like(inputs[1], dtype=torch.float32)
        alone = partial(log_softmax, inputs[1], gradient)
        clock.show(f"{name}: log_softmax, forward and backward", alone)
        for title, criterion, given in (
            ("targets, loss and backward", loss, labels),
            ("the same, CutMix", loss, mixed),
            ("the same, compiled", compiled, labels),
            ("the same by dense targets", dense, labels),
        ):
            clock.show(f"{name}: {title}", partial(backward, criterion, inputs, given))
        print("compiled:", largest(backward(compiled, inputs, labels), backward(loss, inputs, labels)))


def measure_step(options: argparse.Namespace, clock: Clock) -> None:
    name = "vit_tiny_patch16_224" if options.small else "vit_small_patch16_224"
    host, device, cut, mix = pinned(options), options.device, CutMix(), MixToken()
    images = torch.randn(options.batch, 3, 224, 224, device=device)

    def mixtoken(labels: TokenLabels) -> Any:
        box = mix.sample(GRID)
        return images, labels if box is None else box.mix_labels(labels), box

    for compiled in (False, True)[: 2 - options.small]:
        header(f"step of {name}, batch {options.batch}, bfloat16{', compiled' * compiled}")
        for title, way in {
            "labels alone": lambda labels: (images, labels),
            "token labels": lambda labels: (images, labels),
            "token labels, CutMix": lambda labels: cut(images, labels),
            "token labels, MixToken": mixtoken,
        }.items():
            bare, criterion = title == "labels alone", TokenLabelLoss()
            net: Any = timm.create_model(name) if bare else TokenStudent(timm.create_model(name))
            optimizer = torch.optim.AdamW(net.to(device).train().parameters(), fused=clock.cuda)
            if compiled:
                net, criterion = torch.compile(net), torch.compile(criterion)  # type: ignore[assignment]

            def step(way: Any = way, net: Any = net, bare: bool = bare, criterion: Any = criterion, optimizer: Any = optimizer) -> None:  # fmt: skip
                with torch.autocast(device.type, torch.bfloat16):
                    shown, labels, *box = way(host.to(device, non_blocking=True))
                    out = net(shown, *box)
                    loss = functional.cross_entropy(out, labels.label) if bare else criterion(*out, labels)  # fmt: skip
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            clock.show(title, step, options.batch)


def teacher_network(name: str, device: torch.device) -> nn.Module:
    """A network with random weights, in the classifier too, where some begin with zeros."""
    with torch.device(device):
        model: nn.Module = timm.create_model(name, num_classes=CLASSES)
        for part in model.modules():
            if isinstance(part, nn.Linear | nn.Conv2d) and len(part.weight) == CLASSES:
                nn.init.normal_(part.weight, 0, 0.1)
    return model


def measure_annotate(options: argparse.Namespace, clock: Clock, compiled: bool = False) -> None:
    device, rng = options.device, np.random.default_rng(0)
    if not compiled:
        header("encode, 32 maps of 18 x 18")
        for classes in (CLASSES, 21841):
            layout = MapLayout(("identity",), (18, 18), 16, classes)
            logits = 3 * torch.randn(32, 18, 18, classes, device=device)
            clock.show(f"{classes} classes", partial(encode, logits, layout, FLOOR))
    print("\n| teacher | batch | network, images/s | annotator, images/s | encode, ms | ms | MB |")
    print("|---|---|---|---|---|---|---|")
    for name, side, sizes in [("test_nfnet", 160, (2, 4))] if options.small else TEACHERS:
        if options.model not in (None, name):
            continue
        network: Any = teacher_network(name, device)
        for precision, last in WAYS[2:] if compiled else WAYS:
            memory = torch.channels_last if last else torch.contiguous_format
            teacher = Teacher(
                network,
                input_size=side,
                device=str(device),
                precision=precision,
                channels_last=last,
                compile=compiled,
            )
            layout = MapLayout(("identity",), teacher.grid, 16, CLASSES)
            for size in sizes if last and not compiled else sizes[1:2]:
                images = [rng.integers(0, 256, (size, side, side, 3), np.uint8)]
                pixels = torch.randn(size, 3, side, side, device=device).contiguous(memory_format=memory)  # fmt: skip

                @torch.inference_mode()
                def alone(pixels: Tensor = pixels, network: Any = network, precision: str = precision) -> None:  # fmt: skip
                    with torch.autocast(device.type, torch.bfloat16, enabled=precision != "float32"):
                        network.forward_features(pixels)

                whole = partial(teacher.annotate, images, layout, FLOOR)
                took, bare = clock.ms(whole), float("nan") if compiled else clock.ms(alone)
                coding = clock.ms(partial(encode, teacher.logits(images), layout, FLOOR))
                print(
                    f"| {name} {side} {precision}{', channels last' * last}{', compiled' * compiled}"
                    f" | {size} | {size / bare * 1e3:.0f} | {size / took * 1e3:.0f} | {coding:.1f} | "
                    f"{took:.1f} | {clock.peak(whole):.0f} |"
                )


PARTS: dict[str, Callable[[argparse.Namespace, Clock], None]] = {
    "exact": measure_exact,
    "targets": measure_targets,
    "step": measure_step,
    "annotate": measure_annotate,
    "compile": partial(measure_annotate, compiled=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--model", help="this teacher only")
    parser.add_argument("--small", action="store_true", help="tiny networks")
    options = parser.parse_args()
    clock = Clock(options)
    print(torch.cuda.get_device_name() if clock.cuda else "CPU", torch.__version__, timm.__version__)
    for part in options.parts:
        start = time.perf_counter()
        PARTS[part](options, clock)
        print(f"({part}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
