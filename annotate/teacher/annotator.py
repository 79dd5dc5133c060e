"""The annotator: images in, what is stored of every patch out, by a teacher of any family."""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ...dataset.format.score_map import MapLayout
from ...errors import TeacherError
from .encode import encode
from .passes import Pass
from .teacher import TOLERANCE, PatchHead, Teacher
from .weights import weights_digest

Images = npt.NDArray[np.uint8] | Tensor
_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

_log = logging.getLogger(__name__)


class TeacherOutput(NamedTuple):
    """What is stored of a batch of B images, and what a report counts.

    Attributes:
        planes: by name, as `MapLayout.planes` describes them, [B, *shape].
        top5: int64 [B, min(5, C)], best classes of the image as a whole, by the first pass.
    """

    planes: dict[str, Tensor]
    top5: Tensor


class Annotator:
    """Runs a teacher of any family: device and precision, passes and views, what is stored.

    >>> from tokenlabel.annotate.teacher.timm_teacher import TimmTeacher, build_model
    >>> annotator = Annotator(TimmTeacher(build_model("tf_efficientnet_lite0", weights="sample")))
    >>> annotator.logits([np.zeros((1, 224, 224, 3), np.uint8)]).shape  # B, H, W, C
    torch.Size([1, 7, 7, 1000])

    Args:
        teacher: Its network then belongs to the annotator: it is put into eval mode, in float32 and
            on the device.
        code: Bytes of the file that the teacher was loaded from: part of its digest.
        input_sizes: (h, w) of the images in pixels, one for each pass; default: one pass at the
            teacher's own. The logits of later passes are read onto the grid of the first and
            averaged. A teacher that takes one size only looks at overlapping tiles of that size in
            them.
        precision: "float32", or "bfloat16" or "float16" for autocast of the features; the rest is
            float32 always.
        channels_last: Whether images and weights are laid out channels last.
        compile: Whether what gives the features is compiled.
        device: A torch device, or "auto": CUDA where there is one.
        interpolation, mean, std: How images are resized and normalised; default: as in `Teacher`.

    Attributes:
        name, num_classes, class_names: As in `Teacher`.
        grid: (H, W) of the map.
        head: The classifier of the first pass.
        preprocessing: How images are prepared, as JSON-able values; `tiles` of each pass.
        origins: Where input_size, interpolation, mean and std come from, in words.
        weights_digest: Hex SHA-256 of the weights and of `code`.

    Raises:
        TeacherError: The teacher cannot be run as asked, or has no faithful per-patch form.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        code: bytes = b"",
        input_sizes: Sequence[tuple[int, int]] | None = None,
        precision: str = "float32",
        channels_last: bool = False,
        compile: bool = False,
        device: str = "auto",
        interpolation: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if precision not in _PRECISIONS:
            raise _wrong("precision", f"one of {', '.join(_PRECISIONS)}", precision, "float32")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.empty(0, device=device).device
        except Exception as error:  # torch asserts for a missing CUDA, raises for a bad name
            rule = f"one that is there ({error})"
            raise _wrong("device", rule, device, "device: auto") from error
        self.teacher, self.precision = teacher, precision
        self.name, self.num_classes = teacher.name, teacher.num_classes
        self.class_names = teacher.class_names
        self.weights_digest = weights_digest(teacher.network, code)
        self.input_sizes = tuple(input_sizes or [teacher.input_size])
        self.interpolation = interpolation or teacher.interpolation
        filters = [resampling.name.lower() for resampling in Image.Resampling]
        if self.interpolation not in filters:
            rule = f"one of {', '.join(filters)}"
            raise _wrong("interpolation", rule, self.interpolation, "name one of these")
        given_mean, given_std = mean, std
        mean = _three("mean", teacher.mean if mean is None else mean)
        std = _three("std", teacher.std if std is None else std)
        # On the device already: to send them with each batch would wait for a GPU.
        self._mean = torch.tensor(mean, device=self.device)[:, None, None]
        self._std = torch.tensor(std, device=self.device)[:, None, None]

        self._memory = torch.channels_last if channels_last else torch.contiguous_format
        network: Any = teacher.network.eval().requires_grad_(False)
        network.to(self.device, torch.float32, memory_format=self._memory)
        self.head = self._patch_head(self.input_sizes[0])
        self.grid = self.head.grid
        self._later = [self._later_pass(size) for size in self.input_sizes[1:]]
        self.preprocessing: dict[str, Any] = {
            "resize": "squash",
            "input_size": [list(size) for size in self.input_sizes],
            "interpolation": self.interpolation,
            "mean": mean,
            "std": std,
            "tiles": [[1, 1], *(list(later.tiles) for later in self._later)],
        }
        given: dict[str, object] = {"input_size": input_sizes, "interpolation": interpolation}
        given |= {"mean": given_mean, "std": given_std}
        origins = getattr(teacher, "origins", {})
        self.origins = {
            name: "options" if value else origins.get(name, self.name)
            for name, value in given.items()
        }
        self._extract = teacher.features
        if compile:
            # A graph for each batch size. With dynamic shapes, the batches before would decide
            # which graph a batch meets, and with it the last bits.
            self._extract = torch.compile(teacher.features, dynamic=False)
        _log.info("%s: %dx%d patches, %s", self.name, *self.grid, self.head.mode)

    @torch.inference_mode()
    def logits(self, images: Sequence[Images]) -> Tensor:
        """Logits of all classes of every patch, mean of the passes; does not wait for a GPU.

        Args:
            images: uint8 [B, h, w, 3] RGB for each of `input_sizes`, whole images squashed to it;
                read-only arrays are fine.

        Returns:
            float32 [B, H, W, C], on the device.

        Raises:
            ValueError: `images` are not one for each pass, or have another dtype or shape.
        """
        return self._look(self._normalised(images))[0]

    @torch.inference_mode()
    def annotate(
        self, images: Sequence[Images], layout: MapLayout, floor: float = 0.0
    ) -> TeacherOutput:
        """Label every patch of a batch of whole images; does not wait for a GPU to finish.

        Args:
            images: as for `logits`, which raises the same errors.
            layout: what to store, of which views; its grid must be the annotator's.
            floor: classes less probable than this in a patch are dropped there.
        """
        pixels = self._normalised(images)
        logits, pooled = self._look(pixels)
        views = [encode(logits, layout, floor)]
        if "hflip" in layout.views:
            mirrored, _ = self._look([batch.flip(-1) for batch in pixels])
            views.append(encode(mirrored, layout, floor))
        planes = {name: torch.stack([view[name] for view in views], 1) for name in views[0]}
        return TeacherOutput(planes, pooled.topk(min(5, self.num_classes)).indices)

    @torch.inference_mode()
    def top_classes(self, images: Sequence[Images]) -> Tensor:
        """The class that the first pass finds most probable for each image as a whole, int64 [B].

        Args:
            images: as for `logits`, which raises the same errors.
        """
        features = self._features(self._normalised(images)[0])
        return self.head.pooled_logits(features).argmax(1)

    @torch.inference_mode()
    def check(self, images: Sequence[Images]) -> float:
        """How far the mean of the first pass's map is from its pooled logits, at most.

        Raises:
            TeacherError: Logits are not finite, or the two differ although the head is exact.
        """
        features = self._features(self._normalised(images)[0])
        pooled = self.head.pooled_logits(features)
        error = float((self.head.patch_logits(features).mean((1, 2)) - pooled).abs().max())
        scale = float(pooled.abs().max())
        if not math.isfinite(error):
            raise TeacherError(
                f"Logits must be finite; those of {self.name} in {self.precision} are not. "
                "Remedy: precision: bfloat16 or float32, and weights that are not damaged."
            )
        if self.head.exact and error > TOLERANCE * scale:
            raise TeacherError(
                f"The mean of the patch logits must equal the pooled logits within {TOLERANCE:g} "
                f"of the largest; for {self.name} they differ by {error:g} of {scale:g}. "
                "Remedy: another teacher; please report this one."
            )
        return error

    def _patch_head(self, size: tuple[int, int]) -> PatchHead:
        """The teacher's classifier for one size; runs it once on an empty image of that size."""
        try:
            with torch.inference_mode():
                features = self.teacher.features(torch.zeros(1, 3, *size, device=self.device))
        except Exception as error:  # networks raise anything from AssertionError to RuntimeError
            raise TeacherError(
                f"A teacher must accept its input size; {self.name} does not take RGB images of "
                f"{size[0]}x{size[1]} pixels ({type(error).__name__}: {error}). "
                "Remedy: set input_size to one it takes, or leave it out; or correct the network."
            ) from error
        return self.teacher.patch_head(features, size)

    def _later_pass(self, size: tuple[int, int]) -> Pass:
        """A pass at another size, by tiles of the first one's if the teacher does not take it.

        Whether it does is found by asking it: there is no list of models.
        """
        tile, head = self.input_sizes[0], self.head
        try:
            head = self._patch_head(size)
            tile = size
        except TeacherError as error:
            if any(side < least for side, least in zip(size, tile, strict=True)):
                rule = f"at least {tile[0]}x{tile[1]} in later passes"
                raise _wrong("input_size", rule, size, "larger") from error

        def look(part: Tensor) -> Tensor:
            return head.patch_logits(self._features(part))

        return Pass(look, size, tile, head.grid, self.grid, self.device)

    def _normalised(self, images: Sequence[Images]) -> list[Tensor]:
        """float32 [B, 3, h, w] of each pass, on the device; does not wait for a GPU."""
        pixels = []
        if len(images) != len(self.input_sizes):
            raise ValueError(
                f"images must be one array for each pass, {len(self.input_sizes)} here; "
                f"got {len(images)}"
            )
        for batch, (h, w) in zip(images, self.input_sizes, strict=True):
            kind = getattr(batch, "dtype", type(batch).__name__)
            if not isinstance(batch, np.ndarray | Tensor) or kind not in (np.uint8, torch.uint8):
                raise ValueError(f"images must be a uint8 array or tensor; got {kind}")
            shape = tuple(batch.shape)
            if len(shape) != 4 or shape[1:] != (h, w, 3) or not shape[0]:
                raise ValueError(
                    f"images must be [B, h, w, 3] = [1 or more, {h}, {w}, 3]; got {shape}"
                )
            if isinstance(batch, np.ndarray):
                # A copy: torch warns of read-only arrays, and only pinned memory is sent while the
                # host goes on.
                pinned = self.device.type == "cuda"
                host = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
                host.numpy()[...] = batch
                batch = host
            sent = batch.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
            pixels.append(sent.div_(255).sub_(self._mean).div_(self._std))
        return pixels

    def _look(self, pixels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of the patches [B, H, W, C], and pooled logits of the first pass [B, C]."""
        features = self._features(pixels[0])
        logits, pooled = self.head.patch_logits(features), self.head.pooled_logits(features)
        for batch, later in zip(pixels[1:], self._later, strict=True):
            logits = logits + later(batch)
        return logits / len(pixels), pooled

    def _features(self, pixels: Tensor) -> Tensor:
        pixels = pixels.contiguous(memory_format=self._memory)
        dtype = _PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            features = self._extract(pixels)
        return features.float()


def _three(name: str, values: Sequence[float]) -> list[float]:
    """The mean or std of the colour channels."""
    try:
        channels = [float(value) for value in values]
    except (TypeError, ValueError):
        channels = []
    least, kind = (1e-9, "positive") if name == "std" else (0, "non-negative")
    if len(channels) != 3 or not all(least <= channel < math.inf for channel in channels):
        rule = f"three {kind} numbers, one for each colour channel"
        raise _wrong(name, rule, values, "leave it out for the model's own")
    return channels


def _wrong(option: str, rule: str, value: object, remedy: str) -> TeacherError:
    return TeacherError(f"{option} must be {rule}; got {value!r}. Remedy: {remedy}.")
