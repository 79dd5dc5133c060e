"""The loss against the dense definition, in value and gradient; its rules and its errors."""

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.records import exact, made_up, with_word
from tokenlabel.dataset import TokenLabels, TokenTargets, TokenWindows
from tokenlabel.supervise import CutMix, MixedLabels, MixUp, TokenBox, TokenLabelLoss
from tokenlabel.supervise.cross_entropy import cross_entropy

B, N, C = 6, 9, 30
Labels = TokenLabels | MixedLabels | TokenTargets


def logits(
    dtype: torch.dtype = torch.float32, seed: int = 0, batch: int = B
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, C), (batch, N, C))
    drawn = [torch.randn(shape, generator=g, dtype=torch.float64).mul(3) for shape in shapes]
    return drawn[0].to(dtype).requires_grad_(), drawn[1].to(dtype).requires_grad_()


def mixed(mix: Callable[..., Any], labels: TokenLabels) -> MixedLabels:
    torch.manual_seed(1)
    return mix(torch.rand(len(labels), 1, 32, 32), labels)[1]  # type: ignore[no-any-return]


KINDS: dict[str, Callable[[TokenLabels], Labels]] = {
    "records": lambda labels: labels,
    "merged": lambda labels: labels.sparse(k=7),
    "mixup": lambda labels: mixed(MixUp(), labels),
    "cutmix": lambda labels: mixed(CutMix(mode="elem"), labels),
    "mixtoken": lambda labels: TokenBox(torch.eye(3) > 0).mix_labels(labels),
}


def parts_of(labels: Labels) -> list[tuple[TokenWindows, Tensor]]:
    if isinstance(labels, MixedLabels):
        return labels.parts()
    windows = labels.targets() if isinstance(labels, TokenLabels) else labels.windows(C)
    return [(windows, windows.weight)]


def dense_loss(
    cls_logits: Tensor, patch_logits: Tensor, labels: Labels, smoothing: float = 0.0
) -> Tensor:
    """LV-ViT's objective, from dense targets; the class token's by its label(s)."""
    logs = patch_logits.log_softmax(-1)
    rows = sum(-(exact(part) * logs).sum(-1) * area for part, area in parts_of(labels))
    assert isinstance(rows, Tensor)
    label = labels.label.reshape(len(rows), -1)
    probs = labels.label_probs if isinstance(labels, MixedLabels) else torch.ones(len(rows), 1)
    by_label = [
        F.cross_entropy(
            cls_logits, label[:, i], reduction="none", ignore_index=-1, label_smoothing=smoothing
        )
        * probs[:, i]
        for i in range(label.shape[1])
    ]
    return torch.stack(by_label).sum(0).mean() + 0.5 * rows.mean()


