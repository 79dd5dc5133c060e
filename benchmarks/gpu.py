"""What a GPU makes of it: exactness, targets and the loss, a training step, annotation.

    python benchmarks/gpu.py                         # all, some 7 minutes on one H200
    python benchmarks/gpu.py exact targets step      # of: exact, targets, step, annotate
    python benchmarks/gpu.py --small --device cpu    # whether it runs, anywhere

Times are wall-clock of calls in a row with one synchronisation at the end, as a loop that never
waits for the device sees them: the median of `--repeats` such rows. Beside them stands how long the
GPU computed in one call, and in how many kernels. Memory is the peak beyond what was allocated
before. Networks have random weights, which cost as much as others; those of `exact` are the
embedded sample's.
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
from common import sample_folder
from loss import dense, log_softmax, records, step
from PIL import Image
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from tokenlabel.annotate.teacher.annotator import Annotator
from tokenlabel.annotate.teacher.encode import encode
from tokenlabel.annotate.teacher.timm_teacher import TimmTeacher, build_model
from tokenlabel.dataset import MapLayout
from tokenlabel.supervise import CutMix, MixToken, TokenLabelLoss, TokenStudent, lvvit_s, lvvit_t

CLASSES, FLOOR, WAYS = 1000, 0.003, [("float32", False), ("bfloat16", False), ("bfloat16", True)]
#: Name, side in pixels and batch size.
TEACHERS = [
    ("convnext_large", 384, 128),
    ("eva02_large_patch14_448", 448, 128),
    *(("dm_nfnet_f6", 576, batch) for batch in (8, 32, 128)),
]
records = cache(records)


class Clock:
    """Times and memory of calls on one device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.repeats, self.cuda = options.repeats, options.device.type == "cuda"
        self.wait: Callable[[], None] = torch.cuda.synchronize if self.cuda else lambda: None

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

    def peak(self, run: Callable[[], object]) -> float:
        """MB."""
        if not self.cuda:
            return 0.0
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def show(self, name: str, run: Callable[[], object]) -> None:
        took, activity = self.ms(run), ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU
        with profile(activities=[activity], acc_events=True) as recorded:
            run()
            self.wait()
        kernels = [e for e in recorded.events() or () if e.device_type == DeviceType.CUDA]
        busy = sum(e.time_range.elapsed_us() for e in kernels) / 1e3
        print(f"| {name} | {took:.2f} | {busy:.2f} | {len(kernels)} | {self.peak(run):.0f} |")


def header(title: str) -> None:
    print(f"\n| {title} | ms | GPU busy, ms | kernels | MB |\n|---|---|---|---|---|")


def largest(one: Tensor, other: Tensor) -> str:
    """The largest difference, and the largest value."""
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    return f"{float((one - other).abs().max()):.1e} of {float(other.abs().max()):.3g}"


