"""The teacher: images in, what is stored of every patch out."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...dataset.format.score_map import MapLayout
from ...errors import TeacherError
from .dense import TOLERANCE, DenseForm, dense_form
from .encode import encode
from .model import PRETRAINED, build_model, class_names
from .passes import Pass
from .preprocess import Images, resolve_preprocessing
from .weights import weights_digest

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


class Teacher:
    """A timm classifier that labels every patch of an image.

    Args:
        model: timm's name of the model, or a timm model, which then belongs to the teacher: it is
            put into eval mode, in float32 and on the device, with the weights and classes it has.
        weights: "pretrained" (timm downloads them), "sample", or the path of a checkpoint.
        num_classes: Classes of the checkpoint, if not the model's default.
        input_size: Side of the images in pixels, or a list of sides and pairs (h, w), one for each
            pass; default: one pass at what timm tests it at. The logits of later passes are read
            onto the grid of the first and averaged. A model that takes one size only looks at
            overlapping tiles of that size in them.
        precision: "float32", or "bfloat16" or "float16" for autocast of the feature extractor.
            Classifier and softmax are computed in float32 always.
        channels_last: Whether images and weights are laid out channels last.
        compile: Whether the feature extractor is compiled.
        device: A torch device, or "auto": CUDA where there is one.
        interpolation: How images are resized (Pillow's name); default: the model's own.
        mean, std: Of the colour channels, as a fraction of white; default: the model's own.

    Attributes:
        input_sizes: (h, w) of the images of each pass.
        grid: (H, W) of the map.
        rule: How the map is derived, see `tokenlabel.annotate.teacher.dense`.
        exact: Whether the mean of the first pass's map equals the teacher's answer for the whole
            image.
        weights_digest: Hex SHA-256 of the weights.
        class_names: WordNet ids of the classes, or None if they are not known.

    Raises:
        TeacherError: The teacher cannot be built as asked, or has no faithful per-patch form.
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        weights: str = PRETRAINED,
        num_classes: int | None = None,
        input_size: int | Sequence[int | Sequence[int]] | None = None,
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
        self.precision, self.device = precision, _device(device)
        sizes = _sizes(input_size)

        self.model: Any
        if isinstance(model, str):
            self.name = model
            self.model = build_model(model, weights, num_classes, sizes[0] if sizes else None)
            self.class_names = class_names(self.model, weights)
        elif weights != PRETRAINED or num_classes not in (None, getattr(model, "num_classes", 0)):
            rule = "those of the model that is passed in"
            raise _wrong("weights and num_classes", rule, (weights, num_classes), "leave them out")
        else:
            cfg = getattr(model, "pretrained_cfg", {})
            self.name = cfg.get("architecture") or type(model).__name__
            self.model = model
            self.class_names = class_names(self.model, None)
        self.weights_digest = weights_digest(self.model)
        self._preprocessing = resolve_preprocessing(self.model, sizes, interpolation, mean, std)
        self.input_sizes, self.interpolation, self.mean, self.std = self._preprocessing

        self._memory = torch.channels_last if channels_last else torch.contiguous_format
        self.model.eval().requires_grad_(False)
        self.model.to(self.device, torch.float32, memory_format=self._memory)
        if self.device.type == "cuda":
            # The choice of algorithm, and with it the last bits, must not hang on timings.
            torch.backends.cudnn.benchmark = False
            torch.backends.cudnn.deterministic = True
        self._dense = dense_form(self.model, self.name, self.input_sizes[0])
        self.grid, self.rule, self.exact = self._dense.grid, self._dense.rule, self._dense.exact
        self.num_classes = int(self.model.num_classes)
        self._later = [self._later_pass(size) for size in self.input_sizes[1:]]
        self._extract: Callable[[Tensor], Tensor] = self.model.forward_features
        if compile:
            # A graph for each batch size. With dynamic shapes, the batches before would decide
            # which graph a batch meets, and with it the last bits.
            self._extract = torch.compile(self.model.forward_features, dynamic=False)
        _log.info("%s: %dx%d patches, %s", self.name, *self.grid, self.rule)

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
        return self._look(self._preprocessing.normalise(images, self.device))[0]

    @torch.inference_mode()
    def annotate(
        self, images: Sequence[Images], layout: MapLayout, floor: float = 0.0
    ) -> TeacherOutput:
        """Label every patch of a batch of whole images; does not wait for a GPU to finish.

        Args:
            images: as for `logits`.
            layout: what to store, of which views; its grid must be the teacher's.
            floor: classes less probable than this in a patch are dropped there.

        Raises:
            ValueError: `images` are not one for each pass, or have another dtype or shape.
        """
        pixels = self._preprocessing.normalise(images, self.device)
        logits, pooled = self._look(pixels)
        views = [encode(logits, layout, floor)]
        if "hflip" in layout.views:
            mirrored, _ = self._look([batch.flip(-1) for batch in pixels])
            views.append(encode(mirrored, layout, floor))
        planes = {name: torch.stack([view[name] for view in views], 1) for name in views[0]}
        return TeacherOutput(planes, pooled.topk(min(5, self.num_classes)).indices)

    @torch.inference_mode()
    def check(self, images: Sequence[Images]) -> float:
        """Return how far the mean of the first pass's map is from its pooled logits, at most.

        Args:
            images: as for `logits`.

        Raises:
            TeacherError: Logits are not finite, or the two differ although the form is exact.
        """
        features = self._features(self._preprocessing.normalise(images, self.device)[0])
        pooled = self._dense.pooled(features)
        error = float((self._dense(features).mean((1, 2)) - pooled).abs().max())
        scale = float(pooled.abs().max())
        if not math.isfinite(error):
            raise TeacherError(
                f"Logits must be finite; those of {self.name} in {self.precision} are not. "
                "Remedy: precision: bfloat16 or float32, and weights that are not damaged."
            )
        if self.exact and error > TOLERANCE * scale:
            raise TeacherError(
                f"The mean of the patch logits must equal the pooled logits within {TOLERANCE:g} "
                f"of the largest; for {self.name} they differ by {error:g} of {scale:g}. "
                "Remedy: another teacher; please report this one."
            )
        return error

    def preprocessing(self) -> dict[str, Any]:
        """Return how images are prepared, as JSON-able values; `tiles` of each pass."""
        tiles = [[1, 1], *(list(later.tiles) for later, _ in self._later)]
        return {**self._preprocessing.as_dict(), "tiles": tiles}

    def _later_pass(self, size: tuple[int, int]) -> tuple[Pass, DenseForm]:
        """A pass at another size; in tiles of the first one's size where the model takes no other.

        Which it does is found by asking it, as its form is: there is no list of models.
        """
        first = self.input_sizes[0]
        try:
            form = dense_form(self.model, self.name, size)
        except TeacherError as error:
            if any(side < least for side, least in zip(size, first, strict=True)):
                raise _wrong(
                    "input_size", f"at least {first[0]}x{first[1]} in later passes", size, "larger"
                ) from error
            return Pass(size, first, self.grid, self.grid, self.device), self._dense
        return Pass(size, size, form.grid, self.grid, self.device), form

    def _look(self, pixels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of the patches [B, H, W, C], and pooled logits of the first pass [B, C]."""
        features = self._features(pixels[0])
        logits, pooled = self._dense(features), self._dense.pooled(features)
        for batch, (later, form) in zip(pixels[1:], self._later, strict=True):
            logits = logits + later(batch, partial(self._patches, form))
        return logits / len(pixels), pooled

    def _patches(self, form: DenseForm, pixels: Tensor) -> Tensor:
        return form(self._features(pixels))

    def _features(self, pixels: Tensor) -> Tensor:
        pixels = pixels.contiguous(memory_format=self._memory)
        dtype = _PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            features = self._extract(pixels)
        return features.float()


def _sizes(
    input_size: int | Sequence[int | Sequence[int]] | None,
) -> tuple[tuple[int, int], ...] | None:
    """(h, w) of each pass."""
    if input_size is None:
        return None
    given = [input_size] if isinstance(input_size, int) else input_size
    sides = [(side, side) if isinstance(side, int) else tuple(side) for side in given]
    if not sides or any(len(pair) != 2 or min(pair) < 1 for pair in sides):
        rule = "a side in pixels, or a list of sides and pairs (h, w)"
        raise _wrong("input_size", rule, input_size, "leave it out")
    return tuple((pair[0], pair[1]) for pair in sides)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # torch asserts for a missing CUDA, raises for a bad name
        raise _wrong("device", f"one that is there ({error})", name, "device: auto") from error
    return device


def _wrong(option: str, rule: str, value: object, remedy: str) -> TeacherError:
    return TeacherError(f"{option} must be {rule}; got {value!r}. Remedy: {remedy}.")