@pytest.mark.parametrize("shrink", [0.0, 0.3])  # one dense distribution an image, or two
def test_cross_entropy_is_that_of_the_dense_targets(shrink: float) -> None:
    one, other = (made_up(B, shrink=shrink, seed=seed).targets() for seed in (0, 1))
    assert one.basis.shape[1] == 1 + (shrink > 0)
    areas = torch.rand(2, B, N, dtype=torch.float64)
    patch_logits, scale = logits(torch.float64)[1], torch.rand(B, N, dtype=torch.float64)
    found = cross_entropy(patch_logits, [(one, areas[0]), (other, areas[1])])
    target = exact(one) * areas[0, ..., None] + exact(other) * areas[1, ..., None]
    truth = -(target * patch_logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(found, truth, atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(
        *(torch.autograd.grad(rows, patch_logits, scale) for rows in (found, truth)),
        atol=1e-14,
        rtol=1e-13,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_the_dense_definition(kind: str, smoothing: float) -> None:
    labels, inputs = KINDS[kind](made_up(B)), logits()
    ours = TokenLabelLoss(label_smoothing=smoothing)(*inputs, labels)
    truth = dense_loss(*(part.double() for part in inputs), labels, smoothing)
    assert ours.dtype == torch.float32 and ours.shape == ()
    assert abs(ours.item() - truth.item()) < 1e-5
    for found, expected in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(truth, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


def test_equals_the_papers_formula_where_all_is_inside() -> None:
    labels, (cls_logits, patch_logits) = made_up(2), logits(torch.float64, batch=2)
    windows = labels.targets()
    torch.testing.assert_close(windows.weight, torch.ones(2, N))
    soft, beta = exact(windows), 0.5
    torch.testing.assert_close(soft.sum(-1), torch.ones(2, N, dtype=torch.float64))
    paper = F.cross_entropy(cls_logits, labels.label) + beta * torch.stack(
        [F.cross_entropy(patch_logits[:, i], soft[:, i]) for i in range(N)]
    ).mean(0)
    torch.testing.assert_close(TokenLabelLoss()(cls_logits, patch_logits, labels), paper)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls_target", ["label", "crop", "both"])
def test_gradcheck(kind: str, cls_target: Any) -> None:
    loss = TokenLabelLoss(cls_target=cls_target, label_smoothing=0.1)
    labels = KINDS[kind](with_word(with_word(made_up(B), 1, label=-1), 2, state=0))
    inputs = logits(torch.float64)
    assert torch.autograd.gradcheck(lambda *given: loss(*given, labels), inputs, fast_mode=True)


def test_strided_logits() -> None:
    labels, wide = made_up(B), torch.randn(B, N + 1, C)
    strided = [wide[:, 0], wide[:, 1:].detach().requires_grad_()]
    packed = [part.detach().clone().requires_grad_() for part in strided]
    losses = [TokenLabelLoss()(*pair, labels) for pair in (strided, packed)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(loss, pair[1])
            for loss, pair in zip(losses, (strided, packed), strict=True)
        )
    )


def test_a_second_backward_pass_over_a_retained_graph() -> None:
    """The first one uses up what the forward pass kept."""
    cls_logits, patch_logits = logits()
    loss = TokenLabelLoss()(cls_logits, patch_logits, made_up(B))
    first = torch.autograd.grad(loss, patch_logits, retain_graph=True)
    second = torch.autograd.grad(loss, patch_logits)
    assert torch.equal(first[0], second[0])


class Largest(TorchDispatchMode):
    """Entries of the largest floating-point tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.entries = max(self.entries, result.numel())
        return result


def test_validation_computes_no_gradient() -> None:
    inputs, labels, loss = logits(batch=24), made_up(24), TokenLabelLoss()
    with Largest() as training:
        expected = loss(*inputs, labels)
    with torch.no_grad(), Largest() as validation:
        assert torch.equal(loss(*inputs, labels), expected)
    assert validation.entries < inputs[1].numel() <= training.entries


def test_no_second_derivative_instead_of_a_wrong_one() -> None:
    inputs = logits(torch.float64)
    loss = TokenLabelLoss()(*inputs, made_up(B))
    (gradient,) = torch.autograd.grad(loss, inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_all_classes_stored() -> None:
    """Where nobody is left to take the rest, the mass stays what it is."""
    labels = made_up(B, C, k=C)
    inputs = logits(torch.float64)
    torch.testing.assert_close(TokenLabelLoss()(*inputs, labels), dense_loss(*inputs, labels))


@pytest.mark.parametrize("cls_target", ["label", "crop", "both"])
def test_the_loss_of_mixed_labels_is_the_mixture_of_the_losses(cls_target: Any) -> None:
    """Also of images without a map, and of unknown labels."""
    labels = with_word(with_word(made_up(B), 1, state=0), 2, label=-1)
    mix = mixed(MixUp(), labels)
    lam = float(mix.blend[0])
    assert 0 < lam < 1
    inputs, loss = logits(torch.float64), TokenLabelLoss(cls_target=cls_target)
    both = lam * loss(*inputs, labels) + (1 - lam) * loss(*inputs, labels[mix.partner])
    torch.testing.assert_close(loss(*inputs, mix), both)


def test_an_image_without_a_map_falls_back_on_its_label() -> None:
    labels = made_up(B)
    for row in range(B):
        labels = with_word(labels, row, state=0)
    assert not labels.has_map.any()
    cls_logits, patch_logits = inputs = logits(torch.float64)
    by_label = F.cross_entropy(cls_logits, labels.label)
    for cls_target in ("label", "crop", "both"):
        loss = TokenLabelLoss(cls_target=cls_target)(*inputs, labels)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, by_label)
        (gradient,) = torch.autograd.grad(loss, patch_logits)
        assert not gradient.any()


@pytest.mark.parametrize("merged", [False, True])
def test_unknown_labels(merged: bool) -> None:
    records = made_up(B)
    for row in range(1, B):
        records = with_word(records, row, label=-1)
    labels: Labels = records.sparse(k=C) if merged else records
    cls_logits, patch_logits = logits(torch.float64)
    soft = -(records.crop() * cls_logits.log_softmax(-1)).sum(-1)
    hard = F.cross_entropy(cls_logits[:1], records.label[:1])
    for cls_target, expected in {
        "label": hard / B,
        "crop": soft.mean(),
        "both": ((hard + soft[0]) / 2 + soft[1:].sum()) / B,
    }.items():
        loss = TokenLabelLoss(cls_target=cls_target, dense_weight=0)  # type: ignore[arg-type]
        found = loss(cls_logits, patch_logits, labels)
        torch.testing.assert_close(found, expected)
        (ignored,) = torch.autograd.grad(found, patch_logits)
        assert not ignored.any(), "0, which DistributedDataParallel waits for"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    labels, inputs = KINDS["cutmix"](made_up(B)), logits(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = TokenLabelLoss()(*inputs, labels)
    assert loss.dtype == torch.float32
    exactly = [part.detach().double().requires_grad_() for part in inputs]
    truth = dense_loss(*exactly, labels)
    assert abs(loss.item() - truth.item()) < 1e-5
    for found, expected in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(truth, exactly), strict=True
    ):
        assert found.dtype == dtype
        # Rounded once, at the end.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0.6 * eps)


def test_large_logits_lose_nothing() -> None:
    labels, (cls_logits, patch_logits) = made_up(B), logits()
    apart = (patch_logits * 64).round() / 8  # exact in float32, also with the offset
    near = TokenLabelLoss()(cls_logits, apart, labels)
    far = TokenLabelLoss()(cls_logits, apart + 4096, labels)
    torch.testing.assert_close(near, far, atol=0, rtol=1e-6)
    assert torch.isfinite(TokenLabelLoss()(cls_logits, patch_logits * 1e4, labels))


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("eager", "records"),
        ("aot_eager", "merged"),
        pytest.param(
            "inductor",
            "cutmix",
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a compiler"),
        ),
    ],
)
def test_compiles_as_one_graph(backend: str, kind: str) -> None:
    labels, inputs = KINDS[kind](made_up(B)), logits()
    loss = TokenLabelLoss(cls_target="both", label_smoothing=0.1)
    compiled = torch.compile(copy.deepcopy(loss), backend=backend, fullgraph=True)
    found, expected = compiled(*inputs, labels), loss(*inputs, labels)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_compiles_for_batches_that_zoom_differently() -> None:
    """A record's reach, a float, decides how many cells a window has."""
    labels, inputs, loss = made_up(B), logits(), TokenLabelLoss()
    compiled = torch.compile(copy.deepcopy(loss), backend="eager", fullgraph=True)
    reaches = set()
    for zoom in (1.0, 0.5, 0.3, 0.8):
        matrix = torch.tensor([zoom, zoom, 1.0]).diag().expand(B, 3, 3)
        nearer = labels.follow(matrix, canvas_size=(32, 32))
        reaches.add(nearer.record_layout.reach)
        torch.testing.assert_close(compiled(*inputs, nearer), loss(*inputs, nearer))
    assert len(reaches) > 2


def test_ends_in_nothing_learned_at_the_target() -> None:
    """Cross entropy is least, and its gradient 0, where the student says what the teacher says."""
    labels = made_up(B)
    patch_logits = exact(labels.targets()).log().clamp(min=-100).requires_grad_()
    loss = TokenLabelLoss(cls_weight=0)(logits(torch.float64)[0], patch_logits, labels)
    (gradient,) = torch.autograd.grad(loss, patch_logits)
    assert gradient.abs().max() < 1e-9


def test_the_grid_is_that_of_the_records_or_a_square() -> None:
    (cls_logits, patch_logits), loss = logits(), TokenLabelLoss()
    said = loss(cls_logits, patch_logits, made_up(B))
    torch.testing.assert_close(loss(cls_logits, patch_logits, made_up(B, grid=None)), said)
    flat = loss(cls_logits, patch_logits, made_up(B, grid=(1, 9)))
    assert abs(flat - said) > 1e-3


PLAIN = made_up(B)
MERGED = PLAIN.sparse()
CLS, PATCH = (part.detach() for part in logits())
CASES: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
    (ValueError, r"patch_logits \[B, N, C\] must be \[6, 9, 30\].*got \[6, 9, 31\]",
     (CLS, torch.zeros(B, N, 31), PLAIN)),
    (ValueError, r"must be \[6, 9, 30\].*got \[6, 10, 30\]", (CLS, torch.zeros(B, 10, C), PLAIN)),
    (ValueError, r"must be \[6, 9, 30\].*got \[6, 10, 30\]",
     (CLS, torch.zeros(B, 10, C), made_up(B, grid=None))),
    (ValueError, r"must be \[6, 9, 30\].*got \[6, 10, 30\]", (CLS, torch.zeros(B, 10, C), MERGED)),
    (ValueError, r"must be \[6, 9, 30\].*got \[5, 9, 30\]", (CLS, PATCH[:5], PLAIN)),
    (ValueError, r"cls_logits \[B, C\] must be \[6, 30\].*got \[5, 30\]",
     (CLS[:5], PATCH[:5], PLAIN)),
    (ValueError, r"must be \[6, 30\].*got \[6, 29\]", (CLS[:, :29], PATCH[..., :29], PLAIN)),
    (ValueError, r"must be \[6, 30\].*got \[6, 9, 30\]", (PATCH, CLS, PLAIN)),
    (ValueError, r"must be \[6, 9, 30\].*got \[6, 9, 30, 1\]", (CLS, PATCH[..., None], PLAIN)),
    (TypeError, "must be TokenLabels, MixedLabels or TokenTargets, got Tensor",
     (CLS, PATCH, torch.zeros(B))),
    (ValueError, r"those of a batch, label \[B\], got \[\]", (CLS, PATCH, PLAIN[0])),
    (ValueError, r"\[-1, 29\].*got 30", (CLS, PATCH, with_word(PLAIN, 2, label=30))),
    (ValueError, r"\[-1, 29\].*got -2", (CLS, PATCH, with_word(PLAIN, 2, label=-2))),
    (ValueError, "the logits' device, meta, got cpu", (CLS.to("meta"), PATCH, PLAIN)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "arguments"), CASES)
def test_errors(kind: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(kind, match=message) as caught:
        TokenLabelLoss()(*arguments)
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


def published_loss(
    output: tuple[Tensor, Tensor], labels: TokenLabels, smoothing: float, ground_truth: bool
) -> Tensor:
    """The published objective, written out on dense targets of images that are all shown."""
    even = smoothing / C
    kept = 1 - smoothing + even
    patches = labels.targets().dense().double() * kept + even
    cls = labels.crop().double() * kept + even
    if ground_truth:
        truth = F.one_hot(labels.label, C).double() * (kept - even) + even
        for row in range(len(cls)):
            share = 0.5 if truth[row].argmax() == cls[row].argmax() else 0.9
            cls[row] = share * cls[row] + (1 - share) * truth[row]
    losses = [
        -(target * part.double().log_softmax(-1)).sum(-1).mean()
        for target, part in zip((cls, patches), output, strict=True)
    ]
    return losses[0] + losses[1]


@pytest.mark.parametrize("ground_truth", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_published_loss(smoothing: float, ground_truth: bool) -> None:
    labels = made_up(B, C)
    shown = labels.targets().weight.amin(1) > 0.999
    labels = labels[shown]
    best = labels.crop().argmax(1)
    for row in (0, 1):  # the label agrees with the crop in some images, and not in others
        labels = with_word(labels, row, label=int(best[row]) if row else int(best[row] + 1) % C)
    output = logits(batch=len(labels))
    criterion = TokenLabelLoss.published(smoothing=smoothing, ground_truth=ground_truth)
    loss = criterion(output, labels)
    expected = published_loss(output, labels, smoothing, ground_truth)
    assert len(labels) > 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in output)


def test_smoothing_leaves_what_has_no_map() -> None:
    labels = with_word(made_up(B, C), 0, state=0)
    output = logits()
    losses = [
        TokenLabelLoss(cls_weight=0, map_smoothing=smoothing)(
            (output[0][:1], output[1][:1]), labels[:1]
        )
        for smoothing in (0.0, 0.1)
    ]
    assert losses == [0, 0]
    with pytest.raises(ValueError, match=r"map_smoothing must be in \[0, 1\], got 2"):
        TokenLabelLoss(map_smoothing=2)
