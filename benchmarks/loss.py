"""Time and memory of a step from records: targets, and the loss forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/loss.py

Maps of 18x18 cells, 16 classes a cell and a residual of 64 classes, random crops of them, a
student's logits [64, 196, 1000], all random. The measure is what any dense loss costs at least:
`log_softmax` of the patch logits, forward and backward, without a target. The runs take turns in
this process; ratios are medians over the rounds. Time is CPU time of all threads (`--threads`, one
unless it says otherwise). Memory is the most that was allocated at any moment beyond
what the caller holds (logits and records), as torch.profiler records each allocation: the same in
each run. The losses and gradients are compared with the dense definition first.
"""

import argparse
import functools
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Ways, take_turns
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torchvision.transforms import v2

from tokenlabel.dataset import MapLayout, TokenLabelMap, TokenLabels
from tokenlabel.dataset.format.chunks import shuffle
from tokenlabel.supervise import CutMix, MixedLabels, MixUp, TokenLabelLoss

LAYOUT = MapLayout(("identity",), (18, 18), 16, 1000, residual=64)
GRID = (14, 14)
BETA = 0.5
Labels = TokenLabels | MixedLabels
Inputs = tuple[Tensor, Tensor, Labels]
Loss = Callable[[Tensor, Tensor, Labels], Tensor]


def records(batch: int) -> TokenLabels:
    """Random maps, of which 40% of the entries are dropped, and a random crop of each."""
    rng = np.random.default_rng(0)
    crop = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])
    leaves = []
    for _ in range(batch):
        codes = np.sort(rng.integers(2, 24, (1, LAYOUT.k, *LAYOUT.grid)), 1)
        codes[:, 1:][np.sort(rng.random(codes[:, 1:].shape), 1) > 0.6] = 255
        planes = {
            "codes": codes,
            "classes": rng.random((1, LAYOUT.num_classes, *LAYOUT.grid)).argsort(1)[:, : LAYOUT.k],
            "residual_classes": np.sort(rng.permutation(1000)[None, :64]),
            "residual_codes": rng.integers(60, 120, (1, 64)),
            "level": rng.normal(10, 1, (1, *LAYOUT.grid)),
        }
        data = b"".join(
            shuffle(planes[name].astype(dtype)) for name, (dtype, _) in LAYOUT.planes().items()
        )
        leaf = TokenLabelMap(data, LAYOUT, canvas_size=(375, 500), label=int(rng.integers(1000)))
        leaves.append(crop(leaf))
    return TokenLabels.collate(leaves, GRID)


def dense(cls_logits: Tensor, patch_logits: Tensor, labels: Labels) -> Tensor:
    """The objective with the patches' part by its definition: dense targets, and autograd."""
    if isinstance(labels, MixedLabels):
        parts = labels.parts()
    else:
        windows = labels.targets()
        parts = [(windows, windows.weight)]
    target = sum(part.dense() * coefficient.unsqueeze(-1) for part, coefficient in parts)
    rows = -(target * patch_logits.log_softmax(-1)).sum(-1)
    return TokenLabelLoss(dense_weight=0)(cls_logits, patch_logits, labels) + BETA * rows.mean()


def step(loss: Loss, inputs: Inputs) -> Tensor:
    """Targets, loss and backward; the gradient of the patch logits."""
    gradient: Tensor = torch.autograd.grad(loss(*inputs), inputs[:2])[1]
    return gradient


def log_softmax(patch_logits: Tensor, gradient: Tensor) -> Tensor:
    """What any dense loss does at least."""
    logs = patch_logits.log_softmax(-1, dtype=gradient.dtype)
    result: Tensor = torch.autograd.grad(logs, patch_logits, gradient)[0]
    return result


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes allocated at a time during one run, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    plain, size = records(options.batch), options.batch
    images = torch.zeros(size, 1, 224, 224)
    cls_logits = torch.randn(size, 1000, requires_grad=True)
    patch_logits = torch.randn(size, 196, 1000, requires_grad=True)
    gradient = torch.rand_like(patch_logits)
    ours = TokenLabelLoss(dense_weight=BETA)
    runs: Ways = {
        "log_softmax alone": lambda: log_softmax(patch_logits, gradient),
        "targets alone": plain.targets,
    }
    kinds = {
        "plain": plain,
        "mixup": MixUp()(images, plain)[1],
        "cutmix": CutMix()(images, plain)[1],
    }
    for name, labels in kinds.items():
        inputs: Inputs = (cls_logits, patch_logits, labels)
        torch.testing.assert_close(step(ours, inputs), step(dense, inputs))
        runs[f"step, {name}"] = functools.partial(step, ours, inputs)
    runs["step by dense targets"] = functools.partial(
        step, dense, (cls_logits, patch_logits, plain)
    )
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    times = take_turns(runs, options.rounds)
    print(f"{plain}; {options.threads} thread(s)")
    print("| | CPU time, ms | x log_softmax | memory, MB | x the logits |")
    print("|---|---|---|---|---|")
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(taken, times["log_softmax alone"], strict=True)]
        print(
            f"| {name} | {1e3 * statistics.median(taken):.0f} | {statistics.median(ratios):.2f} | "
            f"{peaks[name] / 1e6:.0f} | {peaks[name] / patch_logits.nbytes:.2f} |"
        )


if __name__ == "__main__":
    main()
