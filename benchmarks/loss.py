"""Time and memory of `TokenLabelLoss`, forward and backward, against the dense form.

    python benchmarks/loss.py

The dense form scatters the targets to [B, N, C], a tensor that the step holds to its end as a
training loop does, and takes softmax cross entropy by autograd. The two take turns in this process
on the same made-up logits and targets. Time is CPU time of all
threads, so that a busy machine does not blur it (one thread unless `--threads` says otherwise); the
table has the medians. Memory is the most that was allocated at any moment beyond what the caller
holds (logits and sparse targets), as torch.profiler records each allocation of a call: the same in
each run. The result of both is compared first.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from tokenlabel.dataset import TokenTargets
from tokenlabel.supervise import TokenLabelLoss, mix_targets
from tokenlabel.supervise.mixed import MixedTargets

CASES = ((64, 196, 1000), (16, 196, 21841))
BETA = 0.5
Targets = TokenTargets | MixedTargets
Inputs = tuple[Tensor, Tensor, Targets]
Step = Callable[[Tensor, Tensor, Targets], Tensor]


def made_up(batch: int, patches: int, num_classes: int, k: int) -> TokenTargets:
    """Targets of distinct random classes, half of the patches partly in padding."""

    def part(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        start = torch.randint(num_classes, (*shape, 1))
        classes = (start + torch.arange(k) * (num_classes // k)) % num_classes
        mass = torch.randn(*shape, k + 1).mul(2).softmax(-1)
        return classes.int(), mass[..., :k].contiguous(), mass[..., k].contiguous()

    weight = torch.rand(batch, patches).mul(2).clamp(max=1)
    label = torch.randint(num_classes, (batch,))
    return TokenTargets(label, *part(batch, patches), weight, *part(batch))


def dense_target(targets: Targets, num_classes: int) -> Tensor:
    """The patches' targets as [B, N, C]."""
    rest = targets.rest.reshape(*targets.weight.shape, -1)
    k = targets.probs.shape[-1] // rest.shape[-1]
    each = rest / (num_classes - k)
    target = torch.empty(*targets.weight.shape, num_classes).copy_(each.sum(-1, keepdim=True))
    values = targets.probs - each.repeat_interleave(k, -1)
    return target.scatter_add_(-1, targets.classes.long(), values)


def dense_loss(
    cls_logits: Tensor, patch_logits: Tensor, target: Tensor, targets: Targets
) -> Tensor:
    """The same objective with a dense target, as short and as lean as plain PyTorch gets."""
    rows = -(target * patch_logits.log_softmax(-1)).sum(-1)
    if isinstance(targets, MixedTargets):
        logs = cls_logits.log_softmax(-1).gather(1, targets.label)
        by_label = -(logs * targets.label_probs).sum(1).mean()
    else:
        by_label = F.cross_entropy(cls_logits, targets.label)
    return by_label + BETA * (rows * targets.weight).mean()


def dense(cls_logits: Tensor, patch_logits: Tensor, targets: Targets) -> Tensor:
    """One step by way of a dense target; the gradient of the patch logits."""
    target = dense_target(targets, patch_logits.shape[-1])
    value = dense_loss(cls_logits, patch_logits, target, targets)
    gradient: Tensor = torch.autograd.grad(value, (cls_logits, patch_logits))[1]
    return gradient


def sparse(cls_logits: Tensor, patch_logits: Tensor, targets: Targets) -> Tensor:
    """One step by `TokenLabelLoss`; the gradient of the patch logits."""
    value = TokenLabelLoss(dense_weight=BETA)(cls_logits, patch_logits, targets)
    gradient: Tensor = torch.autograd.grad(value, (cls_logits, patch_logits))[1]
    return gradient


def seconds(step: Step, inputs: Inputs) -> float:
    """CPU time of one run."""
    start = time.process_time()
    step(*inputs)
    return time.process_time() - start


def peak_bytes(step: Step, inputs: Inputs) -> int:
    """Most bytes allocated at a time during one run, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(*inputs)
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
    parser.add_argument("--k", type=int, default=10, help="classes listed for each patch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print("| B x N x C | targets | time, ms | dense | ratio | memory, MB | dense | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for batch, patches, num_classes in CASES:
        plain = made_up(batch, patches, num_classes, options.k)
        own = torch.rand(batch, patches).mul(2).clamp(max=1)
        mixed = mix_targets(plain, torch.arange(batch).roll(1), own)
        cls_logits = torch.randn(batch, num_classes, requires_grad=True)
        patch_logits = torch.randn(batch, patches, num_classes, requires_grad=True)
        for name, targets in (("plain", plain), ("mixed", mixed)):
            inputs: Inputs = (cls_logits, patch_logits, targets)
            torch.testing.assert_close(sparse(*inputs), dense(*inputs))
            memory = [peak_bytes(step, inputs) / 1e6 for step in (sparse, dense)]
            rounds = [
                (seconds(sparse, inputs), seconds(dense, inputs)) for _ in range(options.rounds)
            ]
            sparse_time, dense_time = (
                1e3 * statistics.median(taken) for taken in zip(*rounds, strict=True)
            )
            print(
                f"| {batch} x {patches} x {num_classes} | {name} | {sparse_time:.0f} | "
                f"{dense_time:.0f} | {sparse_time / dense_time:.2f} | {memory[0]:.0f} | "
                f"{memory[1]:.0f} | {memory[0] / memory[1]:.2f} |"
            )


if __name__ == "__main__":
    main()
