"""TokenLabels: records that go wherever tensors go."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import functional as F

from tests.leaves import LAYOUT, LAYOUTS, SIZE, made_up, record
from tokenlabel.dataset import TokenLabelMap, TokenLabels
from tokenlabel.dataset.targets.record import HEAD


def a_batch(count: int = 5, **options: Any) -> TokenLabels:
    leaves = [F.horizontal_flip(made_up(seed=n, label=n)[0]) for n in range(count)]
    return record(*leaves, **{"grid": (3, 4)} | options)


def same(one: Any, other: TokenLabels) -> bool:
    return (
        type(one) is TokenLabels
        and torch.equal(one, other)
        and one.record_layout == other.record_layout
    )


def plain(labels: TokenLabels) -> Tensor:
    return labels.as_subclass(Tensor)


def test_what_a_record_says_of_itself() -> None:
    labels = a_batch()
    assert labels.dtype == torch.uint8 and labels.device.type == "cpu"
    assert labels.shape == (5, HEAD + LAYOUT.nbytes + -LAYOUT.nbytes % 8)
    assert (labels.grid, labels.num_classes, len(labels)) == ((3, 4), 60, 5)
    assert labels.label.tolist() == labels.hard_label().tolist() == [0, 1, 2, 3, 4]
    assert labels.label.dtype == torch.int64
    assert labels.has_map.tolist() == [True] * 5
    assert "6x8 cells of 5 of 60 classes, grid=(3, 4), device=cpu" in repr(labels)
    for name, layout in LAYOUTS.items():
        assert record(made_up(layout)[0]).record_layout.maps == layout, name
    no_map = record(TokenLabelMap(b"", LAYOUT, canvas_size=SIZE))
    assert no_map.label.tolist() == [-1] and no_map.has_map.tolist() == [False]


COPIES: dict[str, Callable[[TokenLabels], Any]] = {
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x.contiguous(),
    "to": lambda x: x.to("cpu", non_blocking=True, copy=True),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "shared memory": lambda x: x.share_memory_(),
    "slice": lambda x: x[:],
    "indices": lambda x: x[torch.arange(len(x))],
    "index_select": lambda x: x.index_select(0, torch.arange(len(x))),
    "stack of rows": lambda x: torch.stack(list(x)),
    "unbind": lambda x: torch.stack(x.unbind()),
    "cat": lambda x: torch.cat([x[:2], x[2:]]),
    "split": lambda x: torch.cat(x.split(2)),
    "collate": lambda x: default_collate([x[i] for i in range(len(x))]),
    "twice flipped": lambda x: x.flip(0).flip(0),
}


@pytest.mark.parametrize("name", COPIES)
def test_whole_records_stay_records(name: str) -> None:
    labels = a_batch()
    assert same(COPIES[name](a_batch()), labels)
    fresh = TokenLabels.collate([made_up(seed=n)[0] for n in range(2)], (3, 4))
    fresh._layout = None  # as where it was lost on the way
    assert COPIES[name](fresh).record_layout == fresh.record_layout


def test_what_is_put_together_knows_the_paths_of_all() -> None:
    upright, tilted = a_batch(2), record(F.rotate(made_up()[0], 30), grid=(3, 4))
    assert upright.record_layout != tilted.record_layout
    whole = a_batch(3)
    whole[1] = tilted[0]
    for mixed, place in (
        (torch.cat([upright, tilted]), 2),
        (torch.stack([upright[0], tilted[0]]), 1),
        (torch.where(torch.tensor([[True], [False]]), upright, tilted), 1),
        (whole, 1),
    ):
        assert type(mixed) is TokenLabels
        found = mixed.targets((3, 4)).dense()[place]
        torch.testing.assert_close(found, tilted.targets().dense()[0], atol=1e-5, rtol=0)


def test_anything_else_is_a_plain_tensor() -> None:
    labels = a_batch()
    parts = labels[:, :9], labels[0, 0], labels.max(1)[0]
    for other in (*parts, labels.float(), labels == labels, labels.sum()):
        assert type(other) is Tensor
    assert type(labels + 1) is TokenLabels, "whole rows, for all torch can tell"


def test_indexing_is_by_image() -> None:
    labels = a_batch()
    for index, expected in (
        (slice(1, 4), [1, 2, 3]),
        (torch.tensor([4, 0]), [4, 0]),
        (torch.tensor([True, False, False, True, False]), [0, 3]),
        ([2, 2], [2, 2]),
    ):
        assert labels[index].label.tolist() == expected
        assert type(labels[index]) is TokenLabels
    one = labels[3]
    assert type(one) is TokenLabels and one.label.item() == 3
    assert [row.label.item() for row in labels] == [0, 1, 2, 3, 4]
    with pytest.raises(TypeError, match="of one image"):
        len(one)
    assert "TokenLabels([" in repr(one)
    torch.testing.assert_close(labels[1:].targets().dense(), labels.targets().dense()[1:])


def test_saved_and_loaded() -> None:
    labels, file = a_batch(), io.BytesIO()
    torch.save(labels, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False), labels)
    file = io.BytesIO()
    torch.save(plain(labels), file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True).as_subclass(TokenLabels), labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for CUDA")
def test_on_a_gpu() -> None:
    labels = a_batch().pin_memory()
    assert labels.is_pinned() and same(labels, a_batch())
    moved = labels.to("cuda", non_blocking=True)
    assert type(moved) is TokenLabels and moved.record_layout == labels.record_layout
    there, here = moved.targets(), labels.targets()
    assert there.values.device.type == "cuda"
    torch.testing.assert_close(there.dense().cpu(), here.dense(), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved.crop().cpu(), labels.crop(), atol=1e-5, rtol=0)
    assert same(moved.cpu(), labels)


def test_a_device_that_holds_no_data_keeps_the_layout() -> None:
    there = a_batch().to("meta")
    assert type(there) is TokenLabels
    assert there.device.type == "meta"
    assert there.record_layout == a_batch().record_layout


def test_records_of_other_sets_do_not_mix() -> None:
    ours, others = a_batch(2), record(made_up(LAYOUTS["finer codes"])[0], grid=(3, 4))
    assert ours.shape[1] == others.shape[1]
    grid = a_batch(2, grid=(4, 4))
    for other in (others, grid):
        rows = [*ours, *other]
        with pytest.raises(ValueError, match=r"all of one layout. Remedy: .* batch those of one"):
            default_collate(rows)
    longer = record(made_up(LAYOUT._replace(k=6))[0], grid=(3, 4))
    with pytest.raises(ValueError, match="all of one layout"):
        default_collate([*ours, *longer])


def test_what_is_no_record_says_so() -> None:
    for data in (
        torch.zeros(2, 1000, dtype=torch.uint8),
        torch.zeros(2, 10, dtype=torch.uint8),
        torch.zeros(0, 1000, dtype=torch.uint8),
        torch.zeros(2, 1000),
    ):
        with pytest.raises(ValueError, match="Remedy"):
            data.as_subclass(TokenLabels).targets(4)


def test_longer_records_are_padded() -> None:
    """Elastic paths take a lattice; the others' records grow with them."""
    leaf, _ = made_up()
    bent = F.elastic(leaf, torch.zeros(1, *SIZE, 2))
    singles = [record(one, grid=(3, 4)) for one in (leaf, bent)]
    assert singles[0].shape < singles[1].shape
    batch = default_collate([single[0] for single in singles])
    assert batch.shape[1] == singles[1].shape[1]
    expected = torch.cat([single.targets().dense() for single in singles])
    torch.testing.assert_close(batch.targets().dense(), expected, atol=1e-5, rtol=0)


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        leaf, _ = made_up(seed=index, label=index)
        turned = F.elastic(leaf, torch.zeros(1, *SIZE, 2)) if index == 4 else F.rotate(leaf, index)
        return torch.tensor(index), TokenLabels.of(turned, (3, 4))


def as_it_is(batch: Any) -> Any:
    return batch


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("collate", [None, as_it_is], ids=["collated", "in a list"])
def test_workers(context: str, collate: Any) -> None:
    loader = DataLoader(
        Samples(), 3, num_workers=2, collate_fn=collate, multiprocessing_context=context
    )
    expected = [Samples()[index][1] for index in range(6)]
    for number, batch in enumerate(loader):
        labels = batch[1] if collate is None else [sample[1] for sample in batch]
        assert all(type(one) is TokenLabels for one in labels)
        assert [one.label.item() for one in labels] == [3 * number + n for n in range(3)]
        wanted = default_collate(expected[3 * number : 3 * number + 3])
        together = labels if collate is None else default_collate(labels)
        assert same(together, wanted)


def test_targets_of_one_image_ask_for_a_batch() -> None:
    one = TokenLabels.of(made_up()[0], (2, 2))
    with pytest.raises(ValueError, match=r"Remedy: labels\[None\]"):
        one.targets()
    assert one[None].targets().weight.shape == (1, 4)
