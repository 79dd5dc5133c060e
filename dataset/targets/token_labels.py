# mypy: allow-subclassing-any
"""`TokenLabels`: the labels of a batch as one uint8 tensor, from the loader to the loss."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

from ..label_map.label_map import SINGULAR, TokenLabelMap
from .follow import follow_matrices, follow_points
from .published import published_targets
from .record import HAS_MAP, HEAD, Grid, RecordLayout, Records, pack, read_layout, word
from .windows import TokenTargets, TokenWindows, crop_targets, patch_windows


class TokenLabels(Tensor):
    """Labels of a batch: one uint8 tensor [B, bytes], or [bytes] for one sample.

        images, labels = next(iter(loader))  # over a TokenLabelDataset
        labels = labels.to("cpu", non_blocking=True)
        windows = labels.targets(grid=14)  # what each of 14 x 14 patches is taught
        loss = TokenLabelLoss()(student(images), labels)

    A row is a record: the map of the sample's image as it is stored, and where its crop lies on it.
    `targets` reads the maps, all at once, on the device of the batch. The tensor moves like any
    other (`to`, `pin_memory`, pickling, shared memory), has the length of the batch and is indexed
    by image. What keeps whole records stays `TokenLabels`; anything else is a plain tensor.
    """

    #: Read where records are batched, on the CPU, and handed on from there: asking a GPU waits.
    _layout: RecordLayout | None = None

    @classmethod
    def of(cls, leaf: TokenLabelMap, grid: Grid | None = None, shrink: float = 0.0) -> Self:
        """The record of one sample, from the leaf that followed its image.

        Args:
            leaf: the map and its path.
            grid: (h, w) of the student's patches, used where `targets` is called without one.
            shrink: as in `TokenLabelDataset`.
        """
        record: Self = cls.collate([leaf], grid, shrink)[0]  # type: ignore[assignment]
        return record

    @classmethod
    def collate(
        cls, leaves: Sequence[TokenLabelMap], grid: Grid | None = None, shrink: float = 0.0
    ) -> Self:
        """The records of a batch, [B, bytes], from the leaves that followed its images."""
        return cls._batch(pack(leaves, grid, shrink))

    @classmethod
    def wrap(cls, data: Tensor) -> Self:
        """The labels of a batch that lost its class on the way, as a broadcast of its bytes does.

        Args:
            data: uint8 [B, bytes], the records.

        Raises:
            ValueError: they are no records.
        """
        return cls._batch(data.as_subclass(Tensor))

    @classmethod
    def _batch(cls, data: Tensor) -> Self:
        labels = data.as_subclass(cls)
        labels._layout = read_layout(data)
        return labels

    @property
    def _data(self) -> Tensor:
        """The bytes as a plain tensor, in a way that torch.compile follows."""
        with DisableTorchFunctionSubclass():
            return self[...]

    def __len__(self) -> int:
        if self.ndim != 2:
            raise TypeError("these are the labels of one image, which have no length")
        return self.shape[0]

    @property
    def record_layout(self) -> RecordLayout:
        """What the records have in common. Read from them, once, where it was lost on the way."""
        if self._layout is None:
            self._layout = read_layout(self._data)
        return self._layout

    @property
    def num_classes(self) -> int:
        """C."""
        return self.record_layout.maps.num_classes

    @property
    def grid(self) -> Grid | None:
        """(h, w) of the student's patches, None where the records do not say."""
        return self.record_layout.grid

    @property
    def label(self) -> Tensor:
        """Ground-truth classes, int64 [B], -1 where unknown."""
        return word(self._data, "label").long()

    @property
    def has_map(self) -> Tensor:
        """Whether the images have maps, bool [B]."""
        return (word(self._data, "state") & HAS_MAP) > 0

    def hard_label(self) -> Tensor:
        """One class an image, int64 [B]: the ground truth; -1 where unknown."""
        return self.label

    def targets(self, grid: int | Grid | None = None) -> TokenWindows:
        """Each patch's soft target, on the records' device, as windows on the maps' cells.

        Args:
            grid: the student's patches, (h, w), or one number for a square; None: that of the
                data set.

        Raises:
            ValueError: no grid is known.
        """
        return patch_windows(self._records(), self._grid(grid))

    def sparse(
        self, grid: int | Grid | None = None, k: int = 10, *, rule: str = "exact"
    ) -> TokenTargets:
        """The same merged and cut to the k most probable classes, for inspection or another loss.

        Args:
            grid: as for `targets`.
            k: classes kept for each patch; the mass of the others goes to `rest`.
            rule: "exact", or "published": the target of TokenLabeling (Jiang et al., 2021) and
                LV-ViT, for comparison: *logits* averaged over the patch (RoIAlign of the crop's
                box), every class that is not stored at logit 0, then softmax. The published code
                exchanges x and y of its boxes; here they are the right way round. Only for crops,
                flips and resizes, and maps stored with `level`.

        Raises:
            ValueError: a bad option, or no grid is known; by the rule "published", another path or
                no `level`.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if rule not in ("exact", "published"):
            raise ValueError(f"rule must be 'exact' or 'published', got {rule!r}")
        records, grid = self._records(), self._grid(grid)
        if rule == "published":
            return published_targets(records, grid, k)
        windows, crop = patch_windows(records, grid), crop_targets(records, "logits")
        return TokenTargets.of(self.label, windows.weight, windows.dense(), crop, k)

    def follow(
        self, source: Tensor, canvas_size: Grid | None = None, boxes: Tensor | None = None
    ) -> "TokenLabels":
        """The labels after the batch's images were moved where they lie, on any device.

            # every image mirrored, after the loader
            flip = torch.tensor([[-1.0, 0, 224], [0, 1, 0], [0, 0, 1]])
            images, labels = images.flip(-1), labels.follow(flip.expand(len(images), 3, 3))

        Points are (x, y) in pixels, and pixel i covers [i, i + 1]. What lies outside the old image
        shows fill, which has no label. `shrink` stays what the loader's crop made it. Checking what
        is given waits for the device.

        Args:
            source: where the new images' points lie on the old ones: matrices [B, 3, 3] for columns
                (x, y, 1); or points [B, h, w, 2], at the centres of h x w equal parts of the new
                images, far outside for fill; those make records longer by 50 KB.
            canvas_size: (h, w) of the new images in pixels; None: as before.
            boxes: [B, 4], (x0, y0, x1, y1) of the old images in pixels that the new ones may show,
                where matrices are not all: they were cropped on the way; None: all of it.

        Raises:
            ValueError: another shape, images of different sizes and no `canvas_size`, or matrices
                that are singular or not finite.
        """
        records, is_matrix = self._records(), source.shape[1:] == (3, 3)
        known = is_matrix or (source.ndim == 4 and source.shape[3] == 2)
        if not known or len(source) != len(self) or not source.is_floating_point():
            raise ValueError(
                f"source must be floats [B, 3, 3] or [B, h, w, 2], for {len(self)} images; got "
                f"{source.dtype} {list(source.shape)}"
            )
        if is_matrix:
            source = source.to(self.device, torch.float64)
            scale = source[:, 2:, 2:]
            source = source / torch.where(scale == 0, 1.0, scale)
            if not bool(
                (torch.linalg.det(source).abs() > SINGULAR).all() & source.isfinite().all()
            ):
                raise ValueError(
                    "matrices must be finite and not singular. Remedy: give the way from each new "
                    "image's points to the old one's"
                )
        if canvas_size is None:
            sizes = torch.stack([records.word("canvas_h"), records.word("canvas_w")], 1)
            if bool((sizes != sizes[:1]).any()):
                raise ValueError(
                    "the images of these labels differ in size. Remedy: "
                    "labels.follow(source, canvas_size=images.shape[-2:])"
                )
            canvas_size = int(sizes[0, 0]), int(sizes[0, 1])
        size = int(canvas_size[0]), int(canvas_size[1])
        if not is_matrix:
            return TokenLabels.wrap(follow_points(records, source.to(self.device), size))
        boxes = None if boxes is None else boxes.to(self.device, torch.float64)
        return TokenLabels.wrap(follow_matrices(records, source, size, boxes))

    def crop(self, pool: str = "logits") -> Tensor:
        """The whole crop's soft target, float32 [B, C]; 0 where the image has no map.

        `shrink` draws the targets of patches only, not this one.

        Args:
            pool: "logits": softmax of the area mean of the logits, what the teacher itself would
                answer; "probs": area mean of the probabilities, ReLabel's localized label (Yun et
                al., 2021), which the many patches that show nothing known dilute.
        """
        if pool not in ("logits", "probs"):
            raise ValueError(f"pool must be 'logits' or 'probs', got {pool!r}")
        return crop_targets(self._records(), pool)

    def _records(self) -> Records:
        if self.ndim != 2:
            raise ValueError(
                f"targets are those of a batch, [B, bytes], got {list(self.shape)}. Remedy: "
                "labels[None] for one image, or a DataLoader"
            )
        return Records(self._data, self.record_layout)

    def _grid(self, grid: int | Grid | None) -> Grid:
        grid = grid if grid is not None else self.grid
        if grid is None:
            raise ValueError(
                "targets need the student's grid, and these records do not say it. Remedy: "
                "TokenLabelDataset(..., grid=14), or labels.targets(14)"
            )
        return student_grid(grid)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        given = []
        for argument in (*args, *(kwargs or {}).values()):
            parts = argument if isinstance(argument, (tuple, list)) else (argument,)
            given += [part for part in parts if isinstance(part, TokenLabels)]
        if func is Tensor.__setitem__ and given:
            given[0]._layout = None  # the rows put in may reach further
        return _kept(result, given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied: Self = self.clone()  # type: ignore[assignment]
        memo[id(self)] = copied
        return copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.ndim not in (1, 2) or self.shape[-1] < HEAD:
            return f"TokenLabels({list(self.shape)})"
        maps = self.record_layout.maps
        return (
            f"TokenLabels({list(self.shape)}, {maps.grid[0]}x{maps.grid[1]} cells of {maps.k} of "
            f"{maps.num_classes} classes, grid={self.grid}, device={self.device})"
        )


def student_grid(grid: Any) -> Grid:
    """(h, w) of a student's patches.

    Args:
        grid: that, or one number for a square; a `TokenStudent`, or a model of timm that has
            patches; or timm's name of one.

    Raises:
        ValueError: it is no grid, and none is known of it.
    """
    given = grid
    if isinstance(grid, str):
        grid = import_module("timm").create_model(grid)
    grid = getattr(grid, "module", grid)  # as DistributedDataParallel holds it
    grid = getattr(grid, "grid", grid)
    grid = getattr(getattr(grid, "patch_embed", None), "grid_size", grid)
    try:
        height, width = (grid, grid) if isinstance(grid, int) else map(int, grid)
    except (TypeError, ValueError):
        raise ValueError(
            f"grid must be patches (h, w), a TokenStudent, or the name of a timm model with "
            f"patches; got {given!r:.99}. Remedy: grid=student, once there is a student"
        ) from None
    if height < 1 or width < 1:
        raise ValueError(f"grid must be patches (h, w), at least 1 each way, got {grid}")
    return height, width


def _kept(result: Any, given: Sequence[TokenLabels]) -> Any:
    """Whole records keep the class and what is known of them; anything else is a plain tensor."""
    if isinstance(result, (tuple, list)):
        return type(result)([_kept(part, given) for part in result])
    if not isinstance(result, TokenLabels):
        return result
    with DisableTorchFunctionSubclass():
        if not given or result.dtype != torch.uint8 or result.shape[-1:] != given[0].shape[-1:]:
            return result.as_subclass(Tensor)
    # A part of a batch reaches no further than the whole. Of several batches, nothing is known.
    layout = given[0]._layout
    result._layout = layout if all(other._layout == layout for other in given[1:]) else None
    return result


def _collate(batch: Sequence[Tensor], *, collate_fn_map: Any = None) -> TokenLabels:
    """Stack records; those with a lattice are longer, and the others are padded to them."""
    rows = [record.as_subclass(Tensor) for record in batch]
    longest = max(map(len, rows))
    if any(len(row) != longest for row in rows):
        rows = [torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows]
    return TokenLabels._batch(collate_tensor_fn(rows, collate_fn_map=collate_fn_map))


default_collate_fn_map[TokenLabels] = _collate
