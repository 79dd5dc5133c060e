"""The loss against the dense definition, in value and gradient; its rules and its errors."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from tests.soft_targets import crop_targets, made_up, patch_targets
from tokenlabel.dataset import TokenTargets
from tokenlabel.supervise import MixedTargets, TokenLabelLoss, mix_labels, mix_targets

B, N, K, C = 4, 9, 5, 30
Targets = TokenTargets | MixedTargets


def logits(dtype: torch.dtype = torch.float32, seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, C), (B, n, C))
    drawn = [torch.randn(shape, generator=g, dtype=torch.float64).mul(3) for shape in shapes]
    return drawn[0].to(dtype).requires_grad_(), drawn[1].to(dtype).requires_grad_()


def mixed(targets: TokenTargets, mix: Callable[..., MixedTargets] = mix_targets) -> MixedTargets:
    share = torch.rand(B, N, generator=torch.Generator().manual_seed(1))
    share[:, :3] = torch.tensor([0.0, 1.0, 0.5])
    return mix(targets, torch.arange(B).roll(1), share)


def dense_loss(
    cls_logits: Tensor, patch_logits: Tensor, targets: Targets, smoothing: float = 0.0
) -> Tensor:
    """LV-ViT's objective, from dense targets; the class token's by its label(s)."""
    soft = patch_targets(targets, C)
    rows = -(soft * patch_logits.log_softmax(-1)).sum(-1)
    label = targets.label.reshape(B, -1)
    probs = targets.label_probs if isinstance(targets, MixedTargets) else torch.ones(B, 1)
    by_label = sum(
        F.cross_entropy(
            cls_logits, label[:, i], reduction="none", ignore_index=-1, label_smoothing=smoothing
        )
        * probs[:, i]
        for i in range(label.shape[1])
    )
    assert isinstance(by_label, Tensor)
    return by_label.mean() + 0.5 * (rows * targets.weight).mean()


KINDS: dict[str, Callable[[], Targets]] = {
    "full": lambda: made_up(B, N, C, K, padded=False),
    "padded": lambda: made_up(B, N, C, K),
    "mixed": lambda: mixed(made_up(B, N, C, K)),
    "labels mixed": lambda: mixed(made_up(B, N, C, K), mix_labels),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_the_dense_definition(kind: str, smoothing: float) -> None:
    targets, inputs = KINDS[kind](), logits()
    torch.testing.assert_close(
        patch_targets(targets, C).sum(-1), torch.ones(B, N, dtype=torch.float64)
    )
    ours = TokenLabelLoss(label_smoothing=smoothing)(*inputs, targets)
    truth = dense_loss(*(part.double() for part in inputs), targets, smoothing)
    assert ours.dtype == torch.float32 and ours.shape == ()
    assert abs(ours.item() - truth.item()) < 1e-5
    for found, expected in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(truth, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


def test_equals_the_papers_formula_where_all_is_inside() -> None:
    targets, (cls_logits, patch_logits) = KINDS["full"](), logits(torch.float64)
    soft = patch_targets(targets, C)
    beta = 0.5
    paper = F.cross_entropy(cls_logits, targets.label) + beta * torch.stack(
        [F.cross_entropy(patch_logits[:, i], soft[:, i]) for i in range(N)]
    ).mean(0)
    torch.testing.assert_close(TokenLabelLoss()(cls_logits, patch_logits, targets), paper)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls_target", ["label", "crop", "both"])
def test_gradcheck(kind: str, cls_target: Any) -> None:
    loss = TokenLabelLoss(cls_target=cls_target, label_smoothing=0.1)
    targets = KINDS[kind]()
    targets.label[1] = -1
    targets.weight[2] = 0
    inputs = logits(torch.float64)
    assert torch.autograd.gradcheck(lambda *given: loss(*given, targets), inputs, fast_mode=True)


def test_gradcheck_entry_by_entry() -> None:
    targets = mix_targets(made_up(2, 3, 5, 3), torch.tensor([1, 0]), 0.4)
    inputs = [torch.randn(2, 5), torch.randn(2, 3, 5)]
    exact = [part.double().requires_grad_() for part in inputs]
    loss = TokenLabelLoss(cls_target="both")
    assert torch.autograd.gradcheck(lambda *given: loss(*given, targets), exact)


def test_strided_logits() -> None:
    targets = made_up(B, N, C, K)
    wide = torch.randn(B, N + 1, C)
    given_logits = [wide[:, 0], wide[:, 1:].detach().requires_grad_()]
    packed = [part.detach().clone().requires_grad_() for part in given_logits]
    losses = [TokenLabelLoss()(*pair, targets) for pair in (given_logits, packed)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(loss, pair[1])
            for loss, pair in zip(losses, (given_logits, packed), strict=True)
        )
    )


def test_a_second_backward_pass_over_a_retained_graph() -> None:
    """The first one uses up what the forward pass kept."""
    cls_logits, patch_logits = logits(torch.float32)
    loss = TokenLabelLoss()(cls_logits, patch_logits, made_up(B, N, C, K))
    first = torch.autograd.grad(loss, patch_logits, retain_graph=True)
    second = torch.autograd.grad(loss, patch_logits)
    assert torch.equal(first[0], second[0])


def test_a_class_listed_twice_has_the_sum() -> None:
    twice = made_up(B, N, C, K, padded=False)
    twice.classes[..., 1] = twice.classes[..., 0]
    twice.crop_classes[..., 1] = twice.crop_classes[..., 0]
    probs, classes = twice.probs.clone(), twice.classes.clone()
    probs[..., 0] += probs[..., 1]
    probs[..., 1], classes[..., 1] = 0, 0
    once = twice._replace(probs=probs, classes=classes)
    inputs = logits(torch.float64)
    torch.testing.assert_close(TokenLabelLoss()(*inputs, twice), TokenLabelLoss()(*inputs, once))
    torch.testing.assert_close(TokenLabelLoss()(*inputs, twice), dense_loss(*inputs, twice))


def test_all_classes_listed_leave_no_rest() -> None:
    targets = made_up(B, N, C, C, padded=False)
    targets.rest.zero_()
    targets.probs.div_(targets.probs.sum(-1, keepdim=True))
    inputs = logits(torch.float64)
    torch.testing.assert_close(TokenLabelLoss()(*inputs, targets), dense_loss(*inputs, targets))


def test_the_loss_of_mixed_targets_is_the_mixture_of_the_losses() -> None:
    """Also of pictures without a map, and of unknown labels."""
    targets = made_up(B, N, C, K)
    targets.weight[1] = 0
    targets.label[2] = -1
    partner, lam = torch.arange(B).roll(1), 0.3
    inputs = logits(torch.float64)
    loss = TokenLabelLoss()
    other = TokenTargets(*(part[partner] for part in targets))
    both = lam * loss(*inputs, targets) + (1 - lam) * loss(*inputs, other)
    torch.testing.assert_close(loss(*inputs, mix_targets(targets, partner, lam)), both)


def test_a_picture_without_a_map_falls_back_on_its_label() -> None:
    targets = made_up(B, N, C, K)
    targets.weight.zero_()
    cls_logits, patch_logits = inputs = logits(torch.float64)
    by_label = F.cross_entropy(cls_logits, targets.label)
    for cls_target in ("label", "crop", "both"):
        loss = TokenLabelLoss(cls_target=cls_target)(*inputs, targets)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, by_label)
        (gradient,) = torch.autograd.grad(loss, patch_logits)
        assert not gradient.any()


def test_unknown_labels() -> None:
    targets = made_up(B, N, C, K)
    targets.label[1:] = -1
    cls_logits, patch_logits = logits(torch.float64)
    soft = -(crop_targets(targets, C) * cls_logits.log_softmax(-1)).sum(-1)
    hard = F.cross_entropy(cls_logits[:1], targets.label[:1])
    for cls_target, expected in {
        "label": hard / B,
        "crop": soft.mean(),
        "both": ((hard + soft[0]) / 2 + soft[1:].sum()) / B,
    }.items():
        loss = TokenLabelLoss(cls_target=cls_target, dense_weight=0)  # type: ignore[arg-type]
        torch.testing.assert_close(loss(cls_logits, patch_logits, targets), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    targets, inputs = KINDS["mixed"](), logits(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = TokenLabelLoss()(*inputs, targets)
    assert loss.dtype == torch.float32
    exact = [part.detach().double().requires_grad_() for part in inputs]
    truth = dense_loss(*exact, targets)
    assert abs(loss.item() - truth.item()) < 1e-5
    for found, expected, eps in zip(
        torch.autograd.grad(loss, inputs),
        torch.autograd.grad(truth, exact),
        [torch.finfo(dtype).eps] * 2,
        strict=True,
    ):
        assert found.dtype == dtype
        # Rounded once, at the end.
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0.6 * eps)


def test_large_logits_lose_nothing() -> None:
    targets, (cls_logits, patch_logits) = KINDS["padded"](), logits()
    apart = (patch_logits * 64).round() / 8  # exact in float32, also with the offset
    near = TokenLabelLoss()(cls_logits, apart, targets)
    far = TokenLabelLoss()(cls_logits, apart + 4096, targets)
    torch.testing.assert_close(near, far, atol=0, rtol=1e-6)
    assert torch.isfinite(TokenLabelLoss()(cls_logits, patch_logits * 1e4, targets))


@pytest.mark.parametrize(("backend", "kind"), [("eager", "padded"), ("aot_eager", "mixed")])
def test_compiles_as_one_graph(backend: str, kind: str) -> None:
    targets, inputs = KINDS[kind](), logits()
    loss = TokenLabelLoss(cls_target="both", label_smoothing=0.1)
    compiled = torch.compile(copy.deepcopy(loss), backend=backend, fullgraph=True)
    found, expected = compiled(*inputs, targets), loss(*inputs, targets)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_no_second_derivative_instead_of_a_wrong_one() -> None:
    targets, inputs = KINDS["padded"](), logits(torch.float64)
    (gradient,) = torch.autograd.grad(
        TokenLabelLoss()(*inputs, targets), inputs[1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_ends_in_nothing_learned_at_the_target() -> None:
    """Cross entropy is least, and its gradient 0, where the student says what the teacher says."""
    targets = made_up(B, N, C, K)
    patch_logits = patch_targets(targets, C).log().clamp(min=-100).requires_grad_()
    loss = TokenLabelLoss(cls_weight=0)(logits(torch.float64)[0], patch_logits, targets)
    (gradient,) = torch.autograd.grad(loss, patch_logits)
    assert gradient.abs().max() < 1e-9


def bad(name: str, value: Any) -> Targets:
    return made_up(B, N, C, K)._replace(**{name: value})


ONE = TokenTargets(*(part[0] for part in made_up(B, N, C, K)))
CLS, PATCH = (part.detach() for part in logits())
META = torch.zeros(B, dtype=torch.int64, device="meta")
CASES: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
    (ValueError, "cls_logits have 30, patch_logits 31", (CLS, torch.zeros(B, N, 31), ...)),
    (ValueError, "student has 10 patches, the targets have 9", (CLS, torch.zeros(B, 10, C), ...)),
    (ValueError, "4 images, patch_logits 3", (CLS, PATCH[:3], ...)),
    (ValueError, "logits hold 3 images, the targets 4", (CLS[:3], PATCH[:3], ...)),
    (ValueError, r"cls_logits must be \[B, C\]", (PATCH, CLS, ...)),
    (ValueError, r"patch_logits must be \[B, N, C\]", (CLS, PATCH[..., None], ...)),
    (TypeError, "cls_logits must be of a floating dtype", (CLS.long(), PATCH, ...)),
    (TypeError, "must be TokenTargets or MixedTargets, got Tensor", (CLS, PATCH, torch.zeros(B))),
    (ValueError, "targets must be collated", (CLS, PATCH, ONE)),
    (TypeError, "targets.label holds class ids", (CLS, PATCH, bad("label", torch.zeros(B)))),
    (TypeError, "targets.rest must be of a floating", (CLS, PATCH, bad("rest", CLS.long()))),
    (ValueError, r"\[-1, 29\].*label holds 30", (CLS, PATCH, bad("label", torch.full((B,), 30)))),
    (ValueError, r"\[-1, 29\].*holds -2", (CLS, PATCH, bad("label", torch.full((B,), -2)))),
    (ValueError, "targets.classes holds 29", (CLS[:, :29], PATCH[..., :29], ...)),
    (ValueError, "the logits' device, cpu, got meta", (CLS, PATCH, bad("label", META))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "arguments"), CASES)
def test_errors(kind: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    targets = made_up(B, N, C, K)
    targets.classes[0, 1, 0] = 29
    targets.label.zero_()
    with pytest.raises(kind, match=message) as caught:
        TokenLabelLoss()(*(targets if part is ... else part for part in arguments))
    assert "Remedy" in str(caught.value)


@pytest.mark.parametrize(
    "option",
    [
        {"cls_weight": -1},
        {"dense_weight": float("nan")},
        {"cls_target": "soft"},
        {"label_smoothing": 1.5},
    ],
)
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        TokenLabelLoss(**option)


def test_takes_what_a_loader_collates() -> None:
    batch = made_up(B, N, C, K)
    single = [TokenTargets(*(part[i] for part in batch)) for i in range(B)]
    inputs = logits()
    assert torch.equal(
        TokenLabelLoss()(*inputs, default_collate(single)), TokenLabelLoss()(*inputs, batch)
    )