def logits_of(device: torch.device, batch: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    drawn = [torch.randn(shape) for shape in ((batch, CLASSES), (batch, 196, CLASSES))]
    return [part.to(device, dtype).requires_grad_() for part in drawn]


def measure_exact(options: argparse.Namespace, clock: Clock) -> None:
    """The device against the CPU, which the tests hold to the definition."""
    device, labels = options.device, records(options.batch // 4)
    moved, truth, loss = labels.to(device), labels.targets().dense(), TokenLabelLoss()
    print("\ntargets:", largest(moved.targets().dense(), truth))
    print("crop:", largest(moved.crop(), labels.crop()))
    sparse = moved.sparse(k=10)
    print("sparse:", largest(truth.gather(-1, sparse.classes.cpu()), sparse.probs))
    there, here = (logits_of(where, len(labels)) for where in (device, torch.device("cpu")))
    print("loss:", largest(loss(*there, moved), loss(*here, labels)))
    print("gradient:", largest(step(loss, (*there, moved)), step(loss, (*here, labels))))
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(sample_folder(Path(folder)).rglob("*.jpg"))
        images = [np.stack([Image.open(p).convert("RGB").resize((320, 320)) for p in paths])]
    teacher = TimmTeacher(build_model("tf_efficientnet_lite0", weights="sample"))
    build = partial(Annotator, teacher, input_sizes=[(320, 320)])
    logits = build(device="cpu").logits(images)
    layout = MapLayout(("identity",), (logits.shape[1], logits.shape[2]), 16, CLASSES)
    codes = encode(logits, layout, FLOOR)["codes"].int()
    off = encode(logits.to(device), layout, FLOOR)["codes"].cpu().int() - codes
    print(f"encode: fraction of codes that differ {(off != 0).float().mean():.1e}")
    for precision, tf32 in (("float32", True), ("float32", False), ("bfloat16", True)):
        torch.backends.cudnn.allow_tf32 = tf32
        found = build(device=str(device), precision=precision).logits(images)
        logs = [part.cpu().log_softmax(-1) for part in (found, logits)]
        nats = functional.kl_div(*logs, log_target=True, reduction="sum") / logits[..., 0].numel()
        off = (encode(found, layout, FLOOR)["codes"].cpu().int() - codes).abs()
        print(
            f"{precision}, TF32 {tf32}: logits {largest(found, logits)}, KL of a cell {nats:.1e}, "
            f"codes {(off > 0).float().mean():.1e} differ, {(off > 1).float().mean():.1e} by 2+"
        )
    torch.backends.cudnn.allow_tf32 = True


def measure_targets(options: argparse.Namespace, clock: Clock) -> None:
    device, loss = options.device, TokenLabelLoss()
    labels = records(options.batch).to(device)
    mixed = CutMix()(torch.zeros(options.batch, 1, 224, 224, device=device), labels)[1]
    compiled = torch.compile(TokenLabelLoss(), fullgraph=True)
    header(f"batch {options.batch}, grid 14, maps of 18 x 18, k 16")
    clock.show("targets", labels.targets)
    clock.show("crop", labels.crop)
    clock.show("sparse, k 10", partial(labels.sparse, k=10))
    for classes in (CLASSES, 21841):
        layout = MapLayout(("identity",), (18, 18), 16, classes)
        logits = 3 * torch.randn(32, 18, 18, classes, device=device)
        clock.show(f"encode, 32 maps of {classes} classes", partial(encode, logits, layout, FLOOR))
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
            clock.show(f"{name}: {title}", partial(step, criterion, (*inputs, given)))
        print("compiled:", largest(*(step(f, (*inputs, labels)) for f in (compiled, loss))))


def measure_step(options: argparse.Namespace, clock: Clock) -> None:
    name = "vit_tiny_patch16_224" if options.small else "vit_small_patch16_224"
    device, host = options.device, records(options.batch)
    host = host.pin_memory() if clock.cuda else host
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    cut, mix, by_label = CutMix(), MixToken(), functional.cross_entropy

    def mixtoken(labels: Any) -> Any:
        box = mix.sample(14)
        return images, labels if box is None else box.mix_labels(labels), box

    def train(net: Any, criterion: Any, optimizer: Any, way: Any) -> None:
        targets = criterion is not None  # a compiled module has no truth value
        with torch.autocast(device.type, torch.bfloat16):
            shown, labels, *box = way(host.to(device, non_blocking=True))
            out = net(shown, *box)
            loss = criterion(*out, labels) if targets else by_label(out, labels.label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    ways: dict[str, Any] = {"labels alone": lambda labels: (images, labels)}
    ways |= {"token labels": ways["labels alone"], "CutMix": lambda labels: cut(images, labels)}
    for precision in (torch.bfloat16, torch.float16)[: 1 + clock.cuda]:
        measure_lvvit(options, clock, precision, images, host)
    for compiled in (False, True)[: 2 - options.small]:
        header(f"step of {name}, batch {options.batch}, bfloat16{', compiled' * compiled}")
        for title, way in (ways | {"MixToken": mixtoken}).items():
            net: Any = timm.create_model(name)
            criterion: Any = None if title == "labels alone" else TokenLabelLoss()
            net = (net if criterion is None else TokenStudent(net)).to(device).train()
            optimizer = torch.optim.AdamW(net.parameters(), fused=clock.cuda)
            if compiled:
                net = torch.compile(net)
                criterion = None if criterion is None else torch.compile(criterion)
            clock.show(title, partial(train, net, criterion, optimizer, way))


def measure_lvvit(
    options: argparse.Namespace, clock: Clock, dtype: torch.dtype, images: Tensor, host: Any
) -> None:
    """The published recipe: LV-ViT, MixToken's boxes, soft crop targets, all smoothed."""
    device, criterion = options.device, TokenLabelLoss.published()
    name = "lvvit_t" if options.small else "lvvit_s"
    net: Any = (lvvit_t if options.small else lvvit_s)(drop_path_rate=0.1).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), fused=clock.cuda)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    mix = MixToken(published=True)

    def train(with_labels: bool) -> None:
        labels = host.to(device, non_blocking=True)
        box = mix.sample(14) if with_labels else None
        with torch.autocast(device.type, dtype):
            output = net(images, box)
        if with_labels:
            loss = criterion(*output, box.mix_labels(labels) if box else labels)
        else:
            loss = functional.cross_entropy(output[0], labels.label) + 0 * output[1].sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    header(f"step of {name}, batch {options.batch}, {str(dtype).partition('.')[2]}")
    clock.show("labels alone", partial(train, False))
    clock.show("token labels, MixToken", partial(train, True))


def measure_annotate(options: argparse.Namespace, clock: Clock) -> None:
    device, rng = options.device, np.random.default_rng(0)
    print("\n| teacher | network, images/s | annotator, images/s | encode, ms | ms | MB |")
    print("|---|---|---|---|---|---|")
    for name, side, size in [("test_nfnet", 160, 4)] if options.small else TEACHERS:
        images = [rng.integers(0, 256, (size, side, side, 3), np.uint8)]
        pixels = torch.randn(size, 3, side, side, device=device)
        with torch.device(device):
            network: Any = timm.create_model(name)
            for part in network.modules():  # some classifiers begin with zeros
                if isinstance(part, nn.Linear | nn.Conv2d) and len(part.weight) == CLASSES:
                    nn.init.normal_(part.weight, 0, 0.1)
        for precision, last in WAYS:
            given: dict[str, Any] = {"precision": precision, "channels_last": last}
            given |= {"input_sizes": [(side, side)], "device": str(device)}
            annotator = Annotator(TimmTeacher(network), **given)
            layout = MapLayout(("identity",), annotator.grid, 16, CLASSES)
            memory = torch.channels_last if last else torch.contiguous_format
            shown = pixels.contiguous(memory_format=memory)
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision != "float32")
            with torch.inference_mode(), autocast:
                alone = clock.ms(partial(network.forward_features, shown))
            whole = partial(annotator.annotate, images, layout, FLOOR)
            took, coding = clock.ms(whole), partial(encode, annotator.logits(images), layout, FLOOR)
            print(
                f"| {name} {side}, batch {size}, {precision}{', channels last' * last} "
                f"| {size / alone * 1e3:.0f} | {size / took * 1e3:.0f} | {clock.ms(coding):.1f} "
                f"| {took:.1f} | {clock.peak(whole):.0f} |"
            )


PARTS = (measure_exact, measure_targets, measure_step, measure_annotate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help="exact, targets, step, annotate; default: all")
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="tiny networks")
    options = parser.parse_args()
    clock = Clock(options)
    print(torch.cuda.get_device_name() if clock.cuda else "CPU", torch.__version__)
    for measure in PARTS:
        if not options.parts or measure.__name__.removeprefix("measure_") in options.parts:
            measure(options, clock)


if __name__ == "__main__":
    main()
