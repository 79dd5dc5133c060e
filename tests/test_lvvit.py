"""LV-ViT: the paper's sizes, any resolution, residual scaling, and that it learns."""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.volo import VOLO
from torch import Tensor, nn

from tests.records import made_up
from tokenlabel.supervise import (
    LVViT,
    MixToken,
    TokenLabelLoss,
    load_published,
    lvvit_l,
    lvvit_m,
    lvvit_s,
    lvvit_t,
)

SMALL = {"image_size": 32, "patch_size": 4, "num_classes": 5}
SMALL |= {"width": 24, "depth": 3, "heads": 3, "stem_width": 8}


def small(**options: object) -> LVViT:
    torch.manual_seed(0)
    return LVViT(**(SMALL | options))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "image_size", "published", "exact"),
    [
        (lvvit_t, 224, 8.53, 8_534_720),
        (lvvit_s, 224, 26.15, 26_151_824),
        (lvvit_m, 224, 55.83, 55_830_544),
        # The paper's figure for L has the position embeddings of its 448 px model.
        (lvvit_l, 448, 150.47, 150_473_552),
        (lvvit_l, 224, 150.47, 150_021_968),
    ],
)
def test_parameters(
    make: Callable[..., LVViT], image_size: int, published: float, exact: int
) -> None:
    with torch.device("meta"):
        model = make(image_size=image_size)
        cls, patches = model(torch.zeros(2, 3, image_size, image_size))
    assert count(model) == exact
    assert exact / 1e6 == pytest.approx(published, rel=0.01)
    assert model.grid == (image_size // 16, image_size // 16)
    assert cls.shape == (2, 1000)
    assert patches.shape == (2, (image_size // 16) ** 2, 1000)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((32, 32), (2, 2)),
        ((96, 96), (6, 6)),
        ((224, 224), (14, 14)),
        ((288, 288), (18, 18)),
        ((64, 160), (4, 10)),
        ((75, 50), (4, 3)),
    ],
)
def test_any_resolution(size: tuple[int, int], grid: tuple[int, int]) -> None:
    model = small(image_size=96, patch_size=16)
    assert model.grid_for(size) == model.grid_for(torch.Size(size)) == grid
    images = torch.randn(2, 3, *size)
    cls, patches = model(images, MixToken().sample(grid))
    assert cls.shape == (2, 5)
    assert patches.shape == (2, grid[0] * grid[1], 5)
    (cls.square().sum() + patches.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.eval()(images).shape == (2, 5)


def test_positions_follow_the_resolution() -> None:
    """Interpolated position embeddings are those of the same place in the image."""
    model = small(image_size=(32, 48))
    model.blocks, model.norm, model.patch_embed.proj = (
        nn.ModuleList(),
        nn.Identity(),
        nn.Conv2d(8, 24, 2, 2),
    )
    with torch.no_grad():  # nothing is left but the positions
        for parameter in (model.cls_token, *model.patch_embed.proj.parameters()):
            parameter.zero_()
        axes = [(torch.arange(patches) + 0.5) / patches for patches in model.grid]
        model.pos_embed[0, 1:, :2] = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(
            0, 1
        )
        assert torch.equal(
            model.features(torch.zeros(1, 3, 32, 48))[1].flatten(1, 2), model.pos_embed[:, 1:]
        )
        for grid in ((16, 6), (4, 24), (9, 13)):
            own, found = model.features(torch.zeros(1, 3, 4 * grid[0], 4 * grid[1]))
            assert torch.equal(own, model.pos_embed[:, 0])
            for axis, patches in enumerate(grid):
                # Cubic interpolation of a straight line is exact but near the borders.
                inner = slice(patches // 3, -(patches // 3))
                truth, line = (
                    (torch.arange(patches) + 0.5) / patches,
                    found[0, ..., axis].mean(1 - axis),
                )
                torch.testing.assert_close(line[inner], truth[inner], rtol=0, atol=0.01)


def test_patches_lie_row_by_row() -> None:
    model = small(image_size=128, patch_size=16).eval()
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        before = model.features(image)[1]
        for row, column in ((0, 0), (0, 7), (7, 0), (3, 5)):
            painted = image.clone()
            painted[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 3.0
            change = (model.features(painted)[1] - before).norm(dim=-1)[0]
            assert divmod(int(change.argmax()), 8) == (row, column)


def test_residuals_are_scaled() -> None:
    """A layer adds 1 / residual_scale of what the same layer adds unscaled."""
    whole, third = small(residual_scale=1.0), small(residual_scale=3.0)
    third.load_state_dict(whole.state_dict())
    tokens = torch.randn(2, 65, 24)
    one, other = whole.blocks[0], third.blocks[0]
    torch.nn.init.zeros_(one.mlp[2].weight)
    torch.nn.init.zeros_(other.mlp[2].weight)
    torch.testing.assert_close(one(tokens) - tokens, 3 * (other(tokens) - tokens))
    with torch.device("meta"):
        assert [m().blocks[0].residual_scale for m in (lvvit_l, lvvit_s, lvvit_t)] == [3, 2, 1]


def test_evaluation_adds_the_patches_best() -> None:
    model = small().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images = torch.randn(2, 3, 32, 32)
    cls, patches = model(images)
    torch.testing.assert_close(model.eval()(images), cls + 0.5 * patches.max(1).values)
    model.patch_vote = 0.0
    torch.testing.assert_close(model(images), cls)
    with pytest.raises(ValueError, match="for training"):
        model(images, MixToken().sample(8))


def test_checkpointing_gives_the_same_gradients() -> None:
    plain = small(drop_path_rate=0.5)
    lean = copy.deepcopy(plain)
    lean.set_grad_checkpointing()
    images = torch.randn(3, 3, 32, 32)
    saved: dict[int, int] = {}
    for which, model in enumerate((plain, lean)):
        torch.manual_seed(1)
        kept = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            cls, patches = model(images)
        saved[which] = kept
        (cls.square().sum() + patches.square().sum()).backward()
    assert saved[1] < 0.6 * saved[0]
    for (name, one), (_, other) in zip(
        plain.named_parameters(), lean.named_parameters(), strict=True
    ):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    lean.set_grad_checkpointing(False)


def test_stochastic_depth_grows() -> None:
    rates = [block.drop_path.p for block in small(drop_path_rate=0.3).blocks]
    assert rates == pytest.approx([0.0, 0.15, 0.3])
    model = small(drop_path_rate=0.3, residual_scale=1.0)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images)[0], model(images)[0])
    assert torch.equal(model.eval()(images), model(images))


def test_decay_names_are_parameters() -> None:
    model = small()
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 5}, "patch_size must be even, got 5"),
        ({"heads": 5}, "heads must divide width, got 5 heads and width 24"),
        ({"num_classes": 0}, "at least 1, got 0"),
        ({"patch_size": 16}, r"at least one patch of 16 pixels.*\(8, 64\)"),
    ],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)(torch.zeros(2, 3, 8, 64))


def test_compiled() -> None:
    model = small()
    images = torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.manual_seed(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for box in [MixToken().sample(8) for _ in range(4)]:
            torch.testing.assert_close(compiled(images, box), model(images, box))


def test_bfloat16() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        cls, patches = small()(torch.randn(2, 3, 48, 48), MixToken().sample(12))
    assert cls.dtype == patches.dtype == torch.bfloat16
    assert cls.isfinite().all()
    model = small().bfloat16()
    assert model(torch.randn(2, 3, 48, 48).bfloat16())[0].dtype == torch.bfloat16


def test_it_learns() -> None:
    """MixToken, records, AdamW: the loss of 8 images falls."""
    torch.manual_seed(0)
    model = lvvit_t(image_size=64, patch_size=8, num_classes=10, depth=4)
    images = torch.randn(8, 3, 64, 64)
    labels = made_up(8, 10, grid=model.grid, cells=(8, 8))
    criterion, mix = TokenLabelLoss(), MixToken()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(20):
        batch = slice(2 * step % 8, 2 * step % 8 + 2)
        own = labels[batch]
        box = mix.sample(model.grid)
        outputs = model(images[batch], box)
        loss = criterion(*outputs, own if box is None else box.mix_labels(own))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(loss < float("inf") for loss in losses)
    assert sum(losses[-4:]) < 0.93 * sum(losses[:4]), losses


def published_names(depth: int) -> set[str]:
    """Names of the parameters and statistics in the published code's checkpoints."""
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    embed = [f"conv{n}.weight" for n in (1, 2, 3)] + ["proj.weight", "proj.bias"]
    embed += [f"bn{n}.{name}" for n in (1, 2, 3) for name in statistics]
    layer = ["attn.qkv.weight"] + [
        f"{part}.{name}"
        for part in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
        for name in ("weight", "bias")
    ]
    heads = [f"{part}.{name}" for part in ("norm", "head", "aux_head") for name in statistics[:2]]
    return {
        *("cls_token", "pos_embed", *heads),
        *(f"patch_embed.{name}" for name in embed),
        *(f"blocks.{n}.{name}" for n in range(depth) for name in layer),
    }


def test_parameters_have_the_published_names() -> None:
    with torch.device("meta"):
        assert set(lvvit_s().state_dict()) == published_names(16)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_checkpoints_load_and_go_back(prefix: str, tmp_path: Path) -> None:
    source = small()
    state = {prefix + name: value for name, value in source.state_dict().items()}
    averaged = {name: value + 1 for name, value in state.items()}
    saved = {"state_dict": state, "state_dict_ema": averaged, "args": argparse.Namespace(lr=0.1)}
    torch.save(saved, tmp_path / "lvvit-83.3.pth.tar")
    torch.manual_seed(1)
    model = load_published(LVViT(**SMALL), tmp_path / "lvvit-83.3.pth.tar")
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    load_published(model, tmp_path / "lvvit-83.3.pth.tar", ema=True)
    assert torch.equal(model.state_dict()["pos_embed"], source.pos_embed + 1)


@pytest.mark.parametrize(("size", "other"), [(32, 48), (48, 32)])
def test_positions_are_resized_once_as_published(size: int, other: int) -> None:
    source, model = small(image_size=size), small(image_size=other)
    load_published(model, source.state_dict())
    side = size // 4
    planes = source.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(planes, (other // 4,) * 2, mode="bicubic")
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    assert torch.equal(model.pos_embed[:, 1:], resized.flatten(2).mT)
    assert model.eval()(torch.zeros(1, 3, other, other)).shape == (1, 5)


def test_heads_of_other_classes_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    source, model = small(), small(num_classes=7)
    before = model.aux_head.weight.clone()
    load_published(model, source.state_dict())
    assert torch.equal(model.aux_head.weight, before)
    assert torch.equal(model.norm.weight, source.norm.weight)
    assert "head and aux_head of LVViT keeps its own weights" in caplog.text
    caplog.clear()
    state = source.state_dict().items()
    load_published(small(), {f"module.{name}": v for name, v in state if "aux_head" not in name})
    assert "aux_head of LVViT keeps" in caplog.text and "head and" not in caplog.text


def test_lvvit_takes_its_weights_where_it_is_made(tmp_path: Path) -> None:
    source = lvvit_t(image_size=32)
    torch.save(source.state_dict(), tmp_path / "t.pth")
    model = lvvit_t(image_size=48, weights=tmp_path / "t.pth")
    assert torch.equal(model.head.weight, source.head.weight) and model.grid == (3, 3)


def test_volo_of_timm_is_resized_too() -> None:
    options = {"embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4), "num_classes": 5}
    source, model = (VOLO((1, 1, 1, 1), img_size=size, **options) for size in (64, 96))
    load_published(model, {"state_dict": source.state_dict()})
    planes = source.pos_embed.permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(planes, model.pos_embed.shape[1:3], mode="bicubic")
    assert torch.equal(model.pos_embed, resized.permute(0, 2, 3, 1))
    assert torch.equal(model.aux_head.weight, source.aux_head.weight)


def test_what_is_no_published_checkpoint_is_refused(tmp_path: Path) -> None:
    state = small().state_dict()
    with pytest.raises(ValueError, match=r"every name and shape: 11 missing \(blocks\.3"):
        load_published(small(depth=4), state)
    with pytest.raises(ValueError, match=r"of another shape \(cls_token"):
        load_published(small(width=48), state)
    with pytest.raises(ValueError, match=r"1 unexpected \(hybrid\.weight"):
        load_published(small(), state | {"hybrid.weight": torch.zeros(1)})
    torch.save({"state_dict": state, "run": Path.cwd}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="load without running code"):
        load_published(small(), tmp_path / "code.pth")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": [1], "output_fmt": "NLC", "stop_early": True, "intermediates_only": True},
        {"indices": (0, 2), "return_prefix_tokens": True},
    ],
)
def test_intermediates_have_timms_shapes(options: dict[str, Any]) -> None:
    """Held against timm's ViT of the same sizes, and the last layer's against `features`."""
    reference = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=24, depth=3, num_heads=3
    ).eval()
    model, images = small().eval(), torch.rand(2, 3, 32, 32)
    found, expected = (net.forward_intermediates(images, **options) for net in (model, reference))

    def shapes(part: Any) -> Any:
        return part.shape if isinstance(part, Tensor) else [shapes(one) for one in part]

    assert shapes(found) == shapes(expected)
    if options.get("norm"):
        tokens, layers = found
        cls, patches = model.features(images)
        assert torch.equal(layers[-1], patches.permute(0, 3, 1, 2))
        assert torch.equal(tokens[:, 0], cls)
    keys = ("module", "num_chs", "reduction")
    theirs = [{key: row[key] for key in keys} for row in reference.feature_info]
    assert model.feature_info == theirs


def test_layers_that_are_not_there() -> None:
    for indices in (4, 0, [3], [-4]):
        with pytest.raises(ValueError, match="must name some of 3 layers"):
            small().forward_intermediates(torch.rand(1, 3, 32, 32), indices)
